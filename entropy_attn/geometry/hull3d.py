"""The convex hull of points in space: Qhull's, after what is exact to decide without it.

Qhull (Barber, Dobkin and Huhdanpaa, ACM Trans. Math. Softw. 22, 1996) computes in floating point:
of vertices that stick out by no more than its roundings, some may be missing. Whether points span
space at all is decided exactly, and flat sets are left to the exact hull of the plane.
"""

from __future__ import annotations

import numpy as np

from entropy_attn.geometry.copies import first_of_equals
from entropy_attn.geometry.hull2d import hull_2d
from entropy_attn.geometry.polytope import span
from entropy_attn.geometry.predicates import orientation


def hull_3d(points: np.ndarray) -> np.ndarray:
    """Ascending indices of the vertices of the hull.

    Args:
        points: (n, 3) finite float64, n > 0.

    Returns:
        (h,) int64. Of copies of a point the smallest index.

    Raises:
        ValueError: the points span space, but by so little that Qhull cannot tell.
    """
    rank, spanning = span(points)
    if rank < 3:
        axes = _shadow(points[list(spanning[:3])])
        return np.sort(hull_2d(np.ascontiguousarray(points[:, axes])))
    from scipy.spatial import ConvexHull, QhullError

    # Of copies Qhull would keep any.
    distinct = np.flatnonzero(first_of_equals(points))
    if len(distinct) < len(points):
        points = points[distinct]
    # Qhull's roundings are relative to the longest axis, and squares of 1e300 overflow.
    exponents = np.frexp(np.abs(points).max(0))[1]
    try:
        vertices = ConvexHull(np.ldexp(points, -exponents)).vertices
    except QhullError as error:
        raise ValueError(
            "points lie in a plane up to rounding, but not exactly: Qhull finds no hull of them; "
            "drop or round the coordinate across the plane to get that of a flat set"
        ) from error
    return distinct[np.sort(vertices)]


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
