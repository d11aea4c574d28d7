"""Soft cells around anchors: how much of a set of points falls to each, and the gradients.

With anchors c_1..c_k and sharpness alpha, p_ij = softmax_j(-alpha |x_i - c_j|^2). The forward pass
sums w_i p_ij over the points; the entropy of these k sums is the ball surrogate of range-partition
entropy (arXiv 2509.03733; the entropy is that of arXiv 2508.20489).

|x_i|^2 is the same for all anchors and leaves the softmax, so scores are alpha t_ij with
t_ij = 2 x_i.c_j - |c_j|^2. That form loses digits where points and anchors lie far from the
origin: both are taken relative to the mean anchor, in fp32, which changes no distance.

Backward, with g_j = -log P_j - H and G_i = sum_j p_ij g_j, the gradient of a score is w_i e_ij
with e_ij = p_ij (g_j - G_i), which sums to 0 over the anchors, hence

    dx_i = 2 alpha w_i sum_j e_ij c_j            dalpha = sum_ij w_i e_ij t_ij
    dc_j = 2 alpha sum_i w_i e_ij (x_i - c_j)    dw_i   = G_i

each times the incoming gradient over the sum of weights. For the same reason t_ij may be taken
less any number of the point: lse_i / alpha keeps what is added up small.

Nothing of size n x k is stored. Up to one tile of anchors, a program takes a run of points through
all anchors, forward once and backward once; beyond, log-sum-exp and G_i come from passes of their
own. Sums over points are kept for each program and added afterwards, without atomics: results are
the same in every run.

Products take fp32 operands: centred points do not fit half precision, nor do weights of any size.
For fp16 and bf16 points scores are three TF32 products on the tensor cores ("tf32x3"), which lose
next to nothing; one would shift each anchor by its rounding. Gradients are single TF32 products:
they have the mantissa of fp16, and what they round differs from point to point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import (
    device_of,
    fp32_dot_precision,
    padded_head_dim,
    split_rows,
    unexpanded,
    weight_strides,
)
from entropy_attn.kernels.primitives import (
    LOG2_E,
    NO_SCORE,
    head_base,
    load_part,
    online_softmax,
    row_weights,
    weighted_rows,
)

# Arguments that vary from call to call: a new number must not compile the kernel again.
LENGTHS = ("n", "k", "inner", "tiles", "share", "splits", "chunks", "parts")


@triton.jit
def _closeness(
    points, point_strides, anchors, centre, norms, first_anchors, rows, columns, n, k,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(M, N) t_ij of points and anchors; larger is closer.

    Args:
        first_anchors: (N, BLOCK_D) first dimensions of the anchors; the caller may keep them.
    """
    dims = tl.arange(0, BLOCK_D)
    part = _centred(points, point_strides, centre, rows, dims, n, DIM)  # (M, BLOCK_D)
    product = tl.dot(part, tl.trans(first_anchors), input_precision=PRECISION)
    for start in range(BLOCK_D, DIM, BLOCK_D):
        part = _centred(points, point_strides, centre, rows, start + dims, n, DIM)
        anchor = load_part(anchors, columns, k, start + dims, DIM, DIM, 1)  # (N, BLOCK_D)
        product = tl.dot(part, tl.trans(anchor), product, input_precision=PRECISION)
    norm = tl.load(norms + columns, mask=columns < k, other=0.0)
    return 2.0 * product - norm[None, :]


@triton.jit
def _centred(points, point_strides, centre, rows, dims, n, DIM: tl.constexpr):
    """(M, dims) points relative to the mean anchor."""
    part = load_part(points, rows, n, dims, DIM, point_strides[2], point_strides[3])
    return part - tl.load(centre + dims, mask=dims < DIM, other=0.0)[None, :]


