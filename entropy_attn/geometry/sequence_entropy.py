"""How far the order of a point set keeps neighbours together: an entropy, exact and soft.

Take cells (ranges) and cut the sequence of points into contiguous sublists that lie in one cell
each. The range-partition entropy of Eppstein, Goodrich, Illickan and To (arXiv 2508.20489) over
such partitions is `run_entropy`: merging two neighbours of one cell lowers the entropy, so the
maximal runs are the minimum. An order that visits each cell once has the entropy of the cells; one
that never stays has log n.

One grid of cells sees one scale, so `order_entropy` takes the mean over nested ones, and boxes of
a k-d tree rather than a grid, so that dense and sparse regions count by their points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from entropy_attn import validation as check
from entropy_attn.geometry.points import as_order, finite_points
from entropy_attn.partition.module import RangeEntropy

# Levels end where a cell has about so many points: a cell of one point is no range.
_LEAST_IN_CELL = 4


def run_entropy(labels: Any) -> float:
    """The least entropy of a partition into contiguous sublists of one label each, in nats.

    Args:
        labels: (n,) integers, the cell of each point in sequence.

    Returns:
        sum over maximal runs of r/n log(n/r): from the entropy of the labels, where each has one
        run, to log n, where no neighbours share one; 0 for an empty sequence.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iub" or labels.ndim != 1:
        raise TypeError(f"labels must be (n,) integers, got {labels.dtype} {labels.shape}")
    return _run_entropy(np.ascontiguousarray(labels, np.int64), np.arange(len(labels)))


def order_entropy(
    points: Any, order: Any = None, *, cells: Any = None, relative: bool = False
) -> float:
    """The entropy of an order of points: low where neighbours in the order share cells.

    Without ``cells`` the mean of `run_entropy` over the levels of a k-d tree: level l has 2^l boxes
    with n/2^l points each (fewer boxes where points coincide), cut across their longer side, up to
    four points a box. With ``cells`` the `run_entropy` of these alone.

    Args:
        points: (n, 2) or (n, 3) floats or integers.
        order: (n,) a permutation, see `entropy_order`; as they come by default.
        cells: (n,) integers, the cell of each point (by its row in ``points``).
        relative: 0 for the least entropy that an order can have with these cells, 1 for log n;
            the mean of that over the levels. Sets of other sizes compare.

    Returns:
        nats, or with ``relative`` a number in [0, 1]; 0 for fewer than two points.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
    """
    array = finite_points(points)
    n = len(array)
    order = np.arange(n) if order is None else as_order(order, n)
    levels: Iterator[np.ndarray] = _tree_levels(array)
    if cells is not None:
        labels = np.asarray(cells)
        if labels.dtype.kind not in "iu" or labels.shape != (n,):
            raise ValueError(
                f"cells must be ({n},) integers, one a point, got {labels.dtype} {labels.shape}"
            )
        levels = iter([labels.astype(np.int64)])
    if n < 2:
        return 0.0
    found = []
    for labels in levels:
        entropy = _run_entropy(labels, order)
        if relative:
            least = _run_entropy(labels, np.argsort(labels, kind="stable"))
            room = math.log(n) - least
            # Cells of one point each leave no room: every order is as good.
            entropy = min(max((entropy - least) / room, 0.0), 1.0) if room > 1e-12 else 0.0
        found.append(entropy)
    return float(np.mean(found))


def soft_order_entropy(
    x: Tensor,
    measure: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    window: int = 32,
) -> Tensor:
    """A differentiable stand-in for `order_entropy`: the mean entropy of windows of the sequence.

    The sequence is cut into windows of consecutive points; each is a small set with a soft entropy,
    which is low if the window lies in few cells. Sets whose points never stay together have windows
    as rich as the whole.

    Args:
        x: (..., n, d) floating point, the points *in their order*, n > 0.
        measure: from windows (..., m, w, d) and weights (..., m, w) (0 fills up the last window) to
            (..., m) nats: `ea.RangeEntropy()`, or a function of `ea.range_entropy` or
            `ea.halfspace_entropy` with cells of your own. By default balls around 64 anchors that
            are placed by x and held fixed.
        window: points of a window.

    Returns:
        (...) nats, differentiable in x and in what ``measure`` holds.
    """
    check.check_points(x)
    check.check_integer("window", window, minimum=1)
    n = x.shape[-2]
    if n == 0:
        raise ValueError("x holds no points; at least one is needed")
    if measure is None:
        measure = RangeEntropy(num_anchors=64, learn_anchors=False)
        measure.reset(x.detach())
    window = min(window, n)
    missing = -n % window
    filler = x[..., -1:, :].expand(*x.shape[:-2], missing, x.shape[-1])
    windows = torch.cat((x, filler), dim=-2).unflatten(-2, (-1, window))
    weights = x.new_ones(n + missing)
    weights[n:] = 0
    weights = weights.unflatten(0, (-1, window)).expand(windows.shape[:-1])
    entropy = measure(windows, weights)
    share = weights.sum(-1).to(entropy.dtype) / n
    return (entropy * share).sum(-1)


