"""Block selection in plain PyTorch: the CPU backend and the yardstick of the kernels.

Nothing of size Nq x Nk is stored; the scores of groups are taken one block of queries at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_attn.reference.attention import compute_dtype
from entropy_attn.reference.dense import entropy, sum_blocks
from entropy_attn.reference.precision import without_autocast


@dataclass(frozen=True, eq=False)
class Geometry:
    """Lengths, blocks and masks: which block of queries sees which blocks of keys.

    Attributes:
        q_len, kv_len: tokens.
        block_size: (block_q, block_k).
        window: tokens, 0 for none.
        q_lens, kv_lens: (B,) int32 valid lengths, or None.
    """

    q_len: int
    kv_len: int
    block_size: tuple[int, int]
    is_causal: bool
    window: int
    q_lens: Tensor | None
    kv_lens: Tensor | None

    @property
    def q_tiles(self) -> int:
        return -(-self.q_len // self.block_size[0])

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_size[1])

    def ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Valid queries and keys, int64, (B, 1, 1), or (1, 1, 1) where every row has all."""
        return _ends(self.q_lens, self.q_len, device), _ends(self.kv_lens, self.kv_len, device)


def _ends(lens: Tensor | None, length: int, device: torch.device) -> Tensor:
    if lens is None:
        return torch.full((1, 1, 1), length, device=device)
    return lens.to(torch.int64).clamp(max=length).view(-1, 1, 1)


@without_autocast
def pool_tokens(tokens: Tensor, lens: Tensor | None, pool: int) -> Tensor:
    """(B, H, ceil(N / pool), D): means of groups of ``pool`` tokens, over the valid ones.

    A group without a valid token has mean 0. Half precision is averaged in fp32 and returned in
    the dtype of the tokens, as the kernels do.
    """
    length = tokens.shape[2]
    index = torch.arange(length, device=tokens.device)
    valid = (index < _ends(lens, length, tokens.device))[..., None]
    total = sum_blocks(tokens.to(compute_dtype(tokens.dtype)).masked_fill(~valid, 0.0), pool, 2)
    count = sum_blocks(valid.to(total.dtype), pool, 2)
    return (total / count.clamp(min=1.0)).to(tokens.dtype)


def envelope_tokens(
    tokens: Tensor, lens: Tensor | None, pool: int, spread: float
) -> tuple[Tensor, Tensor]:
    """Middle of the box around each group's valid tokens, and the share of its size that counts.

    Returns:
        (B, H, ceil(N / pool), D) in the dtype of the tokens, and (B, H, ceil(N / pool)): ``spread``
        times the length of the box's half diagonal. Both are 0 for a group without a valid token.
    """
    length = tokens.shape[2]
    index = torch.arange(length, device=tokens.device)
    valid = (index < _ends(lens, length, tokens.device))[..., None]
    padding = [0, 0, 0, -length % pool]
    wide = tokens.to(compute_dtype(tokens.dtype))
    low, high = (
        torch.nn.functional.pad(wide.masked_fill(~valid, bound), padding, value=bound)
        for bound in (math.inf, -math.inf)
    )
    low, high = low.unflatten(2, (-1, pool)).amin(3), high.unflatten(2, (-1, pool)).amax(3)
    empty = low > high
    centre = ((low + high) / 2).masked_fill(empty, 0.0)
    half = ((high - low) / 2).masked_fill(empty, 0.0)
    return centre.to(tokens.dtype), half.square().sum(-1).sqrt() * spread


@without_autocast
def antidiagonal_rows(tokens: Tensor, lens: Tensor | None, stride: int, reverse: bool) -> Tensor:
    """(B, H, ceil(N / stride), stride * D): the tokens of each group side by side, 0 for padding.

    With ``reverse`` the last token of a group comes first: the product of a reversed row and a
    plain one is the sum of a stride x stride tile's scores along its antidiagonal.
    """
    length = tokens.shape[2]
    index = torch.arange(length, device=tokens.device)
    valid = (index < _ends(lens, length, tokens.device))[..., None]
    padded = torch.nn.functional.pad(tokens.masked_fill(~valid, 0.0), [0, 0, 0, -length % stride])
    rows = padded.unflatten(2, (-1, stride))
    return (rows.flip(3) if reverse else rows).flatten(3)


