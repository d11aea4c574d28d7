"""The halfspaces of a polytope that a few points span, such that what passes their test is inside.

A polytope is the intersection of the halfspaces of its facets, and each facet's plane goes through
two (three) of its vertices. Which ones, exact predicates decide, so that no facet is missing. A
point passes where it is inside each halfspace by more than all roundings of that test; the bound
stands at `_threshold`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from entropy_attn.geometry.hull2d import hull_2d
from entropy_attn.geometry.predicates import U, collinear_3d, orientation_3d

# Of a test, see `_threshold`.
ROUNDINGS = 32.0
UNDERFLOW = 2.0**-1000
LARGE = 2.0**1000


def halfspaces(vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The convex hull of a few points, as what a point strictly inside it fulfils.

    Args:
        vertices: (m, d) finite; some may lie inside.

    Returns:
        normals (f, d), thresholds (f,) and box (d,). A point x with |x| <= box in each coordinate
        and normal . x > threshold for each halfspace, computed in float64 with or without fused
        multiply-adds, lies strictly inside. Without volume there is no inside: f = 0, and the box
        is -1. A facet of more than three vertices comes up once for each triangle that it is cut
        into.
    """
    dim = vertices.shape[1]
    facets = np.empty((0, dim), np.int64)
    if len(vertices) > 0:
        facets = edges(vertices) if dim == 2 else triangles(vertices)
    if len(facets) == 0:
        return np.empty((0, dim)), np.empty(0), np.full(dim, -1.0)
    box = np.abs(vertices).max(0)
    return *_halfspaces(vertices, facets, box), box


@njit(cache=True, nogil=True)
def _halfspaces(vertices, facets, box):
    """Normals that point inwards, and thresholds, of facets given by the indices of vertices."""
    count, dim = facets.shape
    normals, thresholds = np.empty((count, dim)), np.empty(count)
    size = np.empty(dim)
    for f in range(count):
        a, b = vertices[facets[f, 0]], vertices[facets[f, 1]]
        if dim == 2:
            normals[f, 0], normals[f, 1] = a[1] - b[1], b[0] - a[0]
            size[:] = np.abs(normals[f]) * (1 + 4 * U)
        else:
            u, w = b - a, vertices[facets[f, 2]] - a
            for x in range(3):
                y, z = (x + 1) % 3, (x + 2) % 3
                normals[f, x] = u[z] * w[y] - u[y] * w[z]
                size[x] = abs(u[y] * w[z]) + abs(u[z] * w[y])
        thresholds[f] = _threshold(normals[f], size, a, box)
    return normals, thresholds


@njit(cache=True, nogil=True)
def _threshold(normal, size, point, box):
    """What normal . x must exceed for a point x of the box to be strictly inside.

    The plane through ``point`` has an exact normal N; |normal - N| <= 4 U size and |N| <= size in
    each coordinate. With S = size . box, in units of U S: the rounded normal changes
    N . (x - point) by at most 8, since |x - point| <= 2 box; the caller's products and sums, which
    may reach 2 S, are off by at most 8, and this threshold by 5. ROUNDINGS is above their sum.

    What underflows in a normal is below 2^-1073, and multiplied by the box: hence the first
    UNDERFLOW. All other underflows are below the second. Where something could overflow, the normal
    is set to 0 and the threshold is infinite: the test fails for every point.
    """
    offset, scale = 0.0, 0.0
    for i in range(len(normal)):
        offset += normal[i] * point[i]
        scale += (size[i] + UNDERFLOW) * box[i]
    if not scale < LARGE:
        normal[:] = 0.0
        return np.inf
    return offset + (ROUNDINGS * U * scale + UNDERFLOW)


def edges(points: np.ndarray) -> np.ndarray:
    """(f, 2) indices: the border of the hull of points in the plane, counterclockwise.

    Points on a line have none.
    """
    corners = hull_2d(points)
    if len(corners) < 3:
        return np.empty((0, 2), np.int64)
    return np.stack((corners, np.roll(corners, -1)), 1)


@njit(cache=True, nogil=True)
def triangles(points):
    """(f, 3) indices: the hull of a few points in space, counterclockwise as seen from outside.

    Point by point: the triangles that it sees from outside give way to those that join it to the
    border of what it sees. A point in the plane of a triangle does not see it; then it is on the
    line of no edge of that border, since it would see neither side. So all triangles have an area,
    and each facet's plane comes up. Points without volume have no triangles.
    """
    rank, start = span(points)
    if rank < 3:
        return np.empty((0, 3), np.int64)
    total = len(points)
    found = np.empty((2 * total, 3), np.int64)  # 2 h - 4 is Euler's bound
    # The last point that saw a triangle on the left of an edge.
    seen = np.full((total, total), -1, np.int32)
    i, j, k, m = start
    if _side(points, i, j, k, m) < 0:
        j, k = k, j
    found[0], found[1] = (i, j, k), (i, m, j)
    found[2], found[3] = (j, m, k), (k, m, i)
    count = 4
    for new in range(total):
        if new in (i, j, k, m):
            continue
        # Those that it sees move to the end, by swaps.
        hidden, end = 0, count
        while hidden < end:
            a, b, c = found[hidden, 0], found[hidden, 1], found[hidden, 2]
            if _side(points, a, b, c, new) < 0:
                seen[a, b] = seen[b, c] = seen[c, a] = new
                end -= 1
                found[hidden], found[end] = found[end].copy(), found[hidden].copy()
            else:
                hidden += 1
        border = np.empty((3 * (count - hidden), 3), np.int64)
        size = 0
        for place in range(hidden, count):
            for corner in range(3):
                a, b = found[place, corner], found[place, (corner + 1) % 3]
                if seen[b, a] != new:
                    border[size, 0], border[size, 1], border[size, 2] = a, b, new
                    size += 1
        found[hidden : hidden + size] = border[:size]
        count = hidden + size
    return found[:count].copy()


@njit(cache=True, nogil=True)
def span(points):
    """What points span, exactly: (rank, the indices of four).

    The rank is 0 for one point and its copies, 1 for a line, 2 for a plane, else 3. The first rank
    + 1 of the four points span it; the others repeat the first.
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
        elif _side(points, 0, second, third, m) != 0:
            return 3, (0, second, third, m)
    return (second > 0) + (third > 0), (0, second, third, 0)


@njit(cache=True, nogil=True)
def _side(points, a, b, c, d):
    """The 3D orientation of four points by their indices."""
    p, q, r, s = points[a], points[b], points[c], points[d]
    return orientation_3d(p[0], p[1], p[2], q[0], q[1], q[2], r[0], r[1], r[2], s[0], s[1], s[2])
