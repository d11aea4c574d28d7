"""Which points can be vertices of the convex hull: all others are dropped, provably.

Extreme points along some directions span a polytope inside the hull. What lies strictly inside the
polytope lies strictly inside the hull and is no vertex. Two things make this exact:

- Any input points may span the polytope, so extremes need not be exact, nor of all points: those of
  a small sample cost next to nothing.
- The polytope is the intersection of the halfspaces of its facets, and each facet's plane goes
  through two (three) of its vertices and has all others on one side. `halfspaces` tries all pairs
  (triples) with exact predicates, so that none is missing. A point is dropped where it is inside
  each halfspace by more than all roundings of that test; the bound stands at `_threshold`.

So vertices of the hull are never dropped, nor copies of them, nor what is not finite.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numba import njit

from entropy_attn.geometry.predicates import U, orientation, orientation_3d

SAMPLE = 4096
# Directions of the polytopes that are tried one after the other, for 2D and 3D. The first one is
# spanned by a sample and tested on all points.
STAGES = {2: (16, 64), 3: (16, 64, 128)}
ENOUGH = 1000  # Qhull or a sort take it from here
BLOCK = 512  # points that are in registers and the first cache at once

# Of a test, see `_threshold`.
ROUNDINGS = 32.0
UNDERFLOW = 2.0**-1000
LARGE = 2.0**1000


def candidates(points: np.ndarray) -> np.ndarray:
    """Ascending indices of points among which are all vertices of the hull, and all not finite.

    Args:
        points: (n, 2 or 3) float64, contiguous. Whether they are finite is found out on the way.

    Returns:
        (m,) int64. Further copies of a vertex are kept as well.
    """
    if len(points) <= ENOUGH:
        return np.arange(len(points))
    index = None
    for count in STAGES[points.shape[1]]:
        kept = outside(points, *polytope(_sample(points), count))
        index = kept if index is None else index[kept]
        # Further polytopes cost more than they drop where this one dropped little.
        if len(kept) <= ENOUGH or 2 * len(kept) > len(points):
            break
        points = points[kept]
    return index


def _sample(points: np.ndarray) -> np.ndarray:
    """Some of the finite points, evenly spaced: points are often given in some order."""
    sample = points[:: max(1, len(points) // SAMPLE)]
    return sample[np.isfinite(sample).all(1)]


def polytope(points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The halfspaces of extreme points along ``count`` directions; see `halfspaces`."""
    if len(points) == 0:
        return halfspaces(points)
    found = extremes(points, directions(count, points.shape[1]))
    return halfspaces(np.unique(points[found], axis=0))


@cache
def directions(count: int, dim: int) -> np.ndarray:
    """(count, dim) unit vectors, spread evenly: on a circle, or on a Fibonacci sphere."""
    steps = np.arange(count)
    if dim == 2:
        angle = 2 * math.pi / count * steps
        return np.stack([np.cos(angle), np.sin(angle)], 1)
    height = 1 - (2 * steps + 1) / count
    angle = math.pi * (3 - math.sqrt(5)) * steps
    radius = np.sqrt(1 - height * height)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], 1)


