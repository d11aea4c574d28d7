"""What every launcher needs on the host: device, architecture, strides, precision."""

from __future__ import annotations

import contextlib
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Arguments that differ from call to call. Triton compiles a kernel anew for values of 1 and for
# multiples of 16, which gains nothing here: a new length must not cost seconds. Strides of lists
# follow the lengths; they are single arguments, as the entries of a tuple are always specialised.
LENGTHS = (
    "q_len", "kv_len", "q_tiles", "kv_tiles", "window",
    "count_stride_b", "count_stride_h", "count_stride_t",
    "index_stride_b", "index_stride_h", "index_stride_t",
)  # fmt: skip


def device_of(tensor: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def architecture(device: torch.device) -> str:
    """One of "sm80", "sm90", "sm100", "gfx…" and so on; "cpu" under Triton's interpreter."""
    return _architecture(device.index or 0) if device.type == "cuda" else "cpu"


@cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def tile_descriptor(tensor: Tensor, rows: int) -> Any | None:
    """Lets the copy engine (TMA) of sm_90 and later fetch (rows, head_dim) tiles of a tensor.

    It computes addresses and bounds itself, which frees registers, and works in the background.

    Args:
        tensor: (B, H, N, D). rows: of a tile, which spans the padded head_dim.

    Returns:
        A descriptor for `primitives.load_box`, or None where the hardware cannot take the tensor:
        it wants adjacent entries, and a multiple of 16 bytes as address and strides.
    """
    aligned = 16 // tensor.element_size()
    strides = [s if n > 1 else aligned for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    if tensor.stride(-1) != 1 or tensor.data_ptr() % 16:
        return None
    if any(s == 0 or s % aligned for s in strides[:-1]):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    box = [1, 1, rows, padded_head_dim(tensor.shape[-1])]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], box)


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least 16: what a tile holds."""
    return max(16, 1 << (head_dim - 1).bit_length())


def exponent_scale(scale: float) -> float:
    """The factor that takes raw scores to exponents of 2."""
    return scale * math.log2(math.e)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products follow PyTorch's setting: TF32 only where the user allowed it."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


def list_strides(counts: Tensor | None, indices: Tensor | None) -> tuple[int, ...]:
    """(batch, head, tile) strides of counts, then of indices, as the kernels take them.

    A dimension of size 1 is broadcast by stride 0. The entries of a list must be adjacent.
    """
    if counts is None or indices is None:
        return (0,) * 6
    return *_broadcast_strides(counts), *_broadcast_strides(indices)


def _broadcast_strides(lists: Tensor) -> tuple[int, ...]:
    shape, stride = lists.shape[:3], lists.stride()[:3]
    return tuple(
        0 if n == 1 and dim < 2 else s for dim, (n, s) in enumerate(zip(shape, stride, strict=True))
    )


def adjacent_lists(
    counts: Tensor | None, indices: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Block lists whose entries are adjacent in memory, as the kernels read them."""
    if indices is not None and indices.shape[-1] > 1 and indices.stride(-1) != 1:
        indices = indices.contiguous()
    return counts, indices
