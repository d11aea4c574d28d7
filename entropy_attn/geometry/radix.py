"""The permutation that sorts integer keys: a stable radix sort, several times faster than argsort.

Three passes over 11 bits: the counters of a pass stay in the first-level cache, and keys move
with their indices, so that every pass reads in order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_BITS = 11
_BUCKETS = 1 << _BITS


@njit(cache=True, nogil=True)
def sorting_permutation(keys: np.ndarray) -> np.ndarray:
    """(n,) int64 with keys[result] ascending, equal keys in their order; keys (n,) uint32."""
    n = len(keys)
    counts = np.zeros((3, _BUCKETS), np.int64)
    for i in range(n):
        key = keys[i]
        counts[0, key & 0x7FF] += 1
        counts[1, key >> 11 & 0x7FF] += 1
        counts[2, key >> 22] += 1
    first, second = np.empty(n, np.uint64), np.empty(n, np.uint64)
    for i in range(n):
        first[i] = np.uint64(keys[i]) << np.uint64(32) | np.uint64(i)
    order = np.empty(n, np.int64)
    for turn in range(3):
        starts = counts[turn]
        if starts.max() == n:  # all keys share this digit
            continue
        total = 0
        for bucket in range(_BUCKETS):
            count = starts[bucket]
            starts[bucket] = total
            total += count
        shift = np.uint64(32 + 11 * turn)
        for i in range(n):
            digit = np.int64(first[i] >> shift & np.uint64(0x7FF))
            second[starts[digit]] = first[i]
            starts[digit] += 1
        first, second = second, first
    for i in range(n):
        order[i] = np.int64(first[i] & np.uint64(0xFFFFFFFF))
    return order
