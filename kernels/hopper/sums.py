"""Sums of dQ in memory, for the Hopper backward: cleared before and rounded while others add.

How they lie there, `sum_tiles` says.

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
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.language.core import _aggregate as aggregate

from entropy_attn.kernels.hopper.primitives import NO_ITEM
from entropy_attn.kernels.hopper.sum_tiles import STRIP, TILE, TILE_STRIPS, in_rows
from entropy_attn.kernels.launch import ceil_div, overlapping
from entropy_attn.kernels.plans import MOST_PLANS, Launch, planned
from entropy_attn.kernels.primitives import wait_for_last

# That clear and round. A thread has 16 numbers of a strip on their way; with 8, rounding short
# columns took longer than the rest of the work.
WARPS = gl.constexpr(2)
# A kernel's arguments that say how the work is divided. They follow from lengths.
UNITS = (
    "units", "lead", "unit_items", "all_items", "head_strips", "unit_strips", "all_strips",
)  # fmt: skip


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
        sums: to fp32 strips. out: to dQ, (all heads, q_len, D).
        counters: to 2 * units + 1 int32: items that have cleared, items that have added, items that
            were claimed.
        units: of work; the last one may have fewer heads than the others.
        lead: units between one that is added to and one that is cleared or rounded.
        unit_items: of a unit; all_items: of all units.
        head_strips, unit_strips, all_strips: of the sums of a head, of a unit, of all.
    """

    sums: gl.tensor
    out: gl.tensor
    counters: gl.tensor
    units: gl.tensor
    lead: gl.tensor
    unit_items: gl.tensor
    all_items: gl.tensor
    q_len: gl.tensor
    head_strips: gl.tensor
    unit_strips: gl.tensor
    all_strips: gl.tensor
    HEAD_DIM: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, sums, out, counters, units, lead, unit_items, all_items, q_len, head_strips,
        unit_strips, all_strips, HEAD_DIM,
    ):  # fmt: skip
        self.sums = sums
        self.out = out
        self.counters = counters
        self.units = units
        self.lead = lead
        self.unit_items = unit_items
        self.all_items = all_items
        self.q_len = q_len
        self.head_strips = head_strips
        self.unit_strips = unit_strips
        self.all_strips = all_strips
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
    def wait_added(self, unit):
        """Until all parts of a unit's sums are added."""
        items = gl.minimum(self.unit_items, self.all_items - unit * self.unit_items)
        _wait_for(self.counters + self.units + unit, items)

    @gluon.jit
    def _share(self, item, unit):
        """(first strip, end of the strips) of another unit that are the item's share.

        The items of its own unit, of which the last one may have fewer, share them.
        """
        own = item // self.unit_items * self.unit_items
        members = gl.minimum(self.unit_items, self.all_items - own)
        share = (self.unit_strips + members - 1) // members
        first = unit * self.unit_strips + (item - own) * share
        end = gl.minimum((unit + 1) * self.unit_strips, self.all_strips)
        return first, gl.minimum(first + share, end)

    @gluon.jit
    def _clear(self, first, end):
        layout: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
        number = gl.arange(0, STRIP, layout)
        zeros = gl.zeros([STRIP], gl.float32, layout)
        strip = first
        while strip < end:
            gl.store(self.sums + strip.to(gl.int64) * STRIP + number, zeros)
            strip += 1

    @gluon.jit
    def round(self, strip, COUNT: gl.constexpr, NUM_WARPS: gl.constexpr):
        """From the sums to dQ: ``COUNT`` numbers from a strip on, all of one tile."""
        ACROSS: gl.constexpr = (self.HEAD_DIM + 63) // 64  # tiles side by side
        STRIP_ROWS: gl.constexpr = STRIP // 64
        head = strip // self.head_strips
        tile = strip % self.head_strips // TILE_STRIPS
        number = gl.arange(0, COUNT, gl.BlockedLayout([4], [32], [NUM_WARPS], [0]))
        values = gl.load(self.sums + strip.to(gl.int64) * STRIP + number)
        layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [NUM_WARPS, 1], [1, 0])
        # Pairs of threads swap a half of what they have.
        rounded = gl.convert_layout(in_rows(values.to(self.out.dtype.element_ty)), layout)
        row = gl.arange(0, COUNT // 64, gl.SliceLayout(1, layout))
        row += tile // ACROSS * 64 + strip % TILE_STRIPS * STRIP_ROWS
        column = tile % ACROSS * 64 + gl.arange(0, 64, gl.SliceLayout(0, layout))
        out = self.out + head.to(gl.int64) * self.q_len * self.HEAD_DIM
        inside = (row < self.q_len)[:, None] & (column < self.HEAD_DIM)[None, :]
        gl.store(out + row[:, None] * self.HEAD_DIM + column[None, :], rounded, mask=inside)

    @gluon.jit
    def clear_and_round(self, item):
        """The item's shares of a unit that comes later and of one that came before."""
        unit = item // self.unit_items
        if unit + self.lead < self.units:
            first, end = self._share(item, unit + self.lead)
            self._clear(first, end)
            _raise(self.counters + unit + self.lead)
        if unit >= self.lead:
            strip, end = self._share(item, unit - self.lead)
            if strip < end:
                self.wait_added(unit - self.lead)
                while strip < end:
                    self.round(strip, STRIP, WARPS)
                    strip += 1


# On the host


@dataclass(frozen=True)
class Units:
    """How the work is divided.

    Attributes:
        heads: of keys, of a unit, over all batch rows; the last unit may have fewer.
        count: of units.
        lead: units between one that is added to and one that is cleared or rounded.
        items: of a unit, blocks of keys; all_items: of all units.
        head_strips: of the sums of a query head. strips: of a unit; all_strips: of all units.
    """

    heads: int
    count: int
    lead: int
    items: int
    all_items: int
    head_strips: int
    strips: int
    all_strips: int

    def numbers(self) -> tuple[int, ...]:
        """What kernels take, in the order of `UNITS`."""
        return (
            self.count, self.lead, self.items, self.all_items, self.head_strips, self.strips,
            self.all_strips,
        )  # fmt: skip


@lru_cache(MOST_PLANS)
def divide(
    kv_heads: int, group: int, kv_tiles: int, steps: int, least_items: int, lead: int
) -> Units:
    """Units of at least so many items, if there are as many.

    Args:
        kv_heads: over all batch rows; group: query heads of one.
        kv_tiles: items of a head of keys; steps: of the queries of a query head.
    """
    fewest = min(kv_heads, ceil_div(max(1, least_items), kv_tiles))
    # All of the same size if they can be, else the last one not much smaller.
    nearly = ceil_div(kv_heads, kv_heads // fewest)
    heads = next((n for n in range(fewest, 2 * fewest) if kv_heads % n == 0), nearly)
    count = ceil_div(kv_heads, heads)
    head_strips = steps * 2 * TILE_STRIPS.value  # a step adds to two tiles
    return Units(
        heads, count, min(lead, count), heads * kv_tiles, kv_heads * kv_tiles, head_strips,
        heads * group * head_strips, kv_heads * group * head_strips,
    )  # fmt: skip


def allocate(units: Units, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (all steps, 64, 128) fp32, counters, and the part of both that is to be 0 at the start.

    What a step adds to is one entry of the sums.
    """
    counters = ceil_div(2 * units.count + 1, 32) * 32  # the copy engine wants the sums at 16 bytes
    memory = torch.empty(
        counters + units.all_strips * STRIP.value, dtype=torch.float32, device=device
    )
    strips = min(units.lead * units.strips, units.all_strips)
    cleared = memory[: counters + strips * STRIP.value]
    return memory[counters:].view(-1, 64, 128), memory[:counters].view(torch.int32), cleared


@gluon.jit(do_not_specialize=("q_len", "first_strip", *UNITS))
def _round_kernel(
    sums_ptr, out_ptr, counters_ptr, q_len, first_strip,
    units, lead, unit_items, all_items, head_strips, unit_strips, all_strips,
    HEAD_DIM: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """A tile of the last units, as soon as all of it is added."""
    sums = Sums(
        sums_ptr, out_ptr, counters_ptr, units, lead, unit_items, all_items, q_len, head_strips,
        unit_strips, all_strips, HEAD_DIM,
    )  # fmt: skip
    strip = first_strip + gl.program_id(0) * TILE_STRIPS
    sums.wait_added(strip // unit_strips)
    sums.round(strip, TILE, gl.num_warps())
    wait_for_last(OVERLAP)  # whoever waits for this launch waits for the last one too


def round_last(sums: Tensor, counters: Tensor, out: Tensor, units: Units) -> None:
    """Round the sums of the last units."""
    _plan_rounding(out, units)(sums, out, counters)


@planned
def _plan_rounding(out: Tensor, units: Units) -> Launch:
    first = (units.count - units.lead) * units.strips
    return Launch(
        _round_kernel, ((units.all_strips - first) // TILE_STRIPS.value,),
        (out.shape[2], first, *units.numbers()),
        HEAD_DIM=out.shape[3], **overlapping(out.device), num_warps=4,
    )  # fmt: skip
