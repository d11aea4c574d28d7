"""Checks of what geometry takes: points, as arrays or tensors, and orders of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Integers beyond are not all float64 numbers.
LARGEST_INTEGER = 2**53
INTEGER_ADVICE = "float64 holds integers up to 2^53 only; subtract an offset"


def as_points(points: Any, dims: Sequence[int] = (2, 3), name: str = "points") -> np.ndarray:
    """(n, d) contiguous float32 or float64, equal in value to what was given.

    Not checked to be finite: who looks at every point anyway does that on the way.

    Args:
        points: array, nested sequence or CPU tensor (n, d) of float16 to float64, or of integers.
        dims: the allowed d.

    Raises:
        TypeError: a dtype whose numbers are no float64 numbers, or what cannot be read here.
        ValueError: another shape, or an integer beyond 2^53, named by its row.
    """
    try:
        # A tensor on a GPU or one with a gradient refuses by itself, with the reason.
        array = np.asarray(points)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array of numbers on the CPU: {error}") from error
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise TypeError(
            f"{name} has dtype {array.dtype}; allowed are float16, float32, float64 and integers"
        )
    if array.ndim != 2 or array.shape[1] not in dims:
        raise ValueError(f"{name} must have shape {_shapes(dims)}, got {array.shape}")
    if array.dtype.kind in "iu":
        too_large = (array > LARGEST_INTEGER) | (array < -LARGEST_INTEGER)
        _refuse_row(too_large, array, INTEGER_ADVICE, name=name)
    return np.ascontiguousarray(array, np.float32 if array.dtype == np.float32 else np.float64)


def finite_points(points: Any, dims: Sequence[int] = (2, 3), name: str = "points") -> np.ndarray:
    """`as_points` with every coordinate finite.

    Raises:
        TypeError, ValueError: as for `as_points`, or names the first row that is not finite.
    """
    array = as_points(points, dims, name)
    check_finite(array, name=name)
    return array


def check_finite(points: np.ndarray, rows: np.ndarray | None = None, name: str = "points") -> None:
    """That (m, d) points are finite, which the caller may know as other ``rows``, ascending.

    Raises:
        ValueError: names the first row that is not.
    """
    _refuse_row(~np.isfinite(points), points, "remove or repair it", rows, name)


def sortable(points: np.ndarray) -> np.ndarray:
    """The points, if their indices fit into the 32 bits that orders are sorted with.

    Raises:
        ValueError: there are too many.
    """
    if len(points) >= 2**32:
        raise ValueError(f"points holds {len(points)} rows; at most 2^32 - 1 are allowed")
    return points


def as_order(order: Any, count: int) -> np.ndarray:
    """(count,) int64, each of 0 to count - 1 once.

    Raises:
        TypeError, ValueError: it is no permutation.
    """
    array = np.asarray(order)
    if array.dtype.kind not in "iu":
        raise TypeError(f"order must hold integers, got dtype {array.dtype}")
    if array.shape != (count,):
        raise ValueError(f"order must have shape ({count},), one index a point, got {array.shape}")
    array = array.astype(np.int64, copy=False)
    inside = count == 0 or (array.min() >= 0 and array.max() < count)
    if not inside or (np.bincount(array, minlength=count) != 1).any():
        raise ValueError(f"order must hold each index from 0 to {count - 1} once")
    return np.ascontiguousarray(array)


def check_seed(seed: Any) -> int:
    """The seed as an int.

    Raises:
        ValueError: it is no integer, or negative.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed must be an int >= 0, got {seed!r}")
    return int(seed)


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
            f"points[{batch}, {row}] is {points[batch, row].tolist()}; {INTEGER_ADVICE}"
        )
    return points.double()


def _shapes(dims: Sequence[int]) -> str:
    return " or ".join(f"(n, {dim})" for dim in dims)


def _refuse_row(
    wrong: np.ndarray,
    points: np.ndarray,
    advice: str,
    rows: np.ndarray | None = None,
    name: str = "points",
) -> None:
    """Name the first row of ``points`` where an entry of ``wrong``, as large as it, is set."""
    if wrong.any():
        first = int(wrong.any(1).argmax())
        row = first if rows is None else int(rows[first])
        raise ValueError(f"{name}[{row}] is {points[first].tolist()}; {advice}")
