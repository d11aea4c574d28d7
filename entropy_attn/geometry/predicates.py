"""Exact signs of determinants of points: orientation in 2D and 3D, and the in-circle test.

Each predicate is a float computation with a proven error bound (a filter), and where that cannot
tell, exact arithmetic. They are exact for all finite float64, subnormals and 1e308 included.

The filters and their constants are those of Shewchuk, "Adaptive Precision Floating-Point
Arithmetic and Fast Robust Geometric Predicates", Discrete Comput. Geom. 18 (1997), figures 21, 22
and 25 (ccwerrboundA, o3derrboundA, iccerrboundA). His bounds hold where nothing under- or
overflows. An overflow makes the bound infinite, so that the filter cannot tell; what an underflow
can add is bounded by a constant beside each filter.

The exact stage does without his expansions, whose products underflow below 2^-1022: it writes the
determinant out as a sum of products of coordinates, and adds these up in a fixed-point number that
is as long as it has to be, a long accumulator (Kulisch and Miranker, SIAM Review 28, 1986).

Compiled functions on scalars, without the GIL, to be called from compiled code.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

U = 2.0**-53  # half a unit in the last place of 1
ORIENTATION_BOUND = (3 + 16 * U) * U
ORIENTATION_3D_BOUND = (7 + 56 * U) * U
IN_CIRCLE_BOUND = (10 + 96 * U) * U

# An underflowing product is off by at most 2^-1075. Two of them are far below this:
UNDERFLOW = 2.0**-1000
# The other determinants multiply such an error by what is checked to be below LARGE:
UNDERFLOW_TIMES_LARGE = 2.0**-600
LARGE = 2.0**400

WORD_BITS = 30  # so that a sum of products of words fits into int64
WORD_MASK = (1 << WORD_BITS) - 1
PRODUCT_WORDS = 8  # four mantissas of 53 bits
# frexp gives mantissa * 2^exponent, and the mantissa is a multiple of 2^-53; 2^-1074 has 2^-1073.
LOWEST_EXPONENT = -1073 - 53
HIGHEST_EXPONENT = 1024


@njit(cache=True, nogil=True)
def orientation(ax, ay, bx, by, cx, cy):
    """1 where a, b, c turn counterclockwise, -1 clockwise, 0 where they are collinear.

    The sign of |a - c, b - c|. Coordinates are finite float64.
    """
    acx, acy, bcx, bcy = ax - cx, ay - cy, bx - cx, by - cy
    left, right = acx * bcy, acy * bcx
    determinant = left - right
    if abs(determinant) > ORIENTATION_BOUND * (abs(left) + abs(right)) + UNDERFLOW:
        return 1 if determinant > 0 else -1
    # Points of a grid and the like: where nothing was rounded, `left - right` has the exact sign.
    exact = _is_difference(ax, cx, acx) and _is_difference(ay, cy, acy)
    exact = exact and _is_difference(bx, cx, bcx) and _is_difference(by, cy, bcy)
    if exact and _is_product(acx, bcy, left) and _is_product(acy, bcx, right):
        return (left > right) - (left < right)
    return _exact_orientation(ax, ay, bx, by, cx, cy)


@njit(cache=True, nogil=True)
def orientation_3d(ax, ay, az, bx, by, bz, cx, cy, cz, dx, dy, dz):
    """1 where d lies below the plane of a, b, c, -1 above, 0 on it; finite float64.

    Above is the side that sees a, b, c turn counterclockwise. The sign of |a - d, b - d, c - d|.
    """
    adx, ady, adz = ax - dx, ay - dy, az - dz
    bdx, bdy, bdz = bx - dx, by - dy, bz - dz
    cdx, cdy, cdz = cx - dx, cy - dy, cz - dz
    bc, cb, ca, ac, ab, ba = bdx * cdy, cdx * bdy, cdx * ady, adx * cdy, adx * bdy, bdx * ady
    determinant = adz * (bc - cb) + bdz * (ca - ac) + cdz * (ab - ba)
    permanent = abs(adz) * (abs(bc) + abs(cb)) + abs(bdz) * (abs(ca) + abs(ac))
    permanent += abs(cdz) * (abs(ab) + abs(ba))
    bound = ORIENTATION_3D_BOUND * permanent + UNDERFLOW_TIMES_LARGE
    if abs(determinant) > bound and abs(adz) + abs(bdz) + abs(cdz) < LARGE:
        return 1 if determinant > 0 else -1
    return _exact_orientation_3d(ax, ay, az, bx, by, bz, cx, cy, cz, dx, dy, dz)


@njit(cache=True, nogil=True)
def collinear_3d(a, b, c):
    """Whether three points of space lie on a line, exactly: their three shadows do."""
    flat = orientation(a[0], a[1], b[0], b[1], c[0], c[1]) == 0
    flat = flat and orientation(a[1], a[2], b[1], b[2], c[1], c[2]) == 0
    return flat and orientation(a[2], a[0], b[2], b[0], c[2], c[0]) == 0


@njit(cache=True, nogil=True)
def in_circle(ax, ay, bx, by, cx, cy, dx, dy):
    """1 where d lies inside the circle through a, b, c, -1 outside, 0 on it; finite float64.

    For a, b, c that turn counterclockwise; the opposite for clockwise.
    """
    adx, ady, bdx, bdy, cdx, cdy = ax - dx, ay - dy, bx - dx, by - dy, cx - dx, cy - dy
    bc, cb, ca, ac, ab, ba = bdx * cdy, cdx * bdy, cdx * ady, adx * cdy, adx * bdy, bdx * ady
    alift, blift, clift = adx * adx + ady * ady, bdx * bdx + bdy * bdy, cdx * cdx + cdy * cdy
    determinant = alift * (bc - cb) + blift * (ca - ac) + clift * (ab - ba)
    permanent = alift * (abs(bc) + abs(cb)) + blift * (abs(ca) + abs(ac))
    permanent += clift * (abs(ab) + abs(ba))
    bound = IN_CIRCLE_BOUND * permanent + UNDERFLOW_TIMES_LARGE
    if abs(determinant) > bound and alift + blift + clift < LARGE:
        return 1 if determinant > 0 else -1
    return _exact_in_circle(ax, ay, bx, by, cx, cy, dx, dy)


@njit(cache=True, nogil=True)
def _is_difference(a, b, difference):
    """Whether a - b was not rounded: the error term of Knuth's TwoDiff is 0 (theorem 7)."""
    b_virtual = a - difference
    a_virtual = difference + b_virtual
    return (a - a_virtual) + (b_virtual - b) == 0.0


