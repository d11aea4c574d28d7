"""The vertices of convex hulls by proof, to judge every library by, this package's included.

Nothing here trusts a hull. In the plane a claimed polygon is checked edge by edge against all
points. In space the claimed vertices are joined to a surface, points that lie outside of it are
added until there is none, and what is left is checked to be corners. All by exact predicates, which
the tests check with rational numbers.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from entropy_attn.geometry.filter import candidates
from entropy_attn.geometry.polytope import triangles
from entropy_attn.geometry.predicates import orientation, orientation_3d

# The exact surface of so many takes some seconds: quadratic time.
MOST_VERTICES = 12_000


def true_vertices(points: np.ndarray, guess: np.ndarray) -> np.ndarray | None:
    """(h, d) distinct vertices of the hull of (n, d) finite points; None if that is not proved.

    Args:
        guess: indices of vertices; in the plane counterclockwise from the lexicographically
            smallest, and if they are wrong the result is None.
    """
    if points.shape[1] == 2:
        return points[guess] if is_hull_2d(points, guess) else None
    if len(guess) > MOST_VERTICES:
        return _all_of_a_sphere(points)
    return _true_vertices_3d(points, points[guess])


def differences(truth: np.ndarray, found: np.ndarray) -> tuple[int, int]:
    """How many true vertices were not found, and how many that were found are none; (h, d) each."""
    found = _distinct(found)
    both = _distinct(np.concatenate((truth, found)))
    shared = len(truth) + len(found) - len(both)
    return len(truth) - shared, len(found) - shared


def _distinct(points: np.ndarray) -> np.ndarray:
    """Each point once, sorted: `numpy.unique` along an axis, which takes ten times as long."""
    points = points[np.lexsort(points.T)] + 0.0  # -0 is 0
    is_new = np.append(True, (points[1:] != points[:-1]).any(1))
    return points[is_new[: len(points)]]


def is_hull_2d(points: np.ndarray, vertices: np.ndarray) -> bool:
    """Whether indices are the hull's corners, counterclockwise from the smallest, 3 or more."""
    corners = points[vertices]
    if len(corners) < 3:
        return False
    order = np.lexsort((corners[:, 1], corners[:, 0]))
    if order[0] != 0 or not _is_strictly_convex(corners):
        return False
    last = order[-1]
    # Left turns all the way, first ascending, then descending: once around.
    lower, upper = corners[: last + 1], np.concatenate((corners[last:], corners[:1]))
    if not _ascends(lower) or not _ascends(-upper):
        return False
    return _all_left(points, lower) and _all_left(-points, -upper)


def _ascends(chain: np.ndarray) -> bool:
    """Lexicographically and strictly."""
    x, y = np.sign(np.diff(chain, axis=0)).T
    return bool(((x > 0) | ((x == 0) & (y > 0))).all())


@njit(cache=True)
def _is_strictly_convex(corners):
    total = len(corners)
    for i in range(total):
        a, b, c = corners[i - 1], corners[i], corners[(i + 1) % total]
        if orientation(a[0], a[1], b[0], b[1], c[0], c[1]) != 1:
            return False
    return True


@njit(cache=True)
def _all_left(points, chain):
    """Whether no point is to the right of an edge of an ascending chain above or below it."""
    x = np.ascontiguousarray(chain[:, 0])
    for point in points:
        if not x[0] <= point[0] <= x[-1]:
            return False
        # The edges on both sides of a vertex with the x of the point.
        first = max(np.searchsorted(x, point[0]) - 1, 0)
        last = min(np.searchsorted(x, point[0], "right"), len(x) - 1)
        for i in range(first, last):
            a, b = chain[i], chain[i + 1]
            if orientation(a[0], a[1], b[0], b[1], point[0], point[1]) < 0:
                return False
    return True


def _true_vertices_3d(points: np.ndarray, vertices: np.ndarray) -> np.ndarray | None:
    _, outer = candidates(np.ascontiguousarray(points))
    while True:
        vertices = _distinct(vertices)
        if len(vertices) > MOST_VERTICES:
            return None
        surface = triangles(vertices)
        if len(surface) == 0:  # flat
            return None
        beyond = _beyond(outer, vertices, surface)
        if not beyond.any():
            return vertices[_is_corner(vertices, surface)]
        vertices = np.concatenate((vertices, outer[beyond]))


@njit(cache=True)
def _beyond(points, vertices, surface):
    """(n,) bool: which points see a triangle of the surface from outside."""
    found = np.zeros(len(points), np.bool_)
    for i in range(len(points)):
        for a, b, c in surface:
            if _side(vertices[a], vertices[b], vertices[c], points[i]) < 0:
                found[i] = True
                break
    return found


@njit(cache=True)
def _is_corner(vertices, surface):
    """(h,) bool: whether three different planes of the surface meet in a vertex."""
    planes = np.zeros(len(vertices), np.int64)
    known = np.empty((len(vertices), 2), np.int64)
    for f in range(len(surface)):
        for v in surface[f]:
            is_new = planes[v] < 3
            for g in known[v, : min(planes[v], 2)]:
                flat = True
                for w in surface[f]:
                    a, b, c = surface[g]
                    flat &= _side(vertices[a], vertices[b], vertices[c], vertices[w]) == 0
                is_new &= not flat
            if is_new:
                if planes[v] < 2:
                    known[v, planes[v]] = f
                planes[v] += 1
    return planes >= 3


@njit(cache=True)
def _side(a, b, c, d):
    return orientation_3d(a[0], a[1], a[2], b[0], b[1], b[2], c[0], c[1], c[2], d[0], d[1], d[2])


def _all_of_a_sphere(points: np.ndarray) -> np.ndarray | None:
    """The distinct points, if the planes through them across their radii prove all to be vertices.

    p . (p - q) > 0 for all q where |p - q|^2 > |q|^2 - |p|^2, so all are vertices where the squares
    of the radii differ by less than the square of the least distance.
    """
    from scipy.spatial import cKDTree

    points = _distinct(points)
    distance, _ = cKDTree(points).query(points, k=2)
    squares = (points * points).sum(1)
    rounding = 1e-14 * squares.max()
    least = distance[:, 1].min() ** 2 * (1 - 1e-9)
    return points if least > np.ptp(squares) + rounding else None
