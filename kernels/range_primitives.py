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

each times the incoming gradient over the sum of weights. The sums that dc_j takes give dalpha too:
with D_j = sum_i w_i e_ij (x_i - c_j) and F_j = sum_i w_i e_ij it is sum_j c'_j.(2 D_j + F_j c'_j).

Every product is one of half-precision tiles with an fp32 accumulator, on any tensor core. Numbers
that have more digits are sums of a few such terms, after a power of two has brought them into
range:

- fp16 and bf16 points are terms as they are: tiles go from memory to the tensor cores as they lie.
  c' takes two terms, as the rounding of an anchor is the same for all points and would not average
  out. e is one term: its rounding does, and dx is rounded anyway.
- fp32 points, relative to mu, are two terms of fp16, and so are c' and e; three products are then
  22 digits. Points have a power of two each, to depend on no neighbour.

Nothing of size n x k is stored. Up to one tile of anchors, a program takes a run of points through
all anchors, forward once and backward once; beyond, log-sum-exp and G_i come from passes of their
own. Sums over points are kept for each program and added by a last kernel, without atomics: results
are the same in every run. Anchors are prepared by every program for itself where a step holds them
all, else by a first kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import (
    ceil_div,
    is_describable,
    next_power_of_2,
    padded_head_dim,
    tile_descriptor,
    unexpanded,
)
from entropy_attn.kernels.primitives import (
    LOG2_E,
    dot_terms,
    half_range_scale,
    head_base,
    inside,
    load_box,
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
# Dimensions of the narrowest tile of points that is loaded.
NARROWEST = tl.constexpr(4)


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
        tl.store(centre_ptr + program.to(tl.int64) * DIM + dims, centre, mask=dims < DIM)
        terms_ptr += program.to(tl.int64) * TERMS * k_padded * PADDED
        for start in range(0, k_padded, ROWS):
            rows = start + tl.arange(0, ROWS)
            anchor = load_part(base, rows, k, dims, DIM, anchor_strides[2], anchor_strides[3])
            relative = tl.where((rows < k)[:, None], anchor - centre[None, :], 0.0)
            padded = rows < k_padded
            rest = relative * scale
            where = rows.to(tl.int64)[:, None] * PADDED + dims[None, :]
            for term in tl.static_range(TERMS):
                half = rest.to(terms_ptr.dtype.element_ty)
                rest -= half.to(tl.float32)
                out = terms_ptr + term * k_padded.to(tl.int64) * PADDED + where
                tl.store(out, half, mask=padded[:, None])
            norm = _norms_of(relative - rest * unit, centre, rows < k, CENTRED)
            tl.store(norms_ptr + program.to(tl.int64) * k_padded + rows, norm, mask=padded)
    if HAS_GRAD:
        mean = tl.load(entropy + program)
        highest = tl.zeros([CELLS], tl.float32)
        for start in range(0, k, CELLS):
            cells = start + tl.arange(0, CELLS)
            g = surprise_of(mass + program.to(tl.int64) * k, mean, cells, k)
            highest = tl.maximum(highest, tl.abs(g))
        scale, inverse = half_range_scale(tl.max(highest, 0))
        rate = rate_of(grad, weight_sums, program, n, HAS_WEIGHTS)
        tl.store(rate_ptr + program, rate * inverse)
        for start in range(0, k_padded, CELLS):
            cells = start + tl.arange(0, CELLS)
            g = surprise_of(mass + program.to(tl.int64) * k, mean, cells, k) * scale
            out = surprise_ptr + program.to(tl.int64) * k_padded + cells
            tl.store(out, g, mask=cells < k_padded)


@triton.jit
def _norms_of(relative, centre, there, CENTRED: tl.constexpr):
    """(N,) b of the anchors that the terms add up to, infinite where there is none.

    So all else is exact: distances to an anchor that is off by its last digits, not distances that
    are off. b cancels against the product: all its digits count.
    """
    other = relative
    if not CENTRED:
        other += 2.0 * centre[None, :]
    norm = tl.sum(relative.to(tl.float64) * other.to(tl.float64), 1).to(tl.float32)
    return tl.where(there, norm, float("inf"))


@triton.jit
def rate_of(grad, weight_sums, batch, n, HAS_WEIGHTS: tl.constexpr):
    """The incoming gradient over the sum of weights; 0 for a set without weight."""
    if HAS_WEIGHTS:
        weight = tl.load(weight_sums + batch)
    else:
        weight = n.to(tl.float32)
    rate = tl.load(grad + batch) / tl.where(weight > 0.0, weight, 1.0)
    return tl.where(weight > 0.0, rate, 0.0)


@triton.jit
def surprise_of(mass, entropy, cells, k):
    """-log P - H, how much rarer a cell is than the mean one; 0 where P is 0.

    Less H, which leaves every gradient as it is, since what is small needs no digits for H.
    """
    share = tl.load(mass + cells, mask=cells < k, other=0.0)
    return tl.where(share > 0.0, -tl.log(tl.where(share > 0.0, share, 1.0)) - entropy, 0.0)


@triton.jit
def problem_of(
    points, point_strides, terms, norms, centre, unit, alpha, problem_strides, batch, inner,
    k_padded, DIM: tl.constexpr, PADDED: tl.constexpr, TERMS: tl.constexpr,
    COPY_ENGINE: tl.constexpr,
):  # fmt: skip
    """Addresses of one problem, and the factor that takes t to scores in base 2."""
    outer, head = batch // inner, batch % inner
    if not COPY_ENGINE:
        points = head_base(points, outer, head, point_strides[0], point_strides[1])
    which = (outer * problem_strides[0] + head * problem_strides[1]).to(tl.int64)
    factor = tl.load(alpha + batch) * LOG2_E
    terms += which * TERMS * k_padded * PADDED
    return points, terms, norms + which * k_padded, centre + which * DIM, unit + which, factor


@triton.jit
def anchors_of(
    anchors, anchor_strides, terms, norms, centre, unit, outer, head, columns, dims, k, k_padded,
    DIM: tl.constexpr, PADDED: tl.constexpr, TERMS: tl.constexpr, CENTRED: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """Terms, b, mu and unit of a chunk of anchors, the first and the third for dims.

    With FUSED, if one chunk and one step hold all, every program prepares them for itself, which
    takes less time than to launch a kernel that does.
    """
    if FUSED:
        base = head_base(anchors, outer, head, anchor_strides[0], anchor_strides[1])
        there = columns < k
        anchor = load_part(base, columns, k, dims, DIM, anchor_strides[2], anchor_strides[3])
        origin = tl.sum(anchor, 0) / k
        relative = tl.where(there[:, None], anchor - origin[None, :], 0.0)
        scale, unit_of_terms = half_range_scale(tl.max(tl.max(tl.abs(relative), 1), 0))
        rest = relative * scale
        high = rest.to(terms.dtype.element_ty)
        rest -= high.to(tl.float32)
        middle = rest.to(terms.dtype.element_ty)
        rest -= middle.to(tl.float32)
        low = middle
        if TERMS == 3:
            low = rest.to(terms.dtype.element_ty)
            rest -= low.to(tl.float32)
        norm = _norms_of(relative - rest * unit_of_terms, origin, there, CENTRED)
    else:
        high, middle, low = load_terms(terms, columns, dims, k_padded, PADDED, TERMS)
        norm = tl.load(norms + columns)
        origin = load_centre(centre, dims, DIM)
        unit_of_terms = tl.load(unit)
    return (high, middle, low), norm, origin, unit_of_terms


@triton.jit
def norms_in_base_2(norm, factor):
    """One that is not there has none, whatever the factor."""
    return tl.where(norm < float("inf"), norm * factor, NOWHERE)


@triton.jit
def load_norms(norms, columns, factor):
    """(N,) b of the anchors in base 2."""
    return norms_in_base_2(tl.load(norms + columns), factor)


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
def load_centre(centre, dims, DIM: tl.constexpr):
    """(dims,) of mu. Loaded before a loop, as the compiler would copy it in each step."""
    return tl.load(centre + dims, mask=inside(dims, DIM), other=0.0)


@triton.jit
def load_tile(
    points, point_strides, outer, head, start, lane, dims, n, DIM: tl.constexpr,
    COPY_ENGINE: tl.constexpr,
):  # fmt: skip
    """(M, dims) points from ``start`` on as they are, 0 past the last.

    Addresses of a tile differ from those of the first by one number: it is all that a step of a
    loop computes of them.
    """
    if COPY_ENGINE:
        x = load_box(points, outer, head, start, lane.shape[0], dims.shape[0])
    else:
        points += start.to(tl.int64) * point_strides[2]
        x = load_rows(points, lane, n - start, dims, DIM, point_strides[2], point_strides[3])
    return x


@triton.jit
def load_point_terms(
    points, point_strides, outer, head, start, lane, dims, n, origin, HALF: tl.constexpr,
    DIM: tl.constexpr, CENTRED: tl.constexpr, COPY_ENGINE: tl.constexpr,
):  # fmt: skip
    """(M, dims) points as a high and a low term, and the (M,) powers of two they are over."""
    HALF_WIDTH: tl.constexpr = dims.shape[0] // 2
    if CENTRED and DIM <= HALF_WIDTH and HALF_WIDTH >= NARROWEST and not COPY_ENGINE:
        # Tensor cores take sixteen dimensions. That many threads would share a point, work on
        # zeros and send each other messages to find the largest entry: they join the zeros last.
        few = tl.arange(0, HALF_WIDTH)
        origin = tl.sum(tl.where(dims[None, :] == few[:, None], origin[None, :], 0.0), 1)
        high, low, unit = load_point_terms(
            points, point_strides, outer, head, start, lane, few, n, origin, HALF, DIM, CENTRED,
            COPY_ENGINE,
        )  # fmt: skip
        high, low = _beside_zeros(high), _beside_zeros(low)
    else:
        x = load_tile(points, point_strides, outer, head, start, lane, dims, n, DIM, COPY_ENGINE)
        if CENTRED:
            x -= origin[None, :]
            scale, unit = half_range_scale(tl.max(tl.abs(x), 1))
            high, low = two_terms(x * scale[:, None], HALF)
        else:
            high, low, unit = x, x, tl.full([x.shape[0]], 1.0, tl.float32)
    return high, low, unit


@triton.jit
def _beside_zeros(x):
    """(M, 2 N) of (M, N)."""
    wider = tl.permute(tl.join(x, tl.zeros_like(x)), (0, 2, 1))  # (M, 2, N)
    return tl.reshape(wider, (x.shape[0], 2 * x.shape[1]))


@triton.jit
def products(
    first, points, point_strides, centre, terms, first_terms, start, lane, columns, n, k_padded,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_D: tl.constexpr, TERMS: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """(M, N) products of points and anchors over (M,) powers of two.

    Args:
        first, first_terms: `load_point_terms` and `load_terms` of the first dimensions.
    """
    HALF: tl.constexpr = terms.dtype.element_ty
    x, x_low, unit = first
    high, middle, low = first_terms
    product = tl.zeros([lane.shape[0], columns.shape[0]], tl.float32)
    product = add_products(product, x, x_low, high, middle, low, TERMS, CENTRED)
    if BLOCK_D < DIM:
        if CENTRED:
            product *= unit[:, None]
        for step in range(BLOCK_D, DIM, BLOCK_D):
            dims = step + tl.arange(0, BLOCK_D)
            x, x_low, unit = load_point_terms(
                points, point_strides, 0, 0, start, lane, dims, n, load_centre(centre, dims, DIM),
                HALF, DIM, CENTRED, False,
            )  # fmt: skip
            high, middle, low = load_terms(terms, columns, dims, k_padded, PADDED, TERMS)
            if CENTRED:
                part = dot_terms(x, x_low, tl.trans(high), tl.trans(middle), True)
                product += part * unit[:, None]
            else:
                product = add_products(product, x, x_low, high, middle, low, TERMS, CENTRED)
        unit = tl.full([lane.shape[0]], 1.0, tl.float32)
    return product, unit


@triton.jit
def add_products(product, x, x_low, high, middle, low, TERMS: tl.constexpr, CENTRED: tl.constexpr):
    """The products of all terms, small ones first: tensor cores cut digits off as they add."""
    if TERMS == 3:
        product = tl.dot(x, tl.trans(low), product)
    if CENTRED:
        product = tl.dot(x_low, tl.trans(high), product)
    product = tl.dot(x, tl.trans(middle), product)
    return tl.dot(x, tl.trans(high), product)


@triton.jit
def log2_of(x, FAST: tl.constexpr):
    """log2 of positive normal numbers, with FAST by the special function unit: off by 2^-22."""
    if FAST:
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.log2(x)
    return result


@triton.jit
def inverse_of(x, FAST: tl.constexpr):
    """1 / x for normal numbers whose inverse is one, with FAST off by a unit in the last place."""
    if FAST:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = 1.0 / x
    return result


@dataclass(frozen=True)
class RangeConfig:
    """Tile sizes: points, anchors, dimensions of a step, dimensions of a part of a gradient.

    Attributes:
        programs: how many share the points, the same on every GPU so that sums are the same.
        terms: of half precision that an anchor is a sum of.
        fast: take logarithms and inverses from NVIDIA's special function unit.
        fused: leave out the first kernel where a step of a program holds all anchors.
        overlap: start the last kernel before the one ahead has ended, on NVIDIA from sm_90 on.
        copy_engine: let it fetch the points where it can, and write their gradients.
        registers: the most a thread may have, or None; fewer let more programs run side by side.
    """

    block_m: int
    block_n: int
    block_d: int
    block_out: int
    num_warps: int
    num_stages: int
    programs: int
    terms: int = 2
    fast: bool = False
    copy_engine: bool = False
    fused: bool = False
    overlap: bool = False
    registers: int | None = None


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
        self.tiles = ceil_div(self.n, config.block_m)
        self.chunks = ceil_div(self.k, config.block_n)
        self.k_padded = self.chunks * config.block_n
        self.anchors, self.weights = anchors, weights
        self.weight_sums = None if weights is None else weights.sum(-1)
        self.stored = unexpanded(anchors)  # anchors that sets share are prepared once
        first, second = self.stored.shape[:2]
        self.problems = first * second
        is_centred = points.dtype == torch.float32
        half = torch.float16 if is_centred else points.dtype
        terms, padded = config.terms, padded_head_dim(self.dim)
        self.terms = points.new_empty((self.problems, terms, self.k_padded, padded), dtype=half)
        self.norms, self.centre, self.unit = (
            alpha.new_empty(self.problems * entries) for entries in (self.k_padded, self.dim, 1)
        )
        self.alpha = alpha.contiguous()
        self.fused = config.fused and self.chunks == 1 and padded <= config.block_d
        # A box holds all dimensions of its points, as one step of a program does.
        self.copies = (
            config.copy_engine
            and padded <= config.block_d
            and config.block_out in (0, config.block_d)
            and is_describable(points)
        )
        given = tile_descriptor(points, config.block_m) if self.copies else points
        # What kernels take first, and strides; those of problems count problems.
        self.given = (given, self.terms, self.norms, self.centre, self.unit, self.alpha)
        self.problem_strides = (second if first > 1 else 0, 1 if second > 1 else 0)
        self.strides = (points.stride(), self.problem_strides)
        self.form = dict(DIM=self.dim, PADDED=padded, TERMS=terms, CENTRED=is_centred)
        self.shape = dict(
            **self.form, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=config.block_d,
            COPY_ENGINE=self.copies, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if config.registers:
            self.shape["maxnreg"] = config.registers
        # Of the last kernel, which the driver may launch early.
        self.last = {"launch_pdl": True} if config.overlap else {}

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
            self.problems, ROWS=max(1, min(next_power_of_2(self.k_padded), 8192 // padded)),
            HAS_GRAD=has_grad, HAS_WEIGHTS=self.weights is not None, CELLS=step_of(self.k_padded),
            **self.form, num_warps=8,
        )  # fmt: skip


def step_of(k: int) -> int:
    """How many cells a step of a kernel takes that goes through all of them."""
    return min(1024, max(16, next_power_of_2(k)))