@njit(cache=True, nogil=True)
def _is_product(a, b, product):
    """Whether a * b was not rounded: the error term of Dekker's TwoProduct is 0 (theorem 18).

    An overflow makes it NaN. Small products are left to the exact stage: their error underflows.
    """
    if a == 0.0 or b == 0.0:
        return True
    if abs(product) < 1e-200:
        return False
    splitter = 134217729.0  # 2^27 + 1
    large = splitter * a
    a_high = large - (large - a)
    a_low = a - a_high
    large = splitter * b
    b_high = large - (large - b)
    b_low = b - b_high
    error = product - a_high * b_high - a_low * b_high - a_high * b_low
    return a_low * b_low - error == 0.0


@njit(cache=True, nogil=True)
def _orientation_terms(terms, ax, ay, bx, by, cx, cy):
    """Fill the first two factors of (6, ..) products, whose sum has the sign of orientation."""
    row = 0
    for px, py, qx, qy in ((ax, ay, bx, by), (bx, by, cx, cy), (cx, cy, ax, ay)):
        terms[row, 0], terms[row, 1] = px, qy
        terms[row + 1, 0], terms[row + 1, 1] = -py, qx
        row += 2


@njit(cache=True, nogil=True)
def _exact_orientation(ax, ay, bx, by, cx, cy):
    terms = np.empty((6, 2))
    _orientation_terms(terms, ax, ay, bx, by, cx, cy)
    return _sign_of_sum(terms)


