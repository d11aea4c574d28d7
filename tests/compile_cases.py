"""The calls that the compile-only tier compiles: every kernel, in the forms that differ most.

Tensors are of the meta device: realistic shapes, no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

BATCH, HEADS, KV_HEADS, LENGTH = 2, 16, 4, 16384


def _tokens(heads: int, head_dim: int, dtype: torch.dtype, length: int = LENGTH) -> Tensor:
    return torch.empty(BATCH, heads, length, head_dim, dtype=dtype, device="meta")


def _ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def _problem(
    head_dim: int, dtype: torch.dtype, block: tuple[int, int], listed: bool, lens: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]:
    """(query, key, value) and (counts, indices, kv_lens, q_lens)."""
    query, key = _tokens(HEADS, head_dim, dtype), _tokens(KV_HEADS, head_dim, dtype)
    tiles = LENGTH // block[0]
    lists = (_ints(BATCH, HEADS, tiles), _ints(BATCH, HEADS, tiles, 32)) if listed else (None, None)
    lengths = (_ints(BATCH), _ints(BATCH)) if lens else (None, None)
    return (query, key, torch.empty_like(key)), (*lists, *lengths)


def _forward(
    head_dim: int,
    dtype: torch.dtype,
    block: tuple[int, int],
    *,
    listed: bool = True,
    lens: bool = False,
    causal: bool = False,
    window: int = 0,
    entropy: bool = False,
) -> None:
    from entropy_attn.kernels.block_sparse_forward import block_sparse_forward

    inputs, lists = _problem(head_dim, dtype, block, listed, lens)
    scale = head_dim**-0.5
    block_sparse_forward(*inputs, *lists, block, causal, window, scale, entropy, entropy)


def _backward(
    head_dim: int,
    dtype: torch.dtype,
    block: tuple[int, int],
    *,
    listed: bool = True,
    lens: bool = False,
    causal: bool = False,
    window: int = 0,
) -> None:
    from entropy_attn.kernels.block_sparse_backward import block_sparse_backward

    inputs, lists = _problem(head_dim, dtype, block, listed, lens)
    query = inputs[0]
    lse = torch.empty(query.shape[:3], device="meta")
    columns = None
    if listed:
        columns = (_ints(BATCH, HEADS, LENGTH // block[1] + 1).long(), _ints(BATCH, HEADS, 8192))
    grad_lse = torch.empty_like(lse) if lens else None
    block_sparse_backward(
        query, grad_lse, *inputs, query, lse, *lists, columns, block, causal, window,
        head_dim**-0.5,
    )  # fmt: skip


def _tile_mass(
    head_dim: int, dtype: torch.dtype, block: tuple[int, int], *, whole: bool, causal: bool
) -> None:
    """``whole``: mass of every tile, without the forward's lse; else the entropies of listed ones."""
    from entropy_attn.kernels.tile_mass import tile_mass

    (query, key, _), lists = _problem(head_dim, dtype, block, not whole, whole)
    lse = None if whole else torch.empty(query.shape[:3], device="meta")
    tile_mass(query, key, lse, *lists, block, causal, 0, head_dim**-0.5, whole)


def _score(
    head_dim: int, dtype: torch.dtype, block: tuple[int, int], group: int, *, pooled: bool
) -> None:
    from entropy_attn.kernels.scoring import pool_tokens, score_tiles

    (query, key, _), (_, _, kv_lens, q_lens) = _problem(head_dim, dtype, block, False, not pooled)
    if pooled:
        query, key = pool_tokens(query, key, q_lens, kv_lens, group)
    score_tiles(
        query, key, q_lens, kv_lens, LENGTH, LENGTH, group, 1 if pooled else group, pooled, block,
        True, 0, head_dim**-0.5, 0, LENGTH // block[0],
    )  # fmt: skip


def _keep(rule: str, length: int, *, lens: bool) -> None:
    from entropy_attn.kernels.budget import keep_tiles

    mass = torch.empty(BATCH, HEADS, 64, length // 64, device="meta")
    lengths = (_ints(BATCH), _ints(BATCH)) if lens else (None, None)
    keep_tiles(
        mass, *lengths, length, length, (64, 64), True, 0, 1, 2, rule, 0.9, 1, 1.0, 256, 0
    )


_bf16, _fp16, _fp32 = torch.bfloat16, torch.float16, torch.float32

CASES: dict[str, Callable[[], None]] = {
    "forward-d128-128x128": partial(_forward, 128, _bf16, (128, 128)),
    "forward-d128-64x64-causal": partial(_forward, 128, _bf16, (64, 64), causal=True),
    "forward-d64-64x64-causal-lens": partial(_forward, 64, _bf16, (64, 64), causal=True, lens=True),
    "forward-d64-128x128": partial(_forward, 64, _bf16, (128, 128)),
    "forward-d80-32x32": partial(_forward, 80, _fp16, (32, 32)),
    "forward-d128-128x128-entropy": partial(_forward, 128, _bf16, (128, 128), entropy=True),
    "forward-d64-dense-window": partial(
        _forward, 64, _bf16, (64, 64), listed=False, causal=True, window=4096
    ),
    "forward-d256-64x64": partial(_forward, 256, _bf16, (64, 64)),
    "forward-d256-fp32": partial(_forward, 256, _fp32, (64, 64)),
    "backward-d128-128x128": partial(_backward, 128, _bf16, (128, 128)),
    "backward-d64-64x64-causal-lens": partial(
        _backward, 64, _bf16, (64, 64), causal=True, lens=True
    ),
    "backward-d96-128x32": partial(_backward, 96, _fp16, (128, 32)),
    "backward-d256-64x64": partial(_backward, 256, _bf16, (64, 64)),
    "backward-d128-fp32-dense": partial(_backward, 128, _fp32, (64, 64), listed=False, causal=True),
    "tile-mass-d128-listed": partial(_tile_mass, 128, _bf16, (128, 128), whole=False, causal=True),
    "tile-mass-d64-whole": partial(_tile_mass, 64, _bf16, (64, 64), whole=True, causal=False),
    "tile-mass-d256-fp32": partial(_tile_mass, 256, _fp32, (64, 64), whole=True, causal=True),
    "score-pooled-8-d128": partial(_score, 128, _bf16, (64, 64), 8, pooled=True),
    "score-pooled-64-d64": partial(_score, 64, _bf16, (128, 128), 64, pooled=True),
    "score-antidiagonal-16-d64": partial(_score, 64, _bf16, (64, 64), 16, pooled=False),
    "keep-perplexity": partial(_keep, "perplexity", 16384, lens=False),
    "keep-mass-1m": partial(_keep, "mass", 2**20, lens=True),
}
