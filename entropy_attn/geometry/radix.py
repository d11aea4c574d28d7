"""The permutation that sorts numbers: a stable radix sort, linear whatever the numbers are.

Three passes over 11 bits: the counters of a pass stay in the first-level cache, and keys move
with their indices, so that every pass reads in order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_BITS = 11
_BUCKETS = 1 << _BITS
_LAST = np.uint64(_BUCKETS - 1)
_LOW_HALF = np.uint64(0xFFFFFFFF)
# Steps of `_repair` a number, after which two more sorts are cheaper.
_PATIENCE = 4


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
    # The key above, the index below.
    first, second = np.empty(n, np.uint64), np.empty(n, np.uint64)
    for i in range(n):
        first[i] = np.uint64(keys[i]) << np.uint64(32) | np.uint64(i)
    for turn in range(3):
        starts = counts[turn]
        if starts.max() == n:  # all keys share this digit
            continue
        total = 0
        for bucket in range(_BUCKETS):
            count = starts[bucket]
            starts[bucket] = total
            total += count
        shift = np.uint64(32 + _BITS * turn)
        for i in range(n):
            digit = first[i] >> shift & _LAST
            place = starts[digit]
            second[place] = first[i]
            starts[digit] = place + 1
        first, second = second, first
    for i in range(n):
        first[i] &= _LOW_HALF
    return first.view(np.int64)


@njit(cache=True, nogil=True)
def ascending_order(x: np.ndarray) -> np.ndarray:
    """(n,) int64 with x[result] ascending; x (n,) float64 without NaN. -0 may come before 0.

    Sorted by the upper halves of their bits, most numbers are in place, and neighbours that are not
    trade places. Where there are too many of these, as on a line that is nearly upright, the lower
    halves are sorted first.
    """
    upper, lower = _sortable_halves(x)
    order = sorting_permutation(upper)
    if not _repair(order, x):
        order = sorting_permutation(lower)
        order = order[sorting_permutation(upper[order])]
    return order


@njit(cache=True, nogil=True)
def _sortable_halves(x):
    """(n,) uint32 twice: 64 bits that sort as the numbers do.

    The bits of doubles do once the sign is flipped, and all of the negative ones.
    """
    n = len(x)
    upper, lower = np.empty(n, np.uint32), np.empty(n, np.uint32)
    number = np.empty(1)
    bits = number.view(np.uint64)
    sign = np.uint64(1) << np.uint64(63)
    for i in range(n):
        number[0] = x[i]
        key = ~bits[0] if bits[0] & sign else bits[0] ^ sign
        upper[i], lower[i] = key >> np.uint64(32), key & _LOW_HALF
    return upper, lower


@njit(cache=True, nogil=True)
def _repair(order, x):
    """Finish an order that is nearly sorted, by insertion; False if it takes too many steps."""
    steps, most = 0, _PATIENCE * len(order)
    previous = -np.inf
    for i in range(len(order)):
        index = order[i]
        number = x[index]
        if number >= previous:
            previous = number
            continue
        place = i
        while place > 0 and x[order[place - 1]] > number:
            order[place] = order[place - 1]
            place -= 1
        order[place] = index
        steps += i - place
        if steps > most:
            return False
    return True
