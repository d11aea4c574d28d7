"""The measure of many calls at once: how spread out their attention is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from entropy_attn.api import attention_with_entropy
from entropy_attn.entropy import AttentionEntropy
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.statistics import visible_blocks
from entropy_attn.masks import BlockMask
from entropy_attn.regularizer.layer import Seen
from entropy_attn.regularizer.sampling import Draws, Sample

MEASURES = ("density", "tile", "block", "row")
# Queries that are put together, which copies them: enough to keep a GPU busy, little to hold.
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Settings:
    """What is measured and how.

    Attributes:
        measure: one of MEASURES.
        block_size: (block_q, block_k) in tokens.
        tile_fraction: of all blocks of queries, which is measured.
        backend: of the measurement.
    """

    measure: str
    block_size: tuple[int, int]
    tile_fraction: float
    backend: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """The entropies that are needed."""
        return ("tile",) if self.measure in ("density", "tile") else (self.measure,)


@dataclass(frozen=True)
class Sums:
    """Over what some calls attended to, tensors without dimensions; of samples, scaled up.

    Attributes:
        measure: of the measure, with a gradient, without bias.
        count: of what it is summed over; not of the sample's blocks, but of all of the rows.
        kept: blocks that the sample's tiles effectively need, exp(tile entropy); 0 if unknown.
        visible: blocks with a visible pair that these tiles see. The ratio of kept and visible
            varies less than that of measure and count, but is only nearly without bias.
        tiles: those with a visible pair.
    """

    measure: Tensor
    count: Tensor
    kept: Tensor
    visible: Tensor
    tiles: Tensor


def measure_calls(seen: Sequence[Seen], draws: Draws, settings: Settings) -> list[Sums]:
    """The sums of all calls, a few for each shape that they have."""
    found = []
    for _, alike in groupby(sorted(seen, key=_shape), key=_shape):
        calls = list(alike)
        batch, _, q_len, _ = calls[0].call.query.shape
        sample = Sample.of(settings.tile_fraction, batch, -(-q_len // settings.block_size[0]))
        for chunk in _chunks(calls, sample):
            found.append(_measure(chunk, sample, draws, settings))
    return found


def _shape(seen: Seen) -> tuple[str, ...]:
    """What two calls must have in common, as text, which can be sorted."""
    call = seen.call
    kinds = (call.query.shape, call.key.shape, call.query.dtype, call.query.device)
    lens = (call.kv_lens is None, call.q_lens is None)
    return tuple(map(str, (*kinds, *lens, call.is_causal, call.scale, call.window)))


def _chunks(calls: list[Seen], sample: Sample) -> Iterator[list[Seen]]:
    """Up to CHUNK_BYTES of sampled queries at a time."""
    query = calls[0].call.query
    row_bytes = query.numel() // max(1, sample.batch) * query.element_size()
    size = max(1, CHUNK_BYTES // max(1, row_bytes * sample.rows))
    return (calls[i : i + size] for i in range(0, len(calls), size))


def _measure(chunk: list[Seen], sample: Sample, draws: Draws, settings: Settings) -> Sums:
    call = _joined([
        _rows(seen.call, sample.first_row(draws.host[seen.layer]), sample.rows) for seen in chunk
    ])  # fmt: skip
    # Stacked, since an index made of a list would wait for the device.
    own = torch.stack([draws.device[seen.layer] for seen in chunk])
    chosen = sample.chosen_tiles(own.to(call.query.device))
    _, entropy = attention_with_entropy(
        call.query,
        call.key,
        call.value.detach(),  # only the entropies are used
        block_mask=None if chosen is None else _rows_of_mask(chosen, call, settings),
        block_size=settings.block_size,
        kinds=settings.kinds,
        backend=settings.backend,
        **call.geometry,
    )
    return _sum_up(call, entropy, chosen, sample, settings)


def _rows(call: AttentionCall, first: int, count: int) -> AttentionCall:
    """A run of the call's batch rows."""
    if count == call.query.shape[0]:
        return call
    key = call.key.narrow(0, first, count)
    return replace(
        call,
        query=call.query.narrow(0, first, count),
        key=key,
        value=key,
        kv_lens=None if call.kv_lens is None else call.kv_lens.narrow(0, first, count),
        q_lens=None if call.q_lens is None else call.q_lens.narrow(0, first, count),
    )


