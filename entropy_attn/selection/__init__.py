"""Which blocks of keys each block of queries visits: scorers predict, budgets decide.

`select_blocks` runs both. Nothing of size Nq x Nk is stored, nothing waits for the device, and
the width of the lists follows from shapes and the budget alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from entropy_attn import validation as check
from entropy_attn.autocast import follow_autocast
from entropy_attn.masks import BlockMask
from entropy_attn.reference.selection import Geometry
from entropy_attn.selection import ops
from entropy_attn.selection.budgets import Budget, Perplexity, TopK, TopP
from entropy_attn.selection.geometry import (
    choose_backend,
    make_geometry,
    most_always_kept,
    most_visible,
)
from entropy_attn.selection.scorers import (
    Antidiagonal,
    Envelope,
    GroupScorer,
    Pooled,
    TrueMass,
)

__all__ = [
    "Antidiagonal",
    "Envelope",
    "Perplexity",
    "Pooled",
    "TopK",
    "TopP",
    "TrueMass",
    "keep_blocks",
    "select_blocks",
]

# The best for its cost of what was measured without training (docs/benchmarks.md).
DEFAULT_SCORER = Envelope(8)
DEFAULT_BUDGET = TopP(0.945)
# Masses and their workspace take no more than the query does, or this many bytes.
WORKSPACE_BYTES = 256 * 2**20


def select_blocks(
    query: Tensor,
    key: Tensor,
    *,
    block_size: int | tuple[int, int] = 64,
    scorer: Callable[..., Tensor] | None = None,
    budget: Budget | None = None,
    is_causal: bool = False,
    sink: int = 1,
    local: int = 2,
    scale: float | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> BlockMask:
    """Predict where each block of queries attends and keep what the budget asks for.

    Args:
        query: (B, Hq, Nq, D); key: (B, Hkv, Nk, D), Hq a multiple of Hkv. They must be finite; a
            tile whose prediction is not keeps as many blocks as the budget can allow.
        block_size: tokens a block, or (query, key).
        scorer: predicts the distribution of each tile, `Envelope(8)` by default; or a callable,
            see `entropy_attn.selection.scorers`, whose values are checked as by `keep_blocks`.
        budget: how many blocks a tile keeps, `TopP(0.945)` by default.
        is_causal, scale, kv_lens, q_lens, window: as in `ea.block_sparse_attention`; the
            prediction respects them, and a block that no query of a tile sees is never listed.
        sink: the first ``sink`` blocks of keys are always kept.
        local: the diagonal blocks and ``local - 1`` blocks before them are always kept (and
            after them if not causal); 0 for none. Both come on top of the budget, and only where
            they are visible.
        backend: "auto", "triton" or "reference"; a callable gets it too.

    Returns:
        A mask with one list for each of the Hq query heads. Not differentiable.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
        BackendUnavailable: a named backend cannot run this call.
    """
    scorer = DEFAULT_SCORER if scorer is None else scorer
    if not callable(scorer):
        raise TypeError(f"scorer must be Envelope(), Pooled(), … or a callable, got {scorer!r}")
    query, key = follow_autocast(query, key)
    geometry = make_geometry(query, key, block_size, is_causal, kv_lens, q_lens, window)
    rules = Rules(budget, sink, local)
    scale = check.check_scale(scale, query.shape[3])
    query, key = query.detach(), key.detach()
    chosen = choose_backend(query, geometry, backend)
    if isinstance(scorer, GroupScorer):
        masses = _group_masses(scorer, query, key, geometry, scale, chosen)
        lists = [rules.keep(mass, geometry, first, chosen) for first, mass in masses]
    else:
        mass = scorer(
            query,
            key,
            block_size=geometry.block_size,
            is_causal=geometry.is_causal,
            scale=scale,
            kv_lens=kv_lens,
            q_lens=q_lens,
            window=window,
            backend=backend,
        )
        check.check_tile_mass(
            "scorer's result", mass, geometry.q_tiles, geometry.kv_blocks, query.shape[:2]
        )
        if not isinstance(scorer, TrueMass):
            _assert_finite(mass)
        lists = [rules.keep(mass, geometry, 0, choose_backend(mass, geometry, backend))]
    return _mask(lists, geometry)


def keep_blocks(
    mass: Tensor,
    budget: Budget | None = None,
    *,
    block_size: int | tuple[int, int],
    q_len: int,
    kv_len: int,
    is_causal: bool = False,
    sink: int = 1,
    local: int = 2,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> BlockMask:
    """The budget step of `select_blocks` alone.

    Args:
        mass: (B, H, Mq, Mk) fp32 or fp64, what each block of queries needs of each block of keys.
            Its scale does not matter; blocks that the tile cannot see are ignored. A negative,
            NaN or infinite value fails an assertion on the tensor's device (torch._assert_async),
            without waiting for it.
        q_len, kv_len: tokens; Mq and Mk are their numbers of blocks.
        The other arguments are those of `select_blocks`. Among equal masses the first are kept.
    """
    block_size = check.check_block_size(block_size)
    check.check_integer("q_len", q_len, minimum=0)
    check.check_integer("kv_len", kv_len, minimum=0)
    geometry = Geometry(
        q_len=q_len,
        kv_len=kv_len,
        block_size=block_size,
        is_causal=bool(is_causal),
        window=check.check_window(window, is_causal),
        q_lens=q_lens,
        kv_lens=kv_lens,
    )
    check.check_tile_mass("mass", mass, geometry.q_tiles, geometry.kv_blocks)
    geometry = replace(
        geometry,
        kv_lens=check.check_lens("kv_lens", kv_lens, mass),
        q_lens=check.check_lens("q_lens", q_lens, mass),
    )
    rules = Rules(budget, sink, local)
    chosen = choose_backend(mass, geometry, backend)
    mass = mass.detach()
    _assert_finite(mass)
    return _mask([rules.keep(mass, geometry, 0, chosen)], geometry)


class Rules:
    """A checked budget with the blocks that are kept besides."""

    def __init__(self, budget: Budget | None, sink: int, local: int) -> None:
        self.budget = DEFAULT_BUDGET if budget is None else budget
        if not isinstance(self.budget, Budget):
            raise TypeError(f"budget must be TopK, TopP or Perplexity, got {budget!r}")
        self.sink = check.check_integer("sink", sink, minimum=0)
        self.local = check.check_integer("local", local, minimum=0)

    def keep(
        self, mass: Tensor, geometry: Geometry, first_tile: int, backend: str
    ) -> tuple[Tensor, Tensor]:
        """counts and indices of the tiles in ``mass``."""
        return ops.keep_tiles(
            mass, geometry.q_lens, geometry.kv_lens, geometry.q_len, geometry.kv_len,
            *geometry.block_size, geometry.is_causal, geometry.window, *self.numbers(geometry),
            first_tile, backend,
        )  # fmt: skip

    def numbers(self, geometry: Geometry) -> tuple[int, int, str, float, int, float, int]:
        """As `keep_tiles` takes them: sink, local, rule, amount, min_blocks, max_density, width."""
        visible = most_visible(geometry)
        always = most_always_kept(geometry, self.sink, self.local)
        width = min(visible, self.budget.most(visible) + always)
        budget = self.budget
        return (
            self.sink, self.local, *budget.rule, budget.min_blocks, budget.density_bound, width
        )  # fmt: skip


def most_tiles(scorer: GroupScorer, query: Tensor, geometry: Geometry) -> int:
    """How many tiles of queries the workspace allows at a time."""
    rows = 1 + geometry.block_size[0] // scorer.group  # the mass, and one row a query group
    tile_bytes = max(1, 4 * query.shape[0] * query.shape[1] * rows * geometry.kv_blocks)
    chunk = max(WORKSPACE_BYTES, query.numel() * query.element_size()) // tile_bytes
    return max(64, chunk)


def _group_masses(
    scorer: GroupScorer, query: Tensor, key: Tensor, geometry: Geometry, scale: float, backend: str
) -> Iterator[tuple[int, Tensor]]:
    """(first tile, mass) of as many tiles at a time as the workspace allows."""
    score = scorer.tile_scores(query, key, geometry, scale, backend)
    chunk = most_tiles(scorer, query, geometry)
    if geometry.q_tiles <= chunk:
        yield 0, score(0, geometry.q_tiles)
        return
    for first in range(0, geometry.q_tiles, chunk):
        yield first, score(first, min(chunk, geometry.q_tiles - first))


def _mask(lists: list[tuple[Tensor, Tensor]], geometry: Geometry) -> BlockMask:
    counts, indices = zip(*lists, strict=True)
    return BlockMask(
        counts[0] if len(counts) == 1 else torch.cat(counts, 2),
        indices[0] if len(indices) == 1 else torch.cat(indices, 2),
        geometry.block_size,
        geometry.q_len,
        geometry.kv_len,
        validate=False,
    )


def _assert_finite(mass: Tensor) -> None:
    fine = torch.isfinite(mass) & (mass >= 0)
    torch._assert_async(
        fine.all(), "the predicted mass of a tile is negative, NaN or infinite: check the scorer"
    )
