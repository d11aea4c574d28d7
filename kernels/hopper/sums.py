"""Sums of dQ in memory, for the Hopper backward: cleared before and rounded while others add.

Programs add their parts of dQ to fp32 sums. Clearing all of them before and rounding them to the
dtype of the inputs after would each pass over them once more, while nothing else runs: 6 % of a
backward of 8192 tokens. Instead the work is divided into units of some heads each. A program of a
unit also clears its share of the sums of a unit that comes a little later, and rounds its share of
those of a unit that came a little before. Two warps that had nothing to do take care of that;
the launch for the statistics clears the first units, and one of its own, which may begin while
others end, rounds the last.

Two counters a unit tell how many programs have cleared their share, and how many have added all
they had. A program only waits for programs of units before its own. GPUs start the programs of a
grid in the order of their numbers, so those run or have ended. CUDA does not promise that order; on
a GPU with another one programs might wait for ever. In a call in one unit they wait for nobody. The
launch that rounds the last sums waits for all programs, and begins when all of them have started.
"""

# No `from __future__ import annotations`: Gluon's aggregates look at the annotations of fields.
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

from entropy_attn.kernels.hopper.columns import PIECE
from entropy_attn.kernels.launch import ceil_div, overlapping
from entropy_attn.kernels.plans import MOST_PLANS, Launch, planned
from entropy_attn.kernels.primitives import wait_for_last

ROWS = gl.constexpr(64)  # of a tile of sums, (64, 64) fp32
WARPS = gl.constexpr(2)  # that clear and round
ROUNDED = 4096  # numbers that a program of the last launch rounds


# Pieces of PTX that Gluon has no name for


