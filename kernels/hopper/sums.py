"""Sums of dQ in memory, for the Hopper backward: cleared before and rounded while others add.

Programs add their parts of dQ to fp32 sums. Clearing all of them before and rounding them to the
dtype of the inputs after would each pass over them once more, while nothing else runs: 6 % of a
backward of 8192 tokens. Instead the work is divided into units of some heads each. Whoever works at
an item of a unit, a block of keys, also clears a share of the sums of a unit that comes a little
later, and rounds a share of those of a unit that came a little before. Two warps that had nothing
to do take care of that; the launch for the statistics clears the first units, and one of its own,
which may begin while others end, rounds the last.

Two counters a unit tell for how many items a share has been cleared, and for how many all is
added. Programs claim items, in their order, from one more counter. So whoever waits, waits for
items of lower numbers only, which running programs have claimed and take in their order: no two
wait for each other, however many programs run at a time. That rests on one rule: only writers and
caretakers wait for other programs. As the last part of an item's dQ is added in the first step of
its program's next item, nothing up to there may wait, neither the claim nor what the producer
fetches. The launch that rounds the last sums waits for all programs, and begins when all of them
have started.
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
from triton.language.core import _aggregate as aggregate

from entropy_attn.kernels.hopper.primitives import NO_ITEM
from entropy_attn.kernels.launch import ceil_div, overlapping
from entropy_attn.kernels.plans import MOST_PLANS, Launch, planned
from entropy_attn.kernels.primitives import wait_for_last

WARPS = gl.constexpr(2)  # that clear and round
# That a thread clears or rounds at a time. With 8 of them on their way, rounding short columns took
# longer than the rest of the work.
NUMBERS = gl.constexpr(16)
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
    """Until a counter is raised to ``count``; what was written before that is seen after.

    Adding nothing is compiled to a load.
    """
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
        counters: to 2 * units + 1 int32: items that have cleared, items that have added, items that
            were claimed.
        units: of work; the last one may have fewer heads than the others.
        lead: units between one that is added to and one that is cleared or rounded.
        unit_items: of a unit; all_items: of all units.
        unit_rows: of the sums of a unit; all_rows: of all units.
    """

    sums: gl.tensor
    out: gl.tensor
    counters: gl.tensor
    units: gl.tensor
    lead: gl.tensor
    unit_items: gl.tensor
    all_items: gl.tensor
    unit_rows: gl.tensor
    all_rows: gl.tensor
    HEAD_DIM: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, sums, out, counters, units, lead, unit_items, all_items, unit_rows, all_rows,
        HEAD_DIM,
    ):  # fmt: skip
        self.sums = sums
        self.out = out
        self.counters = counters
        self.units = units
        self.lead = lead
        self.unit_items = unit_items
        self.all_items = all_items
        self.unit_rows = unit_rows
        self.all_rows = all_rows
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)

    @gluon.jit
    def claim(self):
        """The next item; `NO_ITEM` if there is none."""
        item = gl.atomic_add(self.counters + 2 * self.units, 1, sem="relaxed", scope="gpu")
        return gl.where(item < self.all_items, item, NO_ITEM)

    @gluon.jit
    def wait_cleared(self, item):
        """Before anything of the item is added."""
        unit = item // self.unit_items
        if unit >= self.lead:
            _wait_for(self.counters + unit, self.unit_items)

    @gluon.jit
    def tell_added(self, item):
        """All of the item is added."""
        _wait_added()
        _raise(self.counters + self.units + item // self.unit_items)

    @gluon.jit
    def _rows(self, item, unit):
        """(first row, end of the rows) of another unit that are the item's share.

        The items of its own unit, of which the last one may have fewer, share them.
        """
        own = item // self.unit_items * self.unit_items
        members = gl.minimum(self.unit_items, self.all_items - own)
        share = (self.unit_rows + members - 1) // members
        first = unit * self.unit_rows + (item - own) * share
        end = gl.minimum((unit + 1) * self.unit_rows, self.all_rows)
        return first, gl.minimum(first + share, end)

    @gluon.jit
    def _clear(self, first, end):
        CHUNK: gl.constexpr = NUMBERS * 32 * WARPS
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
    def _round(self, first, end):
        """From the sums to dQ."""
        CHUNK: gl.constexpr = NUMBERS * 32 * WARPS
        layout: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
        lane = gl.arange(0, CHUNK, layout)
        offset = first.to(gl.int64) * self.HEAD_DIM
        size = (end - first) * self.HEAD_DIM
        start = 0
        while start < size:
            mask = start + lane < size
            values = gl.load(self.sums + offset + start + lane, mask=mask)
            gl.store(
                self.out + offset + start + lane, values.to(self.out.dtype.element_ty), mask=mask
            )
            start += CHUNK

    @gluon.jit
    def clear_and_round(self, item):
        """The item's shares of a unit that comes later and of one that came before."""
        unit = item // self.unit_items
        if unit + self.lead < self.units:
            first, end = self._rows(item, unit + self.lead)
            self._clear(first, end)
            _raise(self.counters + unit + self.lead)
        if unit >= self.lead:
            first, end = self._rows(item, unit - self.lead)
            if first < end:
                _wait_for(self.counters + self.units + unit - self.lead, self.unit_items)
                self._round(first, end)


# On the host


@dataclass(frozen=True)
class Units:
    """How the work is divided.

    Attributes:
        heads: of keys, of a unit, over all batch rows; the last unit may have fewer.
        count: of units.
        lead: units between one that is added to and one that is cleared or rounded.
        items: of a unit, blocks of keys; last_items: of the last one.
        rows: of the sums of a unit.
    """

    heads: int
    count: int
    lead: int
    items: int
    last_items: int
    rows: int


@lru_cache(MOST_PLANS)
def divide(kv_heads: int, kv_tiles: int, head_rows: int, least_items: int, lead: int) -> Units:
    """Units of at least so many items, if there are as many.

    Args:
        kv_heads: over all batch rows.
        kv_tiles: items of a head of keys; head_rows: queries of it, in all heads of its group.
    """
    fewest = min(kv_heads, ceil_div(max(1, least_items), kv_tiles))
    # All of the same size if they can be, else the last one not much smaller.
    nearly = ceil_div(kv_heads, kv_heads // fewest)
    heads = next((n for n in range(fewest, 2 * fewest) if kv_heads % n == 0), nearly)
    count = ceil_div(kv_heads, heads)
    last_items = (kv_heads - (count - 1) * heads) * kv_tiles
    return Units(heads, count, min(lead, count), heads * kv_tiles, last_items, heads * head_rows)


def allocate(query: Tensor, units: Units) -> tuple[Tensor, Tensor, Tensor]:
    """Sums like query in fp32, counters, and the part of both that has to be 0 at the start."""
    counters = ceil_div(2 * units.count + 1, 32) * 32  # the copy engine wants the sums at 16 bytes
    sums = query.numel()
    memory = torch.empty(counters + sums, dtype=torch.float32, device=query.device)
    cleared = memory[: counters + min(units.lead * units.rows * query.shape[3], sums)]
    return memory[counters:].view(query.shape), memory[:counters].view(torch.int32), cleared


# first and end are specialised, so that multiples of 16 are moved 16 bytes at a time.
@triton.jit(do_not_specialize=("unit_size", "units", "items", "last_items"))
def _round_kernel(
    sums_ptr, out_ptr, counters_ptr, first, end, unit_size, units, items, last_items,
    CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sums first to end, of the last units, each as soon as all of it is added."""
    start = first + tl.program_id(0).to(tl.int64) * CHUNK
    for unit in range(start // unit_size, (tl.minimum(start + CHUNK, end) - 1) // unit_size + 1):
        awaited = tl.where(unit == units - 1, last_items, items)
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
        (first, out.numel(), unit_size, units.count, units.items, units.last_items),
        CHUNK=ROUNDED, **overlapping(out.device), num_warps=4,
    )  # fmt: skip
