"""Units of the Hopper backward: how work is divided, and what is done beside the kernel.

Who waits for whom, `test_hopper_backward_on_cpu` finds out.
"""

from __future__ import annotations

import gluon_on_cpu
import numpy as np
import pytest
import torch
from gluon_machine import Machine, Number, Pointer, lanes, machine, run_programs
from hopper_calls import row_by_row
from hypothesis import given
from hypothesis import strategies as st

from entropy_attn.kernels import backward_statistics
from entropy_attn.kernels.backward_statistics import row_statistics
from entropy_attn.kernels.hopper.sum_tiles import STRIP
from entropy_attn.kernels.hopper.sums import allocate, divide
from entropy_attn.kernels.launch import ceil_div

numbers = st.integers(1, 600)
# The kernels' own source, on the CPU.
SUMS = gluon_on_cpu.load(["sums", "sum_tiles"], {})
TILES = gluon_on_cpu.load(["sum_tiles"], {})
division = {
    "kv_heads": numbers, "group": st.integers(1, 8), "kv_tiles": numbers, "steps": numbers,
    "least": st.integers(0, 200), "lead": st.integers(1, 3),
}  # fmt: skip


@given(**division)
def test_units_cover_all_heads(kv_heads, group, kv_tiles, steps, least, lead):
    units = divide(kv_heads, group, kv_tiles, steps, least, lead)
    last = kv_heads - (units.count - 1) * units.heads
    assert 0 < last <= units.heads
    assert units.items == units.heads * kv_tiles
    assert units.all_items == kv_heads * kv_tiles
    assert units.head_strips * STRIP.value == steps * 128 * 64
    assert units.strips == units.heads * group * units.head_strips
    assert units.all_strips == kv_heads * group * units.head_strips
    assert units.lead == min(lead, units.count)
    assert units.heads - last < units.count  # the last unit is not tiny beside the others
    if units.count > 1:
        assert units.items >= least


@given(**division)
def test_shares_cover_the_strips_of_another_unit(kv_heads, group, kv_tiles, steps, least, lead):
    """By the items of any unit, which may be the last, smaller one: each strip once."""
    units = divide(kv_heads, group, kv_tiles, steps, least, lead)
    count, lead, unit_items, all_items, *strips = units.numbers()
    sums = SUMS.Sums(None, None, None, count, lead, unit_items, all_items, 1, *strips, 64)
    for own in {0, units.count - 1}:
        items = range(own * units.items, min((own + 1) * units.items, units.all_items))
        for unit in {0, units.count - 1}:
            shares = [sums._share(item, unit) for item in items]
            ends = [unit * units.strips, *[end for start, end in shares if start < end]]
            assert [start for start, end in shares if start < end] == ends[:-1]
            assert ends[-1] == min((unit + 1) * units.strips, units.all_strips)


def test_tiles_are_stored_and_read_in_the_same_order():
    """And in that order in which a thread stores 16 bytes, and eight threads 128."""
    row, column = np.indices((64, 64))
    stored = TILES.in_order(lanes(row * 64 + column))
    assert (TILES.in_rows(stored) == row * 64 + column).all()
    # Where a warpgroup's registers of 64 columns are: PTX ISA, wgmma, "matrix D".
    warp, lane = row // 16, row % 8 * 4 + column % 8 // 2
    thread = (warp * 32 + lane).reshape(-1)[stored].reshape(-1, 8, 4)
    assert (thread == thread[:, :, :1]).all()
    at_once = thread[:, :, 0] % 32
    assert (at_once // 8 == at_once[:, :1] // 8).all()  # a quarter of a warp


@pytest.mark.parametrize(
    ("heads", "length", "head_dim"), [(1, 100, 80), (7, 70, 64), (29, 33, 16), (3, 200, 128)]
)
def test_last_units_are_rounded(heads, length, head_dim):
    """Those, all of them, and no other; the last unit is smaller than the others."""
    block_m = 128 if head_dim <= 64 else 64
    units = divide(heads, 1, 3, ceil_div(length, block_m), 6, 2)
    sums, counters, _ = allocate(units, torch.device("cpu"))
    sums.copy_(torch.randn(sums.shape))
    counters[: units.count] = 0
    counters[units.count :] = units.items
    counters[2 * units.count - 1] = units.all_items - (units.count - 1) * units.items
    out = torch.full((1, heads, length, head_dim), float("nan"))
    first = (units.count - units.lead) * units.strips
    pointers = [Pointer(x.view(-1).numpy()) for x in (sums, out, counters)]
    plain = [Number(x) for x in (length, first, *units.numbers())]

    def launch():
        machine().program.partitions.append(
            lambda: SUMS._round_kernel(*pointers, *plain, HEAD_DIM=head_dim, OVERLAP=False)
        )

    run_programs(Machine(0, 2, lambda *stored: None), launch, (units.all_strips - first) // 4)
    first = (units.count - units.lead) * units.heads
    assert out[:, :first].isnan().all()
    assert torch.equal(out[:, first:], row_by_row(sums, out)[:, first:])


def test_statistics_clear_what_they_are_given(device):
    """And leave what follows; -delta is what it says."""
    out, grad = torch.randn(2, 1, 3, 200, 64, dtype=torch.bfloat16, device=device)
    lse, grad_lse = torch.randn(2, 1, 3, 200, device=device)
    memory = torch.full((10_007,), float("nan"), device=device)
    rows = (out, grad, lse, grad_lse, *[None] * 5, 128, 0.125)
    statistics = row_statistics(*rows, negative=True, cleared=memory[:9_001])
    assert not memory[:9_001].any()
    assert memory[9_001:].isnan().all()
    expected = row_statistics(*rows)
    assert torch.equal(statistics[:, :, 0], expected[:, :, 0])
    assert torch.equal(statistics[:, :, 1], -expected[:, :, 1])
    delta = (out.float() * grad.float()).sum(-1) - grad_lse
    torch.testing.assert_close(expected[:, :, 1, :200], delta)


@pytest.mark.parametrize("grads", [(0,), (0, 1), (0, 1, 2)])
def test_what_is_copied_is_not_read_early(grads, device, monkeypatch):
    """A copy of a gradient is a launch of its own, whose end the statistics have to wait for."""
    planned = []
    plan = backward_statistics._plan_statistics
    monkeypatch.setattr(
        backward_statistics, "_plan_statistics", lambda *a: planned.append(a[-1]) or plan(*a)
    )
    out, grad = torch.randn(2, 1, 2, 40, 16, device=device)
    lse, row, block = torch.randn(3, 1, 2, 40, device=device)
    gradients = list(torch.randn(3, 1, 2, 40, device=device))
    expanded = torch.ones((), device=device).expand(1, 2, 40)

    def statistics():
        a, b, c = gradients
        rows = (out, grad, lse, a, row, b, block, c, None, 128, 0.1)
        return row_statistics(*rows, after_lists=True)

    statistics()
    assert planned == [True]
    for place in grads:
        gradients[place] = expanded
    found = statistics()
    assert planned == [True, False]
    gradients = [x.contiguous() for x in gradients]
    assert torch.equal(statistics(), found)
