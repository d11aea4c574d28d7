"""The filter of convex hulls on a GPU: extreme points, then which points a polytope holds.

Points are read once by each kernel, in their own dtype, and computed with in fp64: the bounds that
make the filter rigorous are those of `entropy_attn.geometry.filter`, with or without fused
multiply-adds. Which points are extreme does not depend on the order in which programs run: ties go
to the smallest index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import device_of, split_rows

ROWS = 64  # points of a tile, in the search for extremes
PROGRAMS = 128  # in the search
BLOCK = 1024  # points of a program, in the test


@triton.jit
def _load_points(points, rows, total, row_stride, dim_stride, DIM: tl.constexpr):
    """Three (rows,) fp64 coordinates; 0 past the last point, and for z in the plane."""
    where, mask = points + rows.to(tl.int64) * row_stride, rows < total
    x = tl.load(where, mask=mask, other=0.0).to(tl.float64)
    y = tl.load(where + dim_stride, mask=mask, other=0.0).to(tl.float64)
    z = tl.zeros_like(x)
    if DIM == 3:
        z = tl.load(where + 2 * dim_stride, mask=mask, other=0.0).to(tl.float64)
    return x, y, z


@triton.jit(do_not_specialize=("total", "tiles", "share", "splits"))
def _extreme_kernel(
    points, directions, reach_ptr, index_ptr, batch_stride, row_stride, dim_stride,
    total, tiles, share, splits, DIM: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The furthest point along each direction among a run of tiles of points."""
    program = tl.program_id(0)
    batch, split = program // splits, program % splits
    points += batch.to(tl.int64) * batch_stride
    along = tl.arange(0, COUNT)
    dx, dy = tl.load(directions + along * DIM), tl.load(directions + along * DIM + 1)
    best = tl.full([COUNT], -float("inf"), tl.float64)
    index = tl.zeros([COUNT], tl.int32)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        x, y, z = _load_points(points, rows, total, row_stride, dim_stride, DIM)
        reach = x[:, None] * dx[None, :] + y[:, None] * dy[None, :]  # (ROWS, COUNT)
        if DIM == 3:
            reach += z[:, None] * tl.load(directions + along * DIM + 2)[None, :]
        usable = (rows < total)[:, None] & (reach == reach)
        reach = tl.where(usable, reach, -float("inf"))
        furthest = tl.max(reach, 0)
        place = tl.argmax(reach, 0, tie_break_left=True)
        index = tl.where(furthest > best, tile * ROWS + place, index)
        best = tl.maximum(best, furthest)
    out = program.to(tl.int64) * COUNT + along
    tl.store(reach_ptr + out, best)
    tl.store(index_ptr + out, index)


@triton.jit(do_not_specialize=("splits",))
def _furthest_kernel(
    reach_ptr, index_ptr, out_ptr, splits, COUNT: tl.constexpr, SPLITS: tl.constexpr
):
    """The furthest of what the programs of one batch row found, the first of equals."""
    batch, along = tl.program_id(0), tl.arange(0, COUNT)
    runs = tl.arange(0, SPLITS)
    where = (batch * splits + runs).to(tl.int64)[:, None] * COUNT + along[None, :]
    reach = tl.load(reach_ptr + where, mask=(runs < splits)[:, None], other=-float("inf"))
    first = tl.argmax(reach, 0, tie_break_left=True)
    chosen = (batch * splits + first).to(tl.int64) * COUNT + along
    tl.store(out_ptr + batch * COUNT + along, tl.load(index_ptr + chosen).to(tl.int64))


@triton.jit(do_not_specialize=("total", "tiles", "facets"))
def _outside_kernel(
    points, normals, thresholds, box, out_ptr, batch_stride, row_stride, dim_stride,
    total, tiles, facets, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether each point of a block is not found to be strictly inside its polytope."""
    program = tl.program_id(0)
    batch, tile = program // tiles, program % tiles
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    points += batch.to(tl.int64) * batch_stride
    x, y, z = _load_points(points, rows, total, row_stride, dim_stride, DIM)
    # Written so that NaN is outside.
    inside = (tl.abs(x) <= tl.load(box + batch * DIM)) & (
        tl.abs(y) <= tl.load(box + batch * DIM + 1)
    )
    if DIM == 3:
        inside &= tl.abs(z) <= tl.load(box + batch * DIM + 2)
    normals += batch.to(tl.int64) * facets * DIM
    thresholds += batch.to(tl.int64) * facets
    for facet in range(facets):
        normal = normals + facet * DIM
        value = y * tl.load(normal + 1) - tl.load(thresholds + facet)
        if DIM == 3:
            value += z * tl.load(normal + 2)
        inside &= value + x * tl.load(normal) > 0.0
    out = out_ptr + batch.to(tl.int64) * total + rows
    tl.store(out, tl.where(inside, 0, 1).to(tl.uint8), mask=rows < total)


def extreme_points(points: Tensor, directions: Tensor) -> Tensor:
    """(B, K) int64 indices of the points that lie furthest along each direction, up to rounding.

    Args:
        points: (B, n, 2 or 3) floating point, any strides, 0 < n < 2^31.
        directions: (K, d) fp64, contiguous, K a power of two.
    """
    batch, total, dim = points.shape
    count = len(directions)
    tiles = triton.cdiv(total, ROWS)
    splits, share = split_rows(tiles, batch, PROGRAMS)
    reach = directions.new_empty(batch, splits, count)
    index = torch.empty_like(reach, dtype=torch.int32)
    out = torch.empty(batch, count, dtype=torch.int64, device=points.device)
    with device_of(points):
        _extreme_kernel[(batch * splits,)](
            points, directions, reach, index, *points.stride(), total, tiles, share, splits,
            DIM=dim, COUNT=count, ROWS=ROWS,
        )  # fmt: skip
        _furthest_kernel[(batch,)](
            reach, index, out, splits, COUNT=count, SPLITS=triton.next_power_of_2(splits),
            num_warps=8,
        )  # fmt: skip
    return out


def outside(points: Tensor, normals: Tensor, thresholds: Tensor, box: Tensor) -> Tensor:
    """(B, n) bool: whether a point is not found to be strictly inside.

    Args:
        points: (B, n, 2 or 3) floating point, any strides, 0 < n < 2^31.
        normals: (B, F, d) fp64, thresholds: (B, F) fp64, box: (B, d) fp64; contiguous.
    """
    batch, total, dim = points.shape
    tiles = triton.cdiv(total, BLOCK)
    out = torch.empty(batch, total, dtype=torch.uint8, device=points.device)
    with device_of(points):
        _outside_kernel[(batch * tiles,)](
            points, normals, thresholds, box, out, *points.stride(), total, tiles,
            normals.shape[1], DIM=dim, BLOCK=BLOCK,
        )  # fmt: skip
    return out.view(torch.bool)
