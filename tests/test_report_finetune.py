"""The tables of fine-tuning, from made records."""

from __future__ import annotations

import math

import pytest

from entropy_attn.benchmarks import report_finetune as report
from entropy_attn.benchmarks.report import draw, fill
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.suites.finetune import VERSION, Method, Plan, methods
from entropy_attn.selection import TopP

MACHINE = {"gpu": "some GPU", "commit": "0123456789", "dirty": False, "arch": "sm_90"}
PLAN = Plan(64, 2, 9, 1e-4, 2, None, (0, 1))
SHARED = {
    "form": "full", "version": VERSION, "model": "M", "batch": 2, "length": 64,
    "learning_rate": 1e-4, "windows": 2, "held_out": "prose", "block": 64,
}  # fmt: skip


def record(method: Method, seed: int, dense: float, points: list[tuple[float, float]]) -> Record:
    found = [
        {"family": family, "density": d, "perplexity": p}
        for family in report.FAMILIES
        for d, p in points
    ]
    result = {"status": "ok", "perplexity": dense, "density": 0.2, "points": found}
    return Record("finetune", {**SHARED, **method.config(PLAN), "seed": seed}, result, MACHINE)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    for seed in (0, 1):
        worse = 0.01 * seed
        store.append(record(Method("plain"), seed, 10.0, [(0.1, 10.5 + worse), (0.4, 10.0)]))
        sparse = Method("density", 0.1, TopP(0.85))
        store.append(record(sparse, seed, 10.05, [(0.05, 10.5 + worse), (0.2, 10.0)]))
    store.append(record(Method("not trained"), 0, 12.0, [(0.1, 13.0), (0.4, 12.5)]))
    return store


def test_density_between_points_goes_by_its_logarithm():
    points = [(0.1, 11.0), (0.4, 10.0)]
    assert report.density_at(points, 10.5) == pytest.approx(0.2)
    assert report.density_at(points, 11.0) == pytest.approx(0.1)
    assert report.density_at(points, 10.0) == pytest.approx(0.4)


@pytest.mark.parametrize("perplexity", [9.9, 11.1])
def test_nothing_is_extrapolated(perplexity):
    assert report.density_at([(0.1, 11.0), (0.4, 10.0)], perplexity) is None


def test_a_frontier_that_rises_again_counts_where_it_first_falls_below():
    points = [(0.1, 11.0), (0.2, 10.0), (0.4, 10.2), (0.8, 10.1)]
    assert report.density_at(points, 10.5) == pytest.approx(math.sqrt(0.02))
    assert report.density_at(points, 10.0) == pytest.approx(0.2)


def test_ratios_are_paired_by_seed(store):
    runs = report.runs_of(store.latest("finetune"))
    found = report.ratios(runs, "density 0.1, sparse by TopP(0.85), 9 steps", "predicted", 0.2)
    assert found == pytest.approx([0.5, 0.5])
    assert report.ratios(runs, "plain, 9 steps", "oracle", 0.2) == pytest.approx([1.0, 1.0])
    assert report.ratios(runs, "not trained, 9 steps", "predicted", 0.2) == []


def test_tables_and_picture(store, tmp_path):
    page = "<!-- begin:{0} -->\n<!-- end:{0} -->"
    table = fill(page.format("finetune"), store)
    assert "| plain, 9 steps | 2 | 10.00 ± 0.00 |" in table
    assert "| not trained, 9 steps | 1 | 12.00 |" in table
    assert "some GPU" in table
    ratios = fill(page.format("finetune-ratios"), store)
    assert "| density 0.1, sparse by TopP(0.85), 9 steps | 0.50 ± 0.00 | 0.50 ± 0.00 |" in ratios
    (path,) = draw(store, tmp_path / "images")
    assert path.stat().st_size > 10_000


def test_longer_training_is_compared_with_plain_training_as_long(store):
    store.append(record(Method("plain", length=4), 0, 9.0, [(0.1, 9.5), (0.4, 9.0)]))
    longer = Method("row entropy", 0.1, length=4)
    store.append(record(longer, 0, 9.1, [(0.1, 9.5), (0.4, 9.0)]))
    runs = report.runs_of(store.latest("finetune"))
    found = report.ratios(runs, "row entropy 0.1, 36 steps", "predicted", 0.2)
    assert found == pytest.approx([1.0])


def test_no_two_methods_have_one_name():
    names = [report.title(method.config(PLAN)) for method in methods("full")]
    assert len(set(names)) == len(names)
    assert report.VERSION == VERSION