@njit(cache=True, nogil=True)
def _exact_orientation_3d(ax, ay, az, bx, by, bz, cx, cy, cz, dx, dy, dz):
    """Expanded along z: the z of each point times the orientation of the three others."""
    terms = np.empty((24, 3))
    _orientation_terms(terms[0:6], bx, by, cx, cy, dx, dy)
    _orientation_terms(terms[6:12], ax, ay, cx, cy, dx, dy)
    _orientation_terms(terms[12:18], ax, ay, bx, by, dx, dy)
    _orientation_terms(terms[18:24], ax, ay, bx, by, cx, cy)
    terms[0:6, 2], terms[6:12, 2], terms[12:18, 2], terms[18:24, 2] = az, -bz, cz, -dz
    return _sign_of_sum(terms)


@njit(cache=True, nogil=True)
def _exact_in_circle(ax, ay, bx, by, cx, cy, dx, dy):
    """The same with x^2 + y^2 in place of z."""
    terms = np.empty((48, 4))
    _orientation_terms(terms[0:6], bx, by, cx, cy, dx, dy)
    _orientation_terms(terms[6:12], ax, ay, cx, cy, dx, dy)
    _orientation_terms(terms[12:18], ax, ay, bx, by, dx, dy)
    _orientation_terms(terms[18:24], ax, ay, bx, by, cx, cy)
    terms[24:48] = terms[0:24]
    row = 0
    for first, second in ((ax, ax), (-bx, bx), (cx, cx), (-dx, dx)):
        terms[row : row + 6, 2], terms[row : row + 6, 3] = first, second
        row += 6
    for first, second in ((ay, ay), (-by, by), (cy, cy), (-dy, dy)):
        terms[row : row + 6, 2], terms[row : row + 6, 3] = first, second
        row += 6
    return _sign_of_sum(terms)


@njit(cache=True, nogil=True)
def _sign_of_sum(terms):
    """The exact sign of the sum over rows of the product of each row: (k, degree), degree <= 4.

    Mantissas are multiplied as integers and added, shifted by their exponents, to words of 30 bits
    each. A word takes less than 2^31 from a row, so that int64 never overflows.
    """
    rows, degree = terms.shape
    length = degree * (HIGHEST_EXPONENT - LOWEST_EXPONENT) // WORD_BITS + PRODUCT_WORDS + 2
    words = np.zeros(length, np.int64)
    product = np.empty(PRODUCT_WORDS, np.int64)
    lowest, highest = length, 0
    for row in range(rows):
        product[:] = 0
        product[0] = 1
        position, negative = -degree * LOWEST_EXPONENT, False
        for factor in range(degree):
            value = terms[row, factor]
            negative ^= value < 0.0
            mantissa, exponent = math.frexp(abs(value))
            position += exponent - 53
            _multiply(product, np.int64(mantissa * 2.0**53))
        word, shift = position // WORD_BITS, position % WORD_BITS
        lowest, highest = min(lowest, word), max(highest, word + PRODUCT_WORDS)
        for i in range(PRODUCT_WORDS):
            shifted = -(product[i] << shift) if negative else product[i] << shift
            words[word + i] += shifted & WORD_MASK
            words[word + i + 1] += shifted >> WORD_BITS
    # Carried upwards, all words are >= 0 and what is carried out of the last one has the sign.
    carry, remains = np.int64(0), False
    for i in range(lowest, highest + 1):
        carry += words[i]
        remains |= (carry & WORD_MASK) != 0
        carry >>= WORD_BITS
    if carry != 0:
        return 1 if carry > 0 else -1
    return 1 if remains else 0


@njit(cache=True, nogil=True)
def _multiply(product, mantissa):
    """Multiply words by an integer below 2^53."""
    low, high = mantissa & WORD_MASK, mantissa >> WORD_BITS
    carry, below = np.int64(0), np.int64(0)
    for i in range(PRODUCT_WORDS):
        word = product[i]
        carry += word * low + below * high
        product[i] = carry & WORD_MASK
        carry >>= WORD_BITS
        below = word
