"""The exact convex hull of points in the plane: sort, then a monotone chain.

Andrew's monotone chain (Inf. Process. Lett. 9, 1979) with an exact orientation test. A radix sort
makes all of it linear in the number of points, whatever their order; an adaptive algorithm needs
O(n (1 + H)). Points that are sorted already are not sorted again.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from entropy_attn.geometry.predicates import orientation


def hull_2d(points: np.ndarray) -> np.ndarray:
    """Indices of the vertices of the hull, counterclockwise from the lexicographically smallest.

    Args:
        points: (n, 2) finite float64, n > 0.

    Returns:
        (h,) int64: one point, the two ends of a segment, or the strictly convex corners. Of copies
        of a point the smallest index.
    """
    x = points[:, 0]
    order = np.arange(len(x)) if is_ascending(x) else sort_order(x)
    return _monotone_chain(points.take(order, 0), order)


@njit(cache=True, nogil=True)
def is_ascending(x):
    """Whether no number is smaller than the one before."""
    for i in range(1, len(x)):  # noqa: SIM110, numba compiles no all()
        if x[i] < x[i - 1]:
            return False
    return True


@njit(cache=True, nogil=True)
def sort_order(x):
    """(n,) indices that sort finite float64 x: a radix sort, least significant byte first.

    The bits of doubles sort as integers do once the sign is flipped, and all of the negative ones.
    """
    total, byte = len(x), np.uint64(255)
    keys, order = np.empty(total, np.uint64), np.empty(total, np.int64)
    counts = np.zeros((8, 256), np.int64)
    number = np.empty(1)
    bits = number.view(np.uint64)
    for i in range(total):
        number[0] = x[i]
        sign = np.uint64(1) << np.uint64(63)
        key = ~bits[0] if bits[0] & sign else bits[0] ^ sign
        keys[i], order[i] = key, i
        for place in range(8):
            counts[place, (key >> np.uint64(8 * place)) & byte] += 1
    next_keys, next_order = np.empty_like(keys), np.empty_like(order)
    for place in range(8):
        begin, shift = counts[place], np.uint64(8 * place)
        if total == 0 or begin[(keys[0] >> shift) & byte] == total:
            continue
        before = 0
        for digit in range(256):
            before, begin[digit] = before + begin[digit], before
        for i in range(total):
            digit = (keys[i] >> shift) & byte
            to = begin[digit]
            begin[digit] = to + 1
            next_keys[to], next_order[to] = keys[i], order[i]
        keys, next_keys = next_keys, keys
        order, next_order = next_order, order
    return order


@njit(cache=True, nogil=True)
def _monotone_chain(points, order):
    """Indices of vertices from points in ascending order of x, and their indices.

    The order within one x does not matter.
    """
    lowest, highest = _columns(points, order)
    lower, upper = _half(points, lowest, 1), _half(points, highest, -1)
    # From the leftmost column along the lower chain, then back; ends that coincide count once.
    vertices = np.empty(len(lower) + len(upper), np.int64)
    size = len(lower)
    for i in range(size):
        vertices[i] = order[lower[i]]
    for i in range(len(upper) - 1, -1, -1):
        vertex = order[upper[i]]
        if vertex != vertices[size - 1] and vertex != vertices[0]:
            vertices[size] = vertex
            size += 1
    return vertices[:size].copy()


@njit(cache=True, nogil=True)
def _columns(points, order):
    """(columns,) places of the lowest and of the highest point of each distinct x.

    That of the smallest index among copies. Others of the column lie between: no vertices.
    """
    total, count = len(order), -1
    lowest, highest = np.empty(total, np.int64), np.empty(total, np.int64)
    for i in range(total):
        x, y = points[i, 0], points[i, 1]
        if count < 0 or x != points[lowest[count], 0]:
            count += 1
            lowest[count] = highest[count] = i
            continue
        low, high = lowest[count], highest[count]
        if y < points[low, 1] or (y == points[low, 1] and order[i] < order[low]):
            lowest[count] = i
        if y > points[high, 1] or (y == points[high, 1] and order[i] < order[high]):
            highest[count] = i
    return lowest[: count + 1], highest[: count + 1]


@njit(cache=True, nogil=True)
def _half(points, columns, turn):
    """Those of the columns that are vertices of the lower hull (turn 1) or of the upper (-1)."""
    if len(columns) <= 2:
        return columns
    # Only what lies beyond the line between the ends: half of the points are of the other hull.
    a, z = columns[0], columns[-1]
    beyond, count = np.empty(len(columns), np.int64), 0
    for c in columns:
        beyond[count] = c
        count += turn * _turn(points, a, z, c) < 0
    beyond[count] = z
    kept, size = np.empty(count + 2, np.int64), 1
    kept[0] = a
    for i in range(count + 1):
        while size >= 2 and turn * _turn(points, kept[size - 2], kept[size - 1], beyond[i]) <= 0:
            size -= 1
        kept[size] = beyond[i]
        size += 1
    return kept[:size]


@njit(cache=True, nogil=True)
def _turn(points, a, b, c):
    """The orientation of three points by their places."""
    return orientation(
        points[a, 0], points[a, 1], points[b, 0], points[b, 1], points[c, 0], points[c, 1]
    )