@triton.jit
def _bases(
    outer, head, points, point_strides, anchors, norms, centre, anchor_strides, k,
    DIM: tl.constexpr,
):  # fmt: skip
    """Addresses of one problem; anchors, norms and centre are contiguous within it."""
    points = head_base(points, outer, head, point_strides[0], point_strides[1])
    which = (outer * anchor_strides[0] + head * anchor_strides[1]).to(tl.int64)
    anchors = anchors + which * k * DIM
    return points, anchors, norms + which * k, centre + which * DIM


@triton.jit(do_not_specialize=LENGTHS)
def _normaliser_kernel(
    points, anchors, norms, centre, alpha, lse_ptr, peak_ptr,
    point_strides, anchor_strides, inner, n, k, tiles,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STORE_PEAK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the scores of a tile of points, over any number of anchors."""
    program = tl.program_id(0)
    batch = program // tiles
    rows = (program % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    outer, head = batch // inner, batch % inner
    points, anchors, norms, centre = _bases(
        outer, head, points, point_strides, anchors, norms, centre, anchor_strides, k, DIM
    )
    factor = tl.load(alpha + batch) * LOG2_E
    maximum = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, k, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        anchor = load_part(anchors, columns, k, tl.arange(0, BLOCK_D), DIM, DIM, 1)
        scores = factor * _closeness(
            points, point_strides, anchors, centre, norms, anchor, rows, columns, n, k,
            DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        scores = tl.where((columns < k)[None, :], scores, float("-inf"))
        exponents, maximum, shift = online_softmax(scores, 1.0, maximum)
        total = total * tl.exp2(shift) + tl.sum(tl.exp2(exponents), 1)
    where = batch.to(tl.int64) * n + rows
    tl.store(lse_ptr + where, maximum + tl.log2(total), mask=rows < n)
    if STORE_PEAK:
        tl.store(peak_ptr + where, 1.0 / total, mask=rows < n)


@triton.jit(do_not_specialize=LENGTHS)
def _mass_kernel(
    points, anchors, norms, centre, alpha, weights, lse_ptr, peak_ptr, sums_ptr,
    point_strides, anchor_strides, weight_strides, inner, n, k, tiles, share, splits, chunks,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ONE_CHUNK: tl.constexpr, HAS_WEIGHTS: tl.constexpr, STORE_PEAK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Weighted sums of p over a run of tiles of points, for one chunk of anchors."""
    program = tl.program_id(0)
    split = program % splits
    chunk = program // splits % chunks
    batch = program // splits // chunks
    outer, head = batch // inner, batch % inner
    points, anchors, norms, centre = _bases(
        outer, head, points, point_strides, anchors, norms, centre, anchor_strides, k, DIM
    )
    columns = chunk * BLOCK_N + tl.arange(0, BLOCK_N)  # (N,)
    anchor = load_part(anchors, columns, k, tl.arange(0, BLOCK_D), DIM, DIM, 1)
    factor = tl.load(alpha + batch) * LOG2_E
    sums = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
        scores = factor * _closeness(
            points, point_strides, anchors, centre, norms, anchor, rows, columns, n, k,
            DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        scores = tl.where((columns < k)[None, :], scores, float("-inf"))
        where = batch.to(tl.int64) * n + rows
        if ONE_CHUNK:
            maximum = tl.max(scores, 1)
            p = tl.exp2(scores - maximum[:, None])  # (M, N)
            total = tl.sum(p, 1)
            p = p / total[:, None]
            tl.store(lse_ptr + where, maximum + tl.log2(total), mask=rows < n)
            if STORE_PEAK:
                tl.store(peak_ptr + where, 1.0 / total, mask=rows < n)
        else:
            lse = tl.load(lse_ptr + where, mask=rows < n, other=0.0)
            p = tl.exp2(scores - lse[:, None])
        weight = row_weights(weights, outer, head, weight_strides, rows, n, HAS_WEIGHTS)
        sums += tl.sum(weighted_rows(p, weight), 0)
    out = sums_ptr + (batch * splits + split).to(tl.int64) * k + columns
    tl.store(out, sums, mask=columns < k)


@triton.jit(do_not_specialize=LENGTHS)
def _point_kernel(
    points, anchors, norms, centre, alpha, weights, lse_ptr, surprise, scale, expected_ptr,
    grad_ptr, point_strides, anchor_strides, weight_strides, inner, n, k, tiles, parts,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr, HAS_WEIGHTS: tl.constexpr, NEED_POINTS: tl.constexpr,
    PRECISION: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """G and a part of the dimensions of dx for a tile of points, over any number of anchors."""
    program = tl.program_id(0)
    tile = program % tiles
    part = program // tiles % parts
    batch = program // tiles // parts
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    outer, head = batch // inner, batch % inner
    points, anchors, norms, centre = _bases(
        outer, head, points, point_strides, anchors, norms, centre, anchor_strides, k, DIM
    )
    factor = tl.load(alpha + batch) * LOG2_E
    where = batch.to(tl.int64) * n + rows
    lse = tl.load(lse_ptr + where, mask=rows < n, other=0.0)
    surprise += batch.to(tl.int64) * k
    out_dims = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)

    expected = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, k, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        anchor = load_part(anchors, columns, k, tl.arange(0, BLOCK_D), DIM, DIM, 1)
        closeness = _closeness(
            points, point_strides, anchors, centre, norms, anchor, rows, columns, n, k,
            DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        p = tl.exp2(closeness * factor - lse[:, None])
        p = tl.where((columns < k)[None, :], p, 0.0)
        g = tl.load(surprise + columns, mask=columns < k, other=0.0)
        expected += tl.sum(p * g[None, :], 1)
    if part == 0:
        tl.store(expected_ptr + where, expected, mask=rows < n)

    if NEED_POINTS:
        grad = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
        for start in range(0, k, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            anchor = load_part(anchors, columns, k, tl.arange(0, BLOCK_D), DIM, DIM, 1)
            closeness = _closeness(
                points, point_strides, anchors, centre, norms, anchor, rows, columns, n, k,
                DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
            p = tl.exp2(closeness * factor - lse[:, None])
            p = tl.where((columns < k)[None, :], p, 0.0)
            g = tl.load(surprise + columns, mask=columns < k, other=0.0)
            e = p * (g[None, :] - expected[:, None])  # (M, N)
            anchor = load_part(anchors, columns, k, out_dims, DIM, DIM, 1)  # (N, OUT)
            grad = tl.dot(e, anchor, grad, input_precision=GRAD_PRECISION)
        weight = row_weights(weights, outer, head, weight_strides, rows, n, HAS_WEIGHTS)
        _store_point_grad(
            grad_ptr + batch.to(tl.int64) * n * DIM, grad, weight, tl.load(scale + batch), rows, n,
            out_dims, DIM,
        )  # fmt: skip


@triton.jit
def _store_point_grad(base, grad, weights, scale, rows, n, dims, DIM: tl.constexpr):
    """Write (M, dims) of dx, contiguous."""
    grad = weighted_rows(grad, weights) * scale
    pointers = base + rows.to(tl.int64)[:, None] * DIM + dims[None, :]
    mask = (rows < n)[:, None] & (dims < DIM)[None, :]
    tl.store(pointers, grad.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def _anchor_kernel(
    points, anchors, norms, centre, alpha, weights, lse_ptr, surprise, scale, expected_ptr,
    grad_ptr, product_ptr, flow_ptr, slope_ptr,
    point_strides, anchor_strides, weight_strides, inner, n, k, tiles, share, splits, chunks, parts,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr, ONE_CHUNK: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    NEED_POINTS: tl.constexpr, NEED_ANCHORS: tl.constexpr, PRECISION: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over a run of tiles of points for a chunk of anchors and a part of the dimensions.

    They are, with weights, sum_i e_ij x_i ("product"), sum_i e_ij ("flow") and, by anchor,
    sum_i e_ij t_ij ("slope"). With ONE_CHUNK every anchor is here, so that G and dx are too.
    """
    program = tl.program_id(0)
    split = program % splits
    part = program // splits % parts
    chunk = program // splits // parts % chunks
    batch = program // splits // parts // chunks
    outer, head = batch // inner, batch % inner
    points, anchors, norms, centre = _bases(
        outer, head, points, point_strides, anchors, norms, centre, anchor_strides, k, DIM
    )
    columns = chunk * BLOCK_N + tl.arange(0, BLOCK_N)  # (N,)
    out_dims = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    anchor = load_part(anchors, columns, k, tl.arange(0, BLOCK_D), DIM, DIM, 1)
    g = tl.load(surprise + batch.to(tl.int64) * k + columns, mask=columns < k, other=0.0)
    factor = tl.load(alpha + batch) * LOG2_E
    inverse_factor = tl.where(factor != 0.0, 1.0 / factor, 0.0)
    out_scale = tl.load(scale + batch)
    product = tl.zeros([BLOCK_N, BLOCK_OUT], tl.float32)
    flow = tl.zeros([BLOCK_N], tl.float32)
    slope = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
        closeness = _closeness(
            points, point_strides, anchors, centre, norms, anchor, rows, columns, n, k,
            DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        where = batch.to(tl.int64) * n + rows
        lse = tl.load(lse_ptr + where, mask=rows < n, other=0.0)
        p = tl.exp2(closeness * factor - lse[:, None])
        # A row past the end has no log-sum-exp: its p may overflow.
        p = tl.where((rows < n)[:, None] & (columns < k)[None, :], p, 0.0)  # (M, N)
        if ONE_CHUNK:
            expected = tl.sum(p * g[None, :], 1)
            if part == 0:
                tl.store(expected_ptr + where, expected, mask=rows < n)
        else:
            expected = tl.load(expected_ptr + where, mask=rows < n, other=0.0)
        e = p * (g[None, :] - expected[:, None])
        weight = row_weights(weights, outer, head, weight_strides, rows, n, HAS_WEIGHTS)
        if NEED_POINTS and ONE_CHUNK:
            anchor_part = load_part(anchors, columns, k, out_dims, DIM, DIM, 1)  # (N, OUT)
            grad = tl.dot(e, anchor_part, input_precision=GRAD_PRECISION)  # (M, OUT)
            _store_point_grad(
                grad_ptr + batch.to(tl.int64) * n * DIM, grad, weight, out_scale, rows, n,
                out_dims, DIM,
            )  # fmt: skip
        if NEED_ANCHORS:
            e = weighted_rows(e, weight)
            x = _centred(points, point_strides, centre, rows, out_dims, n, DIM)  # (M, OUT)
            # 0 times what a masked point holds may be NaN.
            x = tl.where((weight > 0.0)[:, None], x, 0.0)
            closeness = closeness - lse[:, None] * inverse_factor
            closeness = tl.where((weight > 0.0)[:, None], closeness, 0.0)
            product = tl.dot(tl.trans(e), x, product, input_precision=GRAD_PRECISION)
            flow += tl.sum(e, 0)
            slope += tl.sum(e * closeness, 0)
    if NEED_ANCHORS:
        sums = (batch * splits + split).to(tl.int64) * k + columns
        inside = (columns < k)[:, None] & (out_dims < DIM)[None, :]
        tl.store(product_ptr + sums[:, None] * DIM + out_dims[None, :], product, mask=inside)
        if part == 0:
            tl.store(flow_ptr + sums, flow, mask=columns < k)
            tl.store(slope_ptr + sums, slope, mask=columns < k)


@dataclass(frozen=True)
class RangeConfig:
    """Tile sizes: points, anchors, dimensions of a step, dimensions of a part of a gradient."""

    block_m: int
    block_n: int
    block_d: int
    block_out: int
    num_warps: int
    num_stages: int


def forward_config(dim: int, k: int, precision: str) -> RangeConfig:
    """One chunk of anchors up to 128 of them: it saves a pass over the points.

    Fp32 products outside the tensor cores ("ieee") hold whole tiles in registers: smaller ones.
    """
    padded, block_n = padded_head_dim(dim), min(128, max(16, triton.next_power_of_2(k)))
    is_wide = block_n > 64
    if precision == "ieee":
        return RangeConfig(32 if is_wide else 64, block_n, min(padded, 32), 0, 4, 2)
    # For sm_100 Triton 3.6 compiles "tf32x3" on wide tiles of 64 rows to a trap.
    if is_wide:
        return RangeConfig(32, block_n, min(padded, 32), 0, 8, 2)
    return RangeConfig(64, block_n, min(padded, 64), 0, 4, 2)


def backward_config(dim: int, k: int, precision: str) -> RangeConfig:
    """Few points a step, as three products and their operands share the registers.

    Fetching a step ahead does not fit the 64 KiB of gfx942, and costs registers everywhere.
    """
    padded, block_n = padded_head_dim(dim), max(16, triton.next_power_of_2(k))
    if precision == "ieee":
        return RangeConfig(32, min(64, block_n), min(padded, 32), min(padded, 32), 4, 1)
    is_wide = block_n > 64
    block_d = min(padded, 32 if is_wide else 64)
    return RangeConfig(32, min(128, block_n), block_d, min(padded, 64), 8 if is_wide else 4, 1)


@dataclass(frozen=True)
class _Anchors:
    """What every launch takes of the anchors: relative to their mean, stored once if shared."""

    relative: Tensor  # (1 or B0, 1 or B1, k, d)
    norms: Tensor  # (·, ·, k)
    centre: Tensor  # (·, ·, 1, d)

    @classmethod
    def of(cls, anchors: Tensor) -> _Anchors:
        stored = unexpanded(anchors.float())
        centre = stored.mean(-2, keepdim=True)
        relative = (stored - centre).contiguous()
        return cls(relative, relative.square().sum(-1).contiguous(), centre.contiguous())

    @property
    def strides(self) -> tuple[int, int]:
        """In problems, not in elements."""
        outer, inner = self.relative.shape[:2]
        return (inner if outer > 1 else 0), (1 if inner > 1 else 0)


def range_mass(
    points: Tensor,
    anchors: Tensor,
    alpha: Tensor,
    weights: Tensor | None,
    with_peak: bool,
    config: RangeConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums of p over the points.

    Args:
        points: (B0, B1, n, d) fp32, fp16 or bf16, any strides.
        anchors: (B0, B1, k, d) fp32, may be expanded. alpha: (B0, B1) fp32.
        weights: (B0, B1, n) fp32, any strides, or None for 1.

    Returns:
        sums (B0, B1, k); log-sum-exp of the scores in base 2 (B0, B1, n); the largest p of each
        point (B0, B1, n), or empty without ``with_peak``. All fp32.
    """
    outer, inner, n, dim = points.shape
    batch, k = outer * inner, anchors.shape[2]
    precision = fp32_dot_precision(points)
    config = config or forward_config(dim, k, precision)
    tiles, chunks = triton.cdiv(n, config.block_m), triton.cdiv(k, config.block_n)
    lse = torch.empty((outer, inner, n), dtype=torch.float32, device=points.device)
    peak = lse.new_empty((outer, inner, n) if with_peak else (0,))
    if batch * n == 0:
        return lse.new_zeros(outer, inner, k), lse, peak
    splits, share = split_rows(tiles, batch * chunks)
    sums = lse.new_empty(outer, inner, splits, k)
    cells, alpha = _Anchors.of(anchors), alpha.contiguous()
    shared = dict(
        DIM=dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=config.block_d,
        STORE_PEAK=with_peak, PRECISION=precision, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    with device_of(points):
        if chunks > 1:
            _normaliser_kernel[(batch * tiles,)](
                points, cells.relative, cells.norms, cells.centre, alpha, lse, peak,
                points.stride(), cells.strides, inner, n, k, tiles, **shared,
            )  # fmt: skip
        _mass_kernel[(batch * chunks * splits,)](
            points, cells.relative, cells.norms, cells.centre, alpha, weights, lse, peak, sums,
            points.stride(), cells.strides, weight_strides(weights), inner, n, k, tiles, share,
            splits, chunks, ONE_CHUNK=chunks == 1, HAS_WEIGHTS=weights is not None, **shared,
        )  # fmt: skip
    return sums.sum(2), lse, peak


def range_gradients(
    points: Tensor,
    anchors: Tensor,
    alpha: Tensor,
    weights: Tensor | None,
    lse: Tensor,
    surprise: Tensor,
    scale: Tensor,
    need_points: bool,
    need_anchors: bool,
    config: RangeConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the entropy of the sums that `range_mass` returned, and of what it saved.

    Args:
        surprise: (B0, B1, k) fp32, -log P_j - H, 0 where P_j is 0.
        scale: (B0, B1) fp32, the incoming gradient over the sum of weights.

    Returns:
        dx (B0, B1, n, d) in the dtype of the points or empty, danchors (B0, B1, k, d) and dalpha
        (B0, B1) fp32 or empty, G (B0, B1, n) fp32.
    """
    outer, inner, n, dim = points.shape
    batch, k = outer * inner, anchors.shape[2]
    precision = fp32_dot_precision(points)
    config = config or backward_config(dim, k, precision)
    tiles, chunks = triton.cdiv(n, config.block_m), triton.cdiv(k, config.block_n)
    parts = triton.cdiv(dim, config.block_out) if need_points or need_anchors else 1
    expected = torch.empty_like(lse)
    point_grad = points.new_empty(points.shape if need_points else (0,))
    if batch * n == 0:
        shape = anchors.shape if need_anchors else (0,)
        return point_grad, lse.new_zeros(shape), lse.new_zeros(shape[:2]), expected
    cells, alpha = _Anchors.of(anchors), alpha.contiguous()
    splits, share = split_rows(tiles, batch * chunks * parts)
    sums = (outer, inner, splits, k)
    product = lse.new_empty((*sums, dim) if need_anchors else (0,))
    flow, slope = (lse.new_empty(sums if need_anchors else (0,)) for _ in range(2))
    shared = dict(
        DIM=dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=config.block_d,
        BLOCK_OUT=config.block_out, HAS_WEIGHTS=weights is not None, NEED_POINTS=need_points,
        PRECISION=precision, GRAD_PRECISION="tf32" if precision == "tf32x3" else precision,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    # What both kernels take first and last.
    given = (
        points, cells.relative, cells.norms, cells.centre, alpha, weights, lse,
        surprise.contiguous(), (2.0 * alpha * scale).contiguous(), expected, point_grad,
    )  # fmt: skip
    strides = (points.stride(), cells.strides, weight_strides(weights))
    with device_of(points):
        if chunks > 1:
            _point_kernel[(batch * parts * tiles,)](
                *given, *strides, inner, n, k, tiles, parts, **shared
            )
        if need_anchors or chunks == 1:
            _anchor_kernel[(batch * chunks * parts * splits,)](
                *given, product, flow, slope, *strides, inner, n, k, tiles, share, splits, chunks,
                parts, ONE_CHUNK=chunks == 1, NEED_ANCHORS=need_anchors, **shared,
            )  # fmt: skip
    if not need_anchors:
        return point_grad, product, flow, expected
    gradient = product.sum(2) - cells.relative * flow.sum(2)[..., None]
    gradient = gradient * (2.0 * alpha * scale)[..., None, None]
    return point_grad, gradient, slope.sum((2, 3)) * scale, expected
