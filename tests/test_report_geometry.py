"""The suite `geometry` on small sets, and its tables and pictures from made records."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("numba")
pytest.importorskip("scipy")

from entropy_attn.benchmarks import points as point_sets  # noqa: E402
from entropy_attn.benchmarks import report_geometry as report  # noqa: E402
from entropy_attn.benchmarks.hulls import HullPlan  # noqa: E402
from entropy_attn.benchmarks.orders import all_orders  # noqa: E402
from entropy_attn.benchmarks.registry import SUITES, Context  # noqa: E402
from entropy_attn.benchmarks.report import draw, fill  # noqa: E402
from entropy_attn.benchmarks.resume import among  # noqa: E402
from entropy_attn.benchmarks.store import Record, Store  # noqa: E402
from entropy_attn.benchmarks.suites import geometry as suite  # noqa: E402

MACHINE = {"gpu": None, "cpu": "a CPU", "torch_threads": 2, "commit": "0123456789", "dirty": False}
ORDERS = {"Hilbert": 1.0, "BRIO": 2.0, "x-sorted": 3.0, "random": 4.0}


@pytest.fixture
def store(tmp_path):
    """One library whose run time follows the entropy, and one where the best two trade places."""
    store = Store(tmp_path)
    for library, faster in (("first", 0), ("second", 2)):
        for order, entropy in ORDERS.items():
            result = {
                "status": "ok", "entropy": entropy, "relative": entropy / 4, "soft": entropy / 2,
                "median_ms": 100 * entropy - (60 * faster if order == "BRIO" else 0),
                "order_ms": 25.0, "triangles": 7, "version": "1.0", "over_scipy": 2.0,
            }  # fmt: skip
            config = {"form": "full", "points": "square", "n": 1000, "order": order}
            for kind in ("entropy", "triangulate", "order"):
                keys = {"kind": kind} | ({} if kind == "order" else {"library": library})
                store.append(Record("geometry", {**config, **keys}, result, MACHINE))
        config = {"form": "full", "kind": "whole", "points": "square", "n": 1000}
        store.append(Record("geometry", {**config, "library": library}, result, MACHINE))
    return store


def test_correlations(store) -> None:
    table = report.TABLES["geometry-correlations"](store)
    assert "4 orders of 1,000 points" in table
    # The second library takes 100, 80, 300 and 400 ms: one swap of neighbours in four ranks.
    assert table.splitlines()[-1] == (
        "| square | 1.00 | 1.00 | 1.00 | 0.80 | 0.80 | 0.80 | 1.00 | 0.80 |"
    )


def test_the_gain_counts_the_time_of_ordering(store) -> None:
    lines = report.TABLES["geometry-triangulations"](store).splitlines()
    assert lines[-2] == "| square, 1,000, first | 100 | 200 | 300 | 400 | 3.2 |"
    assert lines[-1] == "| square, 1,000, second | 100 | 80.0 | 300 | 400 | 3.8 |"


def test_every_table_and_picture(store, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    page = "".join(f"<!-- begin:{name} -->\n<!-- end:{name} -->\n" for name in report.TABLES)
    filled = fill(page, store)
    assert "Not measured yet" not in filled
    assert "Not measured yet" in fill(page, Store(tmp_path / "empty"))
    drawn = draw(store, tmp_path)
    assert [path.name for path in drawn] == ["geometry_entropy_a_cpu.png", "geometry_orders.png"]
    assert all(path.stat().st_size > 0 for path in drawn)
    assert draw(Store(tmp_path / "empty"), tmp_path) == []


def test_the_suite_measures_the_cpu(tmp_path) -> None:
    cpu = torch.device("cpu")
    assert SUITES["geometry"].measures_cpu
    assert Context(cpu, False, tmp_path).form == "small"
    assert Context(cpu, False, tmp_path, measures_cpu=True).form == "full"
    assert Context(cpu, True, tmp_path, measures_cpu=True).form == "quick"


def test_the_suite_runs(tmp_path, monkeypatch) -> None:
    few = ("square", "circle")
    plan = suite.Plan(600, 500, 1, 1, few, few, few, ())
    monkeypatch.setattr(suite.Plan, "of", lambda form: plan)
    hulls = HullPlan((("disk", 500), ("sphere", 500), ("cube", 500)), (), 500)
    monkeypatch.setattr(HullPlan, "of", lambda form: hulls)
    monkeypatch.setattr(suite.entropy_net, "run", lambda context: iter(()))  # has tests of its own
    context = Context(torch.device("cpu"), True, tmp_path, measures_cpu=True)
    rows = list(SUITES["geometry"].run(context))
    assert {row.result["status"] for row in rows} <= {"ok", "unavailable"}
    measured = [row for row in rows if row.result["status"] == "ok"]
    kinds = {"hull", "hull-order", "order", "entropy", "triangulate", "whole"}
    assert kinds - {"entropy"} <= {row.config["kind"] for row in measured} <= kinds
    counts: dict[tuple, set[int]] = {}
    for row in measured:
        if row.config["points"] == "square" and "triangles" in row.result:
            counts.setdefault((row.config["kind"], row.config["n"]), set()).add(
                row.result["triangles"]
            )
    assert all(len(found) == 1 for found in counts.values()), "libraries differ"
    store = Store(tmp_path)
    for row in measured:
        store.append(Record("geometry", row.config, row.result))
    assert len(store.latest("geometry")) == len(measured)
    done = replace(context, is_measured=among([row.config for row in measured]))
    assert {row.result["status"] for row in SUITES["geometry"].run(done)} <= {"unavailable"}


def test_orders_to_compare_are_permutations() -> None:
    points = point_sets.family("gauss", 5000)
    orders = dict(all_orders(points))
    assert len(orders) >= 10
    for name, order in orders.items():
        assert np.array_equal(np.sort(order), np.arange(5000)), name


@pytest.mark.parametrize("name", point_sets.FAMILIES)
def test_families(name) -> None:
    points = point_sets.family(name, 1000)
    assert points.shape == (1000, 2)
    assert np.array_equal(points, point_sets.family(name, 1000))
    if name == "circle":
        assert np.allclose(np.hypot(*points.T), 1)


@pytest.mark.parametrize("name", point_sets.REAL)
def test_real_sets_say_what_is_missing(name, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(point_sets, "find_spec", lambda module: None)
    with pytest.raises(point_sets.PointsNotFound, match="pip install"):
        point_sets.real(name)
    plan = replace(suite.Plan.of("quick"), real=(name,))
    rows = list(suite._real(Context(torch.device("cpu"), True, tmp_path), name, plan))
    assert [row.result["status"] for row in rows] == ["unavailable"]
    assert "pip install" in rows[0].text