@njit(cache=True, nogil=True)
def _run_entropy(labels, order):
    n = len(order)
    # sum r/n log(n/r) = log n - (sum r log r)/n
    weighted, length = 0.0, 0
    for at in range(n):
        length += 1
        if at + 1 == n or labels[order[at + 1]] != labels[order[at]]:
            weighted += length * math.log(length)
            length = 0
    return max(math.log(n) - weighted / n, 0.0) if n > 0 else 0.0


def _tree_levels(points: np.ndarray) -> Iterator[np.ndarray]:
    """(n,) int64 boxes of each level of a k-d tree, from two boxes on."""
    n = len(points)
    coordinates = points.astype(np.float64)
    index = np.arange(n)
    stops = np.array([n])
    labels = np.empty(n, np.int64)
    for _ in range(max(1, int(math.log2(max(n, 1) / _LEAST_IN_CELL)) if n >= 8 else 1)):
        stops = _split(coordinates, index, stops, labels)
        yield labels


@njit(cache=True, nogil=True)
def _split(coordinates, index, stops, labels):
    """Cut every box in two, reordering coordinates and index; returns where boxes end."""
    ends = np.empty(2 * len(stops), np.int64)
    buffer = np.empty(len(index), np.float64)
    boxes, begin = 0, 0
    for end in stops:
        middle = _cut(coordinates, index, begin, end, buffer)
        if middle > begin:
            for at in range(begin, middle):
                labels[index[at]] = boxes
            ends[boxes] = middle
            boxes += 1
        for at in range(middle, end):
            labels[index[at]] = boxes
        ends[boxes] = end
        boxes += 1
        begin = end
    return ends[:boxes].copy()


@njit(cache=True, nogil=True)
def _cut(coordinates, index, begin, end, buffer):
    """Bring the points below the median of the longer side to the front; returns their end.

    Points with one coordinate stay together: a box is a range, whatever ties there are. Returns
    ``begin`` if all points coincide.
    """
    axis, extent = 0, -1.0
    for each in range(coordinates.shape[1]):
        low = high = coordinates[begin, each]
        for at in range(begin, end):
            low, high = min(low, coordinates[at, each]), max(high, coordinates[at, each])
        if high * 0.5 - low * 0.5 > extent:
            axis, extent = each, high * 0.5 - low * 0.5
    if extent <= 0.0:
        return begin
    for at in range(begin, end):
        buffer[at] = coordinates[at, axis]
    pivot = _select(buffer, begin, end, begin + (end - begin) // 2)
    middle = _gather(coordinates, index, begin, end, axis, pivot, False)
    if middle == begin:  # the median is the least: it goes to the front
        middle = _gather(coordinates, index, begin, end, axis, pivot, True)
    return middle


@njit(cache=True, nogil=True)
def _gather(coordinates, index, begin, end, axis, pivot, with_pivot):
    middle = begin
    for at in range(begin, end):
        value = coordinates[at, axis]
        if value < pivot or (with_pivot and value == pivot):
            index[at], index[middle] = index[middle], index[at]
            for each in range(coordinates.shape[1]):
                kept = coordinates[at, each]
                coordinates[at, each] = coordinates[middle, each]
                coordinates[middle, each] = kept
            middle += 1
    return middle


@njit(cache=True, nogil=True)
def _select(values, begin, end, target):
    """The value that sorting values[begin:end] would put at target (Hoare's quickselect)."""
    low, high = begin, end - 1
    while low < high:
        pivot = values[(low + high) // 2]
        left, right = low, high
        while left <= right:
            while values[left] < pivot:
                left += 1
            while values[right] > pivot:
                right -= 1
            if left <= right:
                values[left], values[right] = values[right], values[left]
                left += 1
                right -= 1
        if target <= right:
            high = right
        elif target >= left:
            low = left
        else:
            break
    return values[target]
