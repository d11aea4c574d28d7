"""Masses and entropy of soft cells around anchors: the forward pass.

The formulas stand at the top of `kernels/range_primitives.py`. Up to one tile of anchors, a program
takes a run of points through all of them; beyond, log-sum-exp comes from a pass of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import (
    architecture,
    next_power_of_2,
    padded_head_dim,
    split_rows,
    weight_strides,
)
from entropy_attn.kernels.plans import device_of
from entropy_attn.kernels.primitives import (
    NO_SCORE,
    may_start_next,
    online_softmax,
    row_weights,
    wait_for_last,
    weighted_rows,
)
from entropy_attn.kernels.range_primitives import (
    LENGTHS,
    NOWHERE,
    Call,
    RangeConfig,
    anchors_of,
    inverse_of,
    load_centre,
    load_norms,
    load_point_terms,
    load_terms,
    log2_of,
    norms_in_base_2,
    problem_of,
    products,
    step_of,
)


@triton.jit(do_not_specialize=LENGTHS)
def _normaliser_kernel(
    points, terms, norms, centre, unit, alpha, lse_ptr, peak_ptr,
    point_strides, problem_strides, inner, n, k_padded, tiles,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, TERMS: tl.constexpr, CENTRED: tl.constexpr, COPY_ENGINE: tl.constexpr,
    STORE_PEAK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the scores of a tile of points, over any number of anchors."""
    program = tl.program_id(0)
    batch = program // tiles
    start = (program % tiles) * BLOCK_M
    lane = tl.arange(0, BLOCK_M)  # (M,)
    points, terms, norms, centre, unit, factor = problem_of(
        points, point_strides, terms, norms, centre, unit, alpha, problem_strides, batch, inner,
        k_padded, DIM, PADDED, TERMS, COPY_ENGINE,
    )  # fmt: skip
    scale = 2.0 * factor * tl.load(unit)
    dims = tl.arange(0, BLOCK_D)
    maximum = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    x_terms = load_point_terms(
        points, point_strides, batch // inner, batch % inner, start, lane, dims, n,
        load_centre(centre, dims, DIM), terms.dtype.element_ty, DIM, CENTRED, COPY_ENGINE,
    )  # fmt: skip
    for column in range(0, k_padded, BLOCK_N):
        columns = column + tl.arange(0, BLOCK_N)
        first = load_terms(terms, columns, dims, k_padded, PADDED, TERMS)
        product, units = products(
            x_terms, points, point_strides, centre, terms, first, start, lane, columns, n,
            k_padded, DIM, PADDED, BLOCK_D, TERMS, CENTRED,
        )  # fmt: skip
        norm = load_norms(norms, columns, factor)
        scores = product * (scale * units)[:, None] - norm[None, :]
        exponents, maximum, shift = online_softmax(scores, 1.0, maximum)
        total = total * tl.exp2(shift) + tl.sum(tl.exp2(exponents), 1)
    where = batch.to(tl.int64) * n + start + lane
    tl.store(lse_ptr + where, maximum + tl.log2(total), mask=start + lane < n)
    if STORE_PEAK:
        tl.store(peak_ptr + where, 1.0 / total, mask=start + lane < n)