def _joined(calls: list[AttentionCall]) -> AttentionCall:
    """The calls as one, of as many batch rows as all of them."""
    if len(calls) == 1:
        return calls[0]
    query, key = (torch.cat([getattr(c, name) for c in calls]) for name in ("query", "key"))
    kv_lens, q_lens = (
        None if getattr(calls[0], name) is None else torch.cat([getattr(c, name) for c in calls])
        for name in ("kv_lens", "q_lens")
    )
    return replace(calls[0], query=query, key=key, value=key, kv_lens=kv_lens, q_lens=q_lens)


def _rows_of_mask(chosen: Tensor, call: AttentionCall, settings: Settings) -> BlockMask:
    """Every block of keys for the chosen (B, Mq) blocks of queries, none for the others."""
    blocks = -(-call.kv_len // settings.block_size[1])
    counts = torch.where(chosen, blocks, 0).to(torch.int32)[:, None]
    indices = torch.arange(blocks, dtype=torch.int32, device=chosen.device)
    return BlockMask(
        counts,
        indices.expand(*counts.shape, blocks),
        settings.block_size,
        call.q_len,
        call.kv_len,
        validate=False,
    )


def _sum_up(
    call: AttentionCall,
    entropy: AttentionEntropy,
    chosen: Tensor | None,
    sample: Sample,
    settings: Settings,
) -> Sums:
    batch, heads = call.query.shape[:2]
    visible = _visible_blocks(call, settings.block_size)  # (B or 1, Mq)
    seen = visible > 0
    row_scale = sample.batch / sample.rows  # of what is known of every block of the rows
    repeats = heads * (batch // visible.shape[0]) * row_scale
    sees_and_chosen = seen if chosen is None else seen & chosen

    def total(x: Tensor, where: Tensor) -> Tensor:
        """Of (B, H, M), where (B or 1, M)."""
        return torch.where(where[:, None], x, 0.0).sum() * sample.scale

    per_head = torch.ones(1, heads, 1, device=call.query.device).expand(batch, -1, -1)
    effective = torch.zeros((), device=call.query.device)
    if entropy.tile is not None:
        effective = total(entropy.tile.exp(), sees_and_chosen)
    if settings.measure == "density":
        measure, count = effective, visible.sum() * repeats
    elif settings.measure == "tile":
        measure, count = total(entropy.tile, sees_and_chosen), seen.sum() * repeats
    else:
        rows = entropy.row if settings.measure == "row" else entropy.block
        # A query that sees no key may stand in a tile from which others see one.
        valid = _visible_blocks(call, (1, max(1, call.kv_len))) > 0  # (B or 1, Nq)
        where = valid
        if chosen is not None:
            block_q = settings.block_size[0]
            where = valid & chosen.repeat_interleave(block_q, dim=1)[:, : call.q_len]
        measure = total(rows, where)
        count = valid.sum() * heads * (batch // valid.shape[0]) * row_scale
    blocks = total(visible[:, None] * per_head, sees_and_chosen)
    return Sums(measure, count, effective.detach(), blocks, total(per_head, sees_and_chosen))


def _visible_blocks(call: AttentionCall, block_size: tuple[int, int]) -> Tensor:
    """(B, Mq) with lengths, else (1, Mq): blocks of keys with a visible pair."""
    if call.kv_lens is None and call.q_lens is None:
        sizes = (call.q_len, call.kv_len, block_size, call.is_causal, call.window)
        return _visible_without_lens(*sizes, call.query.device)
    return visible_blocks(
        call.q_len,
        call.kv_len,
        block_size,
        is_causal=call.is_causal,
        window=call.window,
        kv_lens=call.kv_lens,
        q_lens=call.q_lens,
        batch=call.query.shape[0],
    )


@lru_cache(maxsize=64)
def _visible_without_lens(q_len, kv_len, block_size, is_causal, window, device) -> Tensor:
    return visible_blocks(
        q_len, kv_len, block_size, is_causal=is_causal, window=window, device=device
    )
