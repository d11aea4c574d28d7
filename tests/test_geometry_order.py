"""Orders of points: permutations, curves, cells, and the entropy of an order, exact and soft."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

np = pytest.importorskip("numpy")
pytest.importorskip("numba")
stats = pytest.importorskip("scipy.stats")

import entropy_attn as ea  # noqa: E402
from entropy_attn.geometry.cells import nearest_cells  # noqa: E402
from entropy_attn.geometry.hilbert import BITS, hilbert_keys  # noqa: E402
from entropy_attn.geometry.radix import sorting_permutation  # noqa: E402

geometry = ea.geometry
DTYPES = (np.float64, np.float32, np.int64, np.uint8)


def make(seed: int, n: int, dim: int = 2, dtype=np.float64) -> np.ndarray:
    """Points with ties where the dtype is small."""
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, 50, (n, dim)).astype(dtype)
    return rng.normal(size=(n, dim)).astype(dtype)


# Permutations


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 300),
    dim=st.sampled_from([2, 3]),
    dtype=st.sampled_from(DTYPES),
    method=st.sampled_from(["hilbert", "brio", "cells", "random"]),
    scale=st.sampled_from([1, 0]),
)
@settings(max_examples=120, deadline=None)
def test_every_order_is_a_permutation(seed, n, dim, dtype, method, scale) -> None:
    points = make(seed, n, dim, dtype) * dtype(scale)
    anchors = {"anchors": make(seed + 1, 7, dim)} if method == "cells" else {}
    order = geometry.entropy_order(points, method, seed=seed, **anchors)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    again = geometry.entropy_order(points.copy(), method, seed=seed, **anchors)
    assert np.array_equal(order, again)


@pytest.mark.parametrize("method", ["brio", "random"])
def test_the_seed_decides(method) -> None:
    points = make(0, 500)
    first, second = (geometry.entropy_order(points, method, seed=seed) for seed in (1, 2))
    assert not np.array_equal(first, second)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=300), st.sampled_from([0, 11, 22, 32]))
@settings(max_examples=60, deadline=None)
def test_the_radix_sort_is_stable(keys, shift) -> None:
    keys = (np.array(keys, np.uint64) >> np.uint64(shift)).astype(np.uint32)
    assert np.array_equal(sorting_permutation(keys), np.argsort(keys, kind="stable"))


@pytest.mark.parametrize(("dim", "side"), [(2, 64), (3, 16)])
def test_hilbert_neighbours_are_adjacent(dim, side) -> None:
    grid = np.stack(np.meshgrid(*[np.arange(side)] * dim), -1).reshape(-1, dim)
    grid = np.random.default_rng(0).permutation(grid)
    order = geometry.entropy_order(grid)
    assert (np.abs(np.diff(grid[order], axis=0)).sum(1) == 1).all()


@pytest.mark.parametrize("dim", [2, 3])
def test_the_curve_reaches_its_last_bits(dim) -> None:
    """Neighbouring cells of the finest grid, along a piece of the curve."""
    side = 1 << BITS[dim]
    corner = np.zeros((1, dim))
    square = np.stack(np.meshgrid(*[np.arange(4)] * dim), -1).reshape(-1, dim) + side // 2
    points = np.concatenate((corner, corner + side, square + 0.5))
    keys = hilbert_keys(points)[2:]
    assert len(np.unique(keys)) == len(square)
    assert keys.max() - keys.min() == len(square) - 1, "an aligned square is one piece"


@pytest.mark.parametrize("scale", [1e300, 1.7e308, 5e-324, 1e-300])
@pytest.mark.parametrize("method", ["hilbert", "brio", "cells"])
def test_the_scale_of_a_set_does_not_matter(scale, method) -> None:
    points = np.random.default_rng(0).integers(-1000, 1000, (400, 2)) / 1000
    if scale == 5e-324:
        points = np.rint(points * 1000)
    points = points * scale
    assert np.isfinite(points).all()
    anchors = {"anchors": points[:9]} if method == "cells" else {}
    order = geometry.entropy_order(points, method, **anchors)
    assert np.array_equal(np.sort(order), np.arange(400))
    if method == "hilbert" and scale > 1e-300:
        assert np.array_equal(order, geometry.entropy_order(points / scale))


def test_points_of_one_hilbert_cell_stay_in_their_order() -> None:
    points = np.array([[1.0, 1], [0, 0], [1, 1], [0, 0], [1, 1]])
    assert geometry.entropy_order(points).tolist() == [1, 3, 0, 2, 4]


def test_brio_doubles_its_rounds() -> None:
    points = make(0, 1 << 14)
    order = geometry.entropy_order(points, "brio")
    along = np.empty(len(order), np.int64)
    along[geometry.entropy_order(points)] = np.arange(len(order))
    starts = np.nonzero(np.diff(along[order]) < 0)[0] + 1  # a round begins at the curve's begin
    sizes = np.diff(np.concatenate((starts, [len(order)])))
    assert abs(sizes[-1] / len(order) - 1 / 2) < 0.02
    assert abs(sizes[-2] / len(order) - 1 / 4) < 0.02


# Cells


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 400),
    k=st.integers(1, 60),
    spread=st.sampled_from([1.0, 1e-3, 30.0, 0.0]),
    offset=st.sampled_from([0.0, 1e6]),
)
@settings(max_examples=100, deadline=None)
def test_cells_are_those_of_the_nearest_anchor(seed, n, k, spread, offset) -> None:
    rng = np.random.default_rng(seed)
    points = rng.random((n, 2)) + offset
    anchors = spread * rng.random((k, 2)) + offset
    labels = nearest_cells(points, anchors)
    squared = ((points[:, None] - anchors) ** 2).sum(-1)
    chosen = squared[np.arange(n), labels]
    assert np.allclose(chosen, squared.min(1), rtol=1e-9, atol=1e-20)


def test_a_cell_is_visited_once_and_keeps_its_order() -> None:
    rng = np.random.default_rng(0)
    points, anchors = rng.random((5000, 2)), rng.random((40, 2))
    order = geometry.entropy_order(points, "cells", anchors=anchors)
    labels = nearest_cells(points, anchors)[order]
    assert (np.diff(labels) != 0).sum() + 1 == len(np.unique(labels))
    assert (np.diff(order)[np.diff(labels) == 0] > 0).all()


# The exact entropy of an order


def least_entropy_by_hand(labels: list[int]) -> float:
    """The minimum over every partition into contiguous sublists of one label."""
    n, least = len(labels), math.inf
    for cuts in itertools.product((False, True), repeat=n - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        parts = [labels[a:b] for a, b in itertools.pairwise(edges)]
        if all(len(set(part)) == 1 for part in parts):
            least = min(least, sum(len(p) / n * math.log(n / len(p)) for p in parts))
    return least


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_maximal_runs_are_the_minimum(labels) -> None:
    assert geometry.run_entropy(labels) == pytest.approx(least_entropy_by_hand(labels), abs=1e-12)


@given(seed=st.integers(0, 2**31), n=st.integers(2, 200))
@settings(max_examples=40, deadline=None)
def test_entropy_with_cells_lies_between_its_extremes(seed, n) -> None:
    rng = np.random.default_rng(seed)
    points, cells = rng.random((n, 2)), rng.integers(0, 6, n)
    low = float(ea.partition_entropy(torch.from_numpy(cells), 6, torch.ones(n).double()))
    found = geometry.order_entropy(points, rng.permutation(n), cells=cells)
    assert low - 1e-9 <= found <= math.log(n) + 1e-9
    by_cell = geometry.order_entropy(points, np.argsort(cells, kind="stable"), cells=cells)
    assert by_cell == pytest.approx(low, abs=1e-9)
    relative = geometry.order_entropy(
        points, np.argsort(cells, kind="stable"), cells=cells, relative=True
    )
    assert relative == pytest.approx(0, abs=1e-9)


def test_a_random_order_has_almost_log_n() -> None:
    points = make(0, 4096)
    assert geometry.order_entropy(points) > 0.97 * math.log(4096)
    assert geometry.order_entropy(points, relative=True) > 0.9
    # 4096 points alternate between 64 cells: no neighbours share one.
    cells = np.arange(4096) % 64
    assert geometry.order_entropy(points, cells=cells) == pytest.approx(math.log(4096))
    assert geometry.order_entropy(points, cells=cells, relative=True) == 1


def test_levels_of_the_tree_are_boxes_of_equal_size() -> None:
    from entropy_attn.geometry.sequence_entropy import _tree_levels

    points = make(3, 4096)
    levels = [labels.copy() for labels in _tree_levels(points)]
    assert [len(np.unique(labels)) for labels in levels] == [2**level for level in range(1, 11)]
    for level, labels in enumerate(levels, start=1):
        assert (np.bincount(labels) == 4096 >> level).all()
    boxes = [points[levels[3] == box] for box in range(16)]
    for a, b in itertools.combinations(boxes, 2):
        overlap = (a.min(0) < b.max(0)) & (b.min(0) < a.max(0))
        assert not overlap.all(), "boxes of one level overlap"
    # Visiting each box of the finest level once costs nothing at any level.
    assert geometry.order_entropy(points, np.argsort(levels[-1]), relative=True) < 1e-9


def test_ties_stay_in_one_box() -> None:
    points = np.array([[0.0, 0.0]] * 60 + [[1.0, 1.0]] * 4)
    order = np.argsort(points[:, 0], kind="stable")
    assert geometry.order_entropy(points, order, relative=True) == 0
    assert geometry.order_entropy(np.zeros((50, 2))) == 0


def test_small_sets_have_an_entropy() -> None:
    assert geometry.order_entropy(np.zeros((0, 2))) == 0
    assert geometry.order_entropy(np.zeros((1, 2))) == 0
    assert geometry.order_entropy([[0, 0], [1, 1]]) == pytest.approx(math.log(2))
    assert geometry.run_entropy(np.zeros(0, int)) == 0


def orders(points: np.ndarray) -> dict[str, np.ndarray]:
    rng, n = np.random.default_rng(5), len(points)
    hilbert = geometry.entropy_order(points)
    found = {
        "hilbert": hilbert,
        "brio": geometry.entropy_order(points, "brio"),
        "x": np.argsort(points[:, 0]),
        "random": rng.permutation(n),
    }
    for k in (16, 256):
        anchors = points[rng.choice(n, k, replace=False)]
        found[f"cells {k}"] = geometry.entropy_order(points, "cells", anchors=anchors)
    for size in (16, 64, 256, 1024):
        blocks = [hilbert[i : i + size] for i in range(0, n, size)]
        found[f"within {size}"] = np.concatenate([rng.permutation(block) for block in blocks])
        found[f"blocks {size}"] = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
    return found


def test_the_soft_entropy_ranks_orders_like_the_exact_one() -> None:
    points = make(1, 8192)
    x = torch.from_numpy(points)
    exact, soft = [], []
    for order in orders(points).values():
        exact.append(geometry.order_entropy(points, order))
        soft.append(geometry.soft_order_entropy(x[torch.from_numpy(order)]).item())
    assert stats.spearmanr(exact, soft).statistic > 0.85


# The soft entropy


def test_soft_entropy_by_hand() -> None:
    """Sharp cells and windows of two: log 2 for a window of two cells, else nothing."""
    anchors = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    measure = lambda x, weights: ea.range_entropy(x, anchors, 1e4, weights)  # noqa: E731
    x = anchors[[0, 0, 0, 1, 1]]
    out = geometry.soft_order_entropy(x, measure, window=2)
    assert out.item() == pytest.approx(2 / 5 * math.log(2), abs=1e-9)
    # The last window, of one point, is filled up with points of no weight.
    out = geometry.soft_order_entropy(anchors[[0, 1, 0, 1, 0]], measure, window=4)
    assert out.item() == pytest.approx(4 / 5 * math.log(2), abs=1e-9)


@pytest.mark.parametrize("window", [3, 4, 50])
def test_soft_entropy_has_the_right_gradient(window) -> None:
    x = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    anchors = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    normals, offsets = torch.randn(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)

    def balls(x, anchors):
        measure = lambda windows, weights: ea.range_entropy(windows, anchors, 2.0, weights)  # noqa: E731
        return geometry.soft_order_entropy(x, measure, window=window)

    def planes(x):
        measure = lambda windows, weights: ea.halfspace_entropy(  # noqa: E731
            windows, normals, offsets, 0.5, weights
        )
        return geometry.soft_order_entropy(x, measure, window=window)

    assert torch.autograd.gradcheck(balls, (x, anchors))
    assert torch.autograd.gradcheck(planes, (x,))

    # By default anchors follow the points, but they are held fixed by the gradient.
    geometry.soft_order_entropy(x, window=window).backward()
    assert x.grad.isfinite().all()
    assert anchors.grad is None


def test_soft_entropy_of_a_batch() -> None:
    x = torch.randn(3, 70, 2, dtype=torch.float64)
    measure = ea.RangeEntropy(num_anchors=9)
    measure.reset(x)
    batch = geometry.soft_order_entropy(x, measure)
    each = torch.stack([geometry.soft_order_entropy(one, measure) for one in x])
    torch.testing.assert_close(batch, each)


# What is refused


@pytest.mark.parametrize(
    ("points", "error", "says"),
    [
        ([[0, 0], [1, np.nan], [np.inf, 0]], ValueError, r"points\[1\] is \[1.0, nan\]"),
        (np.array([[0, 0], [2**53 + 1, 0]]), ValueError, r"points\[1\].*2\^53"),
        (np.array([[0, 0], [-(2**63), 0]]), ValueError, r"points\[1\].*2\^53"),
        (np.zeros((3, 4)), ValueError, r"\(n, 2\) or \(n, 3\), got \(3, 4\)"),
        (np.zeros(3), ValueError, r"got \(3,\)"),
        (np.zeros((3, 2), complex), TypeError, "complex128"),
        (np.zeros((3, 2), bool), TypeError, "bool"),
        ([["a", "b"]], TypeError, "points has dtype"),
        (torch.zeros(3, 2, requires_grad=True), TypeError, "detach"),
    ],
)  # fmt: skip
def test_bad_points(points, error, says) -> None:
    with pytest.raises(error, match=says):
        geometry.entropy_order(points)
    with pytest.raises(error, match=says):
        geometry.order_entropy(points)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(method="peano"), "hilbert, brio, cells, learned, random, got 'peano'"),
        (dict(method="cells"), "needs anchors"),
        (dict(anchors=np.zeros((2, 2))), "anchors are for"),
        (dict(method="cells", anchors=np.zeros((0, 2))), "anchors holds no row"),
        (dict(method="cells", anchors=np.zeros((2, 3))), r"anchors must have shape \(n, 2\)"),
        (dict(method="cells", anchors=np.full((2, 2), np.nan)), r"anchors\[0\]"),
        (dict(method="brio", seed=-1), "seed must be an int"),
    ],
)
def test_bad_arguments_of_an_order(arguments, says) -> None:
    with pytest.raises(ValueError, match=says):
        geometry.entropy_order(np.zeros((3, 2)), **arguments)


def test_bad_arguments_of_entropies() -> None:
    points = np.zeros((3, 2))
    with pytest.raises(ValueError, match="each index from 0 to 2 once"):
        geometry.order_entropy(points, [0, 1, 1])
    with pytest.raises(ValueError, match="each index from 0 to 2 once"):
        geometry.order_entropy(points, [0, 1, 3])
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        geometry.order_entropy(points, [0, 1])
    with pytest.raises(TypeError, match="integers"):
        geometry.order_entropy(points, [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="cells must be"):
        geometry.order_entropy(points, cells=[0, 1])
    with pytest.raises(TypeError, match="labels"):
        geometry.run_entropy([0.5])
    with pytest.raises(ValueError, match="window"):
        geometry.soft_order_entropy(torch.zeros(3, 2), window=0)
    with pytest.raises(ValueError, match="no points"):
        geometry.soft_order_entropy(torch.zeros(0, 2))
