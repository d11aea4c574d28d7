"""Hilbert keys: the position of a point's grid cell on a Hilbert curve, in two or three dimensions.

The curve is the finite automaton of Hamilton and Rau-Chaplin ("Compact Hilbert indices",
Information Processing Letters 105, 2008): a state is the corner where the curve enters a cell and
the axis along which it leaves; reading one bit of each coordinate gives one digit of the key and
the next state. The automaton is made once in Python and composed with itself, so that one lookup
reads four bits of each of two coordinates, or two bits of each of three.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit

# Bits of each coordinate, by dimension: keys have at most 32 bits, three passes of a radix sort.
BITS = {2: 16, 3: 10}
# Bits of each coordinate that one lookup reads.
_CHUNK = {2: 4, 3: 2}


def hilbert_keys(points: np.ndarray) -> np.ndarray:
    """(n,) uint32 positions on a Hilbert curve over the smallest cube around the points.

    Cells are cubes, not boxes: what is near on the curve is near in the plane, whatever the
    proportions of the set.

    Args:
        points: (n, 2) or (n, 3) finite float64 or float32.
    """
    return keys_on_grid(points, *grid(points))


def keys_on_grid(points: np.ndarray, low: np.ndarray, scale: float) -> np.ndarray:
    """`hilbert_keys` on a grid with this lowest corner and so many cells a unit of length."""
    digits, states = curve_tables(points.shape[1])
    keys = _keys_2d if points.shape[1] == 2 else _keys_3d
    return keys(points, low, scale, digits, states)


def grid(points: np.ndarray) -> tuple[np.ndarray, float]:
    """The lowest corner (d,) and the cells a unit of length, 0 where all points coincide."""
    low, high = bounds(points)
    # Halves: the extent may overflow.
    extent = float((high * 0.5 - low * 0.5).max())
    # The least extents have no finite reciprocal; the points then share a few cells.
    cells = 1 << BITS[points.shape[1]]
    return low, 0.5 * cells / max(extent, 1e-300) if extent > 0 else 0.0


@cache
def curve_tables(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """digits and next states, each (states, 2^(dim * chunk)) int32, of `_CHUNK` bits a coordinate.

    An index holds the first coordinate's bits at the top, then the second's.
    """
    chunk = _CHUNK[dim]
    shape = (dim << dim, 1 << (dim * chunk))
    digits, states = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for start in range(shape[0]):
        for index in range(shape[1]):
            state, digit = start, 0
            for level in reversed(range(chunk)):
                # The axis-th bit of a corner belongs to coordinate dim - 1 - axis.
                corner = sum((index >> (axis * chunk + level) & 1) << axis for axis in range(dim))
                step, state = _step(state, corner, dim)
                digit = digit << dim | step
            digits[start, index], states[start, index] = digit, state
    return digits, states


def _step(state: int, corner: int, dim: int) -> tuple[int, int]:
    """The digit of a corner, and the state inside it."""
    entry, direction = state & (1 << dim) - 1, state >> dim
    digit = _gray_inverse(_rotate(corner ^ entry, dim - direction - 1, dim))
    inner_entry = 0 if digit == 0 else _gray((digit - 1) // 2 * 2)
    if digit == 0:
        turn = 0
    else:
        turn = _trailing_ones(digit - 1 if digit % 2 == 0 else digit) % dim
    entry ^= _rotate(inner_entry, direction + 1, dim)
    return digit, (direction + turn + 1) % dim << dim | entry


def _gray(number: int) -> int:
    return number ^ number >> 1


def _gray_inverse(code: int) -> int:
    number = 0
    while code:
        number ^= code
        code >>= 1
    return number


def _rotate(word: int, left: int, bits: int) -> int:
    left %= bits
    return (word << left | word >> (bits - left)) & (1 << bits) - 1


def _trailing_ones(number: int) -> int:
    return (~number & number + 1).bit_length() - 1


@njit(cache=True, nogil=True)
def bounds(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """low, high: (d,) float64, for (n, d) points, n > 0."""
    dim = points.shape[1]
    low, high = np.empty(dim), np.empty(dim)
    for axis in range(dim):
        least = most = np.float64(points[0, axis])
        for i in range(len(points)):
            value = np.float64(points[i, axis])
            least, most = min(least, value), max(most, value)
        low[axis], high[axis] = least, most
    return low, high


@njit(cache=True, nogil=True)
def _cell(value: float, low: float, scale: float, last: int) -> int:
    # Halves first: the difference of two finite numbers may overflow.
    return min(int((value * 0.5 - low * 0.5) * scale * 2.0), last)


@njit(cache=True, nogil=True)
def _keys_2d(points, low, scale, digits, states):
    keys = np.empty(len(points), np.uint32)
    for i in range(len(points)):
        x = _cell(np.float64(points[i, 0]), low[0], scale, 0xFFFF)
        y = _cell(np.float64(points[i, 1]), low[1], scale, 0xFFFF)
        state, key = 0, 0
        for shift in (12, 8, 4, 0):
            index = (x >> shift & 15) << 4 | (y >> shift & 15)
            key = key << 8 | digits[state, index]
            state = states[state, index]
        keys[i] = key
    return keys


@njit(cache=True, nogil=True)
def _keys_3d(points, low, scale, digits, states):
    keys = np.empty(len(points), np.uint32)
    for i in range(len(points)):
        x = _cell(np.float64(points[i, 0]), low[0], scale, 0x3FF)
        y = _cell(np.float64(points[i, 1]), low[1], scale, 0x3FF)
        z = _cell(np.float64(points[i, 2]), low[2], scale, 0x3FF)
        state, key = 0, 0
        for shift in (8, 6, 4, 2, 0):
            index = (x >> shift & 3) << 4 | (y >> shift & 3) << 2 | (z >> shift & 3)
            key = key << 6 | digits[state, index]
            state = states[state, index]
        keys[i] = key
    return keys
