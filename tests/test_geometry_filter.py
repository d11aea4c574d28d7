"""The filter drops only what is strictly inside the hull, on the CPU and in Triton."""

from __future__ import annotations

import itertools
import math
import random

import pytest

pytest.importorskip("numba")

import numpy as np
import torch
from hull_cases import KINDS, exact_hull_3d, exact_orientation, few_directions, hard_numbers

from entropy_attn.geometry import filter as hull_filter
from entropy_attn.geometry import ops
from entropy_attn.geometry.polytope import halfspaces, triangles
from entropy_attn.reference import hull_filter as reference


def is_strictly_inside(point, vertices, planes) -> bool:
    """By the exact side of each plane through vertices; `planes` are index tuples."""
    for plane in planes:
        corners = [vertices[i] for i in plane]
        inner = {exact_orientation(*corners, vertex) for vertex in vertices} - {0}
        if exact_orientation(*corners, point) not in inner:
            return False
    return True


def supporting_planes(vertices, dim):
    """Index tuples of all lines (planes) through two (three) vertices with none on one side."""
    found = []
    for chosen in itertools.combinations(range(len(vertices)), dim):
        corners = [vertices[i] for i in chosen]
        if len({exact_orientation(*corners, vertex) for vertex in vertices} - {0}) == 1:
            found.append(chosen)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [2, 3])
def test_what_is_dropped_is_strictly_inside(dim, kind):
    numbers = random.Random(f"{dim} {kind}")
    dropped = 0
    for _ in range(12):
        drawn = [[hard_numbers(kind, numbers) for _ in range(dim)] for _ in range(28)]
        vertices, points = np.unique(drawn[:8], axis=0), drawn[8:]
        planes = supporting_planes(vertices, dim)
        middle = vertices / len(vertices)
        points += [middle.sum(0), *vertices, *(vertices / 2 + vertices[0] / 2)]
        kept = hull_filter.outside(np.array(points), *halfspaces(vertices))[0]
        for i in set(range(len(points))) - set(kept.tolist()):
            assert planes
            assert is_strictly_inside(points[i], vertices, planes)
            dropped += 1
    assert dropped > 0 or kind in ("ends", "any", "mixed")


