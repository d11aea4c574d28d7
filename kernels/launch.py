"""What every launcher needs on the host: device, architecture, strides, precision."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from entropy_attn.kernels.plans import dot_precision

# Arguments that differ from call to call. Triton compiles a kernel anew for values of 1 and for
# multiples of 16, which gains nothing here: a new length must not cost seconds. Strides of lists
# follow the lengths; they are single arguments, as the entries of a tuple are always specialised.
LENGTHS = (
    "q_len", "kv_len", "padded_len", "q_tiles", "kv_tiles", "window", "masses_a_tile",
    "count_stride_b", "count_stride_h", "count_stride_t",
    "index_stride_b", "index_stride_h", "index_stride_t",
    "terms_a_head", "terms_a_row", "term_stride",
)  # fmt: skip

GLUON_VERSION = ("3", "6")

# Architectures on which tiles fetched by the copy engine were measured to be faster.
COPY_ENGINE = ("sm90",)


def architecture(device: torch.device) -> str:
    """One of "sm80", "sm90", "sm100", "gfx…" and so on; "cpu" under Triton's interpreter."""
    return _architecture(device.index or 0) if device.type == "cuda" else "cpu"


@cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def overlapping(device: torch.device) -> dict[str, bool]:
    """Constants of a launch that may begin before the one ahead has ended, on sm_90.

    Its kernel has to call `primitives.wait_for_last`, and may call `primitives.may_start_next`.
    """
    is_possible = architecture(device) == "sm90"
    return {"OVERLAP": is_possible} | ({"launch_pdl": True} if is_possible else {})


@cache
def device_limits(index: int) -> tuple[int, int]:
    """(multiprocessors, bytes of L2) of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.L2_cache_size


def other_gluon() -> str | None:
    """Why kernels in Gluon, whose names change with Triton's versions, cannot run; or None."""
    version = triton.__version__
    if tuple(version.split(".")[:2]) == GLUON_VERSION:
        return None
    return f"it was tried with Triton {'.'.join(GLUON_VERSION)} only, and this is {version}"


def has_copy_engine(arch: str, *tensors: Tensor) -> bool:
    """Whether tiles of these tensors can be fetched by the copy engine (TMA).

    It computes addresses and bounds itself, which frees registers, and works in the background.
    Tiles are of two-byte entries; for the rest see `is_describable`.
    """
    return arch in COPY_ENGINE and all(
        tensor.element_size() == 2 and is_describable(tensor) for tensor in tensors
    )


def is_describable(tensor: Tensor) -> bool:
    """Whether the copy engine can be told where a tensor lies.

    It wants adjacent entries, and a multiple of 16 bytes as address and strides.
    """
    *strides, last = tensor.stride()
    rows = [s for n, s in zip(tensor.shape, strides, strict=False) if n > 1]
    return (
        last == 1
        and tensor.data_ptr() % 16 == 0
        and all(s > 0 and s * tensor.element_size() % 16 == 0 for s in rows)
    )


def tile_descriptor(tensor: Tensor, rows: int) -> Any:
    """What `primitives.load_box` takes to fetch (rows, padded head_dim) tiles of (B, H, N, D)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    # The stride of a dimension of size 1 is never used, but has to be a valid one.
    strides = [s if n > 1 else 16 for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    box = [1, 1, rows, padded_head_dim(tensor.shape[-1])]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], box)


def row_descriptor(tensor: Tensor, length: int) -> Any:
    """A descriptor of the (.., length) pieces of the rows of a contiguous tensor, taken as 2D."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor.flatten(0, -2), [1, length])


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is made for kernels and takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, 0 for 0; as Triton's own, which is slow on the host too."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least 16: what a tile holds."""
    return max(16, next_power_of_2(head_dim))


def exponent_scale(scale: float) -> float:
    """The factor that takes raw scores to exponents of 2."""
    return scale * math.log2(math.e)


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


def unexpanded(tensor: Tensor) -> Tensor:
    """The tensor with the first two dimensions cut to 1 where they are expanded (stride 0)."""
    for dim in (0, 1):
        if tensor.stride(dim) == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def weight_strides(weights: Tensor | None) -> tuple[int, int, int]:
    """Strides of (B0, B1, n) weights, a dimension of size 1 broadcast; 0 where there are none."""
    if weights is None:
        return 0, 0, 0
    first, second = (weights.stride(dim) if weights.shape[dim] > 1 else 0 for dim in (0, 1))
    return first, second, weights.stride(2)


def fp32_dot_precision(tensor: Tensor) -> str:
    """Of products whose operands are fp32, derived from an input that may be in half precision.

    For half precision three TF32 products, which lose next to nothing, on tensor cores. AMD's
    matrix cores take fp32 as it is.
    """
    if tensor.dtype == torch.float32:
        return dot_precision(tensor.dtype)
    return "tf32x3" if architecture(tensor.device).startswith("sm") else "ieee"


def split_rows(tiles: int, programs_a_split: int, programs: int = 1024) -> tuple[int, int]:
    """How many programs share the tiles of rows of one problem, and how many tiles each takes.

    The same on every GPU, so that sums over programs are the same numbers everywhere.

    Args:
        programs_a_split: programs that are started for each split.
        programs: to aim at, a few a multiprocessor.
    """
    splits = max(1, min(tiles, programs // max(1, programs_a_split)))
    share = max(1, ceil_div(tiles, splits))
    return max(1, ceil_div(tiles, share)), share
