"""Units of the Hopper backward: how work is divided, and what is done beside the kernel.

Who waits for whom, `test_hopper_backward_on_cpu` finds out.
"""

from __future__ import annotations

import gluon_on_cpu
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entropy_attn.kernels import backward_statistics
from entropy_attn.kernels.backward_statistics import row_statistics
from entropy_attn.kernels.hopper.sums import allocate, divide, round_last

numbers = st.integers(1, 600)
SUMS = gluon_on_cpu.load(["entropy_attn.kernels.hopper.sums"], {}).Sums  # the kernel's own


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
    """By the items of any unit, which may be the last, smaller one: each row once."""
    units = divide(kv_heads, kv_tiles, head_rows, least, lead)
    sizes = units.items, kv_heads * kv_tiles, units.rows, kv_heads * head_rows
    sums = SUMS(None, None, None, units.count, units.lead, *sizes, 64)
    for own in {0, units.count - 1}:
        items = range(own * units.items, min((own + 1) * units.items, kv_heads * kv_tiles))
        for unit in {0, units.count - 1}:
            shares = [sums._rows(item, unit) for item in items]
            ends = [unit * units.rows, *[end for start, end in shares if start < end]]
            assert [start for start, end in shares if start < end] == ends[:-1]
            assert ends[-1] == min((unit + 1) * units.rows, kv_heads * head_rows)


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
