"""From which length on sparse attention pays: made data, and the data of the package."""

from __future__ import annotations

import importlib
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import entropy_attn as ea
from entropy_attn.backend import crossover
from entropy_attn.backend.choice import Choice
from entropy_attn.min_length import expected_blocks, expected_crossover

CPU = torch.device("cpu")


def point(kv_len: int, break_even: float, **changes: Any) -> dict[str, Any]:
    shape = {"arch": "sm90", "head_dim": 64, "is_causal": False, "batch": 2, "heads": 8}
    return {**shape, "kv_len": kv_len, "break_even_density": break_even, **changes}


POINTS = [point(1024, 0.0), point(4096, 0.2), point(16384, 0.6)]


def curve(points=POINTS, arch="sm90", head_dim=64, is_causal=False) -> crossover.Curve | None:
    found = crossover.make_curves(points, arch, head_dim, is_causal)
    assert len(found) <= 1
    return found[0] if found else None


def shortest(density: float, points=POINTS, **call: Any) -> int | None:
    return curve(points, **call).shortest(density, 0)


@pytest.fixture
def made(monkeypatch):
    """Made data for a made GPU, which is what CPU tensors are on."""

    def use(points, arch="sm90"):
        monkeypatch.setattr(crossover, "measured", lambda: tuple(points))
        monkeypatch.setattr(crossover, "architecture", lambda device: arch)
        crossover._find_crossover.cache_clear()

    yield use
    crossover._find_crossover.cache_clear()


# --- lookup -------------------------------------------------------------------------------------


def test_measured_lengths_count_as_measured():
    assert shortest(0.2) == 4096
    assert shortest(0.6) == 16384
    assert shortest(0.61) is None


def test_linear_in_the_logarithm_between_lengths():
    # Halfway from 0.2 to 0.6, so halfway from 2^12 to 2^14.
    assert shortest(0.4) == 8192
    assert curve().break_even(8192) == pytest.approx(0.4)
    # Rounded up to whole steps, never down.
    assert shortest(0.41) % crossover.STEP == 0
    assert curve().break_even(shortest(0.41)) >= 0.41
    assert curve().break_even(shortest(0.41) - crossover.STEP) < 0.41


def test_nothing_is_gained_between_a_length_of_no_gain_and_the_next():
    assert curve().break_even(4095) == 0.0
    assert shortest(0.01) == 4096


def test_nothing_is_gained_below_the_shortest_length_and_no_more_beyond_the_longest():
    assert shortest(0.01, POINTS[1:]) == 4096
    assert curve().break_even(10**6) == 0.6


@pytest.mark.parametrize("lucky", [1024, 2048])
def test_a_lucky_point_does_not_let_short_calls_run_sparse(lucky):
    noisy = [point(lucky, 0.9), point(4096, 0.0), *POINTS[2:]]
    assert shortest(0.2, noisy) == 16384


def test_an_unlucky_point_makes_dense_win():
    noisy = [*POINTS, point(32768, 0.3)]
    assert shortest(0.2, noisy) == 4096
    assert shortest(0.35, noisy) is None
    repeated = [*POINTS, point(4096, 0.1)]
    assert shortest(0.2, repeated) > 4096


def test_causal_calls_have_their_own_points():
    points = [*POINTS, point(2048, 0.5, is_causal=True)]
    assert shortest(0.2, points) == 4096
    assert shortest(0.2, points, is_causal=True) == 2048
    assert curve(is_causal=True) is None


def test_blocks_that_are_always_kept_weigh_more_in_short_calls():
    found = curve()
    assert found.density(4096, 0.1, 512) == pytest.approx(0.1 + 512 / 4096)
    assert shortest(0.1) == 4096
    assert 4096 < found.shortest(0.1, 512) < 8192
    causal = curve([point(4096, 0.2, is_causal=True)], is_causal=True)
    assert causal.density(4096, 0.1, 512) == pytest.approx(0.1 + 512 / 2048)
    assert causal.density(64, 0.1, 512) == 1.0


def test_head_dim_between_measured_ones_takes_the_worse():
    points = [*POINTS, *(point(n, 0.5, head_dim=128) for n in (1024, 4096, 16384))]
    assert shortest(0.2, points, head_dim=128) == 1024
    between = curve(points, head_dim=96)
    assert between.shortest(0.2, 0) == 4096
    assert between.break_even(16384) == 0.5
    assert "head_dim 64 and 128, nearest to 96" in between.source
    assert curve(points, head_dim=256).densities == (0.5, 0.5, 0.5)
    assert "head_dim 128, nearest to 256" in curve(points, head_dim=256).source


