"""The custom ops of sparse decoding: plain tensors and numbers in, validated by the caller.

Neither is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_attn.custom_ops import custom_op, laid_out_like
from entropy_attn.reference import decoding as reference


@torch.library.custom_op("entropy_attn::choose_blocks", mutates_args=("boxes", "fresh", "totals"))
def choose_blocks(
    query: Tensor,
    key: Tensor,
    boxes: Tensor,
    fresh: Tensor,
    totals: Tensor,
    valid: Tensor | None,
    kv_lens: Tensor | None,
    block: int,
    sink: int,
    local: int,
    share: float,
    least: int,
    width: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Bring the boxes around blocks of keys up to date, and choose blocks for the last queries.

    Args:
        query: (B, Hq, Nq, D), the last Nq keys' own queries; key: (B, Hkv, Nk, D).
        boxes: (B, Hkv, M, 2, D), M at least the number of blocks; written.
        fresh: (B,) int32, tokens up to which the boxes are right; moved to the last key.
        totals: (2,) int64; what is kept and what is visible are added.
        valid: (B, Nk) int8, odd where a key may be attended to; None where all may.
        kv_lens: (B,) int32, keys up to the last query's own; None for Nk.
        share, least: ceil(share * visible blocks) blocks are asked for, and at least ``least``.
        width: entries a list.

    Returns:
        counts (B, Hkv, 1) and ascending indices (B, Hkv, 1, width), int32.
    """
    arguments = (
        query, key, boxes, fresh, totals, valid, kv_lens, block, sink, local, share, least,
        width, scale,
    )  # fmt: skip
    if backend == "reference":
        return reference.choose_blocks(*arguments)
    from entropy_attn.kernels.key_boxes import choose_blocks as launch

    return launch(*arguments)


@choose_blocks.register_fake
def _(
    query, key, boxes, fresh, totals, valid, kv_lens, block, sink, local, share, least, width,
    scale, backend,
):  # fmt: skip
    rows = (*key.shape[:2], 1)
    return fresh.new_empty(rows), fresh.new_empty((*rows, width))


@custom_op("decode_forward")
def decode_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    valid: Tensor,
    kv_lens: Tensor | None,
    block: int,
    scale: float,
    backend: str,
) -> Tensor:
    """(B, Hq, Nq, D): causal attention of the last queries to the valid keys of listed blocks.

    Args:
        kv_num_blocks, kv_indices: (B, Hkv, 1) and (B, Hkv, 1, W).
        valid, kv_lens: as in `choose_blocks`.
    """
    if backend == "reference":
        return reference.decode_forward(
            query, key, value, kv_num_blocks, kv_indices, valid, kv_lens, block, scale
        )
    from entropy_attn.kernels.decode import FEW_QUERIES, split_forward

    lists = (kv_num_blocks, kv_indices, kv_lens, None)
    size = (FEW_QUERIES, block)
    return split_forward(query, key, value, *lists, size, True, 0, scale, valid=valid)[0]


@decode_forward.register_fake
def _(query, key, value, kv_num_blocks, kv_indices, valid, kv_lens, block, scale, backend):
    return laid_out_like(query, backend)
