"""Units of the Hopper backward: how work is divided, and a model of who waits for whom.

The model is kept by hand: a change of the waits in kernels/hopper/sums.py is to be made here too.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entropy_attn.kernels import backward_statistics
from entropy_attn.kernels.backward_statistics import row_statistics
from entropy_attn.kernels.hopper.sums import ROWS, Units, allocate, divide, round_last
from entropy_attn.kernels.launch import ceil_div

numbers = st.integers(1, 600)


@given(numbers, numbers, numbers, st.integers(0, 200), st.integers(1, 3))
def test_units_cover_all_heads(kv_heads, kv_tiles, head_rows, least, lead):
    units = divide(kv_heads, kv_tiles, head_rows, least, lead)
    last = kv_heads - (units.count - 1) * units.heads
    assert 0 < last <= units.heads
    assert units.items == units.heads * kv_tiles
    assert units.last_items == last * kv_tiles
    assert units.rows == units.heads * head_rows
    assert units.lead == min(lead, units.count)
    assert units.heads - last < units.count  # the last unit is not tiny beside the others
    if units.count > 1:
        assert units.items >= least


@given(numbers, numbers, numbers, st.integers(0, 200), st.integers(1, 3))
def test_shares_cover_the_rows_of_another_unit(kv_heads, kv_tiles, head_rows, least, lead):
    """By the programs of any unit, which may be the last, smaller one: each row once."""
    units = divide(kv_heads, kv_tiles, head_rows, least, lead)
    sums = Sums(units, kv_heads * kv_tiles, kv_heads * head_rows)
    for own in {0, units.count - 1}:
        for unit in {0, units.count - 1}:
            first = own * units.items
            shares = [rows(sums, first + n, unit) for n in range(sums.members(own))]
            ends = [unit * units.rows, *[share.stop for share in shares if share]]
            assert [share.start for share in shares if share] == ends[:-1]
            assert ends[-1] == min((unit + 1) * units.rows, sums.all_rows)


class Sums:
    """Which programs have cleared, added to and rounded each unit."""

    def __init__(self, units: Units, programs: int, all_rows: int) -> None:
        self.units, self.programs, self.all_rows = units, programs, all_rows
        self.cleared = [set() for _ in range(units.count)]
        self.added = [set() for _ in range(units.count)]
        self.rounded = [set() for _ in range(units.count)]

    def members(self, unit: int) -> int:
        return min(self.units.items, self.programs - unit * self.units.items)

    def has_cleared(self, unit: int) -> bool:
        return len(self.cleared[unit]) == self.units.items

    def has_added(self, unit: int) -> bool:
        """What the kernel knows; of the last unit only the launch that rounds asks it."""
        is_last = unit == self.units.count - 1
        awaited = self.units.last_items if is_last else self.units.items
        return len(self.added[unit]) == awaited


def writer(sums: Sums, program: int, steps: int, wait: bool = True):
    unit = program // sums.units.items
    while wait and unit >= sums.units.lead and not sums.has_cleared(unit):
        yield "waits"
    for _ in range(steps):
        is_clear = unit < sums.units.lead or sums.has_cleared(unit)
        assert is_clear, "added to what is cleared later"
        assert not sums.rounded[unit], "added to what was rounded"
        yield "adds"
    sums.added[unit].add(program)


def rows(sums: Sums, program: int, unit: int) -> range:
    """`Sums._rows` of the kernel: a program's share of another unit's rows."""
    own = program // sums.units.items
    members, size = sums.members(own), sums.units.rows
    share = ceil_div(ceil_div(size, members), ROWS.value) * ROWS.value
    first = unit * size + (program - own * sums.units.items) * share
    return range(first, min(first + share, (unit + 1) * size, sums.all_rows))


def caretaker(sums: Sums, program: int, wait: bool = True):
    unit, lead = program // sums.units.items, sums.units.lead
    yield "starts"
    if unit + lead < sums.units.count:
        sums.cleared[unit + lead].add(program)
    if unit >= lead and rows(sums, program, unit - lead):
        while wait and not sums.has_added(unit - lead):
            yield "waits"
        assert sums.has_added(unit - lead), "rounded too early"
        sums.rounded[unit - lead].add(program)


def rounder(sums: Sums, wait: bool = True):
    """The launch that rounds the last units; it begins when all programs have started."""
    for unit in range(sums.units.count - sums.units.lead, sums.units.count):
        while wait and not sums.has_added(unit):
            yield "waits"
        assert len(sums.added[unit]) == sums.members(unit), "rounded too early"
        sums.rounded[unit].add("the last launch")


def eager_caretaker(sums: Sums, program: int):
    """One that waits for programs of its own unit, which may not have started."""
    yield from caretaker(sums, program)
    while not sums.has_added(program // sums.units.items):
        yield "waits"


def run(seed: int, make_writer=writer, make_caretaker=caretaker, make_rounder=rounder) -> None:
    """Programs start in order wherever one has ended, and their warps are stepped at random."""
    rng = random.Random(seed)
    kv_tiles, kv_heads = rng.randint(1, 6), rng.randint(1, 12)
    head_rows = rng.choice((100, 1000))
    units = divide(kv_heads, kv_tiles, head_rows, rng.randint(1, 10), rng.randint(1, 3))
    sums = Sums(units, kv_heads * kv_tiles, kv_heads * head_rows)
    resident: dict[int | str, list] = {}
    started = 0
    places, idle = rng.randint(1, 24), 0
    is_rounded = False
    while started < sums.programs or resident:
        if started == sums.programs and not is_rounded:
            is_rounded = True
            resident["rounder"] = [make_rounder(sums)]
        while started < sums.programs and len(resident) < places:
            steps = rng.choice((0, 1, 3, 20))
            resident[started] = [
                make_writer(sums, started, steps),
                make_caretaker(sums, started),
            ]
            started += 1
        program = rng.choice(list(resident))
        warps = resident[program]
        warp = rng.choice(warps)
        what = next(warp, "ends")
        if what == "ends":
            warps.remove(warp)
            if not warps:
                del resident[program]
        idle = idle + 1 if what == "waits" else 0
        assert idle < 20_000, "programs wait for each other"
    for unit in range(units.count):
        is_later, is_earlier = unit >= units.lead, unit + units.lead < units.count
        assert len(sums.cleared[unit]) == (units.items if is_later else 0)
        after = (unit + units.lead) * units.items
        later = range(after, after + sums.members(unit + units.lead)) if is_earlier else ()
        by_last = set() if is_earlier else {"the last launch"}
        assert sums.rounded[unit] == {p for p in later if rows(sums, p, unit)} | by_last


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_nobody_waits_for_ever_and_nothing_is_touched_too_early(first):
    for seed in range(first, first + 50):
        run(seed)


def many_runs(**forgotten):
    for seed in range(200):
        run(seed, **forgotten)


@pytest.mark.parametrize(
    ("forgotten", "message"),
    [
        ({"make_writer": lambda *a: writer(*a, wait=False)}, "cleared later"),
        ({"make_caretaker": lambda *a: caretaker(*a, wait=False)}, "too early"),
        ({"make_caretaker": eager_caretaker}, "wait for each other"),
        ({"make_rounder": lambda sums: rounder(sums, wait=False)}, "too early"),
    ],
)
def test_what_is_forgotten_is_found(forgotten, message):
    with pytest.raises(AssertionError, match=message):
        many_runs(**forgotten)


@pytest.mark.parametrize(("heads", "length", "head_dim"), [(1, 100, 80), (7, 70, 64), (29, 33, 16)])
def test_last_units_are_rounded(heads, length, head_dim, device):
    """Those, all of them, and no other; the last unit is smaller than the others."""
    query = torch.zeros(1, heads, length, head_dim, dtype=torch.bfloat16, device=device)
    units = divide(heads, 3, length, 6, 2)
    sums, counters, _ = allocate(query, units)
    sums.copy_(torch.randn(sums.shape))
    counters[: units.count] = 0
    counters[units.count :] = units.items
    counters[2 * units.count - 1] = units.last_items
    out = torch.full_like(query, float("nan"))
    round_last(sums, counters, out, units)
    first = (units.count - units.lead) * units.rows
    found = out.view(-1, head_dim)
    assert found[:first].isnan().all()
    # Triton's interpreter cuts bits off instead of rounding.
    expected = sums.view(-1, head_dim)[first:].bfloat16()
    torch.testing.assert_close(found[first:], expected, atol=0, rtol=2**-7)


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
