"""What the suite `geometry` judges hulls by agrees with rational arithmetic, and tells errors."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("numba")
pytest.importorskip("scipy")

import torch  # noqa: E402
from hull_cases import exact_hull_2d, exact_hull_3d, hard_numbers  # noqa: E402

import entropy_attn as ea  # noqa: E402
from entropy_attn.benchmarks import hulls  # noqa: E402
from entropy_attn.benchmarks import report_hulls as report  # noqa: E402
from entropy_attn.benchmarks.hull_truth import differences, is_hull_2d, true_vertices  # noqa: E402
from entropy_attn.benchmarks.points import SPACE_FAMILIES, family  # noqa: E402
from entropy_attn.benchmarks.registry import Context  # noqa: E402
from entropy_attn.benchmarks.report import draw, fill  # noqa: E402
from entropy_attn.benchmarks.store import Record, Store  # noqa: E402

MACHINE = {"gpu": None, "cpu": "a CPU", "torch_threads": 2, "commit": "0123456789", "dirty": False}


@pytest.mark.parametrize("kind", ["random", "grid", "near"])
def test_wrong_polygons_are_told(kind) -> None:
    numbers = random.Random(kind)
    for _ in range(40):
        points = np.array([[hard_numbers(kind, numbers) for _ in range(2)] for _ in range(12)])
        hull = exact_hull_2d(points.tolist())
        assert is_hull_2d(points, np.array(hull)) == (len(hull) > 2)
        inner = [i for i in range(12) if i not in hull]
        wrong = [hull[1:] + hull[:1], hull[::-1], hull + hull]
        wrong += [hull[:k] + hull[k + 1 :] for k in range(len(hull))]
        wrong += [hull[:k] + inner[:1] + hull[k:] for k in range(len(hull)) if inner]
        assert not any(is_hull_2d(points, np.array(each)) for each in wrong)


@pytest.mark.parametrize("kind", ["random", "grid"])
def test_vertices_in_space_are_found_from_any_guess(kind) -> None:
    numbers = random.Random(kind)
    for _ in range(6):
        points = np.array([[hard_numbers(kind, numbers) for _ in range(3)] for _ in range(10)])
        truth = true_vertices(points, np.arange(4))
        if truth is None:  # the guess is flat
            continue
        expected = points[exact_hull_3d(points.tolist())]
        assert differences(truth, expected) == (0, 0)
        assert differences(truth, expected[1:]) == (1, 0)
        assert differences(truth, np.concatenate((expected, [[9.0, 9.0, 9.0]]))) == (0, 1)


def test_a_sphere_is_proved_and_what_is_none_is_not(monkeypatch) -> None:
    monkeypatch.setattr("entropy_attn.benchmarks.hull_truth.MOST_VERTICES", 10)
    sphere = family("sphere", 500)
    assert len(true_vertices(sphere, np.arange(500))) == 500
    assert true_vertices(sphere * np.linspace(0.9, 1, 500)[:, None], np.arange(500)) is None


@pytest.mark.parametrize("name", SPACE_FAMILIES)
def test_families_in_space(name) -> None:
    points = family(name, 100)
    assert points.shape == (100, 3)
    assert np.array_equal(points, family(name, 100))


def test_what_is_left_to_sort() -> None:
    orders = hulls.orders_along_x(family("square", 5000))
    assert next(iter(orders)) == "random"
    for name, order in orders.items():
        assert np.array_equal(np.sort(order), np.arange(5000)), name
    left = [hulls.sorting_entropy(name, 5000) for name in orders if "runs" not in name]
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0


def test_missing_packages_are_rows(tmp_path, monkeypatch) -> None:
    absent = {
        name: replace(each, module="no_such_module") if name == "manifold3d" else each
        for name, each in hulls.HULL_LIBRARIES.items()
    }
    monkeypatch.setattr(hulls, "HULL_LIBRARIES", absent)
    context = Context(torch.device("cpu"), True, tmp_path, measures_cpu=True)
    plan = hulls.HullPlan((("square", 500),), (), 500)
    rows = list(hulls.hull_rows(context, plan))
    assert [r.text for r in rows if r.result["status"] == "unavailable"] == [
        "manifold3d | manifold3d is not installed"
    ]
    ours = next(r for r in rows if r.config.get("library") == hulls.OURS)
    assert (ours.result["missing"], ours.result["surplus"]) == (0, 0)
    assert ours.result["vertices"] == len(ea.geometry.convex_hull(family("square", 500)))


def test_tables_and_pictures(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    store = Store(tmp_path)
    for dim, points in ((2, "square"), (3, "ball")):
        for library, ms in ((report.OURS, 10.0), (report.QHULL, 200.0), ("manifold3d", 50.0)):
            result = {
                "status": "ok", "median_ms": ms, "vertices": 7, "version": "1.0",
                "over_qhull": 200 / ms,
            }  # fmt: skip
            if dim == 2:
                result |= {"missing": 3 if library == report.QHULL else 0, "surplus": 0}
            config = {"form": "full", "kind": "hull", "points": points, "n": 10**6, "dim": dim}
            store.append(Record("geometry", {**config, "library": library}, result, MACHINE))
    for order, entropy in (("random", 13.0), ("sorted", 0.0)):
        config = {"form": "full", "kind": "hull-order", "points": "circle", "n": 10, "order": order}
        result = {"status": "ok", "median_ms": 5.0, "entropy": entropy}
        store.append(Record("geometry", config, result, MACHINE))
    whole = {"form": "full", "points": 10**7, "dim": 2, "dtype": "float64", "whole": True}
    for name, result in (("filter", {"bandwidth": 0.5}), ("hull", {"over_qhull": 300.0})):
        found = {"status": "ok", "median_ms": 1.25} | result
        store.append(Record("hull", {**whole, "contestant": name}, found, MACHINE))
    assert report.TABLES["hulls-gpu"](store).splitlines()[-2:] == [
        "| 10,000,000, 2D, float64 | filter | 1.250 | 50% | – |",
        "| 10,000,000, 2D, float64 | hull | 1.250 | – | 300 x |",
    ]
    plane, space = (
        report.TABLES[name](store).splitlines()[-1] for name in ("hulls-plane", "hulls-space")
    )
    assert plane == (
        "| square, 1,000,000 | 7 | 10.0 | 200 (wrong: 3 missing) | 50.0 | 20.0 | 5.0 (manifold3d) |"
    )
    assert "10.0 (unchecked)" in space
    claim = report.TABLES["hulls-claim"](store).splitlines()[-2]
    assert claim == "| in the plane | 1 | 20.0 to 20.0 | 5.0 to 5.0 | 0 | 3 |"
    page = "".join(f"<!-- begin:{name} -->\n<!-- end:{name} -->\n" for name in report.TABLES)
    assert "Not measured yet" not in fill(page, store)
    drawn = [path.name for path in draw(store, tmp_path)]
    assert drawn == ["hulls_a_cpu.png", "hull_orders_a_cpu.png", "hull_filter.png"]