@pytest.mark.parametrize("dim", [2, 3])
def test_halfspaces_are_those_of_the_facets(dim):
    """The corners of a cube, the middles of its edges and faces."""
    grid = np.stack(np.meshgrid(*[[0.0, 1.0, 2.0]] * dim), -1).reshape(-1, dim)
    normals, thresholds, box = halfspaces(grid)
    planes = np.column_stack((normals, thresholds.round(9)))
    planes /= np.abs(normals).max(1)[:, None]
    expected = [[*row, offset] for s, offset in ((1, 0), (-1, -2)) for row in s * np.eye(dim)]
    assert {tuple(plane) for plane in (planes + 0.0).tolist()} == {tuple(p) for p in expected}
    assert box.tolist() == [2.0] * dim
    assert hull_filter.outside(grid, normals, thresholds, box)[0].tolist() == [
        i for i, point in enumerate(grid) if not (point == 1.0).all()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_triangles_are_the_surface_of_the_hull(kind):
    numbers = random.Random(kind)
    for _ in range(8):
        points = [[hard_numbers(kind, numbers) for _ in range(3)] for _ in range(9)]
        points += points[:2]
        found = triangles(np.array(points)).tolist()
        edges = [pair for a, b, c in found for pair in ((a, b), (b, c), (c, a))]
        assert len(set(edges)) == len(edges), "some edge has two triangles on one side"
        assert {(b, a) for a, b in edges} == set(edges), "the surface is not closed"
        for a, b, c in found:
            corners = [points[a], points[b], points[c]]
            sides = {exact_orientation(*corners, point) for point in points}
            assert sides == {0, 1}, points
        assert not found or set(exact_hull_3d(points)) <= {
            points.index(points[i]) for i, _ in edges
        }


@pytest.mark.parametrize("dim", [2, 3])
def test_flat_polytopes_hold_nothing(dim):
    line = np.arange(4.0)[:, None] * np.arange(1.0, dim + 1)
    for vertices in (line, line[:1], line[:0]):
        limits = halfspaces(vertices)
        assert hull_filter.outside(line, *limits)[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dim", [2, 3])
def test_extremes_are_the_furthest(dim):
    points = np.random.default_rng(0).normal(size=(1777, dim))
    towards = hull_filter.directions(64, dim)
    assert np.allclose(np.linalg.norm(towards, axis=1), 1)
    assert (hull_filter.extremes(points, towards) == (points @ towards.T).argmax(0)).all()


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_kept(dim, bad):
    points = np.random.default_rng(1).random((20_000, dim))
    points[[0, 1234, 19_999], [0, 1, dim - 1]] = bad
    assert {0, 1234, 19_999} <= set(hull_filter.candidates(points)[0].tolist())


def test_overflows_keep_points():
    """The corners are so large that products with them overflow."""
    corners = np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
    for scale in (1e308, 1e200, 1e150, 1e-150, 5e-324):
        square = corners * scale
        points = np.concatenate([square, [(0.0, 0.0), (1.7e308, 1.7e308), (1.7e308, -1.7e308)]])
        kept = hull_filter.outside(points, *halfspaces(square))[0]
        assert {0, 1, 2, 3, 5, 6} <= set(kept.tolist())
        assert (4 in kept) == (scale not in (1e150, 1e-150, 1.0))


@pytest.fixture
def candidates(monkeypatch, device):
    """The filter of tensors, as a list of kept rows a batch row."""
    if device == "cpu":
        few_directions(monkeypatch)

    def found(points, backend):
        if backend == "triton":
            pytest.importorskip("triton")
        which, index = (each.tolist() for each in ops.candidates(points, backend))
        assert which == sorted(which)
        rows = [[] for _ in points]
        for batch, row in zip(which, index, strict=True):
            rows[batch].append(row)
        return rows

    return found


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float64, "packed"),
        (torch.float32, "packed"),
        (torch.float32, "unaligned"),
        (torch.float16, "strided"),
    ],
)
@pytest.mark.parametrize("dim", [2, 3])
def test_filters_of_tensors_agree_with_numba(dim, dtype, layout, device, candidates):
    """Halfspaces that keep the same points: no extreme points of these lie in one face."""
    batch, total = 3, 1337
    # A ball, a flat set, copies of one point.
    points = torch.randn(batch, total, dim, dtype=torch.float64)
    points[1, :, 0] = 0.5
    points[2] = 1.0
    points = points.to(dtype).to(device)
    if layout == "strided":
        points = points.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    elif layout == "unaligned":
        points = points[:, 1:]
    towards = torch.from_numpy(hull_filter.directions(ops.DIRECTIONS, dim)).to(device)
    found = reference.extreme_points(points, towards).cpu()
    assert found.shape == (batch, ops.DIRECTIONS)
    assert found[2].tolist() == [0] * ops.DIRECTIONS
    reach = points.cpu().double() @ towards.cpu().T
    furthest = reach.gather(1, found[:, None])[:, 0]
    assert torch.allclose(furthest, reach.amax(1), rtol=1e-14, atol=1e-14)

    exact = np.ascontiguousarray(points[0].cpu().double().numpy())
    vertices = np.unique(exact[found[0].numpy()], axis=0)
    expected = hull_filter.outside(exact, *halfspaces(vertices))[0].tolist()
    everything = list(range(points.shape[1]))
    assert len(expected) < total // 2
    for backend in ("reference", "triton"):
        assert candidates(points, backend) == [expected, everything, everything]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [2, 3])
def test_triton_drops_only_what_is_strictly_inside(dim, kind, device, candidates):
    numbers = random.Random(f"{dim} {kind} triton")
    drawn = [
        [[hard_numbers(kind, numbers) for _ in range(dim)] for _ in range(7)] for _ in range(3)
    ]
    points = torch.tensor(drawn, dtype=torch.float64)
    middles = (points[:, ::2] / 2 + points[:, :1] / 2, (points / 7).sum(1, keepdim=True))
    points = torch.cat((points, *middles), 1)
    total = 0
    for each in (points, points[:1].float()):
        kept = candidates(each.to(device), "triton")
        for rows, found in zip(each.tolist(), kept, strict=True):
            dropped = set(range(len(rows))) - set(found)
            vertices = np.unique([rows[i] for i in found if np.isfinite(rows[i]).all()], axis=0)
            planes = supporting_planes(vertices, dim) if dropped else []
            for i in dropped:
                assert planes
                assert is_strictly_inside(rows[i], vertices, planes)
            total += len(dropped)
    assert total > 0 or kind in ("ends", "any", "mixed")


@pytest.mark.parametrize("kind", ["lattice", "clipped"])
def test_triton_drops_what_is_in_a_box(kind, device, candidates):
    """Extreme points that tie along edges and on faces leave a polytope with an inside."""
    numbers = torch.Generator().manual_seed(0)
    points = torch.randn(2000, 3, generator=numbers).clamp(-1, 1)
    if kind == "lattice":
        points = torch.cartesian_prod(*3 * [torch.arange(9.0)])
        points = points[torch.randperm(len(points), generator=numbers)]
    assert len(candidates(points[None].to(device), "triton")[0]) < 0.7 * len(points)


