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
that have more digits are sums of a few such terms, after a power of two has brought them into
range:

- fp16 and bf16 points are terms as they are: tiles go from memory to the tensor cores as they lie.
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

from entropy_attn.kernels.launch import padded_head_dim, unexpanded
from entropy_attn.kernels.primitives import (
    LOG2_E,
    dot_terms,
    half_range_scale,
    head_base,
    load_part,
    load_rows,
    two_terms,
)

# Arguments that vary from call to call: a new number must not compile the kernel again.
LENGTHS = (
    "n", "k", "inner", "tiles", "share", "splits", "chunks", "parts", "problems", "k_padded",
)  # fmt: skip
# The b of an anchor that is not there, and the log-sum-exp of a point that is not, in base 2: p
# becomes 0, and what is multiplied by it stays finite.
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
            norm = tl.where(rows < k, norm, float("inf"))
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
def problem_of(
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
def load_norms(norms, columns, factor):
    """(N,) b of the anchors in base 2. One that is not there has none, whatever the factor."""
    norm = tl.load(norms + columns)
    return tl.where(norm < float("inf"), norm * factor, NOWHERE)


@triton.jit
def load_terms(terms, columns, dims, k_padded, PADDED: tl.constexpr, TERMS: tl.constexpr):
    """(N, dims) terms of the anchors, the highest first; three in any case."""
    where = terms + columns.to(tl.int64)[:, None] * PADDED + dims[None, :]
    high = tl.load(where)
    middle = tl.load(where + k_padded.to(tl.int64) * PADDED)
    low = middle
    if TERMS == 3:
        low = tl.load(where + 2 * k_padded.to(tl.int64) * PADDED)
    return high, middle, low


@triton.jit
def load_points(
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
def products(
    points, point_strides, centre, terms, first_terms, rows, columns, n, k_padded,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_D: tl.constexpr, TERMS: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """(M, N) products of points and anchors over (M,) powers of two; the points' first terms.

    Args:
        first_terms: `load_terms` of the first dimensions; the caller may keep them.
    """
    dims = tl.arange(0, BLOCK_D)
    HALF: tl.constexpr = terms.dtype.element_ty
    x, x_low, unit = load_points(points, point_strides, centre, rows, dims, n, HALF, DIM, CENTRED)
    first = (x, x_low, unit)
    high, middle, low = first_terms
    product = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    product = add_products(product, x, x_low, high, middle, low, TERMS, CENTRED)
    if BLOCK_D < DIM:
        if CENTRED:
            product *= unit[:, None]
        for start in range(BLOCK_D, DIM, BLOCK_D):
            x, x_low, unit = load_points(
                points, point_strides, centre, rows, start + dims, n, HALF, DIM, CENTRED
            )
            high, middle, low = load_terms(terms, columns, start + dims, k_padded, PADDED, TERMS)
            if CENTRED:
                part = dot_terms(x, x_low, tl.trans(high), tl.trans(middle), True)
                product += part * unit[:, None]
            else:
                product = add_products(product, x, x_low, high, middle, low, TERMS, CENTRED)
        unit = tl.full([rows.shape[0]], 1.0, tl.float32)
    return product, unit, first


@triton.jit
def add_products(product, x, x_low, high, middle, low, TERMS: tl.constexpr, CENTRED: tl.constexpr):
    """The products of all terms, small ones first: tensor cores cut digits off as they add."""
    if TERMS == 3:
        product = tl.dot(x, tl.trans(low), product)
    if CENTRED:
        product = tl.dot(x_low, tl.trans(high), product)
    product = tl.dot(x, tl.trans(middle), product)
    return tl.dot(x, tl.trans(high), product)


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


class Call:
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
            HAS_GRAD=has_grad, HAS_WEIGHTS=self.weights is not None, CELLS=step_of(self.k_padded),
            **self.form, num_warps=8,
        )  # fmt: skip


def step_of(k: int) -> int:
    """How many cells a step of a kernel takes that goes through all of them."""
    return min(1024, max(16, triton.next_power_of_2(k)))