def test_narrower_heads_need_more_of_them():
    narrow = curve(head_dim=16)
    assert (narrow.rows, narrow.densities) == (64, curve().densities)
    assert curve().rows == curve(head_dim=128).rows == 16
    assert "head_dim 64, nearest to 16" in narrow.source


@pytest.mark.parametrize(
    ("arch", "used"),
    [("sm80", "sm80"), ("sm89", "sm90"), ("sm85", "sm90"), ("sm120", "sm90"), ("gfx942", None)],
)
def test_unknown_architectures_take_the_nearest(arch, used):
    points = [point(4096, 0.2), point(2048, 0.2, arch="sm80"), point(512, 0.2, arch="gfx90a")]
    found = curve(points, arch=arch)
    if used is None:
        assert found is None
    else:
        assert found.shortest(0.2, 0) == {"sm80": 2048, "sm90": 4096}[used]
        assert (f"on {used}, nearest to {arch}" in found.source) == (arch != used)


def test_no_data(made):
    assert curve([]) is None
    made([])
    assert crossover.find_crossover(CPU, 64, True, 0.25, 0) is None
    assert crossover.compare_with_dense(CPU, 64, True, 16, 4096, 4096) is None


def test_smaller_grids_need_longer_calls(made):
    made(POINTS)
    found = crossover.find_crossover(CPU, 64, False, 0.2, 0)
    assert found.starts == ((4096, 16, 0),)
    assert found.pays(16, 4096, 4096)
    assert not found.pays(16, 4095, 4095)
    # A quarter of the heads: as many pairs at twice the length.
    assert not found.pays(4, 8191, 8191)
    assert found.pays(4, 8192, 8192)
    # More heads, or more queries than keys, earn nothing.
    assert not found.pays(1600, 4095, 4095)
    assert not found.pays(16, 10**6, 4095)
    # A chunk of queries: as many pairs.
    assert not found.pays(16, 1024, 16383)
    assert found.pays(16, 1024, 16384)


def test_more_heads_earn_what_was_measured_with_them(made):
    many = {"batch": 16, "heads": 16}
    made([*POINTS, point(512, 0.0, **many), point(1024, 0.2, **many), point(4096, 0.6, **many)])
    found = crossover.find_crossover(CPU, 64, False, 0.2, 0)
    assert found.starts == ((4096, 16, 0), (1024, 256, 256))
    assert found.pays(256, 1024, 1024)
    assert found.pays(300, 1024, 1024)
    assert not found.pays(256, 1023, 1023)
    assert not found.pays(256, 512, 2047)  # a chunk of queries needs as many pairs
    assert found.pays(256, 512, 2048)
    # As much work as 256 heads of 1024 tokens, in fewer heads: measured with 16 only.
    assert not found.pays(255, 4095, 4095)
    assert not found.pays(16, 4095, 4095)
    assert found.pays(255, 4096, 4096)
    assert "4096 keys on, with as many queries and 16 heads over the batch, at density 0.20, or " \
        "from 1024 keys on, with as many queries and 256 heads" in found.reason  # fmt: skip
    # Where few heads never pay, many may.
    made([point(4096, 0.0), point(1024, 0.2, **many)])
    assert crossover.find_crossover(CPU, 64, False, 0.2, 0).starts == ((1024, 256, 256),)
    faster = "faster than dense attention without the mask up to density 0.20"
    assert faster in crossover.compare_with_dense(CPU, 64, False, 256, 1024, 1024)
    assert "would be faster" in crossover.compare_with_dense(CPU, 64, False, 16, 8192, 8192)


def test_a_number_of_heads_counts_where_both_neighbours_of_a_head_dim_were_measured():
    many = [point(1024, 0.5, batch=16, heads=16), point(4096, 0.3, head_dim=128)]
    assert [c.rows for c in crossover.make_curves([*POINTS, *many], "sm90", 96, False)] == [16]
    assert [c.rows for c in crossover.make_curves([*POINTS, *many], "sm90", 64, False)] == [16, 256]


def test_reasons(made):
    made(POINTS, arch="sm100")
    reason = crossover.find_crossover(CPU, 64, False, 0.1, 409.6).reason
    assert reason == (
        "sparse attention pays from 4096 keys on, with as many queries and 16 heads over the "
        "batch, at density 0.20 (measured on sm90, nearest to sm100, head_dim 64, not causal)"
    )
    never = crossover.find_crossover(CPU, 64, False, 0.7, 0)
    assert never.starts == ()
    assert not never.pays(10**4, 10**6, 10**6)
    assert never.reason.startswith("sparse attention is not known to pay at density 0.70 (meas")


