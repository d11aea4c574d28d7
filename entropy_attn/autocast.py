"""torch.autocast as `scaled_dot_product_attention` follows it: inputs become its dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# torch leaves fp64 alone as well.
CAST = (torch.float16, torch.bfloat16, torch.float32)
DEVICES = ("cpu", "cuda")


def follow_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the autocast that is on for their devices, if one is."""
    if not is_autocasting():
        return tensors
    return tuple(_follow(tensor) for tensor in tensors)


def is_autocasting() -> bool:
    return any(torch.is_autocast_enabled(device) for device in DEVICES)


def _follow(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dtype not in CAST:
        return tensor  # for validation to judge
    device = tensor.device.type
    if device not in DEVICES or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
