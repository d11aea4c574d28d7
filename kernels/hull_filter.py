"""The filter of convex hulls on a GPU: one pass over the points, one wait for the device.

Three kernels run one after the other, a fourth brings what they found into order:

1. `_extreme_kernel`: the furthest points of a sample along some directions.
2. `_facet_kernel`: the planes of the polytope that those span, see there, and with that the radius
   of an ellipsoid inside.
3. `_sieve_kernel`: each program reads a run of points once, in their own precision. Those that are
   not found inside the ellipsoid, a few of most runs, are tested against each plane in fp64.
4. `_gather_kernel`: what the runs have kept, one behind the other.

Everything is computed in a frame that takes the box around the extreme points to [-1, 1]^d: about
its centre, divided by its half widths. So all roundings are bounded by constants. The frame is
written in the precision of the points, and its numbers are taken as exact.

Why nothing is dropped that is not strictly inside. U is 2^-53, u the same of the points' precision
(2^-24 for half precision as well, which is computed with in fp32), w = (x - centre) * scale.

- A plane has the inner normal N, through a vertex a. |n - N| <= 4 U size, |N| <= size. With
  S = BOX * the sum of size, and in units of U S: the rounded normal changes N . (w - a) by at most
  8, products and sums are off by at most 8, the offset n . a by 5, w of a point and w of the
  vertices, which span the polytope, by 2.1 each. ROUNDINGS is above their sum.
- What supports all vertices up to that bound is taken for a facet's plane. So no facet is missing.
  Planes too many only cut something off.
- In the ellipsoid |w| is off by a factor of less than 1 + 4 u, and MARGIN takes 16 u off the square
  of its radius. Underflows, even where subnormals are flushed to 0, add at most 2^-126 times
  LARGEST_SCALE, which is nothing beside LEAST_RADIUS; no scale is near them.

What is not finite, or so large or small that the frame is not, fails every comparison and is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import ceil_div, next_power_of_2, split_rows
from entropy_attn.kernels.plans import device_of

ROWS = 64  # points of a tile, in the search for extremes
SEARCHERS = 128  # programs in the search
PARTS = {2: 8, 3: 2}  # of the pairs of vertices, in space of those that share a third one
CAPACITY = 1024  # planes; with more, which needs many vertices in a plane, all points are kept
TILE = 1024  # points that are in registers at once
RUN = 1 << 15  # most points of a program: their places in the run fit into int16
SIEVES = 4096  # programs to aim at, for balance
BLOCK = 256  # points that are tested against all planes at once
EXPECTED = 1 << 18  # points: that many can be gathered before their number is known

U = tl.constexpr(2.0**-53)
ROUNDINGS = tl.constexpr(32.0)
UNDERFLOW = tl.constexpr(2.0**-1000)
BOX = tl.constexpr(4.0)  # of w. Vertices are in it even where the frame is rounded badly.
LEAST_SCALE = tl.constexpr(2.0**-100)
LARGEST_SCALE = tl.constexpr(2.0**64)
LEAST_RADIUS = tl.constexpr(2.0**-20)
LEAST_NORMAL = tl.constexpr(2.0**-300)  # whose square does not underflow
# Of what is kept of a plane's distance: more than the roundings of its square root and quotient.
NEARLY = tl.constexpr(1 - 2.0**-40)


@triton.jit
def _coordinate(points, rows, mask, row_stride, dim_stride, AXIS: tl.constexpr, DIM: tl.constexpr):
    """(rows,) fp64: 0 where masked, and for z in the plane."""
    where = points + rows.to(tl.int64) * row_stride + AXIS * tl.cast(dim_stride, tl.int64)
    return tl.load(where, mask=mask & (AXIS < DIM), other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=("sampled", "step", "tiles", "share", "splits"))
def _extreme_kernel(
    points, directions, reach_ptr, row_ptr, count_ptr, batch_stride, row_stride, dim_stride,
    sampled, step, tiles, share, splits,
    DIM: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The furthest finite point along each direction, of a run of those sampled: each ``step``-th.

    Ties go to the smallest row. Where there is none the reach is -inf, and the row 0.
    """
    program = tl.program_id(0)
    batch, split = program // splits, program % splits
    if split == 0:
        tl.store(count_ptr + batch, 0)  # for the next kernel
    points += batch.to(tl.int64) * batch_stride
    along = tl.arange(0, COUNT)
    dx, dy = tl.load(directions + along * DIM), tl.load(directions + along * DIM + 1)
    best = tl.full([COUNT], -float("inf"), tl.float64)
    row = tl.zeros([COUNT], tl.int32)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        mask = rows < sampled
        rows = tl.where(mask, rows, 0) * step
        x = _coordinate(points, rows, mask, row_stride, dim_stride, 0, DIM)
        y = _coordinate(points, rows, mask, row_stride, dim_stride, 1, DIM)
        reach = x[:, None] * dx[None, :] + y[:, None] * dy[None, :]  # (ROWS, COUNT)
        if DIM == 3:
            z = _coordinate(points, rows, mask, row_stride, dim_stride, 2, DIM)
            reach += z[:, None] * tl.load(directions + along * DIM + 2)[None, :]
        usable = mask[:, None] & (tl.abs(reach) < float("inf"))
        reach = tl.where(usable, reach, -float("inf"))
        furthest = tl.max(reach, 0)
        place = tl.argmax(reach, 0, tie_break_left=True)
        row = tl.where(furthest > best, (tile * ROWS + place) * step, row)
        best = tl.maximum(best, furthest)
    out = program.to(tl.int64) * COUNT + along
    tl.store(reach_ptr + out, best)
    tl.store(row_ptr + out, row)


