"""The nearest of k anchors for every point of the plane, without looking at all k.

A quadtree over the square around the points: each node knows the anchors that can be nearest to a
point inside it. Of a square with centre c and half diagonal r, whose nearest anchor is at distance
m from c, every point has its nearest anchor within m + 2r of c: the others are dropped, and the
children look at the rest only. The tree grows where a
sample of the points lies, so that empty plane costs nothing; it is right everywhere.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from scipy.spatial import cKDTree

from entropy_attn.geometry.hilbert import bounds

# A node with so few anchors is not split; nor is one at the last level.
_FEW, _LEVELS = 4, 15
# A table of 2^6 squares a side leads past the first levels.
_SKIPPED = 6
# Points that grow the tree, for each anchor and at least.
_SAMPLES, _LEAST_SAMPLE = 8, 4096


def nearest_cells(points: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(n,) int32 index of the nearest anchor; of equally near ones any.

    Args:
        points: (n, d) finite, d 2 or 3, n > 0.
        anchors: (k, d) finite float64, k > 0.
    """
    if points.shape[1] != 2:
        return cKDTree(anchors).query(points)[1].astype(np.int32)
    low, high = bounds(points)
    # Halves, since a difference of two finite numbers may overflow; relative to the points, so
    # that a set far from the origin loses no digits; and in a unit whose square is a number.
    width = float((high * 0.5 - low * 0.5).max())
    unit = math.ldexp(1.0, -max(min(math.frexp(width)[1], 1000), -1000))
    low, near, width = low * 0.5, (anchors * 0.5 - low * 0.5) * unit, width * unit
    stride = max(1, len(points) // max(_LEAST_SAMPLE, _SAMPLES * len(anchors)))
    child, span, items = _tree(points[::stride], stride, low, unit, width, near)
    return _look_up(points, low, unit, width, near, child, span, items)


@njit(cache=True, nogil=True)
def _place(points, i, low, unit, width):
    """A point relative to the square, and its column and row at the last level."""
    x = (np.float64(points[i, 0]) * 0.5 - low[0]) * unit
    y = (np.float64(points[i, 1]) * 0.5 - low[1]) * unit
    finest = (1 << _LEVELS) / width if width > 0 else 0.0
    last = (1 << _LEVELS) - 1
    return x, y, min(int(x * finest), last), min(int(y * finest), last)


@njit(cache=True, nogil=True)
def _tree(points, weight, low, unit, width, anchors):
    """child: (nodes,) the first of four children, 0 for none; span: (nodes, 2) of the items."""
    child, visits = np.zeros(1024, np.int32), np.zeros(1024, np.int32)
    start, stop = np.zeros(1024, np.int32), np.zeros(1024, np.int32)
    items = np.arange(max(4096, 8 * len(anchors))).astype(np.int32)
    nodes, used = 1, len(anchors)
    stop[0] = used
    for i in range(len(points)):
        _, _, column, row = _place(points, i, low, unit, width)
        node, level = 0, _LEVELS
        while level > 0:
            if child[node] == 0:
                count = stop[node] - start[node]
                visits[node] += weight
                # Its points must have paid for a split.
                if count <= _FEW or visits[node] <= count:
                    break
                if nodes + 4 > len(child):
                    child, visits = _doubled(child), _doubled(visits)
                    start, stop = _doubled(start), _doubled(stop)
                while used + 4 * count > len(items):
                    items = _doubled(items)
                child[node] = nodes
                side = width / (1 << (_LEVELS - level + 1))
                for quarter in range(4):
                    left = (column >> level << 1 | quarter >> 1) * side
                    lower = (row >> level << 1 | quarter & 1) * side
                    start[nodes] = used
                    used = _keep(anchors, items, start[node], stop[node], left, lower, side, used)
                    stop[nodes] = used
                    nodes += 1
            level -= 1
            node = child[node] + ((column >> level & 1) << 1 | (row >> level & 1))
    span = np.empty((nodes, 2), np.int32)
    span[:, 0], span[:, 1] = start[:nodes], stop[:nodes]
    return child[:nodes].copy(), span, items[:used].copy()


@njit(cache=True, nogil=True)
def _look_up(points, low, unit, width, anchors, child, span, items):
    labels = np.empty(len(points), np.int32)
    entry = np.empty(1 << 2 * _SKIPPED, np.int32)
    for square in range(len(entry)):
        column, row = square >> _SKIPPED, square & (1 << _SKIPPED) - 1
        node, level = 0, _SKIPPED
        while child[node] > 0 and level > 0:
            level -= 1
            node = child[node] + ((column >> level & 1) << 1 | (row >> level & 1))
        entry[square] = node
    below = _LEVELS - _SKIPPED
    for i in range(len(points)):
        x, y, column, row = _place(points, i, low, unit, width)
        node, level = entry[column >> below << _SKIPPED | row >> below], below
        while child[node] > 0:
            level -= 1
            node = child[node] + ((column >> level & 1) << 1 | (row >> level & 1))
        best, least = items[span[node, 0]], np.inf
        for at in range(span[node, 0], span[node, 1]):
            j = items[at]
            distance = (x - anchors[j, 0]) ** 2 + (y - anchors[j, 1]) ** 2
            if distance < least:
                best, least = j, distance
        labels[i] = best
    return labels


@njit(cache=True, nogil=True)
def _doubled(array):
    larger = np.zeros(2 * len(array), array.dtype)
    larger[: len(array)] = array
    return larger


@njit(cache=True, nogil=True)
def _keep(anchors, items, start, stop, left, lower, side, used):
    """Append the items that can be nearest to a point of a square; returns where they end."""
    x, y, least = left + side / 2, lower + side / 2, np.inf
    for at in range(start, stop):
        j = items[at]
        least = min(least, (anchors[j, 0] - x) ** 2 + (anchors[j, 1] - y) ** 2)
    # 2r is a diagonal; the last factor covers rounding.
    reach = (math.sqrt(least) + side * math.sqrt(2.0)) * (1 + 1e-9)
    for at in range(start, stop):
        j = items[at]
        if (anchors[j, 0] - x) ** 2 + (anchors[j, 1] - y) ** 2 <= reach * reach:
            items[used] = j
            used += 1
    return used
