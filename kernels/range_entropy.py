"""Soft cells around anchors: how much of a set of points falls to each, and the gradients.

With anchors c_1..c_k and sharpness alpha, p_ij = softmax_j(-alpha |x_i - c_j|^2). The forward pass
sums w_i p_ij over the points; the entropy of these k sums is the ball surrogate of range-partition
entropy (arXiv 2509.03733; the entropy is that of arXiv 2508.20489).

|x_i|^2 is the same for all anchors and leaves the softmax. Anchors are taken relative to a centre
mu among them, c' = c - mu, as digits are lost otherwise where all lies far from the origin:

    t_ij = 2 (x_i - mu).c'_j - |c'_j|^2 = 2 x_i.c'_j - b_j,    b_j = |c'_j|^2 + 2 mu.c'_j

and scores are alpha t_ij. Backward, with g_j = -log P_j - H and G_i = sum_j p_ij g_j, the gradient
of a score is w_i e_ij with e_ij = p_ij (g_j - G_i), which sums to 0 over the anchors, hence

    dx_i = 2 alpha w_i sum_j e_ij c'_j           dalpha = sum_ij w_i e_ij t_ij
    dc_j = 2 alpha sum_i w_i e_ij (x_i - c_j)    dw_i   = G_i

each times the incoming gradient over the sum of weights. For the same reason t_ij may be taken
less any number of the point: with lse_i / alpha, what is added up is log p_ij / alpha.

Every product is one of half-precision tiles with an fp32 accumulator, on any tensor core. Numbers
that have more digits are sums of a few such terms, after a power of two has brought them into range:

- fp16 and bf16 points are terms as they are, so tiles go from memory to the tensor cores untouched.
  c' takes two terms of fp16 or three of bf16, as the rounding of an anchor is the same for all
  points and would not average out. e is one term: its rounding does, and dx is rounded anyway.
- fp32 points, relative to mu, are two terms of fp16, and so are c' and e; three products are then
  22 digits. Points have a power of two each, to depend on no neighbour.

Nothing of size n x k is stored. Up to one tile of anchors, a program takes a run of points through
all anchors, forward once and backward once; beyond, log-sum-exp and G_i come from passes of their
own. Sums over points are kept for each program and added by a last kernel, without atomics: results
are the same in every run. A first kernel prepares the anchors, as small ones cost their launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import (
    architecture,
    device_of,
    padded_head_dim,
    split_rows,
    unexpanded,
    weight_strides,
)
from entropy_attn.kernels.primitives import (
    LOG2_E,
    NO_SCORE,
    dot_terms,
    half_range_scale,
    head_base,
    load_part,
    load_rows,
    online_softmax,
    row_weights,
    two_terms,
    weighted_rows,
)

# Arguments that vary from call to call: a new number must not compile the kernel again.
LENGTHS = (
    "n", "k", "inner", "tiles", "share", "splits", "chunks", "parts", "problems", "k_padded",
)  # fmt: skip
# The b of an anchor that is not there, and the log-sum-exp of a point that is not: p becomes 0,
# and what is multiplied by it stays finite.
NOWHERE = tl.constexpr(1.0e30)


@triton.jit(do_not_specialize=LENGTHS)
def _prepare_kernel(
    anchors, terms_ptr, norms_ptr, centre_ptr, unit_ptr,
    grad, mass, entropy, weight_sums, surprise_ptr, rate_ptr,
    anchor_strides, inner, n, k, k_padded, problems,
    DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, TERMS: tl.constexpr,
    CENTRED: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """Terms and b of the anchors of each problem and, before the backward, g and its scale.

    Terms are (problems, TERMS, k_padded, PADDED), of c' over ``unit``; what is padding is nowhere.
    ``surprise`` is g over a power of two, ``rate`` that power times what each gradient is times.
    """
    program = tl.program_id(0)
    dims = tl.arange(0, PADDED)
    if program < problems:
        base = head_base(
            anchors, program // inner, program % inner, anchor_strides[0], anchor_strides[1]
        )
        # Any point near the anchors would do as the centre; one of them all is the best guess.
        centre = tl.zeros([PADDED], tl.float32)
        for start in range(0, k, ROWS):
            rows = start + tl.arange(0, ROWS)
            anchor = load_part(base, rows, k, dims, DIM, anchor_strides[2], anchor_strides[3])
            centre += tl.sum(anchor, 0)
        centre = centre / k
        largest = tl.zeros([ROWS], tl.float32)
        for start in range(0, k, ROWS):
            rows = start + tl.arange(0, ROWS)
            anchor = load_part(base, rows, k, dims, DIM, anchor_strides[2], anchor_strides[3])
            relative = tl.where((rows < k)[:, None], anchor - centre[None, :], 0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(relative), 1))
        scale, unit = half_range_scale(tl.max(largest, 0))
        tl.store(unit_ptr + program, unit)
        if CENTRED:
            tl.store(centre_ptr + program.to(tl.int64) * DIM + dims, centre, mask=dims < DIM)
        terms_ptr += program.to(tl.int64) * TERMS * k_padded * PADDED
        for start in range(0, k_padded, ROWS):
            rows = start + tl.arange(0, ROWS)
            anchor = load_part(base, rows, k, dims, DIM, anchor_strides[2], anchor_strides[3])
            relative = tl.where((rows < k)[:, None], anchor - centre[None, :], 0.0)
            other = relative
            if not CENTRED:
                other += 2.0 * centre[None, :]
            # b cancels against the product: all its digits count.
            norm = tl.sum(relative.to(tl.float64) * other.to(tl.float64), 1).to(tl.float32)
            norm = tl.where(rows < k, norm, NOWHERE)
            padded = rows < k_padded
            tl.store(norms_ptr + program.to(tl.int64) * k_padded + rows, norm, mask=padded)
            rest = relative * scale
            where = rows.to(tl.int64)[:, None] * PADDED + dims[None, :]
            for term in tl.static_range(TERMS):
                half = rest.to(terms_ptr.dtype.element_ty)
                rest -= half.to(tl.float32)
                out = terms_ptr + term * k_padded.to(tl.int64) * PADDED + where
                tl.store(out, half, mask=padded[:, None])
    if HAS_GRAD:
        if HAS_WEIGHTS:
            weight = tl.load(weight_sums + program)
        else:
            weight = n.to(tl.float32)
        mean = tl.load(entropy + program)
        highest = tl.zeros([CELLS], tl.float32)
        for start in range(0, k, CELLS):
            cells = start + tl.arange(0, CELLS)
            g = _surprise(mass + program.to(tl.int64) * k, mean, cells, k)
            highest = tl.maximum(highest, tl.abs(g))
        scale, inverse = half_range_scale(tl.max(highest, 0))
        rate = tl.load(grad + program) / tl.where(weight > 0.0, weight, 1.0)
        tl.store(rate_ptr + program, tl.where(weight > 0.0, rate, 0.0) * inverse)
        for start in range(0, k_padded, CELLS):
            cells = start + tl.arange(0, CELLS)
            g = _surprise(mass + program.to(tl.int64) * k, mean, cells, k) * scale
            out = surprise_ptr + program.to(tl.int64) * k_padded + cells
            tl.store(out, g, mask=cells < k_padded)


@triton.jit
def _surprise(mass, entropy, cells, k):
    """-log P - H, how much rarer a cell is than the mean one; 0 where P is 0.

    Less H, which leaves every gradient as it is, since what is small needs no digits for H.
    """
    share = tl.load(mass + cells, mask=cells < k, other=0.0)
    return tl.where(share > 0.0, -tl.log(tl.where(share > 0.0, share, 1.0)) - entropy, 0.0)


@triton.jit
def _problem(
    points, point_strides, terms, norms, centre, unit, alpha, problem_strides, batch, inner,
    k_padded, DIM: tl.constexpr, PADDED: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Addresses of one problem and the factors of products and of b in base 2."""
    outer, head = batch // inner, batch % inner
    points = head_base(points, outer, head, point_strides[0], point_strides[1])
    which = (outer * problem_strides[0] + head * problem_strides[1]).to(tl.int64)
    factor = tl.load(alpha + batch) * LOG2_E
    scale = 2.0 * factor * tl.load(unit + which)
    terms += which * TERMS * k_padded * PADDED
    return points, terms, norms + which * k_padded, centre + which * DIM, factor, scale