def test_too_many_planes_keep_all_points(monkeypatch, device, candidates):
    kernels = pytest.importorskip("entropy_attn.kernels.hull_filter")
    points = torch.randn(1, 300, 2, device=device)
    assert len(candidates(points, "triton")[0]) < 300
    monkeypatch.setattr(kernels, "CAPACITY", 4)
    assert len(candidates(points, "triton")[0]) == 300


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [2, 3])
def test_triton_keeps_what_is_on_the_border(dim, dtype, device, candidates):
    """Boxes: an ellipsoid inside touches each face in its middle, and must not cut there."""
    factors = torch.tensor([1.0, 1.1, 0.9])[:dim]
    low = (torch.tensor([0.1, 1000.0, -7.77])[:, None] * factors).to(dtype)
    high = (low + torch.tensor([0.3, 9.0, 0.1])[:, None]).to(dtype)
    sides = itertools.product([False, True], repeat=dim)
    border = [torch.where(torch.tensor(side), high, low) for side in sides]
    middle = low / 2 + high / 2
    for axis in range(dim):
        for side in (low, high):
            face = middle.clone()
            face[:, axis] = side[:, axis]
            border.append(face)
    points = torch.stack([*border, middle], 1).to(device)
    assert candidates(points, "triton") == [list(range(len(border)))] * len(points)
    # A little inside of the faces anything may happen, but for those on them.
    scaled = torch.stack([middle + (each - middle) * 0.999 for each in border], 1).to(device)
    for kept in candidates(torch.cat((points, scaled), 1), "triton"):
        assert set(range(len(border))) <= set(kept)


@pytest.mark.parametrize("dim", [2, 3])
def test_triton_keeps_what_is_not_finite(dim, device, candidates, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("entropy_attn.kernels.hull_filter"), "PARTS", {dim: 2})
    points = torch.randn(2, 2050, dim)
    for row, axis, bad in (
        (0, 0, math.nan), (777, 1, math.inf), (2048, dim - 1, -math.inf), (2049, 0, math.nan),
    ):  # fmt: skip
        points[1, row, axis] = bad
    kept = candidates(points.to(device), "triton")
    assert {0, 777, 2048, 2049} <= set(kept[1])
    assert max(map(len, kept)) < 2050 // 2
    nothing = torch.full((1, 5, dim), math.nan, device=device)
    assert candidates(nothing, "triton") == [[0, 1, 2, 3, 4]]


def test_more_points_are_kept_than_expected(monkeypatch, device, candidates):
    kernels = pytest.importorskip("entropy_attn.kernels.hull_filter")
    angle = torch.arange(5000, device=device, dtype=torch.float64)
    points = torch.stack((angle.cos(), angle.sin()), 1)[None]
    points[0, ::5] *= 0.5
    expected = candidates(points, "triton")
    assert set(expected[0]) >= {i for i in range(5000) if i % 5}
    assert len(expected[0]) < 5000
    monkeypatch.setattr(kernels, "EXPECTED", 100)
    monkeypatch.setattr(kernels, "RUN", 2 * kernels.TILE)
    monkeypatch.setattr(kernels, "SIEVES", 1)
    assert candidates(points, "triton") == expected


@pytest.mark.gpu
def test_the_filter_waits_for_the_gpu_once(forbid_waiting):
    from entropy_attn.kernels import hull_filter as kernels

    points = torch.randn(2, 100_000, 3, device="cuda")
    towards = ops._directions(64, 3, points.device)
    with forbid_waiting():
        place, kept = kernels._sieve(points, *kernels._polytope(points, towards, 1))
        found = kernels._gather(place, kept, kept.cumsum(0), 2, 200_000)
    number = int(kept.sum())
    which, index = ops.candidates(points, "triton")
    assert number == len(which)
    assert torch.equal(found[:, :number], torch.stack((which, index)))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [2, 3])
def test_large_offsets_on_the_gpu(dim):
    """More than 2^31 numbers: addresses are 64 bits wide."""
    total = 2**31 // dim + 100_000
    points = torch.rand(1, total, dim, dtype=torch.float16, device="cuda")
    points[0, -7] = 2.0
    which, index = ops.candidates(points, "triton")
    assert total - 7 in index.tolist()
    assert len(index) < total // 10
    assert (which == 0).all()
