"""Sparse decoding in plain PyTorch: boxes around blocks of keys, lists from them, attention.

The formulas are those of `entropy_attn.kernels.key_boxes`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_attn.reference.attention import compute_dtype
from entropy_attn.reference.dense import dense_attention


def key_boxes(key: Tensor, kv_lens: Tensor | None, block: int) -> Tensor:
    """(B, Hkv, Mk, 2, D): the ends of the box around each block's keys, padding included.

    Past the last key they are +inf and -inf.
    """
    counted = _counted(key, None, kv_lens)[:, None, :, None]
    padding = [0, 0, 0, -key.shape[2] % block]
    low, high = (
        torch.nn.functional.pad(key.masked_fill(~counted, end), padding, value=end)
        for end in (math.inf, -math.inf)
    )
    low, high = low.unflatten(2, (-1, block)).amin(3), high.unflatten(2, (-1, block)).amax(3)
    return torch.stack((low, high), 3)


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
) -> tuple[Tensor, Tensor]:
    """See `entropy_attn.decoding.ops.choose_blocks`."""
    q_len, kv_heads, kv_len = query.shape[2], *key.shape[1:3]
    blocks, dtype = -(-kv_len // block), compute_dtype(query.dtype)
    end = _ends(kv_lens, kv_len, query)
    column = torch.arange(blocks, device=query.device)

    # Nothing waits for the device, at the price of all boxes being computed.
    right = torch.minimum(fresh, end - q_len).clamp(min=0)
    stale = (column >= (right // block)[:, None])[:, None, :, None, None]
    boxes[:, :, :blocks] = torch.where(stale, key_boxes(key, kv_lens, block), boxes[:, :, :blocks])
    low, high = boxes[:, :, :blocks].to(dtype).unbind(3)
    counted = _counted(key, valid, kv_lens)
    counted = torch.nn.functional.pad(counted, (0, -kv_len % block))
    seen = counted.unflatten(1, (-1, block)).any(2)[:, None].expand(-1, kv_heads, -1)
    low, high = (x.masked_fill(~seen[..., None], 0.0) for x in (low, high))
    rows = query.to(dtype).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # (B, Hkv, M, D)
    bounds = rows.clamp(min=0.0) @ high.transpose(2, 3) + rows.clamp(max=0.0) @ low.transpose(2, 3)
    empty = ~seen.any(-1)[..., None, None]
    bounds = (bounds * scale).masked_fill(~(seen[:, :, None] | empty), -math.inf)
    mass = torch.softmax(bounds, -1).sum(2)  # (B, Hkv, Mk)
    mass = mass.nan_to_num(math.inf, math.inf).masked_fill(~seen, -1.0)

    visible = seen.sum(-1, keepdim=True)
    asked = (visible.to(torch.float32) * share).ceil().long().clamp(min=least)
    order = torch.argsort(mass, dim=-1, descending=True, stable=True)
    chosen = column < torch.minimum(asked, visible)
    keep = torch.zeros_like(seen).scatter_(-1, order, chosen)
    first_query = ((end - q_len).clamp(min=0) // block)[:, None, None]
    keep = (keep | (seen.cumsum(-1) <= sink) | (column > first_query - local)) & seen
    counts = keep.sum(-1, keepdim=True, dtype=torch.int32)
    order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)
    indices = order[:, :, None, :width].to(torch.int32)
    unused = torch.arange(width, device=query.device) >= counts[..., None]

    fresh.copy_(end)
    totals += torch.stack((counts.sum(dtype=torch.int64), visible.sum()))
    return counts, indices.masked_fill(unused, 0)


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
) -> Tensor:
    """(B, Hq, Nq, D): causal attention to the valid keys of the listed blocks."""
    q_len, kv_len = query.shape[2], key.shape[2]
    blocks = -(-kv_len // block)
    listed = torch.arange(kv_indices.shape[3], device=key.device) < kv_num_blocks[..., None]
    kept = torch.zeros((*kv_num_blocks.shape, blocks + 1), dtype=torch.bool, device=key.device)
    kept.scatter_(-1, torch.where(listed, kv_indices, blocks).long(), True)
    kept = kept[..., :blocks].repeat_interleave(block, -1)[..., :kv_len]  # (B, Hkv, 1, Nk)
    kept = kept.repeat_interleave(query.shape[1] // key.shape[1], 1)
    end = _ends(kv_lens, kv_len, query)[:, None, None, None]
    position = torch.arange(q_len, device=query.device)[:, None] + end - q_len
    causal = torch.arange(kv_len, device=query.device) <= position  # (B, 1, Nq, Nk)
    visible = kept & causal & _counted(key, valid, kv_lens)[:, None, None]
    dtype = compute_dtype(query.dtype)
    out, _, _ = dense_attention(query.to(dtype), key.to(dtype), value.to(dtype), visible, scale)
    return out.to(query.dtype)


def _ends(kv_lens: Tensor | None, kv_len: int, like: Tensor) -> Tensor:
    """(B,) int64: keys up to the last query's own."""
    if kv_lens is None:
        return torch.full(like.shape[:1], kv_len, device=like.device)
    return kv_lens.long().clamp(max=kv_len)


def _counted(key: Tensor, valid: Tensor | None, kv_lens: Tensor | None) -> Tensor:
    """(B, Nk) bool: which keys may be attended to by some query."""
    column = torch.arange(key.shape[2], device=key.device)
    counted = column < _ends(kv_lens, key.shape[2], key)[:, None]
    return counted if valid is None else counted & (valid & 1).bool()
