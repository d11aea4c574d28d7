"""Soft cells cut out by halfspaces: how much of a set of points falls to each, and the gradients.

Plane t has the signed distance a_t(x) = (w_t.x - b_t) / tau and the side h_t = sigmoid(a_t). The
2^T patterns of sides are cells with m_s(x) = prod_t h_t^{s_t} (1 - h_t)^{1 - s_t}, the halfspace
surrogate of arXiv 2509.03733.

A product over planes factors: with L the patterns of the first T // 2 planes and R those of the
others, m_(r,l) = R_r L_l. So the sums over points are one matrix product, sum_i w_i R_i L_i^T, and
a point costs 2 * 2^(T/2) exponentials instead of 2^T. A factor is a softmax, since
sigmoid(a) = e^(a/2) / (e^(a/2) + e^(-a/2)): its logits are sum_t +-a_t / 2.

Backward, with the matrix g_rl = -log P_rl - H and G_i = R_i^T g L_i, the gradients of the logits
are w_i L (R^T g - G) and w_i R (g L - G). They go to the signed distances by the signs, and from
there to points, normals, offsets and tau. As in `range_entropy`, sums over points are kept for each
program and added afterwards, and products take fp32 operands, for fp16 and bf16 points as three
TF32 products each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import (
    ceil_div,
    fp32_dot_precision,
    padded_head_dim,
    split_rows,
    weight_strides,
)
from entropy_attn.kernels.plans import device_of
from entropy_attn.kernels.primitives import (
    LOG2_E,
    head_base,
    load_part,
    row_weights,
    weighted_rows,
)

# Arguments that vary from call to call: a new number must not compile the kernel again.
LENGTHS = ("n", "inner", "tiles", "share", "splits", "parts")
# Columns of a tile of signed distances, a tile's least width.
PLANES = tl.constexpr(16)


@triton.jit
def _signed_distances(
    points, point_strides, normals, offsets, inverse_tau, rows, n, T: tl.constexpr,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(M, PLANES); 0 past the last plane."""
    planes = tl.arange(0, PLANES)
    product = tl.zeros([BLOCK_M, PLANES], tl.float32)
    for start in range(0, DIM, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        x = load_part(points, rows, n, dims, DIM, point_strides[2], point_strides[3])
        normal = load_part(normals, planes, T, dims, DIM, DIM, 1)  # (PLANES, BLOCK_D)
        product = tl.dot(x, tl.trans(normal), product, input_precision=PRECISION)
    offset = tl.load(offsets + planes, mask=planes < T, other=0.0)
    return (product - offset[None, :]) * inverse_tau


@triton.jit
def _factor(
    distances, BLOCK_M: tl.constexpr, FIRST: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr
):
    """(M, WIDTH) product over planes FIRST to FIRST + BITS of a point's sides, by pattern."""
    planes = tl.arange(0, PLANES)
    patterns = tl.arange(0, WIDTH)
    logits = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for t in tl.static_range(BITS):
        distance = tl.sum(tl.where((planes == FIRST + t)[None, :], distances, 0.0), 1)  # (M,)
        logits += distance[:, None] * (((patterns >> t) & 1) - 0.5)[None, :]
    logits = tl.where((patterns < (1 << BITS))[None, :], logits * LOG2_E, float("-inf"))
    e = tl.exp2(logits - tl.max(logits, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _distance_grad(grad, logit_grad, FIRST: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Add what logits of one factor (M, WIDTH) pass to the signed distances (M, PLANES)."""
    planes = tl.arange(0, PLANES)
    patterns = tl.arange(0, WIDTH)
    for t in tl.static_range(BITS):
        sign = ((patterns >> t) & 1) - 0.5
        passed = tl.sum(logit_grad * sign[None, :], 1)  # (M,)
        grad += tl.where((planes == FIRST + t)[None, :], passed[:, None], 0.0)
    return grad


@triton.jit
def _bases(
    batch, inner, points, point_strides, normals, offsets, T: tl.constexpr, DIM: tl.constexpr
):
    """Where one problem stands, and its addresses; normals (T, DIM), offsets (T,) contiguous."""
    outer, head = batch // inner, batch % inner
    points = head_base(points, outer, head, point_strides[0], point_strides[1])
    which = batch.to(tl.int64) * T
    return outer, head, points, normals + which * DIM, offsets + which


@triton.jit
def _pattern_offsets(LEFT_BITS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """(R, L) where a cell stands: bit t of its number is the side of plane t."""
    return (tl.arange(0, RIGHT)[:, None] << LEFT_BITS) + tl.arange(0, LEFT)[None, :]


@triton.jit
def _pattern_mask(
    LEFT_BITS: tl.constexpr, RIGHT_BITS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """(R, L) which entries of a padded tile are cells."""
    right = tl.arange(0, RIGHT) < (1 << RIGHT_BITS)
    return right[:, None] & (tl.arange(0, LEFT) < (1 << LEFT_BITS))[None, :]


@triton.jit(do_not_specialize=LENGTHS)
def _halfspace_mass_kernel(
    points, normals, offsets, inverse_tau, weights, sums_ptr,
    point_strides, weight_strides, inner, n, tiles, share, splits,
    DIM: tl.constexpr, LEFT_BITS: tl.constexpr, RIGHT_BITS: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Weighted sums of m over a run of tiles of points."""
    T: tl.constexpr = LEFT_BITS + RIGHT_BITS
    program = tl.program_id(0)
    split = program % splits
    batch = program // splits
    outer, head, points, normals, offsets = _bases(
        batch, inner, points, point_strides, normals, offsets, T, DIM
    )
    inverse = tl.load(inverse_tau + batch)
    sums = tl.zeros([RIGHT, LEFT], tl.float32)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
        distances = _signed_distances(
            points, point_strides, normals, offsets, inverse, rows, n, T, DIM, BLOCK_M, BLOCK_D,
            PRECISION,
        )  # fmt: skip
        weight = row_weights(weights, outer, head, weight_strides, rows, n, HAS_WEIGHTS)
        distances = tl.where((weight > 0.0)[:, None], distances, 0.0)
        left = _factor(distances, BLOCK_M, 0, LEFT_BITS, LEFT)  # (M, L)
        right = _factor(distances, BLOCK_M, LEFT_BITS, RIGHT_BITS, RIGHT)  # (M, R)
        right = weighted_rows(right, weight)
        sums = tl.dot(tl.trans(right), left, sums, input_precision=PRECISION)
    out = sums_ptr + ((batch * splits + split).to(tl.int64) << T)
    out += _pattern_offsets(LEFT_BITS, LEFT, RIGHT)
    tl.store(out, sums, mask=_pattern_mask(LEFT_BITS, RIGHT_BITS, LEFT, RIGHT))


@triton.jit(do_not_specialize=LENGTHS)
def _plane_kernel(
    points, normals, offsets, inverse_tau, weights, surprise, scale,
    expected_ptr, grad_ptr, product_ptr, flow_ptr, slope_ptr,
    point_strides, weight_strides, inner, n, tiles, share, splits, parts,
    DIM: tl.constexpr, LEFT_BITS: tl.constexpr, RIGHT_BITS: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, NEED_POINTS: tl.constexpr, NEED_PLANES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """G and dx, and sums over a run of tiles of points, for a part of the dimensions.

    With e_it the gradient of a signed distance before incoming gradient and 1 / tau, the sums are,
    with weights, sum_i e_it x_i ("product"), sum_i e_it ("flow"), sum_i e_it a_it ("slope").
    """
    T: tl.constexpr = LEFT_BITS + RIGHT_BITS
    program = tl.program_id(0)
    split = program % splits
    part = program // splits % parts
    batch = program // splits // parts
    outer, head, points, normals, offsets = _bases(
        batch, inner, points, point_strides, normals, offsets, T, DIM
    )
    inverse = tl.load(inverse_tau + batch)
    out_scale = tl.load(scale + batch) * inverse
    planes = tl.arange(0, PLANES)
    out_dims = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_cell = _pattern_mask(LEFT_BITS, RIGHT_BITS, LEFT, RIGHT)
    surprise += (batch.to(tl.int64) << T) + _pattern_offsets(LEFT_BITS, LEFT, RIGHT)
    g = tl.load(surprise, mask=is_cell, other=0.0)  # (R, L)
    product = tl.zeros([PLANES, BLOCK_OUT], tl.float32)
    flow = tl.zeros([PLANES], tl.float32)
    slope = tl.zeros([PLANES], tl.float32)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
        distances = _signed_distances(
            points, point_strides, normals, offsets, inverse, rows, n, T, DIM, BLOCK_M, BLOCK_D,
            PRECISION,
        )  # fmt: skip
        left = _factor(distances, BLOCK_M, 0, LEFT_BITS, LEFT)  # (M, L)
        right = _factor(distances, BLOCK_M, LEFT_BITS, RIGHT_BITS, RIGHT)  # (M, R)
        left_grad = tl.dot(right, g, input_precision=PRECISION)  # (M, L)
        right_grad = tl.dot(left, tl.trans(g), input_precision=PRECISION)  # (M, R)
        expected = tl.sum(left * left_grad, 1)
        if part == 0:
            where = batch.to(tl.int64) * n + rows
            tl.store(expected_ptr + where, expected, mask=rows < n)
        e = tl.zeros([BLOCK_M, PLANES], tl.float32)
        e = _distance_grad(e, left * (left_grad - expected[:, None]), 0, LEFT_BITS, LEFT)
        e = _distance_grad(
            e, right * (right_grad - expected[:, None]), LEFT_BITS, RIGHT_BITS, RIGHT
        )
        weight = row_weights(weights, outer, head, weight_strides, rows, n, HAS_WEIGHTS)
        e = weighted_rows(e, weight)  # (M, PLANES)
        if NEED_POINTS:
            normal = load_part(normals, planes, T, out_dims, DIM, DIM, 1)  # (PLANES, OUT)
            # The weights are of any size: in fp32 they cannot overflow.
            grad = tl.dot(e, normal, input_precision=PRECISION) * out_scale  # (M, OUT)
            out = grad_ptr + (batch.to(tl.int64) * n + rows)[:, None] * DIM + out_dims[None, :]
            mask = (rows < n)[:, None] & (out_dims < DIM)[None, :]
            tl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        if NEED_PLANES:
            x = load_part(points, rows, n, out_dims, DIM, point_strides[2], point_strides[3])
            # 0 times what a masked point holds may be NaN.
            x = tl.where((weight > 0.0)[:, None], x, 0.0)
            distances = tl.where((weight > 0.0)[:, None], distances, 0.0)
            product = tl.dot(tl.trans(e), x, product, input_precision=PRECISION)
            flow += tl.sum(e, 0)
            slope += tl.sum(e * distances, 0)
    if NEED_PLANES:
        sums = (batch * splits + split).to(tl.int64) * T + planes
        inside = (planes < T)[:, None] & (out_dims < DIM)[None, :]
        tl.store(product_ptr + sums[:, None] * DIM + out_dims[None, :], product, mask=inside)
        if part == 0:
            tl.store(flow_ptr + sums, flow, mask=planes < T)
            tl.store(slope_ptr + sums, slope, mask=planes < T)


@dataclass(frozen=True)
class HalfspaceConfig:
    """Tile sizes: points, dimensions of a step, dimensions of a part of a gradient."""

    block_m: int
    block_d: int
    block_out: int
    num_warps: int
    num_stages: int


def default_config(dim: int, precision: str) -> HalfspaceConfig:
    """Small tiles where products run outside the tensor cores and live in registers ("ieee")."""
    padded = padded_head_dim(dim)
    if precision == "ieee":
        return HalfspaceConfig(32, min(padded, 32), min(padded, 32), 4, 2)
    return HalfspaceConfig(64, min(padded, 64), min(padded, 64), 4, 2)


def _shape(planes: int) -> dict[str, int]:
    """How the planes split into two factors, and the padded widths of their tiles."""
    left, right = planes // 2, planes - planes // 2
    width = {"LEFT": max(16, 1 << left), "RIGHT": max(16, 1 << right)}
    return {"LEFT_BITS": left, "RIGHT_BITS": right, **width}


def halfspace_mass(
    points: Tensor,
    normals: Tensor,
    offsets: Tensor,
    tau: Tensor,
    weights: Tensor | None,
    config: HalfspaceConfig | None = None,
) -> Tensor:
    """Weighted sums of m over the points.

    Args:
        points: (B0, B1, n, d) fp32, fp16 or bf16, any strides.
        normals: (B0, B1, T, d), offsets: (B0, B1, T), tau: (B0, B1), all fp32.
        weights: (B0, B1, n) fp32, any strides, or None for 1.

    Returns:
        (B0, B1, 2^T) fp32; bit t of a cell's number is its side of plane t.
    """
    outer, inner, n, dim = points.shape
    batch, planes = outer * inner, normals.shape[2]
    precision = fp32_dot_precision(points)
    config = config or default_config(dim, precision)
    if batch * n == 0:
        return offsets.new_zeros(outer, inner, 1 << planes)
    tiles = ceil_div(n, config.block_m)
    splits, share = split_rows(tiles, batch)
    shape = (outer, inner, splits, 1 << planes)
    sums = torch.empty(shape, dtype=torch.float32, device=points.device)
    with device_of(points):
        _halfspace_mass_kernel[(batch * splits,)](
            points, normals.contiguous(), offsets.contiguous(), tau.reciprocal().contiguous(),
            weights, sums, points.stride(), weight_strides(weights), inner, n, tiles, share,
            splits, DIM=dim, **_shape(planes), BLOCK_M=config.block_m, BLOCK_D=config.block_d,
            HAS_WEIGHTS=weights is not None, PRECISION=precision,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return sums.sum(2)


def halfspace_gradients(
    points: Tensor,
    normals: Tensor,
    offsets: Tensor,
    tau: Tensor,
    weights: Tensor | None,
    surprise: Tensor,
    scale: Tensor,
    need_points: bool,
    need_planes: bool,
    config: HalfspaceConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the entropy of the sums that `halfspace_mass` returned.

    Args:
        surprise: (B0, B1, 2^T) fp32, -log P_s - H, 0 where P_s is 0.
        scale: (B0, B1) fp32, the incoming gradient over the sum of weights.

    Returns:
        dx (B0, B1, n, d) in the dtype of the points or empty; dnormals (B0, B1, T, d), doffsets
        (B0, B1, T) and dtau (B0, B1) fp32 or empty; G (B0, B1, n) fp32.
    """
    outer, inner, n, dim = points.shape
    batch, planes = outer * inner, normals.shape[2]
    precision = fp32_dot_precision(points)
    config = config or default_config(dim, precision)
    expected = torch.empty((outer, inner, n), dtype=torch.float32, device=points.device)
    point_grad = points.new_empty(points.shape if need_points else (0,))
    if batch * n == 0:
        shape = normals.shape if need_planes else (0,)
        zeros = (expected.new_zeros(size) for size in (shape, shape[:3], shape[:2]))
        return point_grad, *zeros, expected
    tiles = ceil_div(n, config.block_m)
    parts = ceil_div(dim, config.block_out) if need_points or need_planes else 1
    splits, share = split_rows(tiles, batch * parts)
    sums = (outer, inner, splits, planes)
    product = expected.new_empty((*sums, dim) if need_planes else (0,))
    flow, slope = (expected.new_empty(sums if need_planes else (0,)) for _ in range(2))
    inverse = tau.reciprocal()
    with device_of(points):
        _plane_kernel[(batch * parts * splits,)](
            points, normals.contiguous(), offsets.contiguous(), inverse.contiguous(), weights,
            surprise.contiguous(), scale.contiguous(), expected, point_grad, product, flow, slope,
            points.stride(), weight_strides(weights), inner, n, tiles, share, splits, parts,
            DIM=dim, **_shape(planes), BLOCK_M=config.block_m, BLOCK_D=config.block_d,
            BLOCK_OUT=config.block_out, HAS_WEIGHTS=weights is not None, NEED_POINTS=need_points,
            NEED_PLANES=need_planes, PRECISION=precision,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    if not need_planes:
        return point_grad, product, flow, slope, expected
    factor = (scale * inverse)[..., None]
    tau_grad = -slope.sum((2, 3)) * scale * inverse
    return point_grad, product.sum(2) * factor[..., None], -flow.sum(2) * factor, tau_grad, expected
