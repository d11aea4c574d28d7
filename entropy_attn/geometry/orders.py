"""Orders of a point set in which neighbours come close together.

Incremental algorithms walk from one point to the next, and caches remember what was near: an order
of low entropy (`order_entropy`) makes them fast, while their result stays the same. No point is
moved.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from entropy_attn.geometry.cells import nearest_cells
from entropy_attn.geometry.entropy_net import pretrained
from entropy_attn.geometry.hilbert import hilbert_keys
from entropy_attn.geometry.learned_order import learned_order
from entropy_attn.geometry.points import check_seed, finite_points, sortable
from entropy_attn.geometry.radix import sorting_permutation

# Of a byte; 8 for 0. A branch on each bit of a random word would be mispredicted.
_TRAILING_ZEROS = np.array([8] + [(b & -b).bit_length() - 1 for b in range(1, 256)], np.uint8)

METHODS = ("hilbert", "brio", "cells", "learned", "random")


def entropy_order(
    points: Any, method: str = "hilbert", *, anchors: Any = None, seed: int = 0
) -> np.ndarray:
    """A permutation that brings near points close together.

    - "hilbert": along a Hilbert curve over 2^16 cells a side (2^10 in space); points of one cell
      stay in their order.
    - "brio": a biased randomized insertion order (Amenta, Choi and Rote, SoCG 2003): rounds that
      double in size, each a random sample along the curve. Keeps the expected cost of a randomized
      incremental algorithm, whatever the points.
    - "cells": by the nearest of given anchors; cells follow one another along a Hilbert curve
      through the anchors, points of one cell stay in their order.
    - "learned": by the cells of `EntropyNet`, in the plane; a sample of at most 4096 points that
      the network has seen comes first, then the others along the same path.
    - "random": a shuffle, the baseline.

    Args:
        points: (n, 2) or, except for "learned", (n, 3) floats or integers, n below 2^32.
        method: see above.
        anchors: (k, d), for "cells" alone.
        seed: of "brio", "learned" and "random"; the same seed gives the same order.

    Returns:
        (n,) int64: take ``points[order]``.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
        ImportError: "learned" without safetensors, which its weights are read with.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if (anchors is None) == (method == "cells"):
        raise ValueError(
            "method='cells' needs anchors (k, d)"
            if method == "cells"
            else f"anchors are for method='cells', not {method!r}; leave them out"
        )
    seed = check_seed(seed)
    array = sortable(finite_points(points, dims=(2,) if method == "learned" else (2, 3)))
    n = len(array)
    if method == "cells":
        centres = finite_points(anchors, dims=array.shape[1:], name="anchors").astype(np.float64)
        if len(centres) == 0:
            raise ValueError("anchors holds no row; at least one is needed")
        return _by_cells(array, centres)
    if method == "random":
        return np.random.default_rng(seed).permutation(n)
    if method == "learned":
        return learned_order(pretrained().cut, array, seed)
    if n == 0:
        return np.empty(0, np.int64)
    along = sorting_permutation(hilbert_keys(array))
    return along if method == "hilbert" else _in_rounds(along, seed % 2**64)


def _by_cells(points: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    if len(points) == 0:
        return np.empty(0, np.int64)
    rank = np.empty(len(anchors), np.uint32)
    rank[sorting_permutation(hilbert_keys(anchors))] = np.arange(len(anchors), dtype=np.uint32)
    return sorting_permutation(rank[nearest_cells(points, anchors)])


@njit(cache=True, nogil=True)
def _in_rounds(along: np.ndarray, seed: int) -> np.ndarray:
    """Points by their round, within one as before; the last round has half of the points."""
    n = len(along)
    rounds = np.empty(n, np.uint8)
    counts = np.zeros(64, np.int64)
    for at in range(n):
        # SplitMix64 of the point's index: its trailing zeros are geometrically distributed.
        word = np.uint64(seed) + np.uint64(along[at] + 1) * np.uint64(0x9E3779B97F4A7C15)
        word = (word ^ word >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ word >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
        zeros = _TRAILING_ZEROS[word & np.uint64(0xFF)]
        if zeros == 8:  # one point of 256
            while zeros < 63 and word >> np.uint64(zeros) & np.uint64(1) == 0:
                zeros += 1
        rounds[at] = 63 - zeros
        counts[63 - zeros] += 1
    total = 0
    for turn in range(64):
        count = counts[turn]
        counts[turn] = total
        total += count
    order = np.empty(n, np.int64)
    for at in range(n):
        order[counts[rounds[at]]] = along[at]
        counts[rounds[at]] += 1
    return order
