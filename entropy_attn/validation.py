"""The one place that validates arguments.

Every check raises an error that names the argument, its value, what is allowed and what to do.
Values that live on a GPU are not read here: a call must not wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_attn.masks import BlockMask

ATTENTION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_DIMS = (16, 256)
ENTROPY_KINDS = ("row", "block", "tile")


def check_qkv(query: Tensor, key: Tensor, value: Tensor | None = None) -> None:
    """Shapes, dtypes and devices of (B, Hq, Nq, D) and (B, Hkv, Nk, D)."""
    named = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, seq, head_dim), got shape "
                f"{tuple(tensor.shape)}; use unsqueeze for a missing batch or head dimension"
            )
        if tensor.dtype not in ATTENTION_DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in ATTENTION_DTYPES)
            raise TypeError(f"{name} has dtype {tensor.dtype}; allowed are {allowed}")
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} but query has {query.dtype}; cast them to one dtype"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} is on {tensor.device} but query is on {query.device}; move it with .to()"
            )
    batch, heads, _, head_dim = query.shape
    if key.shape[0] != batch:
        raise ValueError(f"key has batch size {key.shape[0]} but query has {batch}")
    if key.shape[3] != head_dim:
        raise ValueError(f"key has head_dim {key.shape[3]} but query has {head_dim}")
    if key.shape[1] == 0 or heads % key.shape[1] != 0:
        raise ValueError(
            f"query has {heads} heads, which is not a multiple of key's {key.shape[1]} heads"
        )
    if value is not None and value.shape != key.shape:
        raise ValueError(f"value has shape {tuple(value.shape)} but key has {tuple(key.shape)}")
    low, high = HEAD_DIMS
    if not low <= head_dim <= high:
        raise ValueError(f"head_dim is {head_dim}; allowed are {low} to {high}")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale as a float; head_dim ** -0.5 by default."""
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    return float(scale)


def check_window(window: int | None, is_causal: bool) -> int:
    """The window as an int, 0 for none."""
    if window is None:
        return 0
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be a positive int (tokens) or None, got {window!r}")
    if not is_causal:
        raise ValueError(f"window={window} needs is_causal=True: it counts keys back from the query")
    return window


def check_lens(name: str, lens: Tensor | None, query: Tensor) -> None:
    """(B,) int32 valid lengths on the device of the query. The values are not read."""
    if lens is None:
        return
    if not isinstance(lens, Tensor) or lens.dtype != torch.int32:
        got = lens.dtype if isinstance(lens, Tensor) else type(lens).__name__
        raise TypeError(f"{name} must be an int32 tensor of shape (batch,), got {got}")
    if lens.shape != query.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({query.shape[0]},), one length a batch row, "
            f"got {tuple(lens.shape)}"
        )
    if lens.device != query.device:
        raise ValueError(f"{name} is on {lens.device} but query is on {query.device}")


def check_block_mask(block_mask: BlockMask, query: Tensor, key: Tensor) -> None:
    """That the mask was built for these lengths, heads and device."""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask must be an entropy_attn.BlockMask, got {type(block_mask).__name__}; "
            "BlockMask.from_dense and BlockMask.from_flex convert other masks"
        )
    batch, heads, q_len, _ = query.shape
    if (block_mask.q_len, block_mask.kv_len) != (q_len, key.shape[2]):
        raise ValueError(
            f"block_mask was built for q_len={block_mask.q_len}, kv_len={block_mask.kv_len} but "
            f"query has {q_len} and key {key.shape[2]} tokens; build it for these lengths"
        )
    mask_batch, mask_heads = block_mask.kv_num_blocks.shape[:2]
    if mask_batch not in (1, batch):
        raise ValueError(f"block_mask has batch size {mask_batch}; allowed are 1 and {batch}")
    if mask_heads not in (1, heads):
        raise ValueError(
            f"block_mask has {mask_heads} heads; allowed are 1 and {heads} (one list a query head)"
        )
    if block_mask.kv_indices.device != query.device:
        raise ValueError(
            f"block_mask is on {block_mask.kv_indices.device} but query is on {query.device}; "
            "move it with block_mask.to(device)"
        )


def check_block_size(block_size: int | tuple[int, int], name: str = "block_size") -> tuple[int, int]:
    """(block_q, block_k), each a power of two from 16 to 256."""
    sizes = (block_size, block_size) if isinstance(block_size, int) else block_size
    valid = isinstance(sizes, Sequence) and len(sizes) == 2
    for size in sizes if valid else ():
        power = isinstance(size, int) and not isinstance(size, bool) and 16 <= size <= 256
        valid = valid and power and size & (size - 1) == 0
    if not valid:
        raise ValueError(
            f"{name} must be a power of two from 16 to 256, or a pair of them (query, key), "
            f"got {block_size!r}"
        )
    return sizes[0], sizes[1]


def check_entropy_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """A non-empty selection of "row", "block" and "tile"."""
    if isinstance(kinds, str) or not kinds or any(k not in ENTROPY_KINDS for k in kinds):
        raise ValueError(f"kinds must be a non-empty tuple out of {ENTROPY_KINDS}, got {kinds!r}")
    return tuple(kinds)


def check_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Two partial results of the same queries."""
    if out_a.shape != out_b.shape or out_a.dtype != out_b.dtype:
        raise ValueError(
            f"out_a {tuple(out_a.shape)} {out_a.dtype} and out_b {tuple(out_b.shape)} "
            f"{out_b.dtype} must have one shape and dtype"
        )
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != out_a.shape[:-1]:
            raise ValueError(
                f"{name} must have shape {tuple(out_a.shape[:-1])}, got {tuple(lse.shape)}"
            )
