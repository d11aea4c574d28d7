"""What every launcher needs on the host: device, architecture, strides, precision."""

from __future__ import annotations

import contextlib
import math
from functools import cache

import torch
from torch import Tensor


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


def list_strides(
    counts: Tensor | None, indices: Tensor | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(batch, head, tile) strides of block lists; a dimension of size 1 is broadcast by stride 0.

    The entries of a list must be adjacent.
    """
    if counts is None or indices is None:
        return (0, 0, 0), (0, 0, 0)
    return _broadcast_strides(counts), _broadcast_strides(indices)


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
