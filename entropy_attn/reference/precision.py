"""References compute in the precision that they state, also where torch.autocast is on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
DEVICES = ("cpu", "cuda")


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function with autocast off while it runs."""

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not any(torch.is_autocast_enabled(device) for device in DEVICES):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run