@triton.jit
def _load_terms(terms, columns, dims, k_padded, PADDED: tl.constexpr, TERMS: tl.constexpr):
    """(N, dims) terms of the anchors, the highest first; three in any case."""
    where = terms + columns.to(tl.int64)[:, None] * PADDED + dims[None, :]
    high = tl.load(where)
    middle = tl.load(where + k_padded.to(tl.int64) * PADDED)
    low = middle
    if TERMS == 3:
        low = tl.load(where + 2 * k_padded.to(tl.int64) * PADDED)
    return high, middle, low


@triton.jit
def _load_points(
    points, point_strides, centre, rows, dims, n, HALF: tl.constexpr, DIM: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """(M, dims) points as a high and a low term, and the (M,) powers of two they are over."""
    x = load_rows(points, rows, n, dims, DIM, point_strides[2], point_strides[3])
    if CENTRED:
        x -= tl.load(centre + dims, mask=dims < DIM, other=0.0)[None, :]
        scale, unit = half_range_scale(tl.max(tl.abs(x), 1))
        high, low = two_terms(x * scale[:, None], HALF)
    else:
        high, low, unit = x, x, tl.full([rows.shape[0]], 1.0, tl.float32)
    return high, low, unit


@triton.jit
def _products(
    points, point_strides, centre, terms, first_terms, rows, columns, n, k_padded,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_D: tl.constexpr, TERMS: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """(M, N) products of points and anchors over (M,) powers of two; the points' first terms.

    Args:
        first_terms: `_load_terms` of the first dimensions; the caller may keep them.
    """
    dims = tl.arange(0, BLOCK_D)
    HALF: tl.constexpr = terms.dtype.element_ty
    x, x_low, unit = _load_points(points, point_strides, centre, rows, dims, n, HALF, DIM, CENTRED)
    first = (x, x_low, unit)
    high, middle, low = first_terms
    product = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    product = _add_products(product, x, x_low, high, middle, low, TERMS, CENTRED)
    if BLOCK_D < DIM:
        if CENTRED:
            product *= unit[:, None]
        for start in range(BLOCK_D, DIM, BLOCK_D):
            x, x_low, unit = _load_points(
                points, point_strides, centre, rows, start + dims, n, HALF, DIM, CENTRED
            )
            high, middle, low = _load_terms(terms, columns, start + dims, k_padded, PADDED, TERMS)
            if CENTRED:
                part = dot_terms(x, x_low, tl.trans(high), tl.trans(middle), True)
                product += part * unit[:, None]
            else:
                product = _add_products(product, x, x_low, high, middle, low, TERMS, CENTRED)
        unit = tl.full([rows.shape[0]], 1.0, tl.float32)
    return product, unit, first


@triton.jit
def _add_products(
    product, x, x_low, high, middle, low, TERMS: tl.constexpr, CENTRED: tl.constexpr
):
    """The products of all terms, small ones first: tensor cores cut digits off as they add."""
    if TERMS == 3:
        product = tl.dot(x, tl.trans(low), product)
    if CENTRED:
        product = tl.dot(x_low, tl.trans(high), product)
    product = tl.dot(x, tl.trans(middle), product)
    return tl.dot(x, tl.trans(high), product)


@triton.jit(do_not_specialize=LENGTHS)
def _normaliser_kernel(
    points, terms, norms, centre, unit, alpha, lse_ptr, peak_ptr,
    point_strides, problem_strides, inner, n, k_padded, tiles,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, TERMS: tl.constexpr, CENTRED: tl.constexpr, STORE_PEAK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the scores of a tile of points, over any number of anchors."""
    program = tl.program_id(0)
    batch = program // tiles
    rows = (program % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    points, terms, norms, centre, factor, scale = _problem(
        points, point_strides, terms, norms, centre, unit, alpha, problem_strides, batch, inner,
        k_padded, DIM, PADDED, TERMS,
    )  # fmt: skip
    maximum = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, k_padded, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        first = _load_terms(terms, columns, tl.arange(0, BLOCK_D), k_padded, PADDED, TERMS)
        product, units, _ = _products(
            points, point_strides, centre, terms, first, rows, columns, n, k_padded,
            DIM, PADDED, BLOCK_D, TERMS, CENTRED,
        )  # fmt: skip
        norm = tl.load(norms + columns) * factor
        scores = product * (scale * units)[:, None] - norm[None, :]
        exponents, maximum, shift = online_softmax(scores, 1.0, maximum)
        total = total * tl.exp2(shift) + tl.sum(tl.exp2(exponents), 1)
    where = batch.to(tl.int64) * n + rows
    tl.store(lse_ptr + where, maximum + tl.log2(total), mask=rows < n)
    if STORE_PEAK:
        tl.store(peak_ptr + where, 1.0 / total, mask=rows < n)


@triton.jit(do_not_specialize=LENGTHS)
def _mass_kernel(
    points, terms, norms, centre, unit, alpha, weights, lse_ptr, peak_ptr, sums_ptr,
    point_strides, problem_strides, weight_strides, inner, n, k_padded, tiles, share, splits,
    chunks, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, TERMS: tl.constexpr, CENTRED: tl.constexpr, STORE_PEAK: tl.constexpr,
    ONE_CHUNK: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Weighted sums of p over a run of tiles of points, for one chunk of anchors."""
    program = tl.program_id(0)
    split = program % splits
    chunk = program // splits % chunks
    batch = program // splits // chunks
    points, terms, norms, centre, factor, scale = _problem(
        points, point_strides, terms, norms, centre, unit, alpha, problem_strides, batch, inner,
        k_padded, DIM, PADDED, TERMS,
    )  # fmt: skip
    columns = chunk * BLOCK_N + tl.arange(0, BLOCK_N)  # (N,)
    first = _load_terms(terms, columns, tl.arange(0, BLOCK_D), k_padded, PADDED, TERMS)
    norm = tl.load(norms + columns) * factor
    # Summed over its rows once, at the end: a sum over the rows of a tile crosses threads.
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
        product, units, _ = _products(
            points, point_strides, centre, terms, first, rows, columns, n, k_padded,
            DIM, PADDED, BLOCK_D, TERMS, CENTRED,
        )  # fmt: skip
        scores = product * (scale * units)[:, None] - norm[None, :]
        where = batch.to(tl.int64) * n + rows
        weight = row_weights(
            weights, batch // inner, batch % inner, weight_strides, rows, n, HAS_WEIGHTS
        )
        if ONE_CHUNK:
            maximum = tl.max(scores, 1)
            p = tl.exp2(scores - maximum[:, None])  # (M, N), times total
            total = tl.sum(p, 1)
            tl.store(lse_ptr + where, maximum + tl.log2(total), mask=rows < n)
            inverse = 1.0 / total
            if STORE_PEAK:
                tl.store(peak_ptr + where, inverse, mask=rows < n)
            if HAS_WEIGHTS:
                inverse = tl.where(weight > 0.0, inverse, 0.0)  # it may be NaN
            weight *= inverse
        else:
            lse = tl.load(lse_ptr + where, mask=rows < n, other=NOWHERE)
            p = tl.exp2(scores - lse[:, None])
        if HAS_WEIGHTS:
            sums += weighted_rows(p, weight)
        else:
            sums += p * weight[:, None]
    out = sums_ptr + (batch * splits + split).to(tl.int64) * k_padded + columns
    tl.store(out, tl.sum(sums, 0))


@triton.jit(do_not_specialize=LENGTHS)
def _entropy_kernel(
    sums_ptr, weight_sums, mass_ptr, entropy_ptr, n, k, k_padded, splits,
    HAS_WEIGHTS: tl.constexpr, SPLITS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Masses of all cells of a problem from the sums of its programs, and their entropy."""
    batch = tl.program_id(0)
    if HAS_WEIGHTS:
        weight = tl.load(weight_sums + batch)
    else:
        weight = n.to(tl.float32)
    sums_ptr += batch.to(tl.int64) * splits * k_padded
    entropy = tl.zeros([CELLS], tl.float32)
    for start in range(0, k, CELLS):
        cells = start + tl.arange(0, CELLS)
        parts = tl.zeros([SPLITS, CELLS], tl.float32)
        for first in range(0, splits, SPLITS):
            rows = first + tl.arange(0, SPLITS)
            where = rows.to(tl.int64)[:, None] * k_padded + cells[None, :]
            mask = (rows < splits)[:, None] & (cells < k)[None, :]
            parts += tl.load(sums_ptr + where, mask=mask, other=0.0)
        # Rounded as IEEE division is: a mass of 1 is exactly 1.
        mass = tl.math.div_rn(tl.sum(parts, 0), tl.where(weight > 0.0, weight, 1.0))
        mass = tl.where(weight > 0.0, mass, 0.0)
        tl.store(mass_ptr + batch.to(tl.int64) * k + cells, mass, mask=cells < k)
        entropy -= tl.where(mass > 0.0, mass * tl.log(tl.where(mass > 0.0, mass, 1.0)), 0.0)
    tl.store(entropy_ptr + batch, tl.maximum(tl.sum(entropy, 0), 0.0))


@triton.jit
def _log_share(product, units, norm, lse, scale):
    """(M, N) log2 p."""
    return product * (scale * units)[:, None] - norm[None, :] - lse[:, None]


@triton.jit(do_not_specialize=LENGTHS)
def _point_kernel(
    points, terms, norms, centre, unit, alpha, weights, lse_ptr, surprise, rate, expected_ptr,
    grad_ptr, point_strides, problem_strides, weight_strides, inner, n, k_padded, tiles, parts,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr, TERMS: tl.constexpr, CENTRED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, NEED_POINTS: tl.constexpr,
):  # fmt: skip
    """G and a part of the dimensions of dx for a tile of points, over any number of anchors."""
    program = tl.program_id(0)
    tile = program % tiles
    part = program // tiles % parts
    batch = program // tiles // parts
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    outer, head = batch // inner, batch % inner
    points, terms, norms, centre, factor, scale = _problem(
        points, point_strides, terms, norms, centre, unit, alpha, problem_strides, batch, inner,
        k_padded, DIM, PADDED, TERMS,
    )  # fmt: skip
    where = batch.to(tl.int64) * n + rows
    lse = tl.load(lse_ptr + where, mask=rows < n, other=NOWHERE)
    surprise += batch.to(tl.int64) * k_padded
    out_dims = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)

    expected = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, k_padded, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        first = _load_terms(terms, columns, tl.arange(0, BLOCK_D), k_padded, PADDED, TERMS)
        product, units, _ = _products(
            points, point_strides, centre, terms, first, rows, columns, n, k_padded,
            DIM, PADDED, BLOCK_D, TERMS, CENTRED,
        )  # fmt: skip
        p = tl.exp2(_log_share(product, units, tl.load(norms + columns) * factor, lse, scale))
        expected += tl.sum(p * tl.load(surprise + columns)[None, :], 1)
    if part == 0:
        tl.store(expected_ptr + where, expected, mask=rows < n)

    if NEED_POINTS:
        HALF: tl.constexpr = terms.dtype.element_ty
        grad = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
        for start in range(0, k_padded, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            first = _load_terms(terms, columns, tl.arange(0, BLOCK_D), k_padded, PADDED, TERMS)
            product, units, _ = _products(
                points, point_strides, centre, terms, first, rows, columns, n, k_padded,
                DIM, PADDED, BLOCK_D, TERMS, CENTRED,
            )  # fmt: skip
            p = tl.exp2(_log_share(product, units, tl.load(norms + columns) * factor, lse, scale))
            e = p * (tl.load(surprise + columns)[None, :] - expected[:, None])  # (M, N)
            high, low = two_terms(e, HALF)
            anchor, anchor_low, _ = _load_terms(terms, columns, out_dims, k_padded, PADDED, 2)
            grad += dot_terms(high, low, anchor, anchor_low, CENTRED)
        weight = row_weights(weights, outer, head, weight_strides, rows, n, HAS_WEIGHTS)
        _store_point_grad(
            grad_ptr + batch.to(tl.int64) * n * DIM, grad, weight,
            scale * (1.0 / LOG2_E) * tl.load(rate + batch), rows, n, out_dims, DIM, HAS_WEIGHTS,
        )  # fmt: skip


@triton.jit
def _store_point_grad(
    base, grad, weights, scale, rows, n, dims, DIM: tl.constexpr, HAS_WEIGHTS: tl.constexpr
):
    """Write (M, dims) of dx, contiguous."""
    grad *= scale
    if HAS_WEIGHTS:
        grad = weighted_rows(grad, weights)
    pointers = base + rows.to(tl.int64)[:, None] * DIM + dims[None, :]
    mask = (rows < n)[:, None] & (dims < DIM)[None, :]
    tl.store(pointers, grad.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def _anchor_kernel(
    points, terms, norms, centre, unit, alpha, weights, lse_ptr, surprise, rate, expected_ptr,
    grad_ptr, product_ptr, flow_ptr, slope_ptr, point_strides, problem_strides, weight_strides,
    inner, n, k_padded, tiles, share, splits, chunks, parts,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr, TERMS: tl.constexpr, CENTRED: tl.constexpr,
    ONE_CHUNK: tl.constexpr, HAS_WEIGHTS: tl.constexpr, NEED_POINTS: tl.constexpr,
    NEED_ANCHORS: tl.constexpr, NEED_EXPECTED: tl.constexpr,
):  # fmt: skip
    """Sums over a run of tiles of points for a chunk of anchors and a part of the dimensions.

    They are, with weights, sum_i e_ij x_i ("product"), sum_i e_ij ("flow") and, over the chunk,
    sum_ij e_ij log2 p_ij ("slope"). With ONE_CHUNK every anchor is here, so that G and dx are too.
    """
    program = tl.program_id(0)
    split = program % splits
    part = program // splits % parts
    chunk = program // splits // parts % chunks
    batch = program // splits // parts // chunks
    outer, head = batch // inner, batch % inner
    points, terms, norms, centre, factor, scale = _problem(
        points, point_strides, terms, norms, centre, unit, alpha, problem_strides, batch, inner,
        k_padded, DIM, PADDED, TERMS,
    )  # fmt: skip
    HALF: tl.constexpr = terms.dtype.element_ty
    # One step holds all dimensions, of the products and of the gradients.
    WHOLE: tl.constexpr = DIM <= BLOCK_D and BLOCK_OUT == BLOCK_D
    columns = chunk * BLOCK_N + tl.arange(0, BLOCK_N)  # (N,)
    out_dims = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = _load_terms(terms, columns, tl.arange(0, BLOCK_D), k_padded, PADDED, TERMS)
    norm = tl.load(norms + columns) * factor
    g = tl.load(surprise + batch.to(tl.int64) * k_padded + columns)
    out_scale = scale * (1.0 / LOG2_E) * tl.load(rate + batch)
    product_sum = tl.zeros([BLOCK_N, BLOCK_OUT], tl.float32)
    if CENTRED:
        flow = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        # Points may lie far off: flow has to sum e as it is rounded in the product. The narrowest
        # product with ones does.
        ones = tl.full([BLOCK_M, 16], 1.0, HALF)
        flow = tl.zeros([BLOCK_N, 16], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
        product, units, x_terms = _products(
            points, point_strides, centre, terms, first, rows, columns, n, k_padded,
            DIM, PADDED, BLOCK_D, TERMS, CENTRED,
        )  # fmt: skip
        where = batch.to(tl.int64) * n + rows
        lse = tl.load(lse_ptr + where, mask=rows < n, other=NOWHERE)
        log_share = _log_share(product, units, norm, lse, scale)
        p = tl.exp2(log_share)  # (M, N)
        if ONE_CHUNK:
            expected = tl.sum(p * g[None, :], 1)
            if NEED_EXPECTED and part == 0:
                tl.store(expected_ptr + where, expected, mask=rows < n)
        else:
            expected = tl.load(expected_ptr + where, mask=rows < n, other=0.0)
        e = p * (g[None, :] - expected[:, None])
        weight = row_weights(weights, outer, head, weight_strides, rows, n, HAS_WEIGHTS)
        high, low = two_terms(e, HALF)
        if NEED_POINTS and ONE_CHUNK:
            if WHOLE:
                anchor, anchor_low, _ = first
            else:
                anchor, anchor_low, _ = _load_terms(
                    terms, columns, out_dims, k_padded, PADDED, 2
                )  # (N, OUT)
            grad = dot_terms(high, low, anchor, anchor_low, CENTRED)  # (M, OUT)
            _store_point_grad(
                grad_ptr + batch.to(tl.int64) * n * DIM, grad, weight, out_scale, rows, n,
                out_dims, DIM, HAS_WEIGHTS,
            )  # fmt: skip
        if NEED_ANCHORS:
            steepness = tl.sum(e * log_share, 1)
            if WHOLE:
                x, x_low, units = x_terms
            else:
                x, x_low, units = _load_points(
                    points, point_strides, centre, rows, out_dims, n, HALF, DIM, CENTRED
                )
            if HAS_WEIGHTS:
                steepness = tl.where(weight > 0.0, steepness * weight, 0.0)
                # 0 times what a masked point holds may be NaN.
                x = tl.where((weight > 0.0)[:, None], x, 0.0)
                x_low = tl.where((weight > 0.0)[:, None], x_low, 0.0)
            slope += steepness
            if CENTRED:
                flow += weighted_rows(e, weight) if HAS_WEIGHTS else e
            if HAS_WEIGHTS or CENTRED:
                # Factors of points go into e over a power of two of the tile: none exceeds 1.
                row_factor = tl.where(weight > 0.0, weight * units, 0.0)
                to_range, tile_unit = half_range_scale(tl.max(row_factor, 0))
                row_factor *= to_range * 2.0**-14
                tile_unit *= 2.0**14
                high, low = two_terms(weighted_rows(e, row_factor), HALF)
                total = dot_terms(tl.trans(high), tl.trans(low), x, x_low, CENTRED)
                product_sum += total * tile_unit
                if not CENTRED:
                    flow += tl.dot(tl.trans(high), ones) * tile_unit
            else:
                product_sum = tl.dot(tl.trans(high), x, product_sum)
                flow = tl.dot(tl.trans(high), ones, flow)
    if NEED_ANCHORS:
        sums = (batch * splits + split).to(tl.int64) * k_padded + columns
        inside = (out_dims < DIM)[None, :]
        tl.store(product_ptr + sums[:, None] * DIM + out_dims[None, :], product_sum, mask=inside)
        if part == 0:
            if CENTRED:
                tl.store(flow_ptr + sums, tl.sum(flow, 0))
            else:
                tl.store(flow_ptr + sums, tl.max(flow, 1))  # all columns are the same
            tl.store(slope_ptr + (batch * splits + split) * chunks + chunk, tl.sum(slope, 0))


@triton.jit(do_not_specialize=LENGTHS)
def _cell_gradient_kernel(
    product_ptr, flow_ptr, slope_ptr, anchors, centre, alpha, rate, grad_ptr, alpha_grad_ptr,
    anchor_strides, problem_strides, inner, k, k_padded, splits, chunks,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """The gradients of one anchor, and of alpha, from the sums of all programs."""
    program = tl.program_id(0)
    anchor = program % k
    batch = program // k
    outer, head = batch // inner, batch % inner
    which = (outer * problem_strides[0] + head * problem_strides[1]).to(tl.int64)
    sharpness, factor = tl.load(alpha + batch), tl.load(rate + batch)
    anchors = head_base(anchors, outer, head, anchor_strides[0], anchor_strides[1])
    anchors += anchor.to(tl.int64) * anchor_strides[2]
    base = batch.to(tl.int64) * splits * k_padded + anchor
    flow = tl.zeros([SPLITS], tl.float32)
    for start in range(0, splits, SPLITS):
        rows = start + tl.arange(0, SPLITS)
        flow += tl.load(flow_ptr + base + rows * k_padded, mask=rows < splits, other=0.0)
    for first in range(0, DIM, BLOCK_D):
        dims = first + tl.arange(0, BLOCK_D)
        total = tl.zeros([SPLITS, BLOCK_D], tl.float32)
        for start in range(0, splits, SPLITS):
            rows = start + tl.arange(0, SPLITS)
            where = (base + rows * k_padded)[:, None] * DIM + dims[None, :]
            mask = (rows < splits)[:, None] & (dims < DIM)[None, :]
            total += tl.load(product_ptr + where, mask=mask, other=0.0)
        origin = tl.load(anchors + dims * anchor_strides[3], mask=dims < DIM, other=0.0)
        origin = origin.to(tl.float32)
        if CENTRED:
            origin -= tl.load(centre + which * DIM + dims, mask=dims < DIM, other=0.0)
        grad = (tl.sum(total, 0) - origin * tl.sum(flow, 0)) * (2.0 * sharpness * factor)
        tl.store(grad_ptr + program.to(tl.int64) * DIM + dims, grad, mask=dims < DIM)
    if anchor == 0:
        slope = tl.zeros([SPLITS], tl.float32)
        for start in range(0, splits * chunks, SPLITS):
            parts = start + tl.arange(0, SPLITS)
            where = slope_ptr + batch * splits * chunks + parts
            slope += tl.load(where, mask=parts < splits * chunks, other=0.0)
        # Without sharpness all cells are equal, and to first order it changes no mass.
        inverse = tl.where(sharpness != 0.0, 1.0 / (sharpness * LOG2_E), 0.0)
        tl.store(alpha_grad_ptr + batch, tl.sum(slope, 0) * inverse * factor)


@dataclass(frozen=True)
class RangeConfig:
    """Tile sizes: points, anchors, dimensions of a step, dimensions of a part of a gradient.

    Attributes:
        programs: how many share the points, the same on every GPU so that sums are the same.
    """

    block_m: int
    block_n: int
    block_d: int
    block_out: int
    num_warps: int
    num_stages: int
    programs: int


def forward_config(dim: int, k: int, dtype: torch.dtype, arch: str) -> RangeConfig:
    """One chunk of anchors up to 128 of them: it saves a pass over the points."""
    padded, block_n = padded_head_dim(dim), min(128, max(16, triton.next_power_of_2(k)))
    is_wide = block_n > 64
    return RangeConfig(64, block_n, min(padded, 64), 0, 8 if is_wide else 4, 2, 528)


def backward_config(dim: int, k: int, dtype: torch.dtype, arch: str) -> RangeConfig:
    """Like the forward; three products and their operands share the registers."""
    padded, block_n = padded_head_dim(dim), min(128, max(16, triton.next_power_of_2(k)))
    is_wide = block_n > 64
    block_d = min(padded, 64)
    return RangeConfig(64, block_n, block_d, block_d, 8 if is_wide else 4, 2, 528)


class _Call:
    """Shapes of a call, its anchors as the first kernel prepares them, and what launches share."""

    def __init__(
        self,
        points: Tensor,
        anchors: Tensor,
        alpha: Tensor,
        weights: Tensor | None,
        config: RangeConfig,
    ) -> None:
        outer, self.inner, self.n, self.dim = points.shape
        self.batch, self.k, self.config = outer * self.inner, anchors.shape[2], config
        self.tiles = triton.cdiv(self.n, config.block_m)
        self.chunks = triton.cdiv(self.k, config.block_n)
        self.k_padded = self.chunks * config.block_n
        self.anchors, self.weights = anchors, weights
        self.weight_sums = None if weights is None else weights.sum(-1)
        self.stored = unexpanded(anchors)  # anchors that sets share are prepared once
        first, second = self.stored.shape[:2]
        self.problems = first * second
        is_centred = points.dtype == torch.float32
        half = torch.float16 if is_centred else points.dtype
        terms, padded = 3 if half == torch.bfloat16 else 2, padded_head_dim(self.dim)
        self.terms = points.new_empty((self.problems, terms, self.k_padded, padded), dtype=half)
        self.norms, self.centre, self.unit = (
            alpha.new_empty(self.problems * entries)
            for entries in (self.k_padded, self.dim if is_centred else 0, 1)
        )
        self.alpha = alpha.contiguous()
        # What kernels take first, and strides; those of problems count problems.
        self.given = (points, self.terms, self.norms, self.centre, self.unit, self.alpha)
        self.problem_strides = (second if first > 1 else 0, 1 if second > 1 else 0)
        self.strides = (points.stride(), self.problem_strides)
        self.form = dict(DIM=self.dim, PADDED=padded, TERMS=terms, CENTRED=is_centred)
        self.shape = dict(
            **self.form, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=config.block_d,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    def prepare(self, grad: Tensor | None, *backward: Tensor | None) -> None:
        """Fill in the terms of the anchors and, given a gradient, what the backward starts from.

        Args:
            backward: mass, entropy, then surprise and rate to be filled in.
        """
        mass, entropy, surprise, rate = backward or (None,) * 4
        has_grad = grad is not None
        padded = self.form["PADDED"]
        _prepare_kernel[(self.batch if has_grad else self.problems,)](
            self.stored, self.terms, self.norms, self.centre, self.unit,
            grad, mass, entropy, self.weight_sums, surprise, rate,
            self.stored.stride(), self.stored.shape[1], self.n, self.k, self.k_padded,
            self.problems, ROWS=max(1, min(triton.next_power_of_2(self.k_padded), 8192 // padded)),
            HAS_GRAD=has_grad, HAS_WEIGHTS=self.weights is not None, CELLS=_cells(self.k_padded),
            **self.form, num_warps=8,
        )  # fmt: skip


def _cells(k: int) -> int:
    """How many cells a step of a kernel takes that goes through all of them."""
    return min(1024, max(16, triton.next_power_of_2(k)))


def range_mass(
    points: Tensor,
    anchors: Tensor,
    alpha: Tensor,
    weights: Tensor | None,
    with_peak: bool,
    config: RangeConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masses of the cells, the weighted means of p over the points, and their entropy.

    Args:
        points: (B0, B1, n, d) fp32, fp16 or bf16, any strides.
        anchors: (B0, B1, k, d) fp32, may be expanded. alpha: (B0, B1) fp32.
        weights: (B0, B1, n) fp32, any strides, or None for 1.

    Returns:
        entropy (B0, B1); masses (B0, B1, k); log-sum-exp of the scores in base 2 (B0, B1, n); the
        largest p of each point (B0, B1, n), or empty without ``with_peak``. All fp32.
    """
    outer, inner, n, dim = points.shape
    batch, k = outer * inner, anchors.shape[2]
    lse = alpha.new_empty((outer, inner, n))
    peak = alpha.new_empty((outer, inner, n) if with_peak else (0,))
    if batch * n == 0:
        return alpha.new_zeros(outer, inner), alpha.new_zeros(outer, inner, k), lse, peak
    config = config or forward_config(dim, k, points.dtype, architecture(points.device))
    call = _Call(points, anchors, alpha, weights, config)
    splits, share = split_rows(call.tiles, batch * call.chunks, config.programs)
    entropy, mass = alpha.new_empty(outer, inner), alpha.new_empty(outer, inner, k)
    sums = alpha.new_empty(batch, splits, call.k_padded)
    has_weights = weights is not None
    with device_of(points):
        call.prepare(None)
        if call.chunks > 1:
            _normaliser_kernel[(batch * call.tiles,)](
                *call.given, lse, peak, *call.strides, inner, n, call.k_padded, call.tiles,
                STORE_PEAK=with_peak, **call.shape,
            )  # fmt: skip
        _mass_kernel[(batch * call.chunks * splits,)](
            *call.given, weights, lse, peak, sums, *call.strides, weight_strides(weights), inner,
            n, call.k_padded, call.tiles, share, splits, call.chunks, STORE_PEAK=with_peak,
            ONE_CHUNK=call.chunks == 1, HAS_WEIGHTS=has_weights, **call.shape,
        )  # fmt: skip
        cells = _cells(k)
        _entropy_kernel[(batch,)](
            sums, call.weight_sums, mass, entropy, n, k, call.k_padded, splits,
            HAS_WEIGHTS=has_weights, SPLITS=8192 // cells, CELLS=cells, num_warps=8,
        )  # fmt: skip
    return entropy, mass, lse, peak


def range_gradients(
    grad: Tensor,
    points: Tensor,
    anchors: Tensor,
    alpha: Tensor,
    weights: Tensor | None,
    entropy: Tensor,
    mass: Tensor,
    lse: Tensor,
    need_points: bool,
    need_anchors: bool,
    need_weights: bool,
    config: RangeConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients from that of the entropy, given what `range_mass` took and returned.

    Returns:
        dx (B0, B1, n, d) in the dtype of the points; danchors (B0, B1, k, d), dalpha (B0, B1) and
        dweights (B0, B1, n) in fp32. Those not needed are empty.
    """
    outer, inner, n, dim = points.shape
    batch, k = outer * inner, anchors.shape[2]
    point_grad = points.new_empty(points.shape if need_points else (0,))
    if batch * n == 0:
        shape = anchors.shape if need_anchors else (0,)
        weight_grad = alpha.new_zeros((outer, inner, n) if need_weights else (0,))
        return point_grad, alpha.new_zeros(shape), alpha.new_zeros(shape[:2]), weight_grad
    config = config or backward_config(dim, k, points.dtype, architecture(points.device))
    call = _Call(points, anchors, alpha, weights, config)
    parts = triton.cdiv(dim, config.block_out) if need_points or need_anchors else 1
    splits, share = split_rows(call.tiles, batch * call.chunks * parts, config.programs)
    anchor_grad = alpha.new_empty(anchors.shape if need_anchors else (0,))
    alpha_grad = alpha.new_empty((outer, inner) if need_anchors else (0,))
    surprise, rate = alpha.new_empty(batch, call.k_padded), alpha.new_empty(outer, inner)
    # Where neither asks for it, G stays in registers.
    keeps_expected = need_weights or call.chunks > 1
    expected = alpha.new_empty((outer, inner, n) if keeps_expected else (0,))
    sums = (batch, splits, call.k_padded)
    product = alpha.new_empty((*sums, dim) if need_anchors else (0,))
    flow = alpha.new_empty(sums if need_anchors else (0,))
    slope = alpha.new_empty((batch, splits, call.chunks) if need_anchors else (0,))
    # What both kernels take first and last.
    given = (*call.given, weights, lse, surprise, rate, expected, point_grad)
    strides = (*call.strides, weight_strides(weights))
    shape = dict(
        **call.shape, BLOCK_OUT=config.block_out, HAS_WEIGHTS=weights is not None,
        NEED_POINTS=need_points,
    )  # fmt: skip
    with device_of(points):
        call.prepare(grad.contiguous(), mass, entropy, surprise, rate)
        if call.chunks > 1:
            _point_kernel[(batch * parts * call.tiles,)](
                *given, *strides, inner, n, call.k_padded, call.tiles, parts, **shape
            )
        if need_anchors or call.chunks == 1:
            _anchor_kernel[(batch * call.chunks * parts * splits,)](
                *given, product, flow, slope, *strides, inner, n, call.k_padded, call.tiles, share,
                splits, call.chunks, parts, ONE_CHUNK=call.chunks == 1, NEED_ANCHORS=need_anchors,
                NEED_EXPECTED=keeps_expected, **shape,
            )  # fmt: skip
        if need_anchors:
            _cell_gradient_kernel[(batch * k,)](
                product, flow, slope, anchors, call.centre, call.alpha, rate, anchor_grad,
                alpha_grad, anchors.stride(), call.problem_strides, inner, k, call.k_padded, splits,
                call.chunks, DIM=dim, BLOCK_D=min(64, padded_head_dim(dim)), SPLITS=128,
                CENTRED=call.form["CENTRED"],
            )  # fmt: skip
    weight_grad = expected * rate[..., None] if need_weights else expected.new_empty(0)
    return point_grad, anchor_grad, alpha_grad, weight_grad
