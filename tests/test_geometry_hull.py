"""Convex hulls against rational arithmetic: SciPy itself drops vertices."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("numba")
pytest.importorskip("scipy")

import numpy as np
import torch
from hull_cases import (
    KINDS,
    exact_hull_2d,
    exact_hull_3d,
    exact_orientation,
    few_directions,
    hard_numbers,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import entropy_attn as ea
from entropy_attn.errors import BackendUnavailable
from entropy_attn.geometry import filter as hull_filter
from entropy_attn.geometry.radix import ascending_order

convex_hull = ea.geometry.convex_hull
coordinates = st.one_of(
    st.integers(0, 3).map(float), st.floats(allow_nan=False, allow_infinity=False)
)


def shape(name: str, total: int, dim: int = 2) -> np.ndarray:
    """Random points: "cube", "ball", "sphere", "normal"."""
    numbers = np.random.default_rng(len(name) + total)
    points = numbers.normal(size=(total, dim))
    if name == "normal":
        return points
    if name == "cube":
        return numbers.random((total, dim))
    points /= np.linalg.norm(points, axis=1)[:, None]
    return points if name == "sphere" else points * numbers.random((total, 1)) ** (1 / dim)


@pytest.mark.parametrize("kind", KINDS)
def test_plane_is_exact(kind):
    numbers = random.Random(kind)
    for _ in range(150):
        total = numbers.randint(1, 40)
        points = [[hard_numbers(kind, numbers) for _ in range(2)] for _ in range(total)]
        assert convex_hull(points).tolist() == exact_hull_2d(points), points


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=20))
def test_plane_is_exact_for_all_floats(points):
    assert convex_hull(points).tolist() == exact_hull_2d(points)


@pytest.mark.parametrize("name", ["cube", "ball", "normal", "sphere"])
@pytest.mark.parametrize("total", [1001, 3000])
def test_plane_is_exact_with_the_filter(name, total, monkeypatch):
    monkeypatch.setitem(hull_filter.STAGES, 2, ((16, 1000), (64, 100)))
    points = shape(name, total)
    assert len(hull_filter.candidates(points)[0]) < total or name == "sphere"
    assert convex_hull(points).tolist() == exact_hull_2d(points)


@pytest.mark.parametrize("scale", [1.0, 1e-310, 1e300])
def test_plane_is_exact_on_a_large_grid(scale, monkeypatch):
    """Many collinear points and copies, those along the border included."""
    monkeypatch.setitem(hull_filter.STAGES, 2, ((16, 1000), (64, 100)))
    points = np.random.default_rng(5).integers(-9, 10, (4000, 2)) * scale
    assert convex_hull(points).tolist() == exact_hull_2d(points)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["near", "grid", "decimal"]))
def test_order_turns_and_dtypes_do_not_matter(seed, kind):
    numbers = random.Random(seed)
    points = np.array([[hard_numbers(kind, numbers) for _ in range(2)] for _ in range(30)])
    corners = points[convex_hull(points)]
    order = np.random.default_rng(seed).permutation(len(points))
    assert (points[order][convex_hull(points[order])] == corners).all()
    turned = np.stack([-points[:, 1], points[:, 0]], 1)
    as_sets = [{tuple(p) for p in each.tolist()} for each in (turned[convex_hull(turned)], corners)]
    assert as_sets[0] == {(-y, x) for x, y in as_sets[1]}
    single = points.astype(np.float32)
    assert convex_hull(single).tolist() == exact_hull_2d(single.tolist())


@pytest.mark.parametrize("order", ["sorted", "reversed", "circle", "slabs"])
def test_ordered_points(order):
    points = shape("sphere", 2000)
    points = points[np.argsort(points[:, 0])]
    if order == "reversed":
        points = points[::-1]
    elif order == "circle":
        points = points[np.argsort(np.arctan2(points[:, 1], points[:, 0]))]
    elif order == "slabs":
        points = np.concatenate([points[i::7] for i in range(7)])
    assert convex_hull(points).tolist() == exact_hull_2d(points)


def test_plain_results():
    square = [(0, 0), (2, 0), (2, 2), (0, 2), (1, 1), (1, 0), (2, 2), (0, 0)]
    assert convex_hull(square).tolist() == [0, 1, 2, 3]
    assert convex_hull(square).dtype == np.int64
    assert convex_hull(np.empty((0, 2))).tolist() == []
    assert convex_hull([(3, 1)]).tolist() == [0]
    assert convex_hull([(3, 1), (3, 1)]).tolist() == [0]
    assert convex_hull([(3, 1), (2, 5)]).tolist() == [1, 0]
    assert convex_hull([(i, 2 * i) for i in (2, 1, 3, 0, 3)]).tolist() == [3, 2]
    assert convex_hull([(1, i) for i in (2, 1, 3, 0, 3)]).tolist() == [3, 2]
    assert convex_hull([(0.0, 0.0), (-0.0, -0.0), (1, 0), (0, 1)]).tolist() == [0, 2, 3]
    assert convex_hull(np.asfortranarray(np.array(square)[::-1])).tolist() == [0, 6, 1, 4]


def test_integers_are_exact_up_to_2_to_the_53():
    far = 2**53
    points = [(-far, -far), (far, far - 1), (0, 0), (far - 1, far)]
    assert convex_hull(points).tolist() == exact_hull_2d(points)
    assert convex_hull(np.array([(0, 0), (1, 0), (0, 1)], np.uint8)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "points, error, message",
    [
        ([(0, 0), (2**53 + 1, 1)], ValueError, r"points\[1\] is \[9007199254740993, 1\].*2\^53"),
        ([(0, 0), (-(2**63), 1)], ValueError, r"points\[1\]"),
        ([(0, 0), (2**80, 1)], TypeError, "object"),
        ([(0, 1j)], TypeError, "complex"),
        ([(True, False)], TypeError, "bool"),
        ([0.0, 1.0], ValueError, r"\(n, 2\) or \(n, 3\), got \(2,\)"),
        (np.zeros((3, 4)), ValueError, r"got \(3, 4\)"),
        ([(0, 0), (1, np.inf), (np.nan, 0)], ValueError, r"points\[1\] is \[1.0, inf\]"),
        (torch.tensor([(0, 2**53 + 1)]), ValueError, r"points\[0, 0\].*2\^53"),
        (torch.zeros(3, 2, dtype=torch.bool), TypeError, "bool"),
        (torch.zeros(3), ValueError, "batch dimension"),
        (torch.tensor([(0.0, 0.0, 0.0), (0.0, torch.nan, 0.0)]), ValueError, r"points\[1\].*nan"),
    ],
)
def test_bad_input_is_named(points, error, message):
    with pytest.raises(error, match=message):
        convex_hull(points)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_first_row_that_is_not_finite_is_named(dim):
    points = shape("cube", 20_000, dim)
    points[[4000, 3000], [0, 1]] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"points\[3000\]"):
        convex_hull(points)


def test_backends_that_cannot_run_say_so():
    points = torch.rand(5, 2)
    with pytest.raises(ValueError, match="must be one of"):
        convex_hull(points, backend="cuda")
    with pytest.raises(ValueError, match="torch tensors"):
        convex_hull(points.numpy(), backend="triton")
    with pytest.raises(BackendUnavailable, match="CPU"):
        convex_hull(points.to("meta"), backend="numba")


@pytest.mark.parametrize("kind", ["random", "grid"])
def test_space_is_exact_where_qhull_is(kind):
    numbers = random.Random(kind)
    for _ in range(30):
        total = numbers.randint(1, 12)
        points = [[hard_numbers(kind, numbers) for _ in range(3)] for _ in range(total)]
        if len(set(map(tuple, points))) > 3:
            flat = all(exact_orientation(*points[:3], point) == 0 for point in points)
            expected = exact_hull_3d(points) if not flat else None
            assert expected is None or convex_hull(points).tolist() == expected, points


@pytest.mark.parametrize("name", ["cube", "ball", "normal", "sphere"])
def test_space_has_the_vertices_that_qhull_finds(name):
    from scipy.spatial import ConvexHull

    points = shape(name, 20_000, 3)
    assert convex_hull(points).tolist() == sorted(ConvexHull(points).vertices)
    copies = np.concatenate([points[::2], points])
    assert convex_hull(copies).max() < len(points) // 2 + len(points)
    twice = np.concatenate([points, points])
    assert convex_hull(twice).tolist() == sorted(ConvexHull(points).vertices)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flat_sets_in_space_are_exact(axis):
    plane = np.random.default_rng(3).integers(-4, 5, (60, 2)).astype(float)
    flat = np.insert(plane, axis, plane.sum(1), 1)
    assert convex_hull(flat).tolist() == sorted(exact_hull_2d(plane))
    level = np.insert(plane, axis, 0.3, 1)
    assert convex_hull(level).tolist() == sorted(exact_hull_2d(plane))
    line = np.zeros((5, 3))
    line[:, axis] = 3, 1, 4, 1, 4
    assert convex_hull(line).tolist() == [1, 2]
    assert convex_hull(line[[1, 3, 3]]).tolist() == [0]
    assert convex_hull(np.empty((0, 3))).tolist() == []
    assert convex_hull(np.eye(3)).tolist() == [0, 1, 2]


def test_space_that_is_too_thin_for_qhull_is_refused():
    points = shape("cube", 50, 3)
    points[:, 2] = 1.0
    points[7, 2] = 1.0 + 2.0**-52
    with pytest.raises(ValueError, match="plane up to rounding"):
        convex_hull(points)


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize("dim", [2, 3])
def test_tensors(dim, backend, device, monkeypatch):
    if device == "cpu":
        few_directions(monkeypatch)
    if backend == "triton":
        pytest.importorskip("triton")
    points = torch.from_numpy(np.stack([shape("ball", 3000, dim), shape("cube", 3000, dim)]))
    hulls = convex_hull(points.to(device), backend=backend)
    assert len(hulls) == 2
    for found, each in zip(hulls, points, strict=True):
        assert found.device.type == device
        assert found.tolist() == convex_hull(each.numpy()).tolist()
    single = convex_hull(points[0].float().requires_grad_().to(device), backend=backend)
    assert single.tolist() == convex_hull(points[0].float().numpy()).tolist()
    assert [len(h) for h in convex_hull(points[:, :0].to(device), backend=backend)] == [0, 0]
    points[1, 1500, 0] = torch.nan
    with pytest.raises(ValueError, match=r"points\[1500\]"):
        convex_hull(points.to(device), backend=backend)


def ascending(x: np.ndarray) -> bool:
    order = ascending_order(x)
    assert sorted(order.tolist()) == list(range(len(x)))
    return bool((x[order][1:] >= x[order][:-1]).all())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(allow_nan=False), max_size=300))
def test_ascending_order(numbers):
    assert ascending(np.array(numbers, dtype=np.float64))


@pytest.mark.parametrize("low_bits", [4, 20, 31, 32, 52])
@pytest.mark.parametrize("sign", [1, -1])
def test_ascending_order_of_close_numbers(low_bits, sign):
    """From none to all of the numbers agree in the upper halves of their bits."""
    steps = np.random.default_rng(low_bits).integers(0, 2**low_bits, 3000)
    assert ascending(sign * (1 + steps * 2.0**-52))
