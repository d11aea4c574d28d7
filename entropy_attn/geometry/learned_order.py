"""From a network that cuts pieces of a set in two to an order of the whole set.

A sample of the points is cut into a tree of cells, and a path is laid through them. The squares of
a Hilbert curve, all of one level, are then sorted by the cell that holds their centre: the curve
in other words, with its squares permuted. A point's place follows from its Hilbert key by a table,
so a million points cost little more than their Hilbert order, and no square is torn.

The sample goes first, along the path, then all others. Where the points of an incremental algorithm
only come along a curve, each meets the long triangles at the border of what has been seen so far; a
sample over the whole set leaves none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import Lock

import numpy as np
import torch
from numba import njit
from torch import Tensor

from entropy_attn.geometry.hilbert import BITS, grid, keys_on_grid
from entropy_attn.geometry.radix import sorting_permutation

# Points of a sample: an eighth of the set, within these bounds, or the whole set if it is smaller.
_LARGEST_SAMPLE, _LEAST_SAMPLE, _SHARE = 4096, 256, 8
# Points of the sample in a cell of the last level. With smaller cells the entropy of the order
# rises: an order loses at borders, and inside a cell the curve is as good as any.
_IN_CELL = 256
# Of the curve's 16 levels, the one whose squares are sorted, at most.
_LEVEL = 8

# From points (m, 2), their pieces (m,) and the number of pieces to the axes and offsets of lines.
Cutter = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CutTree:
    """A complete binary tree of lines; node i has the children 2i + 1 and 2i + 2.

    Attributes:
        axes: (2^depth - 1,) int64. offsets: (2^depth - 1,) float64. Points with
            x[axis] > offset belong to the second child.
        ranks: (2^depth,) int64, the place of each cell on the path through all.
    """

    axes: np.ndarray
    offsets: np.ndarray
    ranks: np.ndarray


def learned_order(cut: Cutter, points: np.ndarray, seed: int) -> np.ndarray:
    """(n,) int64, a permutation of (n, 2) finite points."""
    n = len(points)
    if n < 3:
        return np.arange(n)
    low, scale = grid(points)
    keys = keys_on_grid(points, low, scale)
    chosen = choose_sample(n, seed)
    sample = _in_unit_square(points[chosen], low, scale)
    level = min(_LEVEL, max(1, n.bit_length() // 2 - 1))
    _permute_squares(keys, square_places(cut_tree(cut, sample), level), 2 * (BITS[2] - level))
    order = sorting_permutation(keys)
    return order if len(chosen) == n else sample_first(order, chosen)


def learned_cells(cut: Cutter, points: np.ndarray, seed: int) -> np.ndarray:
    """(n,) int64 cells of (n, 2) finite points, numbered along the path."""
    if len(points) == 0:
        return np.empty(0, np.int64)
    low, scale = grid(points)
    inside = _in_unit_square(points, low, scale)
    tree = cut_tree(cut, inside[choose_sample(len(points), seed)])
    return _cells_of(inside, tree.axes, tree.offsets, tree.ranks).astype(np.int64)


def choose_sample(n: int, seed: int) -> np.ndarray:
    """(m,) int64 distinct rows of n, at most 4096; all where there are few."""
    count = min(n, max(_LEAST_SAMPLE, min(_LARGEST_SAMPLE, n // _SHARE)))
    if count == n:
        return np.arange(n)
    return np.random.default_rng(seed).choice(n, count, replace=False, shuffle=False)


def cut_tree(cut: Cutter, sample: np.ndarray) -> CutTree:
    """The cells of a sample (m, 2) float64 of the unit square, m > 0."""
    # Sums depend on their order in the last digits; so that cells do not, it is always the same.
    sample = sample[np.lexsort(sample.T)]
    depth = max(1, (len(sample) // _IN_CELL).bit_length() - 1)
    axes, offsets = np.zeros((1 << depth) - 1, np.int64), np.zeros((1 << depth) - 1)
    middles = np.full(((2 << depth) - 1, 2), np.nan)
    pieces = np.zeros(len(sample), np.int64)
    with torch.inference_mode(), one_thread():
        for level in range(depth):
            first, count = (1 << level) - 1, 1 << level
            lines = cut(torch.from_numpy(sample), torch.from_numpy(pieces), count)
            axes[first : first + count], offsets[first : first + count] = (
                each.numpy() for each in lines
            )
            pieces = _split(sample, pieces, first, count, axes, offsets, middles)
    return CutTree(axes, offsets, _path(middles, depth))


@dataclass
class _Threads:
    """Who is in `one_thread`, and how many threads there were before."""

    lock: Lock = field(default_factory=Lock)
    callers: int = 0
    before: int = 1


_THREADS = _Threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: waiting for a second one takes longer than these small products.

    The number is the process's: of callers side by side or one inside the other the first notes it
    and the last gives it back.
    """
    with _THREADS.lock:
        if _THREADS.callers == 0:
            _THREADS.before = torch.get_num_threads()
        _THREADS.callers += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _THREADS.lock:
            _THREADS.callers -= 1
            if _THREADS.callers == 0:
                torch.set_num_threads(_THREADS.before)


def square_places(tree: CutTree, level: int) -> np.ndarray:
    """(4^level,) uint32: the new place of each square of the curve, by its cell, then as it was."""
    ranks = _cells_of(_centres(level), tree.axes, tree.offsets, tree.ranks)
    places = np.empty(len(ranks), np.uint32)
    places[sorting_permutation(ranks)] = np.arange(len(ranks), dtype=np.uint32)
    return places


