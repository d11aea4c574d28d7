"""Gradients of the entropy of soft cells around anchors: the backward pass.

The formulas stand at the top of `kernels/range_primitives.py`. Up to one tile of anchors, a program
takes a run of points through all of them; beyond, G_i and dx come from a pass of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import (
    architecture,
    ceil_div,
    next_power_of_2,
    padded_head_dim,
    split_rows,
    tile_descriptor,
    weight_strides,
)
from entropy_attn.kernels.plans import device_of
from entropy_attn.kernels.primitives import (
    LOG2_E,
    dot_terms,
    half_range_scale,
    head_base,
    inside,
    may_start_next,
    row_weights,
    two_terms,
    wait_for_last,
    weighted_rows,
)
from entropy_attn.kernels.range_primitives import (
    LENGTHS,
    NOWHERE,
    Call,
    RangeConfig,
    anchors_of,
    load_centre,
    load_norms,
    load_point_terms,
    load_terms,
    norms_in_base_2,
    problem_of,
    products,
    rate_of,
    surprise_of,
)


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
    COPY_ENGINE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, NEED_POINTS: tl.constexpr,
):  # fmt: skip
    """G and a part of the dimensions of dx for a tile of points, over any number of anchors."""
    program = tl.program_id(0)
    tile = program % tiles
    part = program // tiles % parts
    batch = program // tiles // parts
    start = tile * BLOCK_M
    lane = tl.arange(0, BLOCK_M)  # (M,)
    outer, head = batch // inner, batch % inner
    points, terms, norms, centre, unit, factor = problem_of(
        points, point_strides, terms, norms, centre, unit, alpha, problem_strides, batch, inner,
        k_padded, DIM, PADDED, TERMS, COPY_ENGINE,
    )  # fmt: skip
    scale = 2.0 * factor * tl.load(unit)
    where = batch.to(tl.int64) * n + start
    lse = tl.load(lse_ptr + where + lane, mask=start + lane < n, other=NOWHERE)
    surprise += batch.to(tl.int64) * k_padded
    out_dims = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dims = tl.arange(0, BLOCK_D)
    x_terms = load_point_terms(
        points, point_strides, outer, head, start, lane, dims, n, load_centre(centre, dims, DIM),
        terms.dtype.element_ty, DIM, CENTRED, COPY_ENGINE,
    )  # fmt: skip

    expected = tl.zeros([BLOCK_M], tl.float32)
    for column in range(0, k_padded, BLOCK_N):
        columns = column + tl.arange(0, BLOCK_N)
        first = load_terms(terms, columns, dims, k_padded, PADDED, TERMS)
        product, units = products(
            x_terms, points, point_strides, centre, terms, first, start, lane, columns, n,
            k_padded, DIM, PADDED, BLOCK_D, TERMS, CENTRED,
        )  # fmt: skip
        p = tl.exp2(_log_share(product, units, load_norms(norms, columns, factor), lse, scale))
        expected += tl.sum(p * tl.load(surprise + columns)[None, :], 1)
    if part == 0:
        tl.store(expected_ptr + where + lane, expected, mask=start + lane < n)

    if NEED_POINTS:
        HALF: tl.constexpr = terms.dtype.element_ty
        grad = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
        for column in range(0, k_padded, BLOCK_N):
            columns = column + tl.arange(0, BLOCK_N)
            first = load_terms(terms, columns, dims, k_padded, PADDED, TERMS)
            product, units = products(
                x_terms, points, point_strides, centre, terms, first, start, lane, columns, n,
                k_padded, DIM, PADDED, BLOCK_D, TERMS, CENTRED,
            )  # fmt: skip
            p = tl.exp2(_log_share(product, units, load_norms(norms, columns, factor), lse, scale))
            e = p * (tl.load(surprise + columns)[None, :] - expected[:, None])  # (M, N)
            high, low = two_terms(e, HALF)
            anchor, anchor_low, _ = load_terms(terms, columns, out_dims, k_padded, PADDED, 2)
            grad += dot_terms(high, low, anchor, anchor_low, CENTRED)
        weight = row_weights(weights, outer, head, weight_strides, start + lane, n, HAS_WEIGHTS)
        _store_point_grad(
            grad_ptr, grad, weight, scale * (1.0 / LOG2_E) * tl.load(rate + batch), outer, head,
            batch, start, lane, n, out_dims, DIM, HAS_WEIGHTS, False,
        )  # fmt: skip


@triton.jit
def _store_point_grad(
    grad_ptr, grad, weights, scale, outer, head, batch, start, lane, n, dims, DIM: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, COPY_ENGINE: tl.constexpr,
):  # fmt: skip
    """Write (M, dims) of dx, contiguous."""
    grad *= scale
    if HAS_WEIGHTS:
        grad = weighted_rows(grad, weights)
    if COPY_ENGINE:
        box = tl.reshape(grad, (1, 1, grad.shape[0], grad.shape[1]))
        grad_ptr.store([outer, head, start, 0], box.to(grad_ptr.dtype))
    else:
        base = grad_ptr + (batch.to(tl.int64) * n + start) * DIM
        pointers = base + lane[:, None] * DIM + dims[None, :]
        mask = (lane < n - start)[:, None] & inside(dims, DIM)[None, :]
        tl.store(pointers, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def _anchor_kernel(
    points, terms, norms, centre, unit, alpha, weights, lse_ptr, surprise, rate, expected_ptr,
    grad_ptr, product_ptr, flow_ptr, slope_ptr, anchors, incoming, mass, entropy, weight_sums,
    point_strides, problem_strides, weight_strides, anchor_strides, inner, n, k, k_padded, tiles,
    share, splits, chunks, parts,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr, TERMS: tl.constexpr, CENTRED: tl.constexpr,
    COPY_ENGINE: tl.constexpr, ONE_CHUNK: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    NEED_POINTS: tl.constexpr, NEED_ANCHORS: tl.constexpr, NEED_EXPECTED: tl.constexpr,
    FUSED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sums over a run of tiles of points for a chunk of anchors and a part of the dimensions.

    They are, with weights, sum_i e_ij x_i ("product"), sum_i e_ij ("flow") and, over the chunk,
    sum_ij e_ij t_ij ("slope"). With ONE_CHUNK every anchor is here, so that G and dx are too.
    """
    may_start_next(OVERLAP)
    program = tl.program_id(0)
    split = program % splits
    part = program // splits % parts
    chunk = program // splits // parts % chunks
    batch = program // splits // parts // chunks
    outer, head = batch // inner, batch % inner
    points, terms, norms, centre, unit, factor = problem_of(
        points, point_strides, terms, norms, centre, unit, alpha, problem_strides, batch, inner,
        k_padded, DIM, PADDED, TERMS, COPY_ENGINE,
    )  # fmt: skip
    HALF: tl.constexpr = terms.dtype.element_ty
    # One step holds all dimensions, of the products and of the gradients.
    WHOLE: tl.constexpr = DIM <= BLOCK_D and BLOCK_OUT == BLOCK_D
    columns = chunk * BLOCK_N + tl.arange(0, BLOCK_N)  # (N,)
    out_dims = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dims = tl.arange(0, BLOCK_D)
    first, norm, origin, unit_of_terms = anchors_of(
        anchors, anchor_strides, terms, norms, centre, unit, outer, head, columns, dims, k,
        k_padded, DIM, PADDED, TERMS, CENTRED, FUSED,
    )  # fmt: skip
    norm = norms_in_base_2(norm, factor)
    if FUSED:
        g = surprise_of(mass + batch.to(tl.int64) * k, tl.load(entropy + batch), columns, k)
        to_range, result_unit = half_range_scale(tl.max(tl.abs(g), 0))
        g *= to_range
        result_unit *= rate_of(incoming, weight_sums, batch, n, HAS_WEIGHTS)
        if split == 0:  # for the last kernel
            tl.store(rate + batch, result_unit)
            tl.store(centre + dims, origin, mask=inside(dims, DIM))
    else:
        g = tl.load(surprise + batch.to(tl.int64) * k_padded + columns)
        result_unit = tl.load(rate + batch)
    scale = 2.0 * factor * unit_of_terms
    out_scale = scale * (1.0 / LOG2_E) * result_unit
    out_origin = origin
    if not WHOLE:
        out_origin = load_centre(centre, out_dims, DIM)
    product_sum = tl.zeros([BLOCK_N, BLOCK_OUT], tl.float32)
    # Flow has to sum e as it is rounded in the product, as points may lie far off. The narrowest
    # product with ones does.
    ones = tl.full([BLOCK_M, 16], 1.0, tl.float32).to(HALF)
    flow = tl.zeros([BLOCK_N, 16], tl.float32)
    steepness = tl.zeros([BLOCK_M], tl.float32)
    lane = tl.arange(0, BLOCK_M)  # (M,)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        start = tile * BLOCK_M
        left = n - start
        x_terms = load_point_terms(
            points, point_strides, outer, head, start, lane, dims, n, origin, HALF, DIM, CENTRED,
            COPY_ENGINE,
        )  # fmt: skip
        product, units = products(
            x_terms, points, point_strides, centre, terms, first, start, lane, columns, n,
            k_padded, DIM, PADDED, BLOCK_D, TERMS, CENTRED,
        )  # fmt: skip
        where = batch.to(tl.int64) * n + start
        lse = tl.load(lse_ptr + where + lane, mask=lane < left, other=NOWHERE)
        log_share = _log_share(product, units, norm, lse, scale)
        p = tl.exp2(log_share)  # (M, N)
        if ONE_CHUNK:
            expected = tl.sum(p * g[None, :], 1)
            if NEED_EXPECTED and part == 0:
                tl.store(expected_ptr + where + lane, expected, mask=lane < left)
        else:
            expected = tl.load(expected_ptr + where + lane, mask=lane < left, other=0.0)
        e = p * (g[None, :] - expected[:, None])
        weight = row_weights(weights, outer, head, weight_strides, start + lane, n, HAS_WEIGHTS)
        if NEED_ANCHORS and not CENTRED:
            # Points in half precision have e in one term: here it is not rounded yet.
            # t less lse / alpha, which is the same for all anchors: e sums to 0 over them.
            of_point = tl.sum(e * log_share, 1)
            if HAS_WEIGHTS:
                of_point = tl.where(weight > 0.0, of_point * weight, 0.0)
            steepness += of_point
        high, low = two_terms(e, HALF)
        if NEED_POINTS and ONE_CHUNK:
            if WHOLE:
                anchor, anchor_low, _ = first
            else:
                anchor, anchor_low, _ = load_terms(
                    terms, columns, out_dims, k_padded, PADDED, 2
                )  # (N, OUT)
            grad = dot_terms(high, low, anchor, anchor_low, CENTRED)  # (M, OUT)
            _store_point_grad(
                grad_ptr, grad, weight, out_scale, outer, head, batch, start, lane, n, out_dims,
                DIM, HAS_WEIGHTS, COPY_ENGINE and WHOLE,
            )  # fmt: skip
        if NEED_ANCHORS:
            if WHOLE:
                x, x_low, units = x_terms
            else:
                x, x_low, units = load_point_terms(
                    points, point_strides, outer, head, start, lane, out_dims, n, out_origin, HALF,
                    DIM, CENTRED, False,
                )  # fmt: skip
            # Factors of points are taken over a power of two of the tile: none exceeds 1.
            flow_unit = result_unit
            if HAS_WEIGHTS:
                # 0 times what a masked point holds may be NaN.
                x = tl.where((weight > 0.0)[:, None], x, 0.0)
                x_low = tl.where((weight > 0.0)[:, None], x_low, 0.0)
                share_of_highest, highest = _over_highest(weight)
                high, low = two_terms(weighted_rows(e, share_of_highest), HALF)
                flow_unit *= highest
            product_unit = flow_unit
            if CENTRED:
                # Powers of two: what they are multiplied with keeps its digits.
                units, highest_unit = _over_highest(tl.where(weight > 0.0, units, 0.0))
                x *= units.to(HALF)[:, None]
                x_low *= units.to(HALF)[:, None]
                product_unit *= highest_unit
            # The factor keeps the sums out of the tensor cores, which cut digits off as they add,
            # and would make the products of a step wait for those of the last.
            product_sum += (
                dot_terms(tl.trans(high), tl.trans(low), x, x_low, CENTRED) * product_unit
            )
            counted = tl.dot(tl.trans(high), ones)
            if CENTRED:
                counted = tl.dot(tl.trans(low), ones, counted)
            flow += counted * flow_unit
    if NEED_ANCHORS:
        sums = (batch * splits + split).to(tl.int64) * k_padded + columns
        where = sums[:, None] * DIM + out_dims[None, :]
        tl.store(product_ptr + where, product_sum, mask=inside(out_dims, DIM)[None, :])
        flow_sum = tl.max(flow, 1)  # all columns are the same
        if part == 0:
            tl.store(flow_ptr + sums, flow_sum)
        if not CENTRED:
            # Without sharpness all cells are equal, and to first order it changes no mass.
            inverse = tl.where(factor != 0.0, 1.0 / factor, 0.0)
            slope = tl.where(part == 0, tl.sum(steepness, 0) * inverse * result_unit, 0.0)
        else:
            if WHOLE:
                high, middle, low = first
            else:
                high, middle, low = load_terms(terms, columns, out_dims, k_padded, PADDED, TERMS)
            anchor = high.to(tl.float32) + middle.to(tl.float32)
            if TERMS == 3:
                anchor += low.to(tl.float32)
            anchor *= unit_of_terms
            slopes = 2.0 * product_sum - flow_sum[:, None] * anchor
            slope = tl.sum(tl.sum(slopes * anchor, 1), 0)
        tl.store(slope_ptr + ((batch * splits + split) * chunks + chunk) * parts + part, slope)


