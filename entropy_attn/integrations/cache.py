"""Caches of transformers: which keys are still what they were at a layer's last call.

Boxes around a cache's keys are made once and must not outlive the keys. A cache changes between
two calls of a layer where the layer does not see it: it is cropped, reset, reordered by a beam
search, or another one comes. So before each call the tensor that the cache holds is compared with
the one that it held after the call before: the same memory, from the same place on, and not written
to since. Storage, place and version are known on the host; nothing waits for the device.

    appended to by this layer's own call   the same tensor as after that call
    cropped                                a shorter view of it: what is left is what it was
    reordered, selected, repeated, offloaded, concatenated by others   other memory
    written in place, as by reset of a static cache                    another version
    another cache, of a next ``generate`` or a copy                    another cache layer

Only what is proved to be the same is trusted; all else is taken to have changed.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from entropy_attn.decoding.boxes import KeyBoxes
from entropy_attn.decoding.settings import SparseDecoding


class _Seen:
    """A cache layer's keys as they were after a call, and their boxes."""

    def __init__(self, keys: Tensor, settings: SparseDecoding) -> None:
        self.boxes = KeyBoxes(keys, settings)
        self.note(keys)

    def note(self, keys: Tensor) -> None:
        self._identity, self._length = _identity(keys), keys.shape[2]

    def compare(self, keys: Tensor | None) -> None:
        """Take all to have changed but what is the same in ``keys``, which the cache holds now."""
        same = keys is not None and _identity(keys) == self._identity
        length = keys.shape[2] if same else 0
        if length < self._length:
            self.boxes.distrust(length)


def _identity(keys: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors if the shorter one is the front of the longer one, unchanged.

    A storage is known by a weak reference, which keeps its name from being given to another.
    Tensors of inference mode have no version; in it a write in place goes unseen.
    """
    batch, heads, _, head_dim = keys.shape
    version = None if keys.is_inference() else keys._version
    storage = StorageWeakRef(keys.untyped_storage())
    return storage, keys.data_ptr(), keys.stride(), batch, heads, head_dim, version


class CacheFollower:
    """The boxes of every cache that one attention layer was called with, and what they are worth.

    Boxes live as long as their cache.
    """

    def __init__(self, settings: SparseDecoding) -> None:
        self.settings = settings
        self._seen: weakref.WeakKeyDictionary[Any, _Seen] = weakref.WeakKeyDictionary()
        self._owner: weakref.ref | None = None
        self._before = 0

    def __reduce__(self) -> tuple[type[CacheFollower], tuple[SparseDecoding]]:
        return CacheFollower, (self.settings,)  # a copy follows caches of its own

    def before(self, owner: Any) -> None:
        """The layer is about to be called, and to append to ``owner``, one layer of a cache."""
        self._owner = None if owner is None else weakref.ref(owner)
        keys = _held(owner)
        self._before = 0 if keys is None else keys.shape[2]
        if owner is not None and owner in self._seen:
            self._seen[owner].compare(keys)

    def finished(self) -> None:
        """The call is over. The next one is followed only if `before` announces it."""
        self._owner = None

    def follows(self, key: Tensor) -> bool:
        """Whether ``key`` (B, Hkv, Nk, D) is what the cache layer holds after appending."""
        keys = _held(self._current())
        return keys is not None and keys.shape == key.shape and _identity(keys) == _identity(key)

    def boxes(self, key: Tensor) -> KeyBoxes:
        """The boxes for keys that it `follows`, which are about to be brought up to date."""
        owner = self._current()
        seen = self._seen.get(owner)
        if seen is None or not seen.boxes.fits(key):
            seen = self._seen[owner] = _Seen(key, self.settings)
        seen.note(key)
        return seen.boxes

    def passed(self, key: Tensor, q_len: int) -> None:
        """A call appended ``q_len`` keys without bringing boxes up to date."""
        owner = self._current()
        if owner is None or owner not in self._seen:
            return
        seen = self._seen[owner]
        # A cache that does not grow was written to somewhere.
        if self._before + q_len != key.shape[2] or not self.follows(key):
            seen.boxes.distrust(0)
        seen.note(key)

    def _current(self) -> Any:
        return None if self._owner is None else self._owner()


def _held(owner: Any) -> Tensor | None:
    """(B, Hkv, Nk, D), the keys that a cache layer holds, or None."""
    keys = getattr(owner, "keys", None)
    return keys if isinstance(keys, Tensor) and keys.ndim == 4 else None