def halfspaces(vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The convex hull of a few points, as what a point strictly inside it fulfils.

    Args:
        vertices: (m, d) distinct, finite.

    Returns:
        normals (f, d), thresholds (f,) and box (d,). A point x with |x| <= box in each coordinate
        and normal . x > threshold for each halfspace, computed in float64 with or without fused
        multiply-adds, lies strictly inside. Without volume there is no inside: f = 0, and the box
        is -1.
    """
    find = _halfspaces_2d if vertices.shape[1] == 2 else _halfspaces_3d
    normals, thresholds = find(vertices)
    if len(normals) == 0:
        return normals, thresholds, np.full(vertices.shape[1], -1.0)
    return normals, thresholds, np.abs(vertices).max(0)


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


@njit(cache=True, nogil=True)
def _box(vertices):
    box = np.zeros(vertices.shape[1])
    for vertex in vertices:
        box = np.maximum(box, np.abs(vertex))
    return box


@njit(cache=True, nogil=True)
def _halfspaces_2d(vertices):
    """Lines through two vertices that have no vertices on one side; each line once."""
    count, box = len(vertices), _box(vertices)
    normals, thresholds = np.empty((count * count, 2)), np.empty(count * count)
    found = 0
    for i in range(count):
        for j in range(i + 1, count):
            a, b = vertices[i], vertices[j]
            side = 0
            for k in range(count):
                if k in (i, j):
                    continue
                c = vertices[k]
                turn = orientation(a[0], a[1], b[0], b[1], c[0], c[1])
                # i and j must be the first two on their line, and all others on one side of it.
                if turn == -side != 0 or (turn == 0 and k < j):
                    side = 0
                    break
                side = turn if turn != 0 else side
            if side != 0:
                normal = np.array([a[1] - b[1], b[0] - a[0]]) * side
                thresholds[found] = _threshold(normal, np.abs(normal) * (1 + 4 * U), a, box)
                normals[found] = normal
                found += 1
    return normals[:found].copy(), thresholds[:found].copy()


@njit(cache=True, nogil=True)
def _halfspaces_3d(vertices):
    """Planes through three vertices that have no vertices on one side; each plane once."""
    count, box = len(vertices), _box(vertices)
    normals, thresholds = np.empty((2 * count, 3)), np.empty(2 * count)
    order, found = np.arange(count), 0
    for i in range(count):
        for j in range(i + 1, count):
            for k in range(j + 1, count):
                side = _side_of_triple(vertices, order, i, j, k)
                if side == 0:
                    continue
                u, w = vertices[j] - vertices[i], vertices[k] - vertices[i]
                normal, size = np.empty(3), np.empty(3)
                for x in range(3):
                    y, z = (x + 1) % 3, (x + 2) % 3
                    # Inside is below the plane where side is 1.
                    normal[x] = (u[z] * w[y] - u[y] * w[z]) * side
                    size[x] = abs(u[y] * w[z]) + abs(u[z] * w[y])
                thresholds[found] = _threshold(normal, size, vertices[i], box)
                normals[found] = normal
                found += 1
    return normals[:found].copy(), thresholds[:found].copy()


@njit(cache=True, nogil=True)
def _side_of_triple(vertices, order, i, j, k):
    """The sign of orientation_3d of all vertices off the plane of three, 0 where it differs.

    Also 0 where i, j, k are not the first three of their plane that span it. A vertex that tells so
    moves to the front of ``order``: it is likely to tell for the next triple too.
    """
    ax, ay, az = vertices[i, 0], vertices[i, 1], vertices[i, 2]
    bx, by, bz = vertices[j, 0], vertices[j, 1], vertices[j, 2]
    cx, cy, cz = vertices[k, 0], vertices[k, 1], vertices[k, 2]
    side = 0
    for place in range(len(order)):
        m = order[place]
        if m in (i, j, k):
            continue
        dx, dy, dz = vertices[m, 0], vertices[m, 1], vertices[m, 2]
        turn = orientation_3d(ax, ay, az, bx, by, bz, cx, cy, cz, dx, dy, dz)
        differs = turn == -side != 0
        if turn == 0 and m < k:
            differs = m < j or not collinear_3d(vertices[i], vertices[j], vertices[m])
        if differs:
            for later in range(place, 0, -1):
                order[later] = order[later - 1]
            order[0] = m
            return 0
        side = turn if turn != 0 else side
    return side


@njit(cache=True, nogil=True)
def collinear_3d(a, b, c):
    """Whether three points of space lie on a line, exactly: their three shadows do."""
    flat = orientation(a[0], a[1], b[0], b[1], c[0], c[1]) == 0
    flat = flat and orientation(a[1], a[2], b[1], b[2], c[1], c[2]) == 0
    return flat and orientation(a[2], a[0], b[2], b[0], c[2], c[0]) == 0


@njit(cache=True, nogil=True, inline="always")
def _load(points, start, size, xs, ys, zs):
    """Coordinates of a block, each in an array of its own: the compiler vectorises over points."""
    part = points[start : start + size]
    for i in range(size):
        xs[i] = part[i, 0]
        ys[i] = part[i, 1]
    if points.shape[1] == 3:
        for i in range(size):
            zs[i] = part[i, 2]


# NaN cannot come up: the points are finite, and no direction is longer than 1.
@njit(cache=True, nogil=True, fastmath={"contract", "nnan", "nsz"})
def extremes(points, directions):
    """(count,) indices of the points that lie furthest along each direction, up to rounding."""
    total, is_flat = len(points), points.shape[1] == 2
    xs, ys, zs, reach = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    best = np.full(len(directions), -np.inf)
    index = np.zeros(len(directions), np.int64)
    for start in range(0, total, BLOCK):
        size = min(BLOCK, total - start)
        _load(points, start, size, xs, ys, zs)
        for k in range(len(directions)):
            dx, dy = directions[k, 0], directions[k, 1]
            furthest = -np.inf
            if is_flat:
                for i in range(size):
                    reach[i] = dx * xs[i] + dy * ys[i]
                    furthest = max(furthest, reach[i])
            else:
                dz = directions[k, 2]
                for i in range(size):
                    reach[i] = dx * xs[i] + dy * ys[i] + dz * zs[i]
                    furthest = max(furthest, reach[i])
            if furthest > best[k]:
                best[k] = furthest
                index[k] = start + np.argmax(reach[:size])
    return index


@njit(cache=True, nogil=True, fastmath={"contract"})
def outside(points, normals, thresholds, box):
    """Ascending indices of the points that are not found to be strictly inside.

    Points that are not finite are outside: they fail the comparison with the box, and NaN leaves
    the slack as it is.
    """
    total, is_flat = len(points), points.shape[1] == 2
    xs, ys, zs, slack = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    kept, found = np.empty(total, np.int64), 0
    for start in range(0, total, BLOCK):
        size = min(BLOCK, total - start)
        _load(points, start, size, xs, ys, zs)
        for i in range(size):
            slack[i] = 1.0 if (abs(xs[i]) <= box[0]) & (abs(ys[i]) <= box[1]) else -1.0
        if not is_flat:
            for i in range(size):
                slack[i] = slack[i] if abs(zs[i]) <= box[2] else -1.0
        for k in range(len(normals)):
            nx, ny, threshold = normals[k, 0], normals[k, 1], thresholds[k]
            if is_flat:
                for i in range(size):
                    value = nx * xs[i] + (ny * ys[i] - threshold)
                    slack[i] = value if value < slack[i] else slack[i]
            else:
                nz = normals[k, 2]
                for i in range(size):
                    value = nx * xs[i] + (ny * ys[i] + (nz * zs[i] - threshold))
                    slack[i] = value if value < slack[i] else slack[i]
        for i in range(size):
            if not slack[i] > 0.0:
                kept[found] = start + i
                found += 1
    return kept[:found].copy()
