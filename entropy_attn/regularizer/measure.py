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
from entropy_attn.regularizer.sampling import sample_size, sampled_tiles

MEASURES = ("density", "tile", "block", "row")
# Queries that are put together, which copies them: enough to keep a GPU busy, little to hold.
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Settings:
    """What is measured and how.

    Attributes:
        measure: one of MEASURES.
        block_size: (block_q, block_k) in tokens.
        tile_fraction: of the blocks of queries that are measured.
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
        measure: of the measure, with a gradient.
        count: of what it is summed over.
        kept: blocks that the tiles effectively need, exp(tile entropy); 0 if it is not known.
        visible: blocks with a visible pair.
        tiles: blocks of queries with one.
    """

    measure: Tensor
    count: Tensor
    kept: Tensor
    visible: Tensor
    tiles: Tensor


def measure_calls(seen: Sequence[Seen], starts: Tensor, settings: Settings) -> list[Sums]:
    """The sums of all calls, a few for each shape that they have.

    Args:
        starts: (layers,) random starts of the samples, see `sampled_tiles`.
    """
    return [_measure(chunk, starts, settings) for chunk in _chunks(seen)]


def _chunks(seen: Sequence[Seen]) -> Iterator[list[Seen]]:
    """Calls that differ in nothing but their tensors, up to CHUNK_BYTES of queries at a time."""
    for _, alike in groupby(sorted(seen, key=_shape), key=_shape):
        calls = list(alike)
        query = calls[0].call.query
        size = max(1, CHUNK_BYTES // max(1, query.numel() * query.element_size()))
        yield from (calls[i : i + size] for i in range(0, len(calls), size))


def _shape(seen: Seen) -> tuple[str, ...]:
    """What two calls must have in common, as text, which can be sorted."""
    call = seen.call
    kinds = (call.query.shape, call.key.shape, call.query.dtype, call.query.device)
    lens = (call.kv_lens is None, call.q_lens is None)
    return tuple(map(str, (*kinds, *lens, call.is_causal, call.scale, call.window)))


def _measure(chunk: list[Seen], starts: Tensor, settings: Settings) -> Sums:
    call, batch = _joined([seen.call for seen in chunk]), chunk[0].call.query.shape[0]
    chosen = None
    if settings.tile_fraction < 1.0:
        tiles = -(-call.q_len // settings.block_size[0])
        size = sample_size(tiles, settings.tile_fraction)
        # Stacked, since an index made of a list would wait for the device.
        own = torch.stack([starts[seen.layer] for seen in chunk]).to(call.query.device)
        chosen = sampled_tiles(tiles, size, own.repeat_interleave(batch))
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
    return _sum_up(call, entropy, chosen, settings)


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
    call: AttentionCall, entropy: AttentionEntropy, chosen: Tensor | None, settings: Settings
) -> Sums:
    batch, heads = call.query.shape[:2]
    visible = _visible_blocks(call, settings.block_size)  # (B or 1, Mq)
    repeats = heads * (batch // visible.shape[0])
    seen = visible > 0
    tiles = visible.shape[1]
    scale = 1.0 if chosen is None else tiles / sample_size(tiles, settings.tile_fraction)

    def total(x: Tensor, where: Tensor) -> Tensor:
        """Of (B, H, M), where (B or 1, M)."""
        return torch.where(where[:, None], x, 0.0).sum() * scale

    sees_and_chosen = seen if chosen is None else seen & chosen
    blocks, seen_tiles = visible.sum() * repeats, seen.sum() * repeats
    effective = torch.zeros((), device=call.query.device)
    if entropy.tile is not None:
        effective = total(entropy.tile.exp(), sees_and_chosen)
    if settings.measure == "density":
        measure, count = effective, blocks
    elif settings.measure == "tile":
        measure, count = total(entropy.tile, sees_and_chosen), seen_tiles
    else:
        rows = entropy.row if settings.measure == "row" else entropy.block
        # A query that sees no key may stand in a tile from which others see one.
        valid = _visible_blocks(call, (1, max(1, call.kv_len))) > 0  # (B or 1, Nq)
        where = valid
        if chosen is not None:
            block_q = settings.block_size[0]
            where = valid & chosen.repeat_interleave(block_q, dim=1)[:, : call.q_len]
        measure, count = total(rows, where), valid.sum() * heads * (batch // valid.shape[0])
    return Sums(measure, count, effective.detach(), blocks, seen_tiles)


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
