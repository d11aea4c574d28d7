"""Convex hulls of points that lie on a GPU: the filter beside a copy, whole hulls beside Qhull.

Hulls of points on the CPU are a part of ``geometry``. Here every hull is compared with that of the
CPU, vertex by vertex, before it is timed; the largest sets go through the filter alone, which must
keep the points that lie furthest in many directions. Qhull runs once, on a copy on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import entropy_attn as ea
from entropy_attn.benchmarks.baselines import our_backend
from entropy_attn.benchmarks.environment import sm_clock_mhz
from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.timing import measure
from entropy_attn.geometry import ops

DIRECTIONS = 64
FILTER, HULL, COPY, QHULL = "filter", "ea.geometry.convex_hull", "copy", "Qhull (scipy), on the CPU"


@dataclass(frozen=True)
class Case:
    """Points of a standard normal distribution.

    Attributes:
        whole: the hull is found, not only what may belong to it.
    """

    points: int
    dim: int
    dtype: str
    whole: bool


def cases(form: str) -> list[Case]:
    if form == "small":
        return [Case(20_000, dim, "float64", True) for dim in (2, 3)]
    most = 10**8 if form == "full" else 10**7
    found = [Case(most, dim, dtype, False) for dim in (2, 3) for dtype in ("float32", "float64")]
    return [*found, *(Case(10**7, dim, "float64", True) for dim in (2, 3))]


def run(context: Context) -> Iterator[Row]:
    for case in context.left(cases(context.form), contestants=(FILTER,)):
        context.progress(f"{case.points:,} points, {case.dim}D, {case.dtype}")
        yield from _run_case(context, case)


def _run_case(context: Context, case: Case) -> Iterator[Row]:
    generator = torch.Generator(context.device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    shape = (case.points, case.dim)
    points = torch.randn(shape, generator=generator, device=context.device, dtype=dtype)
    backend = our_backend(context.device)
    title = f"{case.points:,} points, {case.dim}D, {case.dtype}"
    config = {"form": context.form, **asdict(case)}
    wrong = _wrong(points, backend, case.whole)
    if wrong is not None:
        result = {"status": "wrong", "reason": wrong}
        yield Row({**config, "contestant": FILTER}, result, f"{title} | wrong: {wrong}", True)
        return

    target = torch.empty_like(points)
    calls: dict[str, Any] = {
        FILTER: [lambda: ops.candidates(points[None], backend)],
        COPY: [lambda: target.copy_(points)],
    }
    if case.whole:
        calls[HULL] = [lambda: ea.geometry.convex_hull(points, backend=backend)]
    seconds = {"full": 2.0, "quick": 0.5, "small": 0.05}[context.form]
    timings = measure(calls, seconds=seconds, device=context.device)
    milliseconds = {name: timing.median_ms for name, timing in timings.items()}
    if case.whole:
        milliseconds[QHULL] = _qhull_once(points)
    for name, median in milliseconds.items():
        result: dict[str, Any] = {"status": "ok", "median_ms": median}
        result |= timings[name].as_dict() if name in timings else {}
        result |= {"backend": backend, "sm_clock_mhz": sm_clock_mhz()}
        text = f"{title} | {name}: {median:.3f} ms"
        if name == FILTER:
            # It reads the points once, a copy moves them twice.
            result["bandwidth"] = milliseconds[COPY] / median / 2
            text += f", {result['bandwidth']:.0%} of the copy's bandwidth"
        if name == HULL:
            result["over_qhull"] = milliseconds[QHULL] / median
            text += f", {result['over_qhull']:.0f} x Qhull"
        yield Row({**config, "contestant": name}, result, text, name in (FILTER, HULL))


def _wrong(points: Tensor, backend: str, whole: bool) -> str | None:
    """What the filter or the hull gets wrong, or None."""
    if whole:
        found = set(ea.geometry.convex_hull(points, backend=backend).tolist())
        true = set(ea.geometry.convex_hull(points.cpu().numpy()).tolist())
        if found != true:
            return f"{len(true - found)} vertices are missing, {len(found - true)} too many"
        return None
    kept = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    kept[ops.candidates(points[None], backend)[1]] = True
    directions = torch.randn(DIRECTIONS, points.shape[1], dtype=torch.float64, device=points.device)
    doubles = points.double()
    furthest = [int((doubles @ direction).argmax()) for direction in directions]
    lost = int((~kept[furthest]).sum())
    return f"{lost} of {DIRECTIONS} vertices are lost" if lost else None


def _qhull_once(points: Tensor) -> float:
    """Milliseconds."""
    from scipy.spatial import ConvexHull

    on_cpu: np.ndarray = points.double().cpu().numpy()
    start = time.perf_counter()
    ConvexHull(on_cpu)
    return 1e3 * (time.perf_counter() - start)
