"""How the kernels of `entropy_attn.kernels.block_sparse_backward` are built."""

from __future__ import annotations

from dataclasses import dataclass

from entropy_attn.kernels.launch import padded_head_dim


@dataclass(frozen=True)
class BackwardConfig:
    """Tile sizes of the two gradient kernels.

    Attributes:
        key_block_m, key_block_n: queries a step and keys a program of the dK, dV kernel;
            they divide block_q and block_k.
        query_block_m, query_block_n: queries a program and keys a step of the dQ kernel.
        descriptors: fetch the tiles of each step by the copy engine.
    """

    key_block_m: int
    key_block_n: int
    key_warps: int
    key_stages: int
    query_block_m: int
    query_block_n: int
    query_warps: int
    query_stages: int
    descriptors: bool = False


def backward_config(
    arch: str,
    head_dim: int,
    itemsize: int,
    block_size: tuple[int, int],
    is_causal: bool = False,
    copy_engine: bool = False,
    block_entropy: bool = False,
) -> BackwardConfig:
    """The measured default (docs/kernels.md)."""
    block_q, block_k = block_size
    block_d = padded_head_dim(head_dim)
    if copy_engine and block_d <= 128 and min(block_size) >= 64:
        # sm_90: programs of 64 rows, so that two or three share a multiprocessor.
        key_stages = 3 if block_d <= 64 and is_causal else 2
        step = 64 if block_d > 64 or is_causal else min(block_k, 128)
        query_stages = 3 if step == 128 or key_stages == 3 else 2
        return BackwardConfig(64, 64, 4, key_stages, 64, step, 4, query_stages, descriptors=True)
    if itemsize == 4:  # fp32 products run outside the tensor cores: registers are the limit
        rows, step = (64, 32) if block_d <= 64 else (32, 16)
        rows_k, rows_q = min(block_k, rows), min(block_q, rows)
        step_k, step_q = min(block_q, step), min(block_k, step)
        return BackwardConfig(step_k, rows_k, 4, 1, rows_q, step_q, 4, 1)
    rows, step = (128, 64) if block_d <= 128 else (64, 32)
    key_block_n, query_block_m = min(block_k, rows), min(block_q, rows)
    if block_d <= 64:
        key_block_n = min(key_block_n, 64)  # two programs a multiprocessor
    key_warps = 8 if key_block_n == 128 or block_d > 128 else 4
    if block_entropy:
        # What it takes besides would not fit the registers of sm_80: ptxas spills kilobytes.
        key_block_n = min(key_block_n, 64)
        query_block_m = min(query_block_m, 32) if block_d > 128 else query_block_m
    key_stages = query_stages = 1
    if arch == "sm90":
        key_stages = 3 if (key_block_n == 128) == (block_d == 128) else 2
        query_stages = 3 if query_block_m == 128 else 2
    return BackwardConfig(
        key_block_m=min(block_q, step),
        key_block_n=key_block_n,
        key_warps=key_warps,
        key_stages=key_stages,
        query_block_m=query_block_m,
        query_block_n=min(block_k, step),
        query_warps=8 if query_block_m == 128 or block_d > 128 else 4,
        query_stages=query_stages,
    )
