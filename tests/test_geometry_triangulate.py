"""Triangulations: what makes one Delaunay is checked with rational numbers."""

from __future__ import annotations

import importlib.util
import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

np = pytest.importorskip("numpy")
pytest.importorskip("numba")
spatial = pytest.importorskip("scipy.spatial")

import entropy_attn as ea  # noqa: E402
from entropy_attn.geometry import triangulation as module  # noqa: E402

INSTALLED = [name for name, each in module.LIBRARIES.items() if each.is_installed]
EXACT = [name for name in INSTALLED if module.LIBRARIES[name].exact]
needs_exact = pytest.mark.skipif(not EXACT, reason="no exact library is installed")


def exact(points: np.ndarray) -> list[tuple[Fraction, Fraction]]:
    return [(Fraction(x), Fraction(y)) for x, y in np.asarray(points, np.float64).tolist()]


def turn(a, b, c) -> Fraction:
    """Twice the signed area."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def in_circle(a, b, c, d) -> Fraction:
    """Positive if d lies inside the circle through a, b, c (counterclockwise)."""
    rows = [(p[0] - d[0], p[1] - d[1]) for p in (a, b, c)]
    (ax, ay), (bx, by), (cx, cy) = rows
    squares = [x * x + y * y for x, y in rows]
    minors = (bx * cy - cx * by, ax * cy - cx * ay, ax * by - bx * ay)
    return squares[0] * minors[0] - squares[1] * minors[1] + squares[2] * minors[2]


def hull(points) -> list:
    """Corners of the convex hull, counterclockwise (Andrew's monotone chain)."""
    ordered = sorted(set(points))
    chains = []
    for sequence in (ordered, ordered[::-1]):
        chain: list = []
        for point in sequence:
            while len(chain) > 1 and turn(chain[-2], chain[-1], point) <= 0:
                chain.pop()
            chain.append(point)
        chains += chain[:-1]
    return chains


def check(points: np.ndarray, triangles: np.ndarray) -> None:
    """Counterclockwise, every point used, the hull covered once, and no point inside a circle.

    Circles are checked across each edge; for a triangulation that is enough (Delaunay's lemma).
    """
    at = exact(points)
    corners = [tuple(row) for row in triangles.tolist()]
    assert triangles.dtype == np.int64
    areas = [turn(*(at[i] for i in corner)) for corner in corners]
    assert all(area > 0 for area in areas)
    edges: dict[tuple[int, int], int] = {}
    for a, b, c in corners:
        for edge, opposite in (((a, b), c), ((b, c), a), ((c, a), b)):
            assert edge not in edges, "two triangles on one side of an edge"
            edges[edge] = opposite
    border = [edge for edge in edges if edge[::-1] not in edges]
    for (a, b), c in edges.items():
        d = edges.get((b, a))
        assert d is None or in_circle(at[a], at[b], at[c], at[d]) <= 0
    first = {}
    for index, point in enumerate(at):
        first.setdefault(point, index)
    assert {i for corner in corners for i in corner} == set(first.values())
    assert len(corners) == 2 * len(first) - 2 - len(border), "Euler"
    around = hull(at)
    whole = sum(turn(around[0], b, c) for b, c in itertools.pairwise(around))
    assert sum(areas) == whole


def sets(seed: int, n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    angle = rng.random(n) * 2 * np.pi
    side = np.arange(int(n**0.5))
    pythagoras = [[5, 0], [3, 4], [4, 3], [0, 5], [-3, 4], [-4, 3], [-5, 0], [0, -5], [4, -3]]
    x = rng.uniform(-1, 1, n)
    return {
        "square": rng.random((n, 2)),
        "float32": rng.normal(size=(n, 2)).astype(np.float32),
        "circle": np.column_stack((np.cos(angle), np.sin(angle))),
        "grid": rng.permutation(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)),
        "cocircular": np.array(pythagoras),
        "rounded, with duplicates": np.round(rng.normal(size=(n, 2)), 1),
        "far": rng.random((n, 2)) + 1e12,
        "huge": rng.random((n, 2)) * 1e300,
        "tiny": rng.random((n, 2)) * 1e-300,
        "subnormal": rng.integers(-99, 99, (n, 2)) * 5e-324,
        "flat parabola": np.column_stack((x, 1e-14 * x * x)),
        "nearly a line": np.column_stack((x, x * (1 + rng.integers(-2, 3, n) * 2.0**-52))),
        "two scales": np.concatenate((1e-60 * rng.random((n // 2, 2)), rng.random((n // 2, 2)))),
    }  # fmt: skip


@needs_exact
@pytest.mark.parametrize("library", EXACT)
@pytest.mark.parametrize("name", sets(0, 4))
def test_exact_libraries_are_exact(library, name) -> None:
    for n in (12, 150):
        points = sets(n, n)[name]
        check(points, ea.geometry.triangulate(points, library=library))


@needs_exact
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(3, 40),
    size=st.integers(1, 12),
    library=st.sampled_from(EXACT or ["none"]),
    order=st.sampled_from(["hilbert", "brio", "random", None]),
)
@settings(max_examples=150, deadline=None)
def test_small_integer_sets(seed, n, size, library, order) -> None:
    """Full of duplicates, collinear and cocircular points."""
    points = np.random.default_rng(seed).integers(-size, size, (n, 2))
    triangles = ea.geometry.triangulate(points, library=library, order=order)
    if len(triangles) == 0:
        assert len(hull(exact(points))) <= 2
    else:
        check(points, triangles)


@needs_exact
def test_no_point_lies_in_any_circle() -> None:
    """The definition itself, on a set with ties."""
    points = np.random.default_rng(1).integers(0, 8, (30, 2))
    at = exact(points)
    for a, b, c in ea.geometry.triangulate(points).tolist():
        assert all(in_circle(at[a], at[b], at[c], d) <= 0 for d in at)


@pytest.mark.parametrize("library", INSTALLED)
def test_libraries_agree_in_general_position(library) -> None:
    points = np.random.default_rng(2).random((3000, 2))
    expected = spatial.Delaunay(points).simplices
    for order in ("hilbert", None):
        found = ea.geometry.triangulate(points, library=library, order=order)
        assert found.dtype == np.int64
        assert len(found) == len(expected)
        assert {frozenset(t) for t in found.tolist()} == {frozenset(t) for t in expected.tolist()}
        a, b, c = (points[found[:, i]] for i in range(3))
        areas = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]
        assert (areas > 0).all()
        assert areas.sum() / 2 == pytest.approx(spatial.ConvexHull(points).volume)


@pytest.mark.parametrize("library", INSTALLED)
def test_indices_are_those_of_the_caller(library) -> None:
    points = np.array([[1.0, 1], [0, 0], [1, 0], [0, 0], [-0.0, 0], [1, 1]])
    triangles = ea.geometry.triangulate(points, library=library)
    assert len(triangles) == 1
    row = triangles[0].tolist()
    start = row.index(0)
    assert row[start:] + row[:start] == [0, 1, 2], "counterclockwise, of the first duplicates"


@pytest.mark.parametrize("library", INSTALLED)
@pytest.mark.parametrize(
    "points",
    [
        np.zeros((0, 2)), np.zeros((1, 2)), np.array([[0, 0], [1, 1]]), np.zeros((9, 2)),
        np.array([[0, 0], [1, 1], [0, 0], [1, 1]]), np.stack((np.arange(20), 3 * np.arange(20)), 1),
        np.stack((np.zeros(20), np.arange(20)), 1),
    ],
)  # fmt: skip
def test_without_area_there_are_no_triangles(library, points) -> None:
    triangles = ea.geometry.triangulate(points, library=library)
    assert triangles.shape == (0, 3)
    assert triangles.dtype == np.int64


@needs_exact
def test_what_points_may_be() -> None:
    points = np.random.default_rng(0).integers(0, 100, (50, 2))
    expected = ea.geometry.triangulate(points)
    fortran, strided = np.asfortranarray(points), np.repeat(points, 2, 0)[::2]
    read_only = points.astype(float)
    read_only.setflags(write=False)
    for same in (points.tolist(), torch.from_numpy(points), fortran, strided, read_only,
                 points.astype(np.float32), points.astype(np.uint8)):  # fmt: skip
        assert np.array_equal(ea.geometry.triangulate(same), expected)
    assert np.array_equal(points, np.random.default_rng(0).integers(0, 100, (50, 2)))


@needs_exact
def test_bad_arguments() -> None:
    points = np.array([[0.0, 0], [1, 0], [0, 1]])
    with pytest.raises(ValueError, match="library must be auto, pythoncdt"):
        ea.geometry.triangulate(points, library="cgal")
    with pytest.raises(ValueError, match=r"points\[1\] is \[1.0, nan\]"):
        ea.geometry.triangulate([[0, 0], [1, float("nan")], [0, 1]])
    with pytest.raises(ValueError, match=r"\(n, 2\), got \(5, 3\)"):
        ea.geometry.triangulate(np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"points\[2\].*underflow"):
        ea.geometry.triangulate([[0, 1], [1, 0], [1e-200, 1]])
    with pytest.raises(ValueError, match="needs anchors"):
        ea.geometry.triangulate(points, order="cells")


def test_what_is_missing_is_named(monkeypatch) -> None:
    monkeypatch.setattr(
        module,
        "find_spec",
        lambda name: None if name != "scipy" else importlib.util.find_spec(name),
    )
    points = np.array([[0.0, 0], [1, 0], [0, 1]])
    with pytest.raises(ImportError, match="pip install startinpy"):
        ea.geometry.triangulate(points, library="startinpy")
    with pytest.raises(
        ImportError, match=r"pip install 'entropy-attn\[geometry\]', or pythoncdt or st"
    ):
        ea.geometry.triangulate(points)
    assert len(ea.geometry.triangulate(points, library="scipy")) == 1


def test_the_extra_is_enough(monkeypatch) -> None:
    """On a fresh install of it there is an exact library, and "auto" finds it."""
    tomllib = pytest.importorskip("tomllib")
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    with project.open("rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["geometry"]
    assert "pythoncdt" in extra
    pytest.importorskip("pythoncdt")
    monkeypatch.setattr(
        module, "find_spec", lambda name: importlib.util.find_spec(name) if name in extra else None
    )
    assert module.choose_library().package == "pythoncdt"
    assert len(ea.geometry.triangulate([(0, 0), (1, 0), (0, 1), (1, 1)])) == 2


def test_the_extra_is_named(monkeypatch) -> None:
    import sys

    for name in [n for n in sys.modules if n.split(".")[:2] == ["entropy_attn", "geometry"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(ea, "geometry", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ImportError, match=r"entropy-attn\[geometry\]"):
        _ = ea.geometry


def test_every_edge_is_shared_by_two_at_most() -> None:
    points = np.random.default_rng(3).random((500, 2))
    triangles = ea.geometry.triangulate(points, library=INSTALLED[0])
    sides = ((0, 1), (1, 2), (2, 0))
    edges = Counter(frozenset((t[a], t[b])) for t in triangles.tolist() for a, b in sides)
    assert max(edges.values()) == 2
