"""What is asked and kept while torch.compile traces or a CUDA graph is captured.

Objects that code under torch.compile needs are found by a text: a function marked
`torch.compiler.assume_constant_result` runs while torch.compile traces, and texts and numbers may
go in and out of it, but before torch 2.13 no objects.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch

_numbers = count()
_objects: WeakValueDictionary[str, Any] = WeakValueDictionary()


def key_of(thing: Any) -> str:
    """A new text by which `find` knows ``thing`` for as long as it lives."""
    key = f"{type(thing).__name__} {next(_numbers)}"
    _objects[key] = thing
    return key


def find(key: str) -> Any:
    return _objects[key]


def is_capturing(device: torch.device | None) -> bool:
    """Whether launches on the device are recorded for a CUDA graph; None is no GPU."""
    is_cuda = device is not None and device.type == "cuda"
    return is_cuda and torch.cuda.is_current_stream_capturing()
