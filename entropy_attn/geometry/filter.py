"""Which points can be vertices of the convex hull: all others are dropped, provably.

Extreme points along some directions span a polytope inside the hull. What lies strictly inside the
polytope lies strictly inside the hull and is no vertex. Two things make this exact:

- Any input points may span the polytope, so extremes need not be exact, nor of all points: those of
  a small sample cost next to nothing.
- Its facets are found by exact predicates, and a point is dropped where it is inside each of their
  halfspaces by more than all roundings of that test; see `polytope.halfspaces`.

So vertices of the hull are never dropped, nor copies of them, nor what is not finite.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numba import njit

from entropy_attn.geometry.polytope import halfspaces

SAMPLE = 4096
# Directions of the polytopes that are tried one after the other, for 2D and 3D, and of how many
# points each pays. A polytope is spanned by a sample of the points that the one before has left.
STAGES = {2: ((16, 16_000), (64, 16_000)), 3: ((16, 2000), (64, 8000), (320, 20_000))}
WORTHWHILE = 0.25  # a polytope that holds less of the sample costs more than it drops
BLOCK = 512  # points that are in registers and the first cache at once


def candidates(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points among which are all vertices of the hull, and all that are not finite.

    Args:
        points: (n, 2 or 3) float64, contiguous. Whether they are finite is found out on the way.

    Returns:
        (m,) int64 ascending indices, and (m, d) the points. Further copies of a vertex are kept as
        well.
    """
    index = None
    for count, least in STAGES[points.shape[1]]:
        if len(points) < least:
            break
        sample = _sample(points)
        limits = polytope(sample, count)
        if len(outside(sample, *limits)[0]) > (1 - WORTHWHILE) * len(sample):
            break
        kept, points = outside(points, *limits)
        index = kept if index is None else index[kept]
    return np.arange(len(points)) if index is None else index, points


def _sample(points: np.ndarray) -> np.ndarray:
    """Some of the finite points, evenly spaced: points are often given in some order."""
    sample = points[:: max(1, len(points) // SAMPLE)]
    return sample[np.isfinite(sample).all(1)]


def polytope(points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The halfspaces of extreme points along ``count`` directions; see `polytope.halfspaces`."""
    if len(points) == 0:
        return halfspaces(points)
    found = extremes(points, directions(count, points.shape[1]))
    return halfspaces(points[np.unique(found)])


@cache
def directions(count: int, dim: int) -> np.ndarray:
    """(count, dim) unit vectors, spread evenly: on a circle, or on a Fibonacci sphere.

    In space none is at a right angle to an axis: along a box's edge it would see no difference,
    and three extreme points on one line span no plane that a GPU could tell from all others.
    """
    steps = np.arange(count)
    if dim == 2:
        angle = 2 * math.pi / count * steps
        return np.stack([np.cos(angle), np.sin(angle)], 1)
    height = 1 - (2 * steps + 1) / count
    angle = math.pi * (3 - math.sqrt(5)) * (steps + 0.5)
    radius = np.sqrt(1 - height * height)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], 1)


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
    """The points that are not found to be strictly inside: ascending indices, and coordinates.

    Points that are not finite are outside: they fail the comparison with the box, and NaN leaves
    the slack as it is.
    """
    total, is_flat = len(points), points.shape[1] == 2
    xs, ys, zs, slack = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    places = np.empty(BLOCK, np.int64)
    kept, rest, found = np.empty(total, np.int64), np.empty(points.shape), 0
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
        here = 0
        for i in range(size):  # without a branch, which would often be predicted wrongly
            places[here] = i
            here += not slack[i] > 0.0
        for place in places[:here]:
            kept[found] = start + place
            rest[found, 0], rest[found, 1] = xs[place], ys[place]
            if not is_flat:
                rest[found, 2] = zs[place]
            found += 1
    return kept[:found].copy(), rest[:found].copy()
