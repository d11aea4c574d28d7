"""Fill what torch.empty returns, so that an output nobody wrote cannot look right.

The memory of a new tensor is often that of an old one with the right answer in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MAKERS = {
    torch: ("empty", "empty_like", "empty_strided"),
    torch.Tensor: ("new_empty", "new_empty_strided"),
}


def poison_memory(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Make floating-point tensors come with NaN, integers with a number that is no index."""
    for owner, names in MAKERS.items():
        for name in names:
            replace(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = function(*args, **kwargs)
        if tensor.device.type == "meta" or torch.compiler.is_compiling():
            return tensor
        if isinstance(tensor, torch._subclasses.FakeTensor):
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(2**30 + 7)
        return tensor

    return filled