@without_autocast
def score_tiles(
    query_groups: Tensor,
    key_groups: Tensor,
    spreads: Tensor | None,
    geometry: Geometry,
    group: int,
    take_maximum: bool,
    scale: float,
    first_tile: int,
    tiles: int,
) -> Tensor:
    """Predicted mass of ``tiles`` query tiles from ``first_tile`` on.

    Args:
        query_groups: (B, Hq, ceil(Nq / group), E); key_groups: (B, Hkv, ceil(Nk / group), E).
        spreads: (B, Hkv, ceil(Nk / group)), times the length of a query group's row a bonus of the
            score, or None.
        group: tokens a group.
        take_maximum: over the tile's query groups, instead of their mean.
        scale: factor of the products of rows.

    Returns:
        (B, Hq, tiles, Mk), fp32 or fp64; with ``take_maximum`` the rows do not sum to 1.
    """
    batch, heads = query_groups.shape[:2]
    dtype, device = compute_dtype(query_groups.dtype), query_groups.device
    block_q, block_k = geometry.block_size
    per_tile = block_q // group
    ratio = heads // key_groups.shape[1]
    key = key_groups.to(dtype).repeat_interleave(ratio, 1)
    bonus = None if spreads is None else spreads.to(dtype).repeat_interleave(ratio, 1)
    q_end, k_end = geometry.ends(device)
    offset = k_end - q_end

    first_key = group * torch.arange(key.shape[2], device=device)
    keys_in_group = (k_end - first_key).clamp(0, group)
    last_key = first_key + keys_in_group - 1
    weight = keys_in_group.clamp(min=1).to(dtype).log()[:, :, None]

    mass = torch.zeros(batch, heads, tiles, geometry.kv_blocks, dtype=dtype, device=device)
    for tile in range(tiles):
        start = (first_tile + tile) * per_tile
        rows = query_groups[:, :, start : start + per_tile].to(dtype)
        first_query = group * torch.arange(start, start + rows.shape[2], device=device)[:, None]
        last_query = torch.minimum(first_query + group, q_end) - 1
        visible = (first_query < q_end) & (keys_in_group > 0)
        if geometry.is_causal:
            visible = visible & (first_key <= last_query + offset)
        if geometry.window:
            visible = visible & (first_query + offset - last_key < geometry.window)
        visible = visible[:, None]
        seeing = visible.any(-1, keepdim=True)
        scores = rows @ key.transpose(-1, -2) * scale + weight
        if bonus is not None:
            scores += abs(scale) * rows.norm(dim=-1, keepdim=True) * bonus[:, :, None]
        scores = scores.masked_fill(~visible, -math.inf)
        p = torch.softmax(scores.masked_fill(~seeing, 0.0), -1).masked_fill(~seeing, 0.0)
        blocks = sum_blocks(p, block_k // group, -1)
        if take_maximum:
            mass[:, :, tile] = blocks.amax(2)
        else:
            mass[:, :, tile] = blocks.sum(2) / seeing.sum(2).clamp(min=1)
    return mass


def visible_blocks(
    geometry: Geometry, first_tile: int, tiles: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(low, high, diagonal low, diagonal high) of each tile, (B|1, 1, tiles) int64.

    A tile sees exactly the key blocks [low, high). The diagonal blocks [diagonal low, diagonal
    high] hold the positions of its queries; positions before the first key count as 0.
    """
    block_q, block_k = geometry.block_size
    q_end, k_end = geometry.ends(device)
    offset = k_end - q_end
    first_query = block_q * torch.arange(first_tile, first_tile + tiles, device=device)
    first = (first_query + offset).clamp(min=0)
    last = torch.minimum(first_query + block_q, q_end) - 1 + offset
    key_end = torch.minimum(k_end, last + 1) if geometry.is_causal else k_end + 0 * last
    low = torch.zeros_like(first)
    if geometry.window:
        low = (first - geometry.window + 1).clamp(min=0) // block_k
    high = (key_end.clamp(min=0) + block_k - 1) // block_k
    high = torch.where(first_query < q_end, torch.maximum(high, low), low)
    return low, high, first // block_k, last.clamp(min=0) // block_k


def keep_tiles(
    mass: Tensor,
    geometry: Geometry,
    sink: int,
    local: int,
    rule: str,
    amount: float,
    min_blocks: int,
    max_density: float,
    width: int,
    first_tile: int,
) -> tuple[Tensor, Tensor]:
    """Block lists of the tiles whose predicted masses are given.

    Args:
        mass: (B, H, tiles, Mk); its scale does not matter, invisible blocks are ignored. A tile
            with a NaN or infinite mass keeps as many blocks as the budget can allow.
        sink: the first blocks of keys, always kept where visible.
        local: the diagonal blocks and ``local - 1`` blocks before them (and after, if not
            causal), always kept where visible; 0 for none.
        rule, amount: how many of a tile's V visible blocks the budget asks for, heaviest first:
            "count" amount; "fraction" ceil(amount * V); "mass" the fewest that hold that share of
            the mass; "perplexity" ceil(amount * exp(H)), H the entropy of the mass. Where all
            mass is 0, one block holds it and H is 0.
        min_blocks, max_density: bounds of that number, blocks and share of V.
        width: entries a list.
        first_tile: which query tile ``mass`` starts with.

    Returns:
        counts (B, H, tiles) int32, indices (B, H, tiles, width) int32, ascending, 0 past the count.
    """
    kv_blocks = mass.shape[3]
    low, high, diagonal_low, diagonal_high = visible_blocks(
        geometry, first_tile, mass.shape[2], mass.device
    )
    column = torch.arange(kv_blocks, device=mass.device)
    visible = (column >= low[..., None]) & (column < high[..., None])
    mass = mass.nan_to_num(math.inf, math.inf, 0.0).clamp(min=0.0).masked_fill(~visible, -1.0)
    ranked, order = torch.sort(mass, dim=-1, descending=True, stable=True)
    ranked = ranked.clamp(min=0.0)
    seen = (high - low).to(mass.dtype).expand(mass.shape[:3])
    total = ranked.sum(-1)
    if rule == "count":
        asked = torch.full_like(total, amount)
    elif rule == "fraction":
        asked = (seen * amount).ceil()
    elif rule == "mass":
        reached = ranked.cumsum(-1) >= (total * amount)[..., None]
        asked = kv_blocks - reached.sum(-1).to(mass.dtype) + 1
    else:
        p = ranked / total.masked_fill(total == 0, 1.0)[..., None]
        asked = (entropy(p).exp() * amount).ceil()
    if rule in ("mass", "perplexity"):
        asked = torch.where(total < math.inf, asked, seen)
    asked = torch.minimum(asked, (seen * max_density).floor()).clamp(min=min_blocks)
    asked = torch.minimum(asked, seen)

    chosen = column < asked[..., None]
    keep = torch.zeros_like(chosen).scatter_(-1, order, chosen)
    near = (column > diagonal_low[..., None] - local) & (
        column <= diagonal_high[..., None] + (0 if geometry.is_causal else local - 1)
    )
    always = (column < sink) | near if local > 0 else (column < sink).expand_as(visible)
    keep = (keep | always) & visible
    counts = keep.sum(-1, dtype=torch.int32)
    indices = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)[..., :width]
    unused = torch.arange(width, device=mass.device) >= counts[..., None]
    return counts, indices.masked_fill(unused, 0).to(torch.int32)