@triton.jit(do_not_specialize=LENGTHS)
def _mass_kernel(
    points, terms, norms, centre, unit, alpha, weights, lse_ptr, peak_ptr, sums_ptr, anchors,
    point_strides, problem_strides, weight_strides, anchor_strides, inner, n, k, k_padded, tiles,
    share, splits, chunks, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TERMS: tl.constexpr, CENTRED: tl.constexpr,
    COPY_ENGINE: tl.constexpr, STORE_PEAK: tl.constexpr,
    ONE_CHUNK: tl.constexpr, HAS_WEIGHTS: tl.constexpr, FAST: tl.constexpr, FUSED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Weighted sums of p over a run of tiles of points, for one chunk of anchors."""
    may_start_next(OVERLAP)
    program = tl.program_id(0)
    split = program % splits
    chunk = program // splits % chunks
    batch = program // splits // chunks
    points, terms, norms, centre, unit, factor = problem_of(
        points, point_strides, terms, norms, centre, unit, alpha, problem_strides, batch, inner,
        k_padded, DIM, PADDED, TERMS, COPY_ENGINE,
    )  # fmt: skip
    columns = chunk * BLOCK_N + tl.arange(0, BLOCK_N)  # (N,)
    dims = tl.arange(0, BLOCK_D)
    first, norm, origin, unit_of_terms = anchors_of(
        anchors, anchor_strides, terms, norms, centre, unit, batch // inner, batch % inner, columns,
        dims, k, k_padded, DIM, PADDED, TERMS, CENTRED, FUSED,
    )  # fmt: skip
    norm = norms_in_base_2(norm, factor)
    scale = 2.0 * factor * unit_of_terms
    # Summed over its rows once, at the end: a sum over the rows of a tile crosses threads.
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    lane = tl.arange(0, BLOCK_M)  # (M,)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        start = tile * BLOCK_M
        left = n - start
        x_terms = load_point_terms(
            points, point_strides, batch // inner, batch % inner, start, lane, dims, n, origin,
            terms.dtype.element_ty, DIM, CENTRED, COPY_ENGINE,
        )  # fmt: skip
        product, units = products(
            x_terms, points, point_strides, centre,
            terms, first, start, lane, columns, n, k_padded, DIM, PADDED, BLOCK_D, TERMS, CENTRED,
        )  # fmt: skip
        scores = product * (scale * units)[:, None] - norm[None, :]
        where = batch.to(tl.int64) * n + start
        weight = row_weights(
            weights, batch // inner, batch % inner, weight_strides, start + lane, n, HAS_WEIGHTS
        )
        if ONE_CHUNK:
            maximum = tl.max(scores, 1)
            p = tl.exp2(scores - maximum[:, None])  # (M, N), times total
            total = tl.sum(p, 1)
            tl.store(lse_ptr + where + lane, maximum + log2_of(total, FAST), mask=lane < left)
            inverse = inverse_of(total, FAST)
            if STORE_PEAK:
                tl.store(peak_ptr + where + lane, inverse, mask=lane < left)
            if HAS_WEIGHTS:
                inverse = tl.where(weight > 0.0, inverse, 0.0)  # it may be NaN
            weight *= inverse
        else:
            lse = tl.load(lse_ptr + where + lane, mask=lane < left, other=NOWHERE)
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
    HAS_WEIGHTS: tl.constexpr, SPLITS: tl.constexpr, CELLS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Masses of all cells of a problem from the sums of its programs, and their entropy."""
    wait_for_last(OVERLAP)
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


def forward_config(dim: int, k: int, dtype: torch.dtype, arch: str) -> RangeConfig:
    """All anchors at once up to 256 of them where they fit: it saves a pass over the points.

    Measured for sm_90 at d=64, k=64 and 256. Triton 3.6 compiles wider tiles to a trap for sm_100,
    and most others have less shared memory.
    """
    padded, cells = padded_head_dim(dim), max(16, next_power_of_2(k))
    part = min(padded, 64)
    common = {"fused": True, "fast": arch.startswith("sm")}
    if arch.startswith("gfx"):
        return RangeConfig(64, min(64, cells), min(padded, 32), 0, 4, 1, 1024, **common)
    if arch != "sm90":
        return RangeConfig(64, min(64, cells), part, 0, 4, 2, 528, **common)
    if cells <= 64:
        common |= {"copy_engine": True, "overlap": True}
        # Many small programs side by side: while some wait for points or for the tensor cores,
        # others compute.
        if dtype == torch.float32:
            return RangeConfig(64, cells, part, 0, 4, 3, 396, registers=168, **common)
        return RangeConfig(64, cells, part, 0, 4, 5, 396, **common)
    if cells == 256 and padded <= 64:
        return RangeConfig(64, 256, part, 0, 8, 3, 132)
    return RangeConfig(64, 128, part, 0, 4, 2, 264)


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
        anchors: (B0, B1, k, d) in fp32 or the dtype of the points, may be expanded.
        alpha: (B0, B1) fp32.
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
    call = Call(points, anchors, alpha, weights, config)
    splits, share = split_rows(call.tiles, batch * call.chunks, config.programs)
    entropy, mass = alpha.new_empty(outer, inner), alpha.new_empty(outer, inner, k)
    sums = alpha.new_empty(batch, splits, call.k_padded)
    has_weights = weights is not None
    with device_of(points):
        if not call.fused:
            call.prepare(None)
        if call.chunks > 1:
            _normaliser_kernel[(batch * call.tiles,)](
                *call.given, lse, peak, *call.strides, inner, n, call.k_padded, call.tiles,
                STORE_PEAK=with_peak, **call.shape,
            )  # fmt: skip
        _mass_kernel[(batch * call.chunks * splits,)](
            *call.given, weights, lse, peak, sums, anchors, *call.strides, weight_strides(weights),
            anchors.stride(), inner, n, k, call.k_padded, call.tiles, share, splits, call.chunks,
            STORE_PEAK=with_peak, ONE_CHUNK=call.chunks == 1, HAS_WEIGHTS=has_weights,
            FAST=config.fast, FUSED=call.fused, OVERLAP=config.overlap, **call.shape,
        )  # fmt: skip
        cells = step_of(k)
        _entropy_kernel[(batch,)](
            sums, call.weight_sums, mass, entropy, n, k, call.k_padded, splits,
            HAS_WEIGHTS=has_weights, SPLITS=16384 // cells, CELLS=cells, num_warps=16,
            OVERLAP=config.overlap, **call.last,
        )  # fmt: skip
    return entropy, mass, lse, peak
