"""The measure of many calls at once: how spread out their attention is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from entropy_attn.api import attention_with_entropy, tile_entropy
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.statistics import visible_blocks
from entropy_attn.masks import BlockMask
from entropy_attn.regularizer.layer import Seen
from entropy_attn.regularizer.sampling import Sample

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
    def tells_density(self) -> bool:
        return self.measure in ("density", "tile")


@dataclass(frozen=True)
class Sums:
    """Over what some calls attended to; of samples, scaled up. Numbers where the host knows them,
    else tensors without dimensions.

    Attributes:
        measure: of the measure, with a gradient, without bias.
        count: of what it is summed over; not of the sample's blocks, but of all of the rows.
        kept: blocks that the sample's tiles effectively need, exp(tile entropy); 0 if unknown.
        visible: blocks with a visible pair that these tiles see. The ratio of kept and visible
            varies less than that of measure and count, but is only nearly without bias.
        tiles: those with a visible pair.
    """

    measure: Tensor
    count: Tensor | float
    kept: Tensor | float
    visible: Tensor | float
    tiles: Tensor | float


def measure_calls(seen: Sequence[Seen], settings: Settings) -> list[Sums]:
    """The sums of all calls, a few for each shape that they have."""
    alike = defaultdict(list)
    for each in seen:
        alike[_shape(each)].append(each)
    return [_measure(chunk, settings) for calls in alike.values() for chunk in _chunks(calls)]


def _shape(seen: Seen) -> Hashable:
    """What two calls must have in common."""
    call = seen.call
    kinds = (call.query.shape, call.key.shape, call.query.dtype, call.query.device)
    lens = (call.kv_lens is None, call.q_lens is None)
    return (*kinds, *lens, call.is_causal, call.scale, call.window, seen.sample)


def _chunks(calls: list[Seen]) -> Iterator[list[Seen]]:
    """Up to CHUNK_BYTES of queries at a time."""
    query = calls[0].call.query
    size = max(1, CHUNK_BYTES // max(1, query.numel() * query.element_size()))
    return (calls[i : i + size] for i in range(0, len(calls), size))


def _measure(chunk: list[Seen], settings: Settings) -> Sums:
    call, sample = _joined([seen.call for seen in chunk]), chunk[0].sample
    chosen = sample.chosen_tiles([seen.draw for seen in chunk])
    options = {
        "block_mask": None if chosen is None else _rows_of_mask(chosen, call, settings),
        "block_size": settings.block_size,
        "backend": settings.backend,
        **call.geometry,
    }
    if settings.tells_density:
        tile = tile_entropy(call.query, call.key, **options)
        return _sum_of_tiles(tile, call, chosen, sample, settings)
    _, entropy = attention_with_entropy(
        call.query,
        call.key,
        call.value.detach(),  # only the entropies are used
        kinds=(settings.measure,),
        **options,
    )
    rows = entropy.row if settings.measure == "row" else entropy.block
    return _sum_of_rows(rows, call, chosen, sample, settings)


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
    device = call.query.device
    blocks = -(-call.kv_len // settings.block_size[1])
    counts = torch.where(chosen, blocks, 0).to(torch.int32)[:, None]
    return BlockMask(
        counts.to(device, non_blocking=True),
        _block_numbers(blocks, device).expand(*counts.shape, blocks),
        settings.block_size,
        call.q_len,
        call.kv_len,
        validate=False,
    )


@lru_cache(maxsize=64)
def _block_numbers(blocks: int, device: torch.device) -> Tensor:
    return torch.arange(blocks, dtype=torch.int32, device=device)


def _sum_of_tiles(
    tile: Tensor, call: AttentionCall, chosen: Tensor | None, sample: Sample, settings: Settings
) -> Sums:
    """From the tile entropies (B, H, Mq), 0 where a tile sees nothing or is not chosen."""
    batch, heads = call.query.shape[:2]
    visible = _visible_blocks(call, settings.block_size)  # (B or 1, Mq)
    sees = visible > 0
    # For all blocks of the sample's rows, and for the blocks of the sample.
    of_rows = heads * (batch // visible.shape[0]) * (sample.batch / sample.rows)
    if chosen is None:
        blocks, tiles = _number(visible.sum() * of_rows), _number(sees.sum() * of_rows)
    else:
        chosen = chosen.to(visible.device, non_blocking=True)
        of_sample = heads * sample.scale
        blocks = _number((visible * chosen).sum() * of_sample)
        tiles = _number((sees & chosen).sum() * of_sample)
    # exp(0) of the tiles that do not count is taken off again.
    effective = tile.exp().sum() * sample.scale + (tiles - tile.numel() * sample.scale)
    if settings.measure == "density":
        measure, count = effective, blocks if chosen is None else _number(visible.sum() * of_rows)
    else:
        measure = tile.sum() * sample.scale
        count = tiles if chosen is None else _number(sees.sum() * of_rows)
    return Sums(measure, count, effective.detach(), blocks, tiles)


def _sum_of_rows(
    rows: Tensor, call: AttentionCall, chosen: Tensor | None, sample: Sample, settings: Settings
) -> Sums:
    """From row or block entropies (B, H, Nq)."""
    batch, heads = call.query.shape[:2]
    # A query that sees no key may stand in a tile from which others see one.
    where = valid = _visible_blocks(call, (1, max(1, call.kv_len))) > 0  # (B or 1, Nq)
    if chosen is not None:
        chosen = chosen.to(where.device, non_blocking=True)
        taken = chosen.repeat_interleave(settings.block_size[0], dim=1)
        where = where & taken[:, : call.q_len]
    where = where.to(rows.device, non_blocking=True)
    measure = torch.where(where[:, None], rows, 0.0).sum() * sample.scale
    of_rows = heads * (batch // valid.shape[0]) * (sample.batch / sample.rows)
    return Sums(measure, _number(valid.sum() * of_rows), 0.0, 0.0, 0.0)


def _number(x: Tensor) -> Tensor | float:
    """A number, if reading it does not wait for a device."""
    return float(x) if x.device.type == "cpu" else x


def _visible_blocks(call: AttentionCall, block_size: tuple[int, int]) -> Tensor:
    """Blocks of keys with a visible pair: (B, Mq) with lengths, else (1, Mq) on the CPU."""
    if call.kv_lens is None and call.q_lens is None:
        sizes = (call.q_len, call.kv_len, block_size, call.is_causal, call.window)
        return _visible_without_lens(*sizes)
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
def _visible_without_lens(q_len, kv_len, block_size, is_causal, window) -> Tensor:
    return visible_blocks(
        q_len, kv_len, block_size, is_causal=is_causal, window=window, device=torch.device("cpu")
    )
