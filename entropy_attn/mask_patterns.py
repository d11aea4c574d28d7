"""Where blocks stand on the token axes, and the lists of fixed patterns.

Queries are aligned to the last key: query ``i`` stands at key position ``i + kv_len - q_len``.
All lists are built on the device from numbers that the host knows, and cost no more than the
blocks they keep. They have batch and head dimensions of 1: the pattern is every head's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_attn.block_lists import Lists


@dataclass(frozen=True)
class BlockGrid:
    """Blocks of (block_q, block_k) tokens over q_len queries and kv_len keys."""

    q_len: int
    kv_len: int
    block_size: tuple[int, int]

    @property
    def num_rows(self) -> int:
        """Mq, blocks of queries."""
        return -(-self.q_len // self.block_size[0])

    @property
    def num_columns(self) -> int:
        """Mk, blocks of keys."""
        return -(-self.kv_len // self.block_size[1])

    def positions(self, device=None) -> tuple[Tensor, Tensor]:
        """(Mq,) int64 twice: key positions at which a block's first and last query stand."""
        first = torch.arange(self.num_rows, device=device) * self.block_size[0]
        last = (first + self.block_size[0]).clamp(max=self.q_len) - 1
        offset = self.kv_len - self.q_len
        return first + offset, last + offset

    def keys(self, device=None) -> tuple[Tensor, Tensor]:
        """(Mk,) int64 twice: the first and the last key of each block."""
        first = torch.arange(self.num_columns, device=device) * self.block_size[1]
        return first, (first + self.block_size[1]).clamp(max=self.kv_len) - 1

    def causal_counts(self, device=None) -> Tensor:
        """(Mq,) int32: how many blocks of keys, from the first on, a causal row sees any of."""
        _, last = self.positions(device)
        return (last // self.block_size[1] + 1).clamp(min=0).to(torch.int32)


def full_lists(grid: BlockGrid, device=None) -> Lists:
    """Every block. The rows of the indices are one row in memory."""
    counts = torch.full((1, 1, grid.num_rows), grid.num_columns, dtype=torch.int32, device=device)
    return counts, _shared_row(grid, device)


def causal_lists(grid: BlockGrid, device=None) -> Lists:
    """Every block with a visible pair. The rows of the indices are one row in memory."""
    return grid.causal_counts(device)[None, None], _shared_row(grid, device)


def _shared_row(grid: BlockGrid, device) -> Tensor:
    row = torch.arange(grid.num_columns, dtype=torch.int32, device=device)
    return row.expand(1, 1, grid.num_rows, -1)


def sliding_window_lists(
    grid: BlockGrid, window: int, sink: int, is_causal: bool, device=None
) -> Lists:
    """Blocks within ``window`` tokens of any of the row's queries, and the first ``sink`` tokens'.

    Causal: the ``window`` keys that end at the query. Otherwise: fewer than ``window`` tokens
    away on either side.
    """
    block_q, block_k = grid.block_size
    first, last = grid.positions(device)
    high = (last if is_causal else last + window - 1).clamp(max=grid.kv_len - 1) // block_k
    low = (first - window + 1).clamp(min=0) // block_k
    # Sinks come first; from where they reach the window on, the window lists them.
    sink_blocks = min(-(-sink // block_k), grid.num_columns)
    if not is_causal:
        high = torch.where(low <= sink_blocks, high.clamp(min=sink_blocks - 1), high)
    sinks = low.clamp(max=sink_blocks)
    counts = sinks + (high - low + 1).clamp(min=0)
    # A run of n tokens, wherever it begins, meets at most this many blocks.
    span = block_q + (window if is_causal else 2 * window - 1) - 1
    width = min((span + block_k - 2) // block_k + 1 + sink_blocks, grid.num_columns)
    slot = torch.arange(width, device=device)
    skipped = (low - sinks)[:, None]
    indices = torch.where(slot < sinks[:, None], slot, slot + skipped)
    indices = indices.clamp(max=max(grid.num_columns - 1, 0))
    return counts.to(torch.int32)[None, None], indices.to(torch.int32)[None, None]


def random_lists(
    grid: BlockGrid,
    batch: int,
    heads: int,
    density: float,
    irregular: bool,
    is_causal: bool,
    seed: int,
    device=None,
) -> Lists:
    """Seeded random blocks, drawn anew for each batch and head, the diagonal block always kept.

    A row that sees ``v`` blocks lists about ``density · v`` of them: exactly so, or, if
    irregular, a number drawn uniformly around it (its mean stays). The ``v`` blocks are cut into
    as many runs of nearly equal length as the row lists blocks, and one block is drawn from each
    run: ascending and unique without a sort, and at no cost for what is not listed.
    """
    generator = torch.Generator(device=device or "cpu").manual_seed(seed)
    shape = (batch, heads, grid.num_rows)
    visible = torch.full((grid.num_rows,), grid.num_columns, device=device)
    if is_causal:
        visible = grid.causal_counts(device).long()
    share = torch.full(shape, density, device=device)
    highest = density
    if irregular:
        lowest, highest = max(0.0, 2 * density - 1), min(1.0, 2 * density)
        draw = torch.rand(shape, generator=generator, device=device)
        share = lowest + (highest - lowest) * draw
    counts = (share * visible).round().long().clamp(min=1).minimum(visible)
    width = min(grid.num_columns, int(highest * grid.num_columns) + 1)

    slot = torch.arange(width, device=device)
    runs = counts.clamp(min=1)[..., None]
    begin = slot * visible[:, None] // runs
    length = (slot + 1) * visible[:, None] // runs - begin
    draw = torch.rand((*shape, width), generator=generator, device=device)
    # draw < 1, but its product with a length may round up to it.
    indices = begin + (draw * length).long().clamp(max=length - 1)
    _, last = grid.positions(device)
    diagonal = (last.clamp(min=0) // grid.block_size[1])[:, None]
    indices = torch.where((begin <= diagonal) & (diagonal < begin + length), diagonal, indices)
    indices = indices.clamp(0, max(grid.num_columns - 1, 0))
    return counts.to(torch.int32), indices.to(torch.int32)