def test_architecture(monkeypatch):
    """As the kernels name it, without importing them."""
    from entropy_attn.kernels import launch

    made = SimpleNamespace(major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: made)
    assert crossover.architecture(CPU) == "cpu"
    for hip, expected in ((None, "sm90"), ("6.2", "gfx942")):
        monkeypatch.setattr(torch.version, "hip", hip)
        launch._architecture.cache_clear()
        device = torch.device("cuda", 0)
        assert crossover.architecture(device) == launch.architecture(device) == expected
    launch._architecture.cache_clear()


# --- the data of the package --------------------------------------------------------------------


def milliseconds(measured: dict[str, Any], density: float) -> float | None:
    """Sparse attention of a measured shape; None beyond the densities that were measured."""
    points = sorted((float(d), ms) for d, ms in measured["sparse_ms"].items())
    if density <= points[0][0]:
        return points[0][1]  # fewer blocks take no longer
    for (low, low_ms), (high, high_ms) in pairwise(points):
        if density <= high:
            return low_ms + (high_ms - low_ms) * (density - low) / (high - low)
    return None


def test_the_names_of_architectures_are_those_of_the_kernels():
    assert {p["arch"] for p in crossover.measured()} >= {"sm90"}
    assert all("_" not in p["arch"] for p in crossover.measured())


@pytest.mark.parametrize("budget", [ea.TopK, lambda share: ea.TopP()], ids=["TopK", "TopP"])
def test_auto_never_takes_the_slower_at_a_measured_point(budget, monkeypatch):
    ran_sparse = 0
    for measured in crossover.measured():
        monkeypatch.setattr(crossover, "architecture", lambda device, m=measured: m["arch"])
        rows, length, is_causal = (
            measured["batch"] * measured["heads"], measured["kv_len"], measured["is_causal"]
        )  # fmt: skip
        for percent in range(1, 101):
            share = percent / 100
            config = ea.SparsityConfig(
                block_size=measured["block"], budget=budget(share), expected_density=share
            )
            found = expected_crossover(config, CPU, torch.bfloat16, measured["head_dim"], is_causal)
            if not found.pays(rows, length, length):
                continue
            ran_sparse += 1
            kept, blocks = expected_blocks(config, is_causal)
            (line,) = crossover.make_curves(
                [measured], measured["arch"], measured["head_dim"], is_causal
            )
            sparse_ms = milliseconds(
                measured, line.density(length, kept, blocks * measured["block"])
            )
            assert sparse_ms is not None, "nothing was measured at that density"
            assert sparse_ms <= measured["dense_ms"], f"{share} of {measured}"
    assert ran_sparse > 100


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
def test_expected_density_is_that_of_real_masks(share, is_causal):
    config = ea.SparsityConfig(block_size=16, budget=ea.TopK(share))
    query, key = torch.randn(2, 1, 2, 2048, 16)
    mask = ea.select_blocks(query, key, block_size=16, budget=config.budget, is_causal=is_causal)
    kept, blocks = expected_blocks(config, is_causal)
    line = curve([point(4096, 0.2, is_causal=is_causal)], is_causal=is_causal)
    real = float(mask.density(is_causal=is_causal))
    assert line.density(2048, kept, blocks * 16) == pytest.approx(real, abs=0.01)


# --- explain ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("break_even", "expected"),
    [
        (0.5, "faster than dense attention without the mask up to density 0.50 at this size"),
        (0.0, "dense attention without the mask would be faster at this size"),
    ],
)
def test_explain_compares_with_dense_attention(break_even, expected, made, monkeypatch):
    made([point(256, break_even, batch=1, heads=2)])
    api = importlib.import_module("entropy_attn.api")
    choose = api.backend_table.choose

    def as_on_a_gpu(call, backend="auto"):
        found = choose(call, backend)
        return Choice("triton", found.reason) if found.backend == "reference" else found

    monkeypatch.setattr(api.backend_table, "choose", as_on_a_gpu)
    query, key, value = torch.randn(3, 1, 2, 256, 64)
    mask = ea.BlockMask.sliding_window(1, 1, 256, 256, window=16, block_size=16)
    reason = ea.explain(query, key, value, mask).reason
    assert reason == (
        "the block mask drops blocks, which dense attention would not; "
        "kernels/block_sparse_forward.py: it runs on every GPU; "
        f"{expected} (measured on sm90, head_dim 64, not causal)"
    )
    full = ea.BlockMask.full(1, 1, 256, 256, 16)
    assert "density" not in ea.explain(query, key, value, full).reason
    named = ea.explain(query, key, value, mask, backend="reference").reason
    assert named.startswith("named by the caller")
    assert "dense" not in named
    made([])
    assert ea.explain(query, key, value, mask).reason.count(";") == 1
