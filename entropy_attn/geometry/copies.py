"""Which points of a set coincide."""

from __future__ import annotations

import numpy as np
from numba import njit


def first_of_equals(points: np.ndarray) -> np.ndarray:
    """(n,) bool: False for a point that one of lower index equals; points (n, 2 or 3) float."""
    slots = 1 << max(2 * len(points), 2).bit_length()
    # 0 + -0 is 0: both zeros have one bit pattern.
    bits = (points.astype(np.float64) + 0.0).view(np.uint64)
    return _first_of_equals(bits, np.full(slots, -1, np.int32 if len(points) < 2**31 else np.int64))


@njit(cache=True, nogil=True)
def _first_of_equals(bits, table):
    """By a hash table with open addressing; at most half of its slots are taken."""
    is_first = np.ones(len(bits), np.bool_)
    last = np.uint64(len(table) - 1)
    for i in range(len(bits)):
        word = bits[i, 0] * np.uint64(0x9E3779B97F4A7C15)
        for axis in range(1, bits.shape[1]):
            word = (word ^ word >> np.uint64(32) ^ bits[i, axis]) * np.uint64(0xBF58476D1CE4E5B9)
        slot = (word ^ word >> np.uint64(29)) & last
        while table[slot] >= 0:
            if _equal(bits[table[slot]], bits[i]):
                is_first[i] = False
                break
            slot = slot + np.uint64(1) & last
        if is_first[i]:
            table[slot] = i
    return is_first


@njit(cache=True, nogil=True)
def _equal(a, b):
    return a[0] == b[0] and a[1] == b[1] and (len(a) == 2 or a[2] == b[2])
