"""Block lists as plain tensors: counts (B, H, Mq) int32 and indices (B, H, Mq, W) int32.

Row ``m`` lists the blocks ``indices[..., m, :counts[..., m]]``, ascending and unique; what lies
past the count is arbitrary but a valid block number. Nothing here waits for the device, and
nothing but the dense conversions costs more than the lists do.
"""

from __future__ import annotations

import torch
from torch import Tensor

Lists = tuple[Tensor, Tensor]


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """(B, H, Mq, W) bool: which entries of ``indices`` count."""
    slot = torch.arange(indices.shape[-1], dtype=torch.int32, device=indices.device)
    return slot < counts[..., None]


def lists_from_dense(dense: Tensor) -> Lists:
    """Lists of a (B, H, Mq, Mk) bool mask, W = Mk."""
    counts = dense.sum(-1, dtype=torch.int32)
    # A stable sort of "not kept" puts the kept blocks first, in order.
    order = torch.argsort((~dense).to(torch.uint8), dim=-1, stable=True)
    return counts, order.to(torch.int32)


def dense_from_lists(counts: Tensor, indices: Tensor, num_columns: int) -> Tensor:
    """(B, H, Mq, Mk) bool mask of the lists."""
    # One column more than there are takes what lies past the counts.
    target = torch.where(listed(counts, indices), indices, num_columns).long()
    dense = torch.zeros(
        (*indices.shape[:3], num_columns + 1), dtype=torch.bool, device=indices.device
    )
    return dense.scatter_(-1, target, True)[..., :num_columns]


def lists_from_candidates(candidates: Tensor, num_columns: int, width: int) -> Lists:
    """Lists of the distinct values below ``num_columns`` in each row of ``candidates``.

    Args:
        candidates: (B, H, Mq, C) int32, in any order, with repeats; ``num_columns`` or more
            stands for nothing.
        width: W of the result, at least the largest number of distinct values.
    """
    values = candidates.sort(-1).values
    repeated = torch.zeros_like(values, dtype=torch.bool)
    repeated[..., 1:] = values[..., 1:] == values[..., :-1]
    values = values.masked_fill(repeated | (values >= num_columns), num_columns).sort(-1).values
    counts = (values < num_columns).sum(-1, dtype=torch.int32)
    return counts, values[..., :width].clamp(max=max(num_columns - 1, 0)).contiguous()


def run_of_lists(indices: Tensor, start: Tensor) -> Tensor:
    """Lists that begin ``start`` (B, H, Mq) entries later; the counts are the caller's."""
    slot = torch.arange(indices.shape[-1], device=indices.device)
    shifted = (slot + start[..., None]).clamp(max=max(indices.shape[-1] - 1, 0))
    return indices.gather(-1, shifted)


def column_lists(
    kv_num_blocks: Tensor, kv_indices: Tensor, num_columns: int
) -> tuple[Tensor, Tensor]:
    """The transposed lists in CSR form: for each block of keys, the blocks of queries it serves.

    One stable radix sort of all entries by (batch, head, key block): deterministic, linear in
    B·H·Mq·W, without host sync, safe under CUDA graphs. The backward of block-sparse attention
    reads it; on a GPU `kernels/transposed_lists.py` makes the same in one launch.

    Args:
        kv_num_blocks: (B, H, Mq) int32. kv_indices: (B, H, Mq, W) int32.
        num_columns: Mk.

    Returns:
        offsets (B, H, Mk + 1) int32 (int64 where B·H·Mq·W needs it) and rows (B, H, Mq·W) int32:
        key block ``c`` is visited by the query blocks ``rows[..., offsets[c]:offsets[c + 1]]``,
        ascending. Rows past ``offsets[Mk]`` are arbitrary within [0, Mq).
    """
    offsets, order = column_order(kv_num_blocks, kv_indices, num_columns)
    return offsets, column_rows(order, kv_indices)


