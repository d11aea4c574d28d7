"""Checks of the points that geometry takes, and their conversion to float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Integers beyond are not all float64 numbers.
LARGEST_INTEGER = 2**53
INTEGER_ADVICE = "integers are exact up to 2^53; subtract an offset first"


def as_points(points: Any, dims: tuple[int, ...] = (2, 3)) -> np.ndarray:
    """(n, d) contiguous float64, equal in value to what was given; not checked to be finite.

    Args:
        points: an array or nested sequence (n, d) of float16 to float64, or of integers.
        dims: the allowed d.

    Raises:
        TypeError: a dtype whose numbers are no float64 numbers.
        ValueError: another shape, or an integer beyond 2^53, named by its row.
    """
    array = np.asarray(points)
    if array.ndim != 2 or array.shape[1] not in dims:
        raise ValueError(f"points must have shape {_shapes(dims)}, got {array.shape}")
    if array.dtype.kind in "iu":
        too_large = (array > LARGEST_INTEGER) | (array < -LARGEST_INTEGER)
        _refuse_row(too_large, array, INTEGER_ADVICE)
    elif array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(
            f"points has dtype {array.dtype}; allowed are float16, float32, float64 and integers"
        )
    return np.ascontiguousarray(array, dtype=np.float64)


def check_finite(points: np.ndarray, rows: np.ndarray) -> None:
    """That (m, d) points are finite, which the caller knows as these ``rows``, ascending.

    Raises:
        ValueError: names the first row that is not.
    """
    _refuse_row(~np.isfinite(points), points, "remove or repair it", rows)


def check_tensor(points: Tensor) -> Tensor:
    """(batch, n, 2 or 3) floating point from (n, d) or (batch, n, d), detached.

    Integers become float64.

    Raises:
        TypeError, ValueError: as for `as_points`.
    """
    if points.ndim not in (2, 3) or points.shape[-1] not in (2, 3):
        raise ValueError(
            f"points must have shape {_shapes((2, 3))}, or with a batch dimension before, "
            f"got {tuple(points.shape)}"
        )
    if points.dtype == torch.bool or points.dtype.is_complex:
        raise TypeError(
            f"points has dtype {points.dtype}; allowed are floating point numbers and integers"
        )
    points = points.detach() if points.ndim == 3 else points.detach()[None]
    if points.dtype.is_floating_point:
        return points
    too_large = (points > LARGEST_INTEGER) | (points < -LARGEST_INTEGER)
    if too_large.any():
        batch, row, _ = too_large.nonzero()[0].tolist()
        raise ValueError(
            f"points[{batch}] holds {points[batch, row].tolist()} at row {row}: {INTEGER_ADVICE}"
        )
    return points.double()


def _shapes(dims: tuple[int, ...]) -> str:
    return " or ".join(f"(n, {dim})" for dim in dims)


def _refuse_row(
    wrong: np.ndarray, points: np.ndarray, advice: str, rows: np.ndarray | None = None
) -> None:
    """Name the first row of ``points`` where an entry of ``wrong``, as large as it, is set."""
    if wrong.any():
        first = int(wrong.any(1).argmax())
        row = first if rows is None else int(rows[first])
        raise ValueError(f"points holds {points[first].tolist()} at row {row}: {advice}")
