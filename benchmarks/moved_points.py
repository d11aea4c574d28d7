"""The paper's own form of EntropyNet, as an experiment: points are moved, then handed on.

A network for points with a pooled feature moves each point of a set; it is trained by the Chamfer
distance to the set as it was plus lambda times the range-partition entropy (arXiv 2509.03733). The
hull and the triangulation of the moved points are fast if they are, and wrong as far as points
moved. The network has to look at every point, so its time is part of the total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import entropy_attn as ea
from entropy_attn.benchmarks.points import family
from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.timing import Timing, measure

_WIDTH, _TRAINING_POINTS, _BATCH, _ANCHORS = 64, 256, 8, 16


@dataclass(frozen=True)
class Plan:
    """What is measured: sets of ``size`` points, networks of ``steps`` steps for each lambda."""

    size: int = 200_000
    steps: int = 300
    rounds: int = 3
    families: tuple[str, ...] = ("square", "gauss", "clusters")
    lambdas: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)


class PointMover(nn.Module):
    """Moves points by a network of each point and of the maximum over all; none at first."""

    def __init__(self) -> None:
        super().__init__()
        self.of_points = nn.Sequential(
            nn.Linear(2, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU()
        )
        self.of_set = nn.Linear(_WIDTH, _WIDTH)
        self.to_move = nn.Linear(_WIDTH, 2)
        nn.init.zeros_(self.to_move.weight)
        nn.init.zeros_(self.to_move.bias)

    def forward(self, points: Tensor) -> Tensor:
        """(..., n, 2) float32 to the same; sets of mean 0 and root mean square radius 1."""
        seen = self.of_points(points)
        whole = self.of_set(seen.amax(-2, keepdim=True))
        return points + self.to_move((seen + whole).relu())

    @torch.inference_mode()
    def move(self, points: np.ndarray) -> np.ndarray:
        """(n, 2) float64 to the same, in the unit of the points."""
        middle = points.mean(0)
        radius = np.sqrt(((points - middle) ** 2).sum(1).mean())
        seen = torch.from_numpy((points - middle) / radius).float()
        return self(seen).double().numpy() * radius + middle


def train(weight: float, steps: int, seed: int = 0) -> PointMover:
    """Trained by Chamfer + ``weight`` * H on sets as those of the benchmark, of other numbers."""
    torch.manual_seed(seed)
    net = PointMover()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    names = Plan.families
    for step in range(steps):
        sets = [
            family(
                names[(step + each) % len(names)], _TRAINING_POINTS, seed=1 + step * _BATCH + each
            )
            for each in range(_BATCH)
        ]
        x = torch.from_numpy(np.stack([_normalised(points) for points in sets])).float()
        # Ranges of the sets as they come: what moves is to lie in few of them.
        measure_of = ea.RangeEntropy(_ANCHORS, learn_anchors=False, lloyd_steps=2)
        moved = net(x)
        loss = chamfer(x, moved).mean() + weight * entropy_of(measure_of, x, moved).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def entropy_of(measure_of: ea.RangeEntropy, x: Tensor, moved: Tensor) -> Tensor:
    """(...) entropy of moved points by balls that the points as they were placed."""
    measure_of.reset(x)
    return measure_of(moved)


def chamfer(first: Tensor, second: Tensor) -> Tensor:
    """(...) mean squared distance to the nearest point of the other set, both ways."""
    squared = (first[..., :, None, :] - second[..., None, :, :]).square().sum(-1)
    return squared.amin(-1).mean(-1) + squared.amin(-2).mean(-1)


def _normalised(points: np.ndarray) -> np.ndarray:
    moved = points - points.mean(0)
    return moved / np.sqrt((moved**2).sum(1).mean())


def run(context: Context, plan: Plan) -> Iterator[Row]:
    from entropy_attn.geometry.learned_order import one_thread

    families = context.left(plan.families, lambda name: {"kind": "moved", "points": name})
    if not families:
        return
    context.progress("points moved by a network: training")
    with one_thread():
        movers = {weight: train(weight, plan.steps) for weight in plan.lambdas}
        for name in families:
            context.progress(f"points moved by a network, {name}")
            points = family(name, plan.size)
            config = {"form": context.form, "kind": "moved", "points": name, "n": len(points)}
            for weight, result in _measured(points, movers, plan.rounds).items():
                text = f"{name} moved, lambda {weight:g}: hull {result['hull_total_ms']:.0f} ms "
                text += f"(exact {result['exact_hull_ms']:.1f}), area {result['area_error']:+.2%}"
                yield Row({**config, "lambda": weight}, {"status": "ok", **result}, text)


def _measured(
    points: np.ndarray, movers: dict[float, PointMover], rounds: int
) -> dict[float, dict[str, Any]]:
    moved = {weight: net.move(points) for weight, net in movers.items()}
    triangulate = partial(ea.geometry.triangulate, order=None)
    calls: dict[Any, Callable[[], object]] = {
        "Qhull": lambda: _qhull(points),
        "exact hull": lambda: ea.geometry.convex_hull(points),
        "triangulation": lambda: triangulate(points),
        "Hilbert, triangulation": lambda: ea.geometry.triangulate(points),
    }
    for weight, net in movers.items():
        calls["net", weight] = partial(net.move, points)
        calls["Qhull", weight] = partial(_qhull, moved[weight])
        calls["triangulation", weight] = partial(triangulate, moved[weight])
    timings = measure(
        {k: [call] for k, call in calls.items()}, seconds=0, min_rounds=rounds, device="cpu"
    )

    def ms(key: Any) -> float:
        timing: Timing = timings[key]
        return timing.median_ms

    hull = ea.geometry.convex_hull(points)
    area, triangles = _area(points[hull]), _as_set(triangulate(points))
    x = torch.from_numpy(points)
    measure_of = ea.RangeEntropy(64)
    before = entropy_of(measure_of, x, x).item()
    radius = np.sqrt(((points - points.mean(0)) ** 2).sum(1).mean())
    found = {}
    for weight in movers:
        net_ms, there = ms(("net", weight)), moved[weight]
        corners = ea.geometry.convex_hull(there)
        kept = np.isin(_as_set(triangulate(there)), triangles, assume_unique=True).sum()
        found[weight] = {
            "entropy_before": before,
            "entropy_after": measure_of(torch.from_numpy(there)).item(),
            "moved_by": float(np.sqrt(((there - points) ** 2).sum(1).mean()) / radius),
            "net_ms": net_ms,
            "hull_ms": ms(("Qhull", weight)),
            "hull_total_ms": net_ms + ms(("Qhull", weight)),
            "qhull_ms": ms("Qhull"),
            "exact_hull_ms": ms("exact hull"),
            "area_error": _area(there[corners]) / area - 1,
            "vertices": len(hull),
            "vertices_right": len(np.intersect1d(hull, corners)),
            "vertices_wrong": len(np.setdiff1d(corners, hull)),
            "triangulation_total_ms": net_ms + ms(("triangulation", weight)),
            "triangulation_ms": ms("triangulation"),
            "hilbert_ms": ms("Hilbert, triangulation"),
            "triangles_kept": float(kept / len(triangles)),
        }
    return found


def _qhull(points: np.ndarray) -> object:
    from scipy.spatial import ConvexHull

    return ConvexHull(points)


def _area(corners: np.ndarray) -> float:
    """Of a counterclockwise polygon (m, 2)."""
    x, y = (corners - corners[0]).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _as_set(triangles: np.ndarray) -> np.ndarray:
    """(m,) one number for each triangle, whichever corner is named first; n below 2^21."""
    a, b, c = np.sort(triangles, 1).T
    return (a << 42) | (b << 21) | c