def column_order(
    kv_num_blocks: Tensor, kv_indices: Tensor, num_columns: int
) -> tuple[Tensor, Tensor]:
    """`column_lists` with the entry ``m · W + slot`` (int64) in the place of each row ``m``."""
    batch, heads, num_rows, width = kv_indices.shape
    segments, stride, entries = batch * heads, num_columns + 1, num_rows * width
    device = kv_indices.device
    # Entries past the count sort behind the last column. The narrower the key, the fewer passes
    # the radix sort makes.
    key_type = _smallest_integer(segments * stride)
    keys = torch.where(listed(kv_num_blocks, kv_indices), kv_indices, num_columns)
    sum_type = torch.promote_types(key_type, keys.dtype)
    first_key = torch.arange(0, segments * stride, stride, dtype=sum_type, device=device)
    first_key = first_key.view(batch, heads, 1, 1)
    keys = (keys + first_key).to(key_type).flatten()
    keys, order = torch.sort(keys, stable=True)

    boundaries = torch.arange(segments * stride, dtype=key_type, device=device)
    fits = keys.numel() <= torch.iinfo(torch.int32).max
    offsets = torch.searchsorted(keys, boundaries, out_int32=fits).view(batch, heads, stride)
    offsets = offsets - offsets[..., :1]
    return offsets, order.remainder(max(entries, 1)).view(batch, heads, entries)


def column_rows(order: Tensor, kv_indices: Tensor) -> Tensor:
    """The rows (int32) of the entries that `column_order` returns."""
    return order.div(max(kv_indices.shape[3], 1), rounding_mode="floor").to(torch.int32)


def _smallest_integer(limit: int) -> torch.dtype:
    """The narrowest integer type that holds [0, limit] and that sorts on every device."""
    for dtype in (torch.int16, torch.int32):
        if limit <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64


def transposed_lists(counts: Tensor, indices: Tensor, num_columns: int, width: int) -> Lists:
    """Lists (B, H, Mk), (B, H, Mk, width) of the query blocks of each key block.

    ``width`` must be at least the largest count; it is not checked here.
    """
    offsets, rows = column_lists(counts, indices, num_columns)
    transposed_counts = offsets.diff(dim=-1).to(torch.int32)
    slot = torch.arange(width, device=rows.device)
    position = offsets[..., :-1, None].long() + slot
    if rows.shape[-1] == 0:
        return transposed_counts, torch.zeros_like(position, dtype=torch.int32)
    flat = position.clamp(max=rows.shape[-1] - 1).flatten(-2)
    return transposed_counts, rows.gather(-1, flat).view(position.shape)


def resized_lists(
    counts: Tensor,
    indices: Tensor,
    block_size: tuple[int, int],
    new_block_size: tuple[int, int],
    q_len: int,
    kv_len: int,
) -> Lists:
    """Lists for other block sizes: a new block is kept where it meets a kept one.

    Sizes are powers of two, so each side is split or merged by a whole factor.
    """
    num_rows, num_columns = (
        -(-n // b) for n, b in zip((q_len, kv_len), new_block_size, strict=True)
    )
    old_columns = -(-kv_len // block_size[1])
    # old_columns · split >= num_columns, so what stands for nothing still does after splitting.
    candidates = torch.where(listed(counts, indices), indices, old_columns)
    merge = new_block_size[1] // block_size[1]
    if merge >= 1:
        kept = candidates < old_columns
        candidates = torch.where(kept, candidates // merge, num_columns)
    else:
        split = block_size[1] // new_block_size[1]
        parts = torch.arange(split, dtype=torch.int32, device=indices.device)
        candidates = (candidates[..., None] * split + parts).flatten(-2)
    merge = new_block_size[0] // block_size[0]
    if merge >= 1:
        padding = num_rows * merge - candidates.shape[2]
        candidates = torch.nn.functional.pad(candidates, (0, 0, 0, padding), value=num_columns)
        candidates = candidates.unflatten(2, (num_rows, merge)).flatten(-2)
    else:
        split = block_size[0] // new_block_size[0]
        candidates = candidates.repeat_interleave(split, dim=2)[:, :, :num_rows]
    width = min(candidates.shape[-1], num_columns)
    return lists_from_candidates(candidates, num_columns, width)