@triton.jit
def _append_planes(planes, count_ptr, mask, nx, ny, nz, threshold, CAPACITY: tl.constexpr):
    """Append planes: normal, threshold, and a lower bound of the distance from the origin."""
    place = tl.atomic_add(count_ptr + tl.zeros_like(mask.to(tl.int32)), 1, mask=mask, sem="relaxed")
    mask &= place < CAPACITY
    length = tl.sqrt(nx * nx + ny * ny + nz * nz)
    reach = tl.where(length > LEAST_NORMAL, -threshold / length * NEARLY, -1.0)
    tl.store(planes + place, nx, mask=mask)
    tl.store(planes + CAPACITY + place, ny, mask=mask)
    tl.store(planes + 2 * CAPACITY + place, nz, mask=mask)
    tl.store(planes + 3 * CAPACITY + place, threshold, mask=mask)
    tl.store(planes + 4 * CAPACITY + place, reach, mask=mask)


@triton.jit(do_not_specialize=("splits",))
def _facet_kernel(
    points, reach_ptr, row_ptr, frame_ptr, vertex_ptr, planes, count_ptr,
    batch_stride, row_stride, dim_stride, splits, SPLITS: tl.constexpr, DIM: tl.constexpr,
    COUNT: tl.constexpr, PARTS: tl.constexpr, CAPACITY: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """The planes through two (three) vertices that have all others on one side, up to rounding.

    All pairs (triples) are tried: 64 vertices have 41,664 triples, which a GPU tests faster than a
    CPU would be told of the vertices. Each program finds the vertices and the frame anew, and
    writes the same numbers to the same places. The planes come in any order. In a polytope without
    volume all planes are found with both signs, and nothing is inside.
    """
    FIRSTS: tl.constexpr = COUNT if DIM == 3 else 1
    program = tl.program_id(0)
    batch, part = program // (FIRSTS * PARTS), program % PARTS
    first = program // PARTS % FIRSTS
    points += batch.to(tl.int64) * batch_stride
    vertex_ptr += batch * 3 * COUNT
    planes += batch.to(tl.int64) * 5 * CAPACITY
    count_ptr += batch

    along, runs = tl.arange(0, COUNT), tl.arange(0, SPLITS)
    where = (batch * splits + runs).to(tl.int64)[:, None] * COUNT + along[None, :]
    reach = tl.load(reach_ptr + where, mask=(runs < splits)[:, None], other=-float("inf"))
    chosen = batch.to(tl.int64) * splits + tl.argmax(reach, 0, tie_break_left=True)
    rows = tl.load(row_ptr + chosen * COUNT + along)
    everywhere = rows >= 0
    wrong = 0
    for axis in tl.static_range(3):
        value = _coordinate(points, rows, everywhere, row_stride, dim_stride, axis, DIM)
        centre = (tl.max(value, 0) * 0.5 + tl.min(value, 0) * 0.5).to(WORK)
        scale = (1.0 / (tl.max(value, 0) * 0.5 - tl.min(value, 0) * 0.5)).to(WORK)
        if axis >= DIM:
            scale = tl.full([], 1.0, WORK)
        tl.store(frame_ptr + batch * 6 + 2 * axis, centre)
        tl.store(frame_ptr + batch * 6 + 2 * axis + 1, scale)
        w = (value - centre.to(tl.float64)) * scale.to(tl.float64)
        tl.store(vertex_ptr + axis * COUNT + along, w)
        # Written so that NaN is wrong.
        wrong += tl.sum(tl.where(tl.abs(w) <= BOX, 0, 1), 0)
        wrong += tl.where((scale >= LEAST_SCALE) & (scale <= LARGEST_SCALE), 0, 1)
    tl.debug_barrier()

    # Vertices i < j < k, of which copies of earlier ones are none; in the plane j < k.
    LENGTH: tl.constexpr = COUNT // PARTS
    j, k = part * LENGTH + tl.arange(0, LENGTH), along
    if (wrong == 0) & ((DIM == 2) | (first < part * LENGTH + LENGTH - 1)):
        jx, jy = tl.load(vertex_ptr + j), tl.load(vertex_ptr + COUNT + j)
        kx, ky = tl.load(vertex_ptr + k), tl.load(vertex_ptr + COUNT + k)
        jz, kz = tl.load(vertex_ptr + 2 * COUNT + j), tl.load(vertex_ptr + 2 * COUNT + k)
        candidate = j[:, None] < k[None, :]  # (LENGTH, COUNT)
        if DIM == 2:
            ax, ay, az = jx[:, None], jy[:, None], jz[:, None]
            nx, ny = ay - ky[None, :], kx[None, :] - ax
            nz = tl.zeros_like(nx)
            size = tl.abs(nx) + tl.abs(ny)
        else:
            ax, ay = tl.load(vertex_ptr + first), tl.load(vertex_ptr + COUNT + first)
            az = tl.load(vertex_ptr + 2 * COUNT + first)
            candidate &= (first < j)[:, None]
            ux, uy, uz = (jx - ax)[:, None], (jy - ay)[:, None], (jz - az)[:, None]
            vx, vy, vz = (kx - ax)[None, :], (ky - ay)[None, :], (kz - az)[None, :]
            nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
            size = tl.abs(uy * vz) + tl.abs(uz * vy) + tl.abs(uz * vx) + tl.abs(ux * vz)
            size += tl.abs(ux * vy) + tl.abs(uy * vx)
        offset = nx * ax + ny * ay + nz * az
        bound = ROUNDINGS * U * BOX * size + UNDERFLOW
        below, above = candidate & False, candidate & False
        j_copy, k_copy = j < 0, k < 0
        first_copy = first < 0
        for m in range(COUNT):
            mx, my = tl.load(vertex_ptr + m), tl.load(vertex_ptr + COUNT + m)
            mz = tl.load(vertex_ptr + 2 * COUNT + m)
            side = nx * mx + (ny * my - offset)
            if DIM == 3:
                side += nz * mz
                first_copy |= (ax == mx) & (ay == my) & (az == mz) & (m < first)
            below |= side < -bound
            above |= side > bound
            j_copy |= (jx == mx) & (jy == my) & (jz == mz) & (m < j)
            k_copy |= (kx == mx) & (ky == my) & (kz == mz) & (m < k)
        candidate &= ~j_copy[:, None] & ~k_copy[None, :]
        if DIM == 3:
            candidate &= ~first_copy
        inner, outer = candidate & ~below, candidate & ~above
        _append_planes(planes, count_ptr, inner, nx, ny, nz, offset + bound, CAPACITY)
        _append_planes(planes, count_ptr, outer, -nx, -ny, -nz, bound - offset, CAPACITY)


@triton.jit
def _numbers(
    points, groups, whole, row_stride, dim_stride,
    BEGIN: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """(groups, COUNT) numbers from BEGIN on of the 4 DIM of four points; NaN where not whole."""
    number = BEGIN + tl.arange(0, COUNT)[None, :]
    if PACKED:  # adjacent, which makes one load of them
        where = groups.to(tl.int64)[:, None] * (4 * DIM) + number
    else:
        rows = groups.to(tl.int64)[:, None] * 4 + number // DIM
        where = rows * row_stride + (number % DIM).to(tl.int64) * dim_stride
    return tl.load(points + where, mask=whole[:, None], other=float("nan"))


@triton.jit
def _four_numbers(
    points, groups, whole, row_stride, dim_stride,
    PIECE: tl.constexpr, DIM: tl.constexpr, PACKED: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Numbers 4 PIECE to 4 PIECE + 3 of the 4 DIM of four points, each (groups,); else NaN."""
    if WORK == tl.float64:  # 16 bytes a load: what one thread has is split without a move
        where = (points, groups, whole, row_stride, dim_stride)
        first, second = tl.split(_numbers(*where, 4 * PIECE, 2, DIM, PACKED))
        third, fourth = tl.split(_numbers(*where, 4 * PIECE + 2, 2, DIM, PACKED))
    else:
        found = _numbers(points, groups, whole, row_stride, dim_stride, 4 * PIECE, 4, DIM, PACKED)
        even, odd = tl.split(tl.reshape(found.to(WORK), [found.shape[0], 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _square(value, centre, scale):
    w = (value - centre) * scale
    return w * w


@triton.jit
def _squares(
    points, groups, whole, row_stride, dim_stride, cx, cy, cz, sx, sy, sz,
    DIM: tl.constexpr, PACKED: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """|w|^2 of the four points of each group, (groups,) each; NaN in one that is not whole."""
    where = (points, groups, whole, row_stride, dim_stride)
    x0, y0, a2, a3 = _four_numbers(*where, 0, DIM, PACKED, WORK)
    b0, b1, b2, b3 = _four_numbers(*where, 1, DIM, PACKED, WORK)
    if DIM == 2:
        x1, y1, x2, y2, x3, y3 = a2, a3, b0, b1, b2, b3
    else:
        x1, y1, x2, y2 = a3, b0, b2, b3
    q0 = _square(x0, cx, sx) + _square(y0, cy, sy)
    q1 = _square(x1, cx, sx) + _square(y1, cy, sy)
    q2 = _square(x2, cx, sx) + _square(y2, cy, sy)
    if DIM == 3:
        z2, x3, y3, z3 = _four_numbers(*where, 2, DIM, PACKED, WORK)
        q0 += _square(a2, cz, sz)
        q1 += _square(b1, cz, sz)
        q2 += _square(z2, cz, sz)
    q3 = _square(x3, cx, sx) + _square(y3, cy, sy)
    if DIM == 3:
        q3 += _square(z3, cz, sz)
    return q0, q1, q2, q3


@triton.jit(do_not_specialize=("total", "tiles", "share", "splits"))
def _sieve_kernel(
    points, frame_ptr, planes, count_ptr, place_ptr, kept_ptr,
    batch_stride, row_stride, dim_stride, total, tiles, share, splits, MARGIN: tl.constexpr,
    DIM: tl.constexpr, PACKED: tl.constexpr, WORK: tl.constexpr,
    CAPACITY: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The places in a run of points of those that are not found strictly inside, and how many."""
    program = tl.program_id(0)
    batch, split = program // splits, program % splits
    points += batch.to(tl.int64) * batch_stride
    planes += batch.to(tl.int64) * 5 * CAPACITY
    place_ptr += program.to(tl.int64) * share * TILE
    frame_ptr += batch * 6
    cx, sx = tl.load(frame_ptr), tl.load(frame_ptr + 1)
    cy, sy = tl.load(frame_ptr + 2), tl.load(frame_ptr + 3)
    cz, sz = tl.load(frame_ptr + 4), tl.load(frame_ptr + 5)

    count = tl.load(count_ptr + batch)
    is_closed = (count > 0) & (count <= CAPACITY)
    count = tl.minimum(count, CAPACITY)
    radius = tl.full([], BOX, tl.float64)
    for start in range(0, count, BLOCK):
        plane = start + tl.arange(0, BLOCK)
        reach = tl.load(planes + 4 * CAPACITY + plane, mask=plane < count, other=BOX)
        radius = tl.minimum(radius, tl.min(reach, 0))
    limit = tl.where(is_closed & (radius > LEAST_RADIUS), radius * radius * MARGIN, -1.0).to(WORK)

    begin, found = split * share * TILE, 0
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        groups = tile * (TILE // 4) + tl.arange(0, TILE // 4)
        # The last points, fewer than four, are all tested against the planes.
        q0, q1, q2, q3 = _squares(
            points, groups, groups < total // 4, row_stride, dim_stride,
            cx, cy, cz, sx, sy, sz, DIM, PACKED, WORK,
        )  # fmt: skip
        # Written so that NaN is outside.
        first = ((4 * groups < total) & ~(q0 <= limit)).to(tl.int32)
        second = ((4 * groups + 1 < total) & ~(q1 <= limit)).to(tl.int32)
        third = ((4 * groups + 2 < total) & ~(q2 <= limit)).to(tl.int32)
        fourth = ((4 * groups + 3 < total) & ~(q3 <= limit)).to(tl.int32)
        outside = first + second + third + fourth
        here = tl.sum(outside, 0)
        if here > 0:
            where = place_ptr + found + tl.cumsum(outside, 0) - outside
            place = (4 * groups - begin).to(tl.int16)
            tl.store(where, place, mask=first > 0)
            where += first
            tl.store(where, place + 1, mask=second > 0)
            where += second
            tl.store(where, place + 2, mask=third > 0)
            where += third
            tl.store(where, place + 3, mask=fourth > 0)
            found += here
    tl.debug_barrier()

    kept = 0
    for start in range(0, found, BLOCK):
        where = start + tl.arange(0, BLOCK)
        place = tl.load(place_ptr + where, mask=where < found, other=0)
        rows, some = begin + place.to(tl.int32), where < found
        x = _coordinate(points, rows, some, row_stride, dim_stride, 0, DIM)
        y = _coordinate(points, rows, some, row_stride, dim_stride, 1, DIM)
        z = _coordinate(points, rows, some, row_stride, dim_stride, 2, DIM)
        x = (x - cx.to(tl.float64)) * sx.to(tl.float64)
        y = (y - cy.to(tl.float64)) * sy.to(tl.float64)
        z = (z - cz.to(tl.float64)) * sz.to(tl.float64)
        # Written so that NaN is outside.
        inside = is_closed & (tl.abs(x) <= BOX) & (tl.abs(y) <= BOX) & (tl.abs(z) <= BOX)
        for plane in range(count):
            normal = planes + plane
            value = y * tl.load(normal + CAPACITY) - tl.load(normal + 3 * CAPACITY)
            if DIM == 3:
                value += z * tl.load(normal + 2 * CAPACITY)
            inside &= value + x * tl.load(normal) > 0.0
        chosen = (some & ~inside).to(tl.int32)
        # To the front of the same run, behind what has been read by all.
        where = kept + tl.cumsum(chosen, 0) - 1
        tl.debug_barrier()
        tl.store(place_ptr + where, place, mask=some & ~inside)
        kept += tl.sum(chosen, 0)
    tl.store(kept_ptr + program, kept.to(tl.int64))


@triton.jit(do_not_specialize=("capacity", "run", "splits"))
def _gather_kernel(
    place_ptr, kept_ptr, end_ptr, which_ptr, index_ptr, capacity, run, splits, BLOCK: tl.constexpr
):
    """Batch and row of what a run has kept, behind what those before it have."""
    program = tl.program_id(0)
    batch, split = program // splits, program % splits
    place_ptr += program.to(tl.int64) * run
    kept = tl.load(kept_ptr + program)
    begin = tl.load(end_ptr + program) - kept
    for start in range(0, kept.to(tl.int32), BLOCK):
        where = start + tl.arange(0, BLOCK)
        place = tl.load(place_ptr + where, mask=where < kept, other=0)
        out = begin + where
        mask = (where < kept) & (out < capacity)
        tl.store(which_ptr + out, (batch + tl.zeros_like(where)).to(tl.int64), mask=mask)
        tl.store(index_ptr + out, (split * run + place.to(tl.int32)).to(tl.int64), mask=mask)


def candidates(points: Tensor, directions: Tensor, sample: int) -> tuple[Tensor, Tensor]:
    """Batch and row of each point that is not found to be strictly inside the hull; ascending.

    It waits for the device once, for their number, and takes 2 bytes a point and 40 KB a batch row.

    Args:
        points: (B, n, 2 or 3) floating point, any strides, 0 < n < 2^31.
        directions: (K, d) fp64, contiguous, K a power of two; extremes along them are searched.
        sample: about how many points are searched.
    """
    batch, total, _ = points.shape
    with device_of(points):
        frame, planes, count = _polytope(points, directions, max(1, total // sample))
        place, kept = _sieve(points, frame, planes, count)
        ends = kept.cumsum(0)
        # Before their number is known: most often it is small, and this takes place meanwhile.
        found = _gather(place, kept, ends, batch, min(batch * total, EXPECTED))
        number = int(ends[-1])
        if number > found.shape[1]:
            found = _gather(place, kept, ends, batch, number)
    return found[0, :number], found[1, :number]


def _polytope(points: Tensor, directions: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every ``step``-th point: frame (B, 3, 2), planes (B, 5, CAPACITY), their number (B,)."""
    batch, total, dim = points.shape
    count = len(directions)
    sampled = ceil_div(total, step)
    tiles = ceil_div(sampled, ROWS)
    splits, share = split_rows(tiles, batch, SEARCHERS)
    reach = directions.new_empty(batch, splits, count)
    rows = torch.empty_like(reach, dtype=torch.int32)
    found = torch.empty(batch, dtype=torch.int32, device=points.device)
    _extreme_kernel[(batch * splits,)](
        points, directions, reach, rows, found, *points.stride(), sampled, step, tiles, share,
        splits, DIM=dim, COUNT=count, ROWS=ROWS, num_warps=8,
    )  # fmt: skip
    work = _precision(points)
    frame = torch.empty(batch, 3, 2, dtype=work, device=points.device)
    vertices = directions.new_empty(batch, 3, count)
    planes = directions.new_empty(batch, 5, CAPACITY)
    parts = min(PARTS[dim], count)
    _facet_kernel[(batch * parts * (count if dim == 3 else 1),)](
        points, reach, rows, frame, vertices, planes, found, *points.stride(), splits,
        SPLITS=next_power_of_2(splits), DIM=dim, COUNT=count, PARTS=parts,
        CAPACITY=CAPACITY, WORK=_name(work), num_warps=8,
    )  # fmt: skip
    return frame, planes, found


def _sieve(points: Tensor, frame: Tensor, planes: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """(runs, run) places in each run of what is kept, and (runs,) their number."""
    batch, total, dim = points.shape
    tiles = ceil_div(total, TILE)
    share = min(split_rows(tiles, batch, SIEVES)[1], RUN // TILE)
    splits = ceil_div(tiles, share)
    place = torch.empty(batch * splits, share * TILE, dtype=torch.int16, device=points.device)
    kept = torch.empty(batch * splits, dtype=torch.int64, device=points.device)
    # Of one batch row the stride is not used; 0 tells the compiler that its start is aligned.
    strides = (points.stride(0) if batch > 1 else 0, *points.stride()[1:])
    _sieve_kernel[(batch * splits,)](
        points, frame, planes, count, place, kept, *strides, total, tiles, share, splits,
        MARGIN=1 - 16 * (2.0**-24 if frame.dtype == torch.float32 else 2.0**-53), DIM=dim,
        PACKED=points.stride()[1:] == (dim, 1), WORK=_name(frame.dtype), CAPACITY=CAPACITY,
        TILE=TILE, BLOCK=BLOCK,
    )  # fmt: skip
    return place, kept


def _gather(place: Tensor, kept: Tensor, ends: Tensor, batch: int, capacity: int) -> Tensor:
    """(2, capacity) batches and rows of the first that were kept."""
    runs, run = place.shape
    out = torch.empty(2, capacity, dtype=torch.int64, device=place.device)
    _gather_kernel[(runs,)](
        place, kept, ends, out[0], out[1], capacity, run, runs // batch, BLOCK=BLOCK
    )
    return out


def _precision(points: Tensor) -> torch.dtype:
    """What the points are computed with while there are many of them."""
    return torch.float64 if points.dtype == torch.float64 else torch.float32


def _name(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
