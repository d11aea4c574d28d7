"""Orders of a point set to compare: those of the package, and worse ones on the way to random."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

import entropy_attn as ea
from entropy_attn.partition.anchors import place_anchors

RANDOM, HILBERT, BRIO = "random", "Hilbert", "BRIO"
NATIVE = "as they come"
_SAMPLE = 8192


def main_orders(points: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    """What one would use, each as a call that makes the permutation."""
    anchors = k_means(points, 256)
    return {
        RANDOM: lambda: ea.geometry.entropy_order(points, "random"),
        HILBERT: lambda: ea.geometry.entropy_order(points),
        BRIO: lambda: ea.geometry.entropy_order(points, "brio"),
        "256 k-means cells": lambda: ea.geometry.entropy_order(points, "cells", anchors=anchors),
    }


def all_orders(points: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Twenty orders between the best and none, by name."""
    rng, n = np.random.default_rng(1), len(points)
    hilbert = ea.geometry.entropy_order(points)
    shuffled = rng.permutation(n)
    yield from ((name, make()) for name, make in main_orders(points).items())
    yield "x-sorted", np.argsort(points[:, 0], kind="stable")
    yield "strips", _strips(points)
    for k in (16, 4096):
        anchors = k_means(points, 16) if k == 16 else points[rng.choice(n, min(k, n), False)]
        yield f"{k} cells", _shuffled_cells(points, anchors, shuffled)
    for count in (16, 256, 4096):
        yield f"{count} interleaved runs", np.concatenate([hilbert[i::count] for i in range(count)])
    for size in (16, 256, 4096):
        blocks = [hilbert[i : i + size] for i in range(0, n, size)]
        yield (
            f"blocks of {size} shuffled",
            np.concatenate([blocks[i] for i in rng.permutation(len(blocks))]),
        )
        yield f"shuffled in blocks of {size}", np.concatenate([rng.permutation(b) for b in blocks])
    for share in (0.03, 0.3):
        moved = np.flatnonzero(rng.random(n) < share)
        order = hilbert.copy()
        order[moved] = order[rng.permutation(moved)]
        yield f"{share:.0%} of Hilbert moved", order


def k_means(points: np.ndarray, k: int) -> np.ndarray:
    """(k, 2) anchors by k-means on a sample."""
    sample = np.random.default_rng(0).permutation(len(points))[:_SAMPLE]
    generator = torch.Generator().manual_seed(0)
    return place_anchors(torch.from_numpy(points[sample]), k, 5, generator).numpy()


def _shuffled_cells(points: np.ndarray, anchors: np.ndarray, shuffled: np.ndarray) -> np.ndarray:
    """By cells; the points of one cell at random, whatever order they came in."""
    return shuffled[ea.geometry.entropy_order(points[shuffled], "cells", anchors=anchors)]


def _strips(points: np.ndarray) -> np.ndarray:
    """Vertical strips of equally many points, up one and down the next."""
    n = len(points)
    count = max(1, int((n / 3) ** 0.5))
    strip = np.empty(n, np.int64)
    strip[np.argsort(points[:, 0], kind="stable")] = np.arange(n) * count // n
    return np.lexsort((np.where(strip % 2, -points[:, 1], points[:, 1]), strip))
