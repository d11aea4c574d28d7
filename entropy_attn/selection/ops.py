"""The custom ops of block selection: plain tensors and numbers in, validated by the caller.

Each picks the Triton launcher or the PyTorch reference by name and has a fake for tracing. None
is differentiable: which blocks are kept is a discrete choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_attn.custom_ops import custom_op
from entropy_attn.reference import selection as reference


@custom_op("pool_tokens")
def pool_tokens(
    query: Tensor,
    key: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    pool: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(B, Hq, ceil(Nq / pool), D) and (B, Hkv, ceil(Nk / pool), D): means of groups of tokens."""
    if backend == "reference":
        return (
            reference.pool_tokens(query, q_lens, pool),
            reference.pool_tokens(key, kv_lens, pool),
        )
    from entropy_attn.kernels.pooling import pool_tokens as launch

    return launch(query, key, q_lens, kv_lens, pool)


@pool_tokens.register_fake
def _(query, key, q_lens, kv_lens, pool, backend):
    return tuple(
        t.new_empty(*t.shape[:2], -(-t.shape[2] // pool), t.shape[3]) for t in (query, key)
    )


@custom_op("envelope_tokens")
def envelope_tokens(
    query: Tensor,
    key: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    pool: int,
    spread: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of query groups, middles of key groups, and (B, Hkv, ceil(Nk / pool)) their spreads."""
    if backend == "reference":
        means = reference.pool_tokens(query, q_lens, pool)
        return means, *reference.envelope_tokens(key, kv_lens, pool, spread)
    from entropy_attn.kernels.pooling import envelope_tokens as launch

    return launch(query, key, q_lens, kv_lens, pool, spread)


@envelope_tokens.register_fake
def _(query, key, q_lens, kv_lens, pool, spread, backend):
    groups = [t.new_empty(*t.shape[:2], -(-t.shape[2] // pool), t.shape[3]) for t in (query, key)]
    spreads = groups[1].new_empty(groups[1].shape[:3], dtype=_score_dtype(key))
    return *groups, spreads


def _score_dtype(tokens: Tensor) -> torch.dtype:
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32


@custom_op("score_tiles")
def score_tiles(
    query: Tensor,
    key: Tensor,
    spreads: Tensor | None,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
    is_causal: bool,
    window: int,
    group: int,
    antidiagonal: bool,
    take_maximum: bool,
    scale: float,
    first_tile: int,
    tiles: int,
    backend: str,
) -> Tensor:
    """(B, Hq, tiles, Mk) fp32 or fp64: predicted mass of the query tiles from first_tile on.

    query and key are groups, with their spreads or without, or all tokens if ``antidiagonal``.
    """
    if backend == "reference":
        geometry = reference.Geometry(
            q_len, kv_len, (block_q, block_k), is_causal, window, q_lens, kv_lens
        )
        if antidiagonal:
            query = reference.antidiagonal_rows(query, q_lens, group, reverse=True)
            key = reference.antidiagonal_rows(key, kv_lens, group, reverse=False)
            scale = scale / group
        return reference.score_tiles(
            query, key, spreads, geometry, group, take_maximum, scale, first_tile, tiles
        )
    from entropy_attn.kernels.scoring import score_tiles as launch

    taps = group if antidiagonal else 1
    return launch(
        query, key, spreads, q_lens, kv_lens, q_len, kv_len, group, taps, take_maximum,
        (block_q, block_k), is_causal, window, scale, first_tile, tiles,
    )  # fmt: skip


@score_tiles.register_fake
def _(
    query, key, spreads, q_lens, kv_lens, q_len, kv_len, block_q, block_k, is_causal, window,
    group, antidiagonal, take_maximum, scale, first_tile, tiles, backend,
):  # fmt: skip
    shape = (*query.shape[:2], tiles, -(-kv_len // block_k))
    return query.new_empty(shape, dtype=_score_dtype(query))


@custom_op("keep_tiles")
def keep_tiles(
    mass: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
    is_causal: bool,
    window: int,
    sink: int,
    local: int,
    rule: str,
    amount: float,
    min_blocks: int,
    max_density: float,
    width: int,
    first_tile: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """counts (B, H, tiles) and ascending indices (B, H, tiles, width), int32."""
    budget = (sink, local, rule, amount, min_blocks, max_density, width, first_tile)
    if backend == "reference":
        geometry = reference.Geometry(
            q_len, kv_len, (block_q, block_k), is_causal, window, q_lens, kv_lens
        )
        return reference.keep_tiles(mass, geometry, *budget)
    from entropy_attn.kernels.budget import keep_tiles as launch

    return launch(
        mass, q_lens, kv_lens, q_len, kv_len, (block_q, block_k), is_causal, window, *budget
    )


@keep_tiles.register_fake
def _(
    mass, q_lens, kv_lens, q_len, kv_len, block_q, block_k, is_causal, window, sink, local, rule,
    amount, min_blocks, max_density, width, first_tile, backend,
):  # fmt: skip
    rows = mass.shape[:3]
    return mass.new_empty(rows, dtype=torch.int32), mass.new_empty(*rows, width, dtype=torch.int32)
