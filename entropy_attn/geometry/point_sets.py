"""Point sets as arrays: what is allowed, what is refused, and which points coincide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

# Integers beyond are no float64 values.
_LARGEST_INTEGER = 2**53


def as_points(points: Any, dims: Sequence[int] = (2,), name: str = "points") -> np.ndarray:
    """(n, d) contiguous float32 or float64, finite, exactly the numbers that were given.

    Args:
        points: array, list of rows or CPU tensor, of floats (not beyond 64 bits) or integers.
        dims: allowed values of d.

    Raises:
        TypeError: it holds something else than real numbers, or cannot be read here.
        ValueError: a wrong shape, or a row with NaN, infinity or an integer beyond 2^53.
    """
    try:
        # A tensor on a GPU or one with a gradient refuses by itself, with the reason.
        array = np.asarray(points)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array of numbers on the CPU: {error}") from error
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise TypeError(f"{name} has dtype {array.dtype}; allowed are floats and integers, 64 bits")
    if array.ndim != 2 or array.shape[1] not in dims:
        allowed = " or ".join(f"(n, {d})" for d in dims)
        raise ValueError(f"{name} must have shape {allowed}, got {array.shape}")
    if array.dtype.kind in "iu":
        wrong = (array > _LARGEST_INTEGER) | (array < -_LARGEST_INTEGER)
        _refuse(wrong, array, name, "float64 holds integers up to 2^53 only; subtract an offset")
    if array.dtype != np.float32:
        array = array.astype(np.float64, copy=False)
    _refuse(~np.isfinite(array), array, name, "remove the row or give it finite coordinates")
    return np.ascontiguousarray(array)


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


def first_of_equals(points: np.ndarray) -> np.ndarray:
    """(n,) bool: False for a point that one of lower index equals; points (n, 2) float."""
    slots = 1 << max(2 * len(points), 2).bit_length()
    # 0 + -0 is 0: both zeros have one bit pattern.
    bits = (points.astype(np.float64) + 0.0).view(np.uint64)
    return _first_of_equals(bits, np.full(slots, -1, np.int32 if len(points) < 2**31 else np.int64))


@njit(cache=True, nogil=True)
def _first_of_equals(bits, table):
    """By a hash table with open addressing; at most half of its slots are taken."""
    is_first = np.ones(len(bits), np.bool_)
    last = np.uint64(len(table) - 1)
    for i in range(len(bits)):
        word = bits[i, 0] * np.uint64(0x9E3779B97F4A7C15)
        word = (word ^ word >> np.uint64(32) ^ bits[i, 1]) * np.uint64(0xBF58476D1CE4E5B9)
        slot = (word ^ word >> np.uint64(29)) & last
        while table[slot] >= 0:
            other = table[slot]
            if bits[other, 0] == bits[i, 0] and bits[other, 1] == bits[i, 1]:
                is_first[i] = False
                break
            slot = slot + np.uint64(1) & last
        if is_first[i]:
            table[slot] = i
    return is_first


def _refuse(wrong: np.ndarray, array: np.ndarray, name: str, remedy: str) -> None:
    if wrong.any():
        row = int(wrong.any(axis=1).argmax())
        raise ValueError(f"{name}[{row}] is {array[row].tolist()}; {remedy}")