@triton.jit
def _over_highest(factors):
    """(M,) factors over a power of two, so that none exceeds 1, and that power of two."""
    scale, unit = half_range_scale(tl.max(factors, 0))
    return factors * (scale * 2.0**-14), unit * 2.0**14


@triton.jit(do_not_specialize=LENGTHS)
def _cell_gradient_kernel(
    product_ptr, flow_ptr, slope_ptr, anchors, centre, alpha, grad_ptr, alpha_grad_ptr,
    anchor_strides, problem_strides, inner, k, k_padded, splits, parts,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, CENTRED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The gradients of one anchor, and of alpha, from the sums of all programs."""
    wait_for_last(OVERLAP)
    program = tl.program_id(0)
    anchor = program % k
    batch = program // k
    outer, head = batch // inner, batch % inner
    which = (outer * problem_strides[0] + head * problem_strides[1]).to(tl.int64)
    sharpness = tl.load(alpha + batch)
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
        grad = (tl.sum(total, 0) - origin * tl.sum(flow, 0)) * (2.0 * sharpness)
        out = grad_ptr + program.to(tl.int64) * DIM + dims
        tl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=dims < DIM)
    if anchor == 0:
        slope = tl.zeros([SPLITS], tl.float32)
        for start in range(0, parts, SPLITS):
            rows = start + tl.arange(0, SPLITS)
            slope += tl.load(slope_ptr + batch * parts + rows, mask=rows < parts, other=0.0)
        tl.store(alpha_grad_ptr + batch, tl.sum(slope, 0))


def backward_config(dim: int, k: int, dtype: torch.dtype, arch: str) -> RangeConfig:
    """Tiles whose three products and operands fit the registers, or nearly so."""
    padded, cells = padded_head_dim(dim), max(16, next_power_of_2(k))
    common = {"fused": True, "fast": arch.startswith("sm")}
    part = min(padded, 64)
    if arch.startswith("gfx"):
        part = min(padded, 32)
        return RangeConfig(32, min(64, cells), part, part, 4, 1, 1024, **common)
    shape = (64, min(64, cells), part, part, 4)
    if arch != "sm90" or cells > 64 or padded > 64:
        return RangeConfig(*shape, 1 if dtype == torch.float32 else 2, 264, **common)
    # Three stages: with two, a tile is asked for at the end of a step and waited for at once.
    common |= {"copy_engine": True, "overlap": True}
    return RangeConfig(*shape, 3, 264, **common)


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
        dx (B0, B1, n, d) in the dtype of the points; danchors (B0, B1, k, d) in that of the
        anchors; dalpha (B0, B1) and dweights (B0, B1, n) in fp32. Those not needed are empty.
    """
    outer, inner, n, dim = points.shape
    batch, k = outer * inner, anchors.shape[2]
    point_grad = points.new_empty(points.shape if need_points else (0,))
    if batch * n == 0:
        shape = anchors.shape if need_anchors else (0,)
        weight_grad = alpha.new_zeros((outer, inner, n) if need_weights else (0,))
        return point_grad, anchors.new_zeros(shape), alpha.new_zeros(shape[:2]), weight_grad
    config = config or backward_config(dim, k, points.dtype, architecture(points.device))
    call = Call(points, anchors, alpha, weights, config)
    parts = ceil_div(dim, config.block_out) if need_points or need_anchors else 1
    splits, share = split_rows(call.tiles, batch * call.chunks * parts, config.programs)
    anchor_grad = anchors.new_empty(anchors.shape if need_anchors else (0,))
    alpha_grad = alpha.new_empty((outer, inner) if need_anchors else (0,))
    surprise, rate = alpha.new_empty(batch, call.k_padded), alpha.new_empty(outer, inner)
    # Where neither asks for it, G stays in registers.
    keeps_expected = need_weights or call.chunks > 1
    expected = alpha.new_empty((outer, inner, n) if keeps_expected else (0,))
    sums = (batch, splits, call.k_padded)
    product = alpha.new_empty((*sums, dim) if need_anchors else (0,))
    flow = alpha.new_empty(sums if need_anchors else (0,))
    slope = alpha.new_empty((batch, splits * call.chunks * parts) if need_anchors else (0,))
    # What both kernels take first and last.
    writes = call.copies and call.chunks == 1 and need_points
    target = tile_descriptor(point_grad, config.block_m) if writes else point_grad
    given = (*call.given, weights, lse, surprise, rate, expected, target)
    strides = (*call.strides, weight_strides(weights))
    shape = dict(
        **call.shape, BLOCK_OUT=config.block_out, HAS_WEIGHTS=weights is not None,
        NEED_POINTS=need_points,
    )  # fmt: skip
    grad = grad.contiguous()
    with device_of(points):
        if not call.fused:
            call.prepare(grad, mass, entropy, surprise, rate)
        if call.chunks > 1:
            _point_kernel[(batch * parts * call.tiles,)](
                *given, *strides, inner, n, call.k_padded, call.tiles, parts, **shape
            )
        if need_anchors or call.chunks == 1:
            _anchor_kernel[(batch * call.chunks * parts * splits,)](
                *given, product, flow, slope, anchors, grad, mass, entropy, call.weight_sums,
                *strides, anchors.stride(), inner, n, k, call.k_padded, call.tiles, share, splits,
                call.chunks, parts, ONE_CHUNK=call.chunks == 1, NEED_ANCHORS=need_anchors,
                NEED_EXPECTED=keeps_expected, FUSED=call.fused, OVERLAP=config.overlap,
                **shape,
            )  # fmt: skip
        if need_anchors:
            _cell_gradient_kernel[(batch * k,)](
                product, flow, slope, anchors, call.centre, call.alpha, anchor_grad,
                alpha_grad, anchors.stride(), call.problem_strides, inner, k, call.k_padded, splits,
                slope.shape[1], DIM=dim, BLOCK_D=min(64, padded_head_dim(dim)), SPLITS=128,
                CENTRED=call.form["CENTRED"], OVERLAP=config.overlap, **call.last,
            )  # fmt: skip
    weight_grad = expected * rate[..., None] if need_weights else expected.new_empty(0)
    return point_grad, anchor_grad, alpha_grad, weight_grad
