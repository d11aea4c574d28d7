"""Convex hulls: every library on families and real sets, each result checked before it is timed.

Records of kind "hull" compare libraries; "hull-order" sets the time of this package's hull against
the order in which the points come.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

import entropy_attn as ea
from entropy_attn.benchmarks.hull_contestants import HULL_LIBRARIES, OURS, QHULL
from entropy_attn.benchmarks.hull_truth import differences, true_vertices
from entropy_attn.benchmarks.points import (
    FAMILIES,
    REAL_HULLS,
    SPACE_FAMILIES,
    PointsNotFound,
    family,
)
from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.timing import measure

# Families where every point, or nearly, is a vertex.
ALL_VERTICES = ("circle", "sphere")


@dataclass(frozen=True)
class HullPlan:
    """A form.

    Attributes:
        families: (name, number of points). real: names of real sets.
        ordered: points of the sets in many orders.
        seconds: about so long is a contest, but for its check.
    """

    families: tuple[tuple[str, int], ...]
    real: tuple[str, ...]
    ordered: int
    seconds: float = 0.2

    @classmethod
    def of(cls, form: str) -> HullPlan:
        if form == "full":
            plane = [(name, n) for n in (10**5, 10**6, 10**7) for name in FAMILIES]
            space = [(name, n) for n in (10**5, 10**6) for name in SPACE_FAMILIES]
            space += [("cube", 10**7), ("gauss, 3D", 10**7)]
            return cls((*plane, *space), tuple(REAL_HULLS), 10**6, 8.0)
        few = tuple((name, 5000) for name in (*FAMILIES, *SPACE_FAMILIES))
        return cls(few, ("cities",) if form == "quick" else (), 5000)


def hull_rows(context: Context, plan: HullPlan | None = None) -> Iterator[Row]:
    plan = plan or HullPlan.of(context.form)
    sizes = context.left(plan.families, lambda f: {"kind": "hull", "points": f[0], "n": f[1]})
    for name, n in sizes:
        yield from _contest(context, name, family(name, n), plan.seconds)
    for name in context.left(plan.real, lambda name: {"kind": "hull", "points": name}):
        try:
            points = REAL_HULLS[name]()
        except PointsNotFound as error:
            config = {"form": context.form, "kind": "hull", "points": name}
            result = {"status": "unavailable", "reason": str(error)}
            yield Row(config, result, f"{name} | {error}")
            continue
        yield from _contest(context, name, points, plan.seconds)
    ordered = ("circle", "square")
    for name in context.left(ordered, lambda name: {"kind": "hull-order", "points": name}):
        yield from _ordered(context, name, plan)


def _contest(context: Context, name: str, points: np.ndarray, seconds: float) -> Iterator[Row]:
    """All libraries on one set: results, then times in interleaved rounds."""
    context.progress(f"hull of {len(points):,} points, {name}")
    n, dim = points.shape
    config = {"form": context.form, "kind": "hull", "points": name, "n": n, "dim": dim}
    calls, found, once = {}, {}, 0.0
    for title, library in HULL_LIBRARIES.items():
        most = library.most_vertices if name in ALL_VERTICES else library.most
        if dim not in library.dims or (n > most and name not in REAL_HULLS):
            continue
        if not library.is_installed:
            reason = f"{library.package} is not installed"
            result = {"status": "unavailable", "reason": reason}
            yield Row({**config, "library": title}, result, f"{title} | {reason}")
            continue
        library.run(points[:5000])  # loads and compiles
        start = time.perf_counter()
        hull = library.run(points)
        once += time.perf_counter() - start
        calls[title] = [partial(library.run, points)]
        found[title] = library.vertices(points, hull)
    truth = true_vertices(points, ea.geometry.convex_hull(points))
    rounds = max(min(int(seconds / once), 9), 3 if once < 30 else 1)
    timings = measure(calls, rounds=rounds, device="cpu")
    qhull = timings.get(QHULL)
    for title, timing in timings.items():
        result = {
            "status": "ok", **timing.as_dict(), "vertices": len(found[title]),
            "version": HULL_LIBRARIES[title].version,
        }  # fmt: skip
        text = f"{name}, n={n:,} | {title}: {timing.median_ms:.1f} ms"
        if qhull is not None:
            result["over_qhull"] = qhull.median_ms / timing.median_ms
            text += f", {result['over_qhull']:.1f}x"
        if truth is not None:
            result["missing"], result["surplus"] = differences(truth, found[title])
            if result["missing"] or result["surplus"]:
                text += f", wrong: {result['missing']:,} missing, {result['surplus']:,} too many"
        # In space Qhull's roundings are this package's as well.
        if title == OURS and dim == 2 and (truth is None or result["missing"] or result["surplus"]):
            result["status"] = "wrong"
        yield Row({**config, "library": title}, result, text, is_ours=title == OURS)


def _ordered(context: Context, name: str, plan: HullPlan) -> Iterator[Row]:
    """The same points in orders from random to sorted."""
    n = plan.ordered
    context.progress(f"hull of {n:,} points in many orders, {name}")
    points = family(name, n)
    orders = orders_along_x(points)
    calls = {order: [partial(ea.geometry.convex_hull, points[p])] for order, p in orders.items()}
    timings = measure(calls, seconds=plan.seconds, device="cpu")
    for order, timing in timings.items():
        config = {"form": context.form, "kind": "hull-order", "points": name, "n": n}
        result = {"status": "ok", **timing.as_dict(), "entropy": sorting_entropy(order, n)}
        text = f"{name}, n={n:,}, {order} | {timing.median_ms:.1f} ms, "
        text += f"{result['entropy']:.1f} nats to sort"
        yield Row({**config, "order": order}, result, text, is_ours=True)


SLABS = (16384, 1024, 64, 4)


def orders_along_x(points: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Permutations from random to ascending in x: slabs of x one after the other, random inside."""
    n = len(points)
    ascending = np.argsort(points[:, 0])
    orders = {"random": np.random.default_rng(seed).permutation(n)}
    for slabs in reversed([s for s in SLABS if s < n]):
        shuffled = np.random.default_rng(seed).random(n) + np.arange(n) * slabs // n
        orders[f"{slabs:,} slabs"] = ascending[np.argsort(shuffled)]
    for runs in (64, 4):
        orders[f"{runs} runs"] = np.concatenate([ascending[i::runs] for i in range(runs)])
    return orders | {"sorted": ascending}


def sorting_entropy(order: str, n: int) -> float:
    """What is left to sort, nats a point: log n! of each slab, and of the ways to merge runs."""
    if order == "sorted":
        return 0.0
    if order == "random":
        return _log_factorial(n) / n
    count, kind = order.replace(",", "").split()
    if kind == "runs":
        return float(np.log(int(count)))
    return _log_factorial(n / int(count)) * int(count) / n


def _log_factorial(n: float) -> float:
    from scipy.special import gammaln

    return float(gammaln(n + 1))