def _in_unit_square(points: np.ndarray, low: np.ndarray, scale: float) -> np.ndarray:
    # Halves and the two factors apart, since either product may overflow.
    return (points * 0.5 - low * 0.5) * scale * 2.0 ** (1 - BITS[2])


@cache
def _centres(level: int) -> np.ndarray:
    """(4^level, 2) float64 centres of the squares of the unit square, along the curve."""
    side = 1 << level
    at = (np.arange(side) + 0.5) / side
    centres = np.stack(np.meshgrid(at, at, indexing="ij"), -1).reshape(-1, 2)
    return centres[sorting_permutation(keys_on_grid(centres, np.zeros(2), float(1 << BITS[2])))]


@njit(cache=True, nogil=True)
def _split(sample, pieces, first, count, axes, offsets, middles):
    """The pieces (m,) of the next level.

    Where a line leaves a side empty the mean across the wider side takes its place, so that only a
    piece of equal points stays whole.
    """
    sizes, beyond = np.zeros(count, np.int64), np.zeros(count, np.int64)
    sums = np.zeros((count, 2))
    low, high = np.full((count, 2), np.inf), np.full((count, 2), -np.inf)
    for i in range(len(sample)):
        piece = pieces[i]
        sizes[piece] += 1
        beyond[piece] += _is_beyond(sample, i, axes, offsets, first + piece)
        for axis in range(2):
            value = sample[i, axis]
            sums[piece, axis] += value
            low[piece, axis] = min(low[piece, axis], value)
            high[piece, axis] = max(high[piece, axis], value)
    for piece in range(count):
        if sizes[piece] == 0:
            continue
        node = first + piece
        middles[node] = sums[piece] / sizes[piece]
        if beyond[piece] == 0 or beyond[piece] == sizes[piece]:
            extent = high[piece] - low[piece]
            axes[node] = np.int64(extent[1] > extent[0])
            offsets[node] = middles[node, axes[node]]
    found = np.empty_like(pieces)
    sizes, sums = np.zeros(2 * count, np.int64), np.zeros((2 * count, 2))
    for i in range(len(sample)):
        child = 2 * pieces[i] + _is_beyond(sample, i, axes, offsets, first + pieces[i])
        found[i] = child
        sizes[child] += 1
        sums[child] += sample[i]
    for child in range(2 * count):
        if sizes[child] > 0:
            middles[2 * first + 1 + child] = sums[child] / sizes[child]
    return found


@njit(cache=True, nogil=True)
def _is_beyond(points, i, axes, offsets, node):
    return np.int64(points[i, axes[node]] > offsets[node])


@njit(cache=True, nogil=True)
def _path(middles, depth):
    """(2^depth,) ranks of the cells on a path that enters and leaves each piece once.

    Each piece is told where the path comes from and where it goes to, and takes its two children
    in the shorter order; they meet halfway between their middles. Where the path begins and ends
    is unknown (NaN), and empty pieces (middle NaN) are passed over.
    """
    nodes = len(middles)
    come, go = np.full((nodes, 2), np.nan), np.full((nodes, 2), np.nan)
    start = np.zeros(nodes, np.int64)
    inner = (1 << depth) - 1
    below = 1 << depth
    for node in range(inner):
        if node & (node + 1) == 0:  # the first of a level
            below >>= 1
        left, right = 2 * node + 1, 2 * node + 2
        a, b = middles[left], middles[right]
        has_left, has_right = not np.isnan(a[0]), not np.isnan(b[0])
        straight = _distance(come[node], a) + _distance(b, go[node])
        crossed = _distance(come[node], b) + _distance(a, go[node])
        first, second = (right, left) if crossed < straight else (left, right)
        start[first], start[second] = start[node], start[node] + below
        come[first], go[second] = come[node], go[node]
        meet = (a + b) / 2 if has_left and has_right else go[node]
        go[first] = meet
        come[second] = meet if has_left and has_right else come[node]
    return start[inner:].copy()


@njit(cache=True, nogil=True)
def _distance(a, b):
    """0 where one of them is unknown."""
    if np.isnan(a[0]) or np.isnan(b[0]):
        return 0.0
    return np.sqrt((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2)


@njit(cache=True, nogil=True)
def _cells_of(points, axes, offsets, ranks):
    """(n,) uint32 rank of the cell of each point."""
    found = np.empty(len(points), np.uint32)
    for i in range(len(points)):
        node = 0
        while node < len(offsets):
            node = 2 * node + 1 + _is_beyond(points, i, axes, offsets, node)
        found[i] = ranks[node - len(offsets)]
    return found


@njit(cache=True, nogil=True)
def _permute_squares(keys, places, shift):
    inside = np.uint32((1 << shift) - 1)
    for i in range(len(keys)):
        keys[i] = np.uint32(places[keys[i] >> shift] << shift) | keys[i] & inside


@njit(cache=True, nogil=True)
def sample_first(order, chosen):
    """The same order, first of the chosen rows, then of the others."""
    is_chosen = np.zeros(len(order), np.bool_)
    is_chosen[chosen] = True
    found = np.empty_like(order)
    early, late = 0, len(chosen)
    for row in order:
        if is_chosen[row]:
            found[early] = row
            early += 1
        else:
            found[late] = row
            late += 1
    return found