@builtin
def add_to_global(descriptor, coordinates, source, _semantic=None):
    """Let the copy engine add a tile in shared memory to one in global memory."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, source.handle)


@gluon.jit
def _do(INSTRUCTION: gl.constexpr):
    gl.inline_asm_elementwise(
        INSTRUCTION + " mov.b32 $0, 0;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _wait_added():
    """Until all that this warp gave the copy engine to add is added, not only read."""
    _do("cp.async.bulk.wait_group 0;")


@gluon.jit
def _fence_engine():
    """Order what a thread itself does in memory and what the copy engine does for it."""
    _do("fence.proxy.async;")


@gluon.jit
def _wait_for(counter, count):
    """Until programs have raised a counter to ``count``; what they wrote before is seen after."""
    seen = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while seen < count:
        _do("nanosleep.u32 100;")
        seen = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    _fence_engine()


@gluon.jit
def _raise(counter):
    """By one, after all that the warps of the partition have written."""
    _fence_engine()
    gl.thread_barrier()
    gl.atomic_add(counter, 1, sem="release", scope="gpu")


@aggregate
class Sums:
    """The sums, dQ, and how far they are.

    Attributes:
        sums, out: to (all rows, D): fp32 sums, and dQ.
        counters: to (2, units) int32: programs that have cleared, and that have added.
        units: of work; the last one may have fewer heads than the others.
        lead: units between one that is added to and one that is cleared or rounded.
        programs: of a unit.
        unit_rows: of the sums of a unit; all_rows: of all units.
    """

    sums: gl.tensor
    out: gl.tensor
    counters: gl.tensor
    units: gl.tensor
    lead: gl.tensor
    programs: gl.tensor
    unit_rows: gl.tensor
    all_rows: gl.tensor
    HEAD_DIM: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, sums, out, counters, units, lead, programs, unit_rows, all_rows, HEAD_DIM
    ):  # fmt: skip
        self.sums = sums
        self.out = out
        self.counters = counters
        self.units = units
        self.lead = lead
        self.programs = programs
        self.unit_rows = unit_rows
        self.all_rows = all_rows
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)

    @gluon.jit
    def wait_cleared(self):
        """Before the program adds anything."""
        unit = gl.program_id(0) // self.programs
        if unit >= self.lead:
            _wait_for(self.counters + unit, self.programs)

    @gluon.jit
    def tell_added(self):
        """The program adds nothing any more."""
        _wait_added()
        _raise(self.counters + self.units + gl.program_id(0) // self.programs)

    @gluon.jit
    def _rows(self, unit):
        """(first row, end of the rows) of another unit that are the program's share.

        The programs of its own unit, of which the last one may have fewer, share them.
        """
        own = gl.program_id(0) // self.programs * self.programs
        members = gl.minimum(self.programs, gl.num_programs(0) - own)
        share = ((self.unit_rows + members - 1) // members + ROWS - 1) // ROWS * ROWS
        first = unit * self.unit_rows + (gl.program_id(0) - own) * share
        end = gl.minimum((unit + 1) * self.unit_rows, self.all_rows)
        return first, gl.minimum(first + share, end)

    @gluon.jit
    def _clear(self, first, end):
        CHUNK: gl.constexpr = 8 * 32 * WARPS
        layout: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
        lane = gl.arange(0, CHUNK, layout)
        zeros = gl.zeros([CHUNK], gl.float32, layout)
        base = self.sums + first.to(gl.int64) * self.HEAD_DIM
        size = (end - first) * self.HEAD_DIM
        start = 0
        while start < size:
            gl.store(base + start + lane, zeros, mask=start + lane < size)
            start += CHUNK

    @gluon.jit
    def _fetch(self, rows_desc, boxes, full, first, part):
        """Let the copy engine bring a tile of the share, (64, 64)."""
        PIECES: gl.constexpr = (self.HEAD_DIM + PIECE - 1) // PIECE
        barrier = full.index(part % 2)
        mbarrier.expect(barrier, 4 * ROWS * PIECE)
        tma.async_copy_global_to_shared(
            rows_desc, [first + part // PIECES * ROWS, part % PIECES * PIECE], barrier,
            boxes.index(part % 2),
        )  # fmt: skip

    @gluon.jit
    def _round(self, rows_desc, boxes, tiles, full, first, end):
        """From the sums to dQ; the next tile is on its way meanwhile."""
        STEP: gl.constexpr = 4 * WARPS  # rows at a time: registers are few
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
        PIECES: gl.constexpr = (self.HEAD_DIM + PIECE - 1) // PIECE
        row = gl.arange(0, STEP, gl.SliceLayout(1, layout))
        column = gl.arange(0, PIECE, gl.SliceLayout(0, layout))
        parts = (end - first + ROWS - 1) // ROWS * PIECES
        self._fetch(rows_desc, boxes, full, first, 0)
        part = 0
        while part < parts:
            if part + 1 < parts:
                self._fetch(rows_desc, boxes, full, first, part + 1)
            mbarrier.wait(full.index(part % 2), part // 2 & 1)
            tile = tiles.index(part % 2)
            columns = part % PIECES * PIECE + column
            for start in gl.static_range(0, ROWS, STEP):
                values = tile.slice(start, STEP).load(layout)  # (STEP, 64)
                rows = first + part // PIECES * ROWS + start + row
                offsets = rows.to(gl.int64)[:, None] * self.HEAD_DIM + columns[None, :]
                mask = (rows < end)[:, None] & (columns < self.HEAD_DIM)[None, :]
                gl.store(self.out + offsets, values.to(self.out.dtype.element_ty), mask=mask)
            gl.thread_barrier()  # before the copy engine fills it again
            part += 1

    @gluon.jit
    def clear_and_round(self, rows_desc, boxes, tiles, full):
        """The program's shares of a unit that comes later and of one that came before.

        Args:
            rows_desc: of the sums. boxes, tiles: (2, 64, 64) fp32, the same memory; full: its
                barriers.
        """
        unit = gl.program_id(0) // self.programs
        if unit + self.lead < self.units:
            first, end = self._rows(unit + self.lead)
            self._clear(first, end)
            _raise(self.counters + unit + self.lead)
        if unit >= self.lead:
            first, end = self._rows(unit - self.lead)
            if first < end:
                _wait_for(self.counters + self.units + unit - self.lead, self.programs)
                self._round(rows_desc, boxes, tiles, full, first, end)


# On the host


@dataclass(frozen=True)
class Units:
    """How the work is divided.

    Attributes:
        heads: of keys, of a unit, over all batch rows; the last unit may have fewer.
        count: of units.
        lead: units between one that is added to and one that is cleared or rounded.
        programs: of a unit; last_programs: of the last one.
        rows: of the sums of a unit.
    """

    heads: int
    count: int
    lead: int
    programs: int
    last_programs: int
    rows: int


@lru_cache(MOST_PLANS)
def divide(kv_heads: int, kv_tiles: int, head_rows: int, least_programs: int, lead: int) -> Units:
    """Units of at least so many programs, if there are as many.

    Args:
        kv_heads: over all batch rows.
        kv_tiles: programs of a head of keys; head_rows: queries of it, in all heads of its group.
    """
    fewest = min(kv_heads, ceil_div(max(1, least_programs), kv_tiles))
    # All of the same size if they can be, else the last one not much smaller.
    nearly = ceil_div(kv_heads, kv_heads // fewest)
    heads = next((n for n in range(fewest, 2 * fewest) if kv_heads % n == 0), nearly)
    count = ceil_div(kv_heads, heads)
    last_programs = (kv_heads - (count - 1) * heads) * kv_tiles
    return Units(
        heads, count, min(lead, count), heads * kv_tiles, last_programs, heads * head_rows
    )  # fmt: skip


def allocate(query: Tensor, units: Units) -> tuple[Tensor, Tensor, Tensor]:
    """Sums like query in fp32, counters, and the part of both that has to be 0 at the start."""
    counters = ceil_div(2 * units.count, 32) * 32  # the copy engine wants the sums at 16 bytes
    sums = query.numel()
    memory = torch.empty(counters + sums, dtype=torch.float32, device=query.device)
    cleared = memory[: counters + min(units.lead * units.rows * query.shape[3], sums)]
    return memory[counters:].view(query.shape), memory[:counters].view(torch.int32), cleared


# first and end are specialised, so that multiples of 16 are moved 16 bytes at a time.
@triton.jit(do_not_specialize=("unit_size", "units", "programs", "last_programs"))
def _round_kernel(
    sums_ptr, out_ptr, counters_ptr, first, end, unit_size, units, programs, last_programs,
    CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sums first to end, of the last units, each as soon as its programs have added all."""
    start = first + tl.program_id(0).to(tl.int64) * CHUNK
    for unit in range(start // unit_size, (tl.minimum(start + CHUNK, end) - 1) // unit_size + 1):
        awaited = tl.where(unit == units - 1, last_programs, programs)
        while tl.atomic_add(counters_ptr + units + unit, 0, sem="acquire") < awaited:
            pass
    place = start + tl.arange(0, CHUNK)
    values = tl.load(sums_ptr + place, mask=place < end)
    tl.store(out_ptr + place, values.to(out_ptr.dtype.element_ty), mask=place < end)
    wait_for_last(OVERLAP)  # whoever waits for this launch waits for the last one too


def round_last(sums: Tensor, counters: Tensor, out: Tensor, units: Units) -> None:
    """Round the sums of the last units."""
    _plan_rounding(out, units)(sums, out, counters)


@planned
def _plan_rounding(out: Tensor, units: Units) -> Launch:
    unit_size = units.rows * out.shape[3]
    first = (units.count - units.lead) * unit_size
    return Launch(
        _round_kernel, (ceil_div(out.numel() - first, ROUNDED),),
        (first, out.numel(), unit_size, units.count, units.programs, units.last_programs),
        CHUNK=ROUNDED, **overlapping(out.device), num_warps=4,
    )  # fmt: skip
