"""The exact convex hull of points in the plane: sort, then a monotone chain.

Andrew's monotone chain (Inf. Process. Lett. 9, 1979) with an exact orientation test. A radix sort
makes all of it linear in the number of points, whatever their order; an adaptive algorithm needs
O(n (1 + H)). Points that are sorted already are not sorted again.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from entropy_attn.geometry.predicates import orientation
from entropy_attn.geometry.radix import ascending_order


def hull_2d(points: np.ndarray) -> np.ndarray:
    """Indices of the vertices of the hull, counterclockwise from the lexicographically smallest.

    Args:
        points: (n, 2) finite float64, n > 0.

    Returns:
        (h,) int64: one point, the two ends of a segment, or the strictly convex corners. Of copies
        of a point the smallest index.
    """
    x = points[:, 0]
    order = np.arange(len(x)) if is_ascending(x) else ascending_order(x)
    return _monotone_chain(points.take(order, 0), order)


@njit(cache=True, nogil=True)
def is_ascending(x):
    """Whether no number is smaller than the one before."""
    for i in range(1, len(x)):  # noqa: SIM110, numba compiles no all()
        if x[i] < x[i - 1]:
            return False
    return True


@njit(cache=True, nogil=True)
def _monotone_chain(points, order):
    """Indices of vertices from points in ascending order of x, and their indices.

    The order within one x does not matter.
    """
    first, last = _ends(points, order)
    # What lies below the line between the ends is of the lower hull at most, what lies above of the
    # upper one; what lies on it is no vertex.
    total = len(points)
    below, above = np.empty(total + 1, np.int64), np.empty(total + 1, np.int64)
    below[0] = above[0] = first
    low = high = 1
    for i in range(total):
        side = _turn(points, first, last, i)
        below[low] = above[high] = i
        low += side < 0
        high += side > 0
    below[low] = above[high] = last
    lower = _half(points, order, below[: low + 1], 1)
    upper = _half(points, order, above[: high + 1], -1)
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
def _ends(points, order):
    """Places of the lexicographically smallest and largest point; of copies the smallest index."""
    first, last = 0, len(points) - 1
    for i in range(1, len(points)):
        if points[i, 0] != points[0, 0]:
            break
        if _comes_first(points, order, i, first, 1):
            first = i
    for i in range(len(points) - 2, -1, -1):
        if points[i, 0] != points[last, 0]:
            break
        if _comes_first(points, order, i, last, -1):
            last = i
    return first, last


@njit(cache=True, nogil=True)
def _comes_first(points, order, i, j, turn):
    """Of two points of one x: is i lower (turn 1) or higher (-1), or a copy given before?"""
    difference = turn * (points[i, 1] - points[j, 1])
    return difference < 0 or (difference == 0 and order[i] < order[j])


@njit(cache=True, nogil=True)
def _half(points, order, places, turn):
    """Those of the places that are vertices of the lower hull (turn 1) or of the upper (-1)."""
    kept, size = np.empty(len(places), np.int64), 0
    for place in places:
        if size > 0 and points[place, 0] == points[kept[size - 1], 0]:
            if not _comes_first(points, order, place, kept[size - 1], turn):
                continue
            size -= 1
        while size >= 2 and turn * _turn(points, kept[size - 2], kept[size - 1], place) <= 0:
            size -= 1
        kept[size] = place
        size += 1
    return kept[:size]


@njit(cache=True, nogil=True)
def _turn(points, a, b, c):
    """The orientation of three points by their places."""
    return orientation(
        points[a, 0], points[a, 1], points[b, 0], points[b, 1], points[c, 0], points[c, 1]
    )
