"""Convex hulls of points in the plane and in space: filter, then the hull of what is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropy_attn.backend.table import availability
from entropy_attn.errors import BackendUnavailable
from entropy_attn.geometry import ops
from entropy_attn.geometry.filter import candidates
from entropy_attn.geometry.hull2d import hull_2d
from entropy_attn.geometry.hull3d import hull_3d
from entropy_attn.geometry.points import as_points, check_finite, check_tensor

BACKENDS = ("auto", "numba", "triton", "reference")


def convex_hull(points: Any, *, backend: str = "auto") -> Any:
    """Indices of the vertices of the convex hull.

    In the plane the result is exact: every corner, and nothing else, of the given numbers. Points
    on an edge are no vertices. In space a filter drops only what lies strictly inside, exactly;
    Qhull does the rest in floating point.

    Points on a GPU stay there: a filter runs on them, and what may be a vertex, a few of them in
    most sets, goes on to the CPU.

    Args:
        points: (n, 2) or (n, 3). NumPy arrays and nested sequences of float16 to float64, or of
            integers up to 2^53; torch tensors also in bfloat16, also (batch, n, d).
        backend: of the filter for tensors: "numba" on the CPU, "triton" or "reference" on a GPU.

    Returns:
        (h,) int64 indices, a tensor on the device of the points for a tensor, and a list of tensors
        for a batch. In the plane counterclockwise, from the lexicographically smallest vertex;
        ascending in space. Of copies of a point the smallest index. Of points on a line the two
        ends, of copies of one point one, of no points none; points of a plane in space have the
        vertices of their polygon.

    Raises:
        TypeError, ValueError: a shape or dtype that is not allowed; a point that is not finite,
            named by its row; points in space that lie in a plane up to rounding, but not exactly.
        BackendUnavailable: a named backend cannot run this call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if not isinstance(points, Tensor):
        if backend not in ("auto", "numba"):
            raise ValueError(f"backend={backend!r} takes torch tensors; convert the points")
        return _hull(as_points(points).astype(np.float64, copy=False))
    batch = check_tensor(points)
    if _filter_for(points, backend) == "numba":
        found = [_hull(_to_numpy(each)) for each in batch]
    else:
        found = _filtered_hulls(batch, _filter_for(points, backend))
    hulls = [torch.from_numpy(each).to(points.device) for each in found]
    return hulls if points.ndim == 3 else hulls[0]


def _hull(points: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """`convex_hull` of (n, d) float64, which the caller knows as ``rows`` (by default as given)."""
    if len(points) == 0:
        return np.empty(0, np.int64)
    index, points = candidates(points)
    rows = index if rows is None else rows[index]
    check_finite(points, rows)
    return rows[hull_2d(points) if points.shape[1] == 2 else hull_3d(points)]


def _filtered_hulls(points: Tensor, backend: str) -> list[np.ndarray]:
    """`_hull` of each of (batch, n, d) points, after a filter on their device."""
    batch, total, _ = points.shape
    if batch * total == 0:
        return [np.empty(0, np.int64)] * batch
    which, index = ops.candidates(points, backend)
    kept, rows = _to_numpy(points[which, index]), index.cpu().numpy()
    ends = np.searchsorted(which.cpu().numpy(), np.arange(1, batch))
    pairs = zip(np.split(kept, ends), np.split(rows, ends), strict=True)
    return [_hull(*pair) for pair in pairs]


def _filter_for(points: Tensor, backend: str) -> str:
    """The implementation of the filter."""
    on_gpu = points.device.type != "cpu"
    if backend == "auto":
        if not on_gpu:
            return "numba"
        usable = points.is_cuda and availability("triton").available
        return "triton" if usable else "reference"
    if backend == "numba" and on_gpu:
        raise BackendUnavailable(f"backend 'numba' runs on the CPU, not on {points.device}")
    if backend == "triton" and not availability("triton").available:
        raise BackendUnavailable(f"backend 'triton': {availability('triton').reason}")
    return backend


def _to_numpy(points: Tensor) -> np.ndarray:
    return points.double().cpu().numpy()
