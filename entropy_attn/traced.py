"""Objects that code under torch.compile finds by a text.

A function marked `torch.compiler.assume_constant_result` runs while torch.compile traces. Texts
and numbers may go in and out of it, but before torch 2.13 no objects.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

_numbers = count()
_objects: WeakValueDictionary[str, Any] = WeakValueDictionary()


def key_of(thing: Any) -> str:
    """A new text by which `find` knows ``thing`` for as long as it lives."""
    key = f"{type(thing).__name__} {next(_numbers)}"
    _objects[key] = thing
    return key


def find(key: str) -> Any:
    return _objects[key]
