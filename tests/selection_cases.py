"""Block selection by its definition, with everything materialised: for small inputs only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_attn.reference.dense import visible_pairs
from entropy_attn.selection import Antidiagonal, Envelope, Pooled


def group_tokens(tokens: Tensor, lens: Tensor | None, group: int) -> list[list[list[Tensor]]]:
    """[batch][group] lists of the valid tokens' (H, D) rows."""
    batch, _, length, _ = tokens.shape
    ends = [length] * batch if lens is None else [min(n, length) for n in lens.tolist()]
    return [
        [
            [tokens[b, :, i] for i in range(start, min(start + group, ends[b]))]
            for start in range(0, length, group)
        ]
        for b in range(batch)
    ]


def group_scores(scorer, queries: list[Tensor], keys: list[Tensor], scale: float) -> Tensor:
    """(H,) score of one group of queries and one group of keys."""
    if isinstance(scorer, Envelope):
        query = torch.stack(queries).mean(0)
        low, high = torch.stack(keys).amin(0), torch.stack(keys).amax(0)
        bound = query.norm(dim=-1) * ((high - low) / 2).norm(dim=-1)
        return scale * (query * (low + high) / 2).sum(-1) + abs(scale) * scorer.spread * bound
    return scale * products(scorer, queries, keys)


def products(scorer, queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """(H,) product of one group of queries and one group of keys, where the score is that alone."""
    if isinstance(scorer, Pooled):
        return (torch.stack(queries).mean(0) * torch.stack(keys).mean(0)).sum(-1)
    total = torch.zeros(queries[0].shape[0], dtype=queries[0].dtype)
    for t in range(scorer.stride):
        if scorer.stride - 1 - t < len(queries) and t < len(keys):
            total += (queries[scorer.stride - 1 - t] * keys[t]).sum(-1)
    return total / scorer.stride


def predicted_mass(scorer: Pooled | Antidiagonal, query, key, block_size, scale, **masks) -> Tensor:
    """(B, Hq, Mq, Mk) by the words of `entropy_attn.selection.scorers`."""
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    group = scorer.group
    visible = visible_pairs(batch, q_len, kv_len, **masks)[:, 0]
    queries = group_tokens(query, masks.get("q_lens"), group)
    keys = group_tokens(key, masks.get("kv_lens"), group)
    tiles, blocks = -(-q_len // block_size[0]), -(-kv_len // block_size[1])
    mass = torch.zeros(batch, heads, tiles, blocks, dtype=query.dtype)
    rows_seen = torch.zeros(batch, heads, tiles, 1, dtype=query.dtype)
    for b in range(batch):
        for g, some_queries in enumerate(queries[b]):
            weights = torch.zeros(heads, blocks, dtype=query.dtype)
            for c, some_keys in enumerate(keys[b]):
                pairs = visible[b, g * group : (g + 1) * group, c * group : (c + 1) * group]
                if pairs.any():
                    score = group_scores(scorer, some_queries, some_keys, scale)
                    weights[:, c * group // block_size[1]] += len(some_keys) * score.exp()
            tile = g * group // block_size[0]
            if not weights.any():
                continue
            p = weights / weights.sum(-1, keepdim=True)
            if getattr(scorer, "reduce", "mean") == "max":
                mass[b, :, tile] = torch.maximum(mass[b, :, tile], p)
            else:
                mass[b, :, tile] += p
                rows_seen[b, :, tile] += 1
    if getattr(scorer, "reduce", "mean") == "max":
        rows_seen = mass.sum(-1, keepdim=True)
    return mass / rows_seen.masked_fill(rows_seen == 0, 1)


def wanted(budget, masses: list[float]) -> int:
    """How many of a tile's visible blocks a budget asks for; masses are sorted, heaviest first."""
    total = sum(masses)
    rule, amount = budget.rule
    if rule == "count":
        asked = int(amount)
    elif rule == "fraction":
        asked = math.ceil(len(masses) * amount)
    elif rule == "mass":
        held = [sum(masses[:n]) for n in range(1, len(masses) + 1)]
        asked = 1 + sum(h < amount * total for h in held)
    else:
        entropy = -sum(m / total * math.log(m / total) for m in masses if m > 0)
        asked = math.ceil(amount * math.exp(entropy))
    asked = min(asked, math.floor(len(masses) * budget.density_bound))
    return min(max(asked, budget.min_blocks), len(masses))


def kept_blocks(
    mass, budget, block_size, q_len, kv_len, sink, local, is_causal=False, window=None,
    kv_lens=None, q_lens=None,
) -> Tensor:  # fmt: skip
    """(B, H, Mq, Mk) bool by the words of `select_blocks`."""
    batch, heads, tiles, blocks = mass.shape
    visible = visible_pairs(
        batch, q_len, kv_len, is_causal=is_causal, window=window, kv_lens=kv_lens, q_lens=q_lens
    )[:, 0]
    keep = torch.zeros(mass.shape, dtype=torch.bool)
    for b in range(batch):
        valid_q = q_len if q_lens is None else int(q_lens[b])
        offset = (kv_len if kv_lens is None else int(kv_lens[b])) - valid_q
        for a in range(tiles):
            rows = range(a * block_size[0], min((a + 1) * block_size[0], valid_q))
            seen = [
                c for c in range(blocks)
                if visible[b, rows.start : rows.stop, c * block_size[1] :][:, : block_size[1]].any()
            ]  # fmt: skip
            diagonal = {max(i + offset, 0) // block_size[1] for i in rows}
            near = {d - n for d in diagonal for n in range(local)}
            if not is_causal:
                near |= {d + n for d in diagonal for n in range(local)}
            for h in range(heads):
                order = sorted(seen, key=lambda c: (-mass[b, h, a, c].item(), c))
                number = wanted(budget, [mass[b, h, a, c].item() for c in order]) if seen else 0
                for c in seen:
                    keep[b, h, a, c] = c in order[:number] or c < sink or c in near
    return keep


def assert_lists_are_well_formed(mask) -> None:
    """Ascending, in range, and no count beyond the width."""
    counts, indices = mask.kv_num_blocks, mask.kv_indices
    blocks = -(-mask.kv_len // mask.block_size[1])
    assert counts.dtype == indices.dtype == torch.int32
    assert ((counts >= 0) & (counts <= indices.shape[-1])).all()
    assert ((indices >= 0) & (indices < max(blocks, 1))).all()
    within = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    rises = indices[..., 1:] > indices[..., :-1]
    assert (rises | ~within[..., 1:]).all()
