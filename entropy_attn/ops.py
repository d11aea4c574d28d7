"""The torch custom ops: one boundary between autograd, torch.compile and an implementation.

Each op takes plain tensors and numbers, picks the Triton launcher or the PyTorch reference by
name, and has a fake for tracing. Arguments are valid when they arrive here: `entropy_attn.api`
checks them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_attn.reference import attention as reference


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of lse, entropies and masses: fp32, and fp64 for fp64 inputs."""
    return reference.compute_dtype(dtype)


@torch.library.custom_op("entropy_attn::attention_forward", mutates_args=())
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    block_q: int,
    block_k: int,
    is_causal: bool,
    window: int,
    scale: float,
    row_entropy: bool,
    block_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, row entropy, block entropy; an entropy that is not asked for is empty."""
    lists = (kv_num_blocks, kv_indices, kv_lens, q_lens)
    geometry = ((block_q, block_k), is_causal, window, scale)
    if backend == "reference":
        problem = reference.Problem(*lists, *geometry)
        return reference.attention_forward(query, key, value, problem, row_entropy, block_entropy)
    from entropy_attn.kernels.block_sparse_forward import block_sparse_forward

    return block_sparse_forward(query, key, value, *lists, *geometry, row_entropy, block_entropy)


@attention_forward.register_fake
def _(
    query, key, value, kv_num_blocks, kv_indices, kv_lens, q_lens, block_q, block_k, is_causal,
    window, scale, row_entropy, block_entropy, backend,
):  # fmt: skip
    dtype = statistics_dtype(query.dtype)
    rows = query.shape[:3]
    out = query.new_empty(query.shape)
    lse = query.new_empty(rows, dtype=dtype)
    row = query.new_empty(rows if row_entropy else (0,), dtype=dtype)
    block = query.new_empty(rows if block_entropy else (0,), dtype=dtype)
    return out, lse, row, block


@torch.library.custom_op("entropy_attn::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    block_q: int,
    block_k: int,
    is_causal: bool,
    window: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    tensors = (grad_out, grad_lse, query, key, value, out, lse)
    lists = (kv_num_blocks, kv_indices, kv_lens, q_lens)
    geometry = ((block_q, block_k), is_causal, window, scale)
    if backend == "reference":
        return reference.attention_backward(*tensors, reference.Problem(*lists, *geometry))
    from entropy_attn.kernels.block_sparse_backward import block_sparse_backward

    columns = None
    if kv_indices is not None:
        from entropy_attn.masks import column_lists

        num_columns = math.ceil(key.shape[2] / block_k)
        columns = column_lists(kv_num_blocks, kv_indices, num_columns)
    return block_sparse_backward(*tensors, *lists, columns, *geometry)


@attention_backward.register_fake
def _(
    grad_out, grad_lse, query, key, value, out, lse, kv_num_blocks, kv_indices, kv_lens, q_lens,
    block_q, block_k, is_causal, window, scale, backend,
):  # fmt: skip
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    query, key, value, kv_num_blocks, kv_indices, kv_lens, q_lens = inputs[:7]
    out, lse, row, block = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row, block)
    ctx.save_for_backward(query, key, value, out, lse, kv_num_blocks, kv_indices, kv_lens, q_lens)
    ctx.geometry = inputs[7:12]
    ctx.backend = inputs[14]


def _backward(ctx, grad_out, grad_lse, *_):
    query, key, value, out, lse, *lists = ctx.saved_tensors
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if grad_out is not None or grad_lse is not None:
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = attention_backward(
            grad_out, grad_lse, query, key, value, out, lse, *lists, *ctx.geometry, ctx.backend
        )
    return (*grads, *[None] * 12)


attention_forward.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("entropy_attn::tile_mass", mutates_args=())
def tile_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    block_q: int,
    block_k: int,
    is_causal: bool,
    window: int,
    scale: float,
    return_mass: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """mass (B, Hq, Mq, Mk) or empty, tile entropy (B, Hq, Mq) in nats."""
    lists = (kv_num_blocks, kv_indices, kv_lens, q_lens)
    geometry = ((block_q, block_k), is_causal, window, scale)
    if backend == "reference":
        mass = reference.tile_mass(query, key, reference.Problem(*lists, *geometry))
        return mass if return_mass else mass.new_zeros(0), reference.entropy(mass).clamp(min=0)
    from entropy_attn.kernels.tile_mass import tile_mass as launch

    return launch(query, key, lse, *lists, *geometry, return_mass)


@tile_mass.register_fake
def _(
    query, key, lse, kv_num_blocks, kv_indices, kv_lens, q_lens, block_q, block_k, is_causal,
    window, scale, return_mass, backend,
):  # fmt: skip
    dtype = statistics_dtype(query.dtype)
    rows = (*query.shape[:2], -(-query.shape[2] // block_q))
    mass = (*rows, -(-key.shape[2] // block_k)) if return_mass else (0,)
    return query.new_empty(mass, dtype=dtype), query.new_empty(rows, dtype=dtype)
