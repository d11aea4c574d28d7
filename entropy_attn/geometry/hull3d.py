"""The convex hull of points in space: Qhull's, after what is exact to decide without it.

Qhull (Barber, Dobkin and Huhdanpaa, ACM Trans. Math. Softw. 22, 1996) computes in floating point:
of vertices that stick out by no more than its roundings, some may be missing. Whether points span
space at all is decided exactly, and flat sets are left to the exact hull of the plane.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from entropy_attn.geometry.filter import collinear_3d
from entropy_attn.geometry.hull2d import hull_2d, sort_order
from entropy_attn.geometry.predicates import orientation, orientation_3d


def hull_3d(points: np.ndarray) -> np.ndarray:
    """Ascending indices of the vertices of the hull.

    Args:
        points: (n, 3) finite float64, n > 0.

    Returns:
        (h,) int64. Of copies of a point the smallest index.

    Raises:
        ValueError: the points span space, but by so little that Qhull cannot tell.
    """
    rank, first, second, third = span(points)
    if rank < 3:
        axes = _shadow(points[[first, second, third]])
        return np.sort(hull_2d(np.ascontiguousarray(points[:, axes])))
    from scipy.spatial import ConvexHull, QhullError

    # Qhull's roundings are relative to the longest axis, and squares of 1e300 overflow.
    exponents = np.frexp(np.abs(points).max(0))[1]
    try:
        vertices = ConvexHull(np.ldexp(points, -exponents)).vertices
    except QhullError as error:
        raise ValueError(
            "points lie in a plane up to rounding, but not exactly: Qhull finds no hull of them; "
            "drop or round the coordinate across the plane to get that of a flat set"
        ) from error
    return np.unique(_first_copies(points, vertices))


@njit(cache=True, nogil=True)
def span(points):
    """(rank, i, j, k): 0 for one point and its copies, 1 for a line, 2 for a plane, else 3; exact.

    The points i, j, k span the line or plane; where it takes fewer, the others repeat i.
    """
    second = third = 0
    a = points[0]
    for m in range(1, len(points)):
        d = points[m]
        if second == 0:
            if a[0] != d[0] or a[1] != d[1] or a[2] != d[2]:
                second = m
        elif third == 0:
            if not collinear_3d(a, points[second], d):
                third = m
        else:
            b, c = points[second], points[third]
            turn = orientation_3d(
                a[0], a[1], a[2], b[0], b[1], b[2], c[0], c[1], c[2], d[0], d[1], d[2]
            )
            if turn != 0:
                return 3, 0, second, third
    return (second > 0) + (third > 0), 0, second, third


def _shadow(points: np.ndarray) -> tuple[int, int]:
    """Two axes onto which the plane (or line) through three points projects without folding.

    Leaving out a coordinate rounds nothing, and the hull's vertices cast those of the shadow.
    """
    a, b, c = points
    pairs = ((0, 1), (1, 2), (2, 0))
    for i, j in pairs:
        if orientation(a[i], a[j], b[i], b[j], c[i], c[j]) != 0:
            return i, j
    return next(((i, j) for i, j in pairs if a[i] != b[i] or a[j] != b[j]), (0, 1))


def _first_copies(points: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """The smallest index of the copies of each vertex."""
    x = points[sort_order(points[:, 0]), 0]
    if (x[1:] != x[:-1]).all():
        return vertices
    order = np.lexsort(points.T)  # stable: copies stay in ascending order of their indices
    ordered = points[order]
    is_new = np.append(True, (ordered[1:] != ordered[:-1]).any(1))
    first = np.empty(len(points), np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first[vertices]
