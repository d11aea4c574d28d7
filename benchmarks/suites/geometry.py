"""Hulls; orders of points: what they cost, their entropy, the triangulations that they speed up.

CPU only. Hulls have a module of their own, `hulls`, and so have the orders of EntropyNet. Of the
others there are four kinds of records: "order" is the time of a permutation; "entropy" sets the
entropy of many orders against run times; "triangulate" compares the main orders at full size, with
the time of ordering apart; "whole" is `ea.geometry.triangulate` against the libraries as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

import entropy_attn as ea
from entropy_attn.benchmarks import entropy_net
from entropy_attn.benchmarks.hulls import hull_rows
from entropy_attn.benchmarks.orders import (
    BRIO,
    HILBERT,
    NATIVE,
    RANDOM,
    all_orders,
    main_orders,
)
from entropy_attn.benchmarks.points import FAMILIES, PointsNotFound, family, real
from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.timing import measure
from entropy_attn.benchmarks.triangulators import TRIANGULATORS, Triangulator

OURS = "ea.geometry.triangulate"


@dataclass(frozen=True)
class Plan:
    """Sizes of a form."""

    large: int
    medium: int
    rounds: int
    large_rounds: int
    families: tuple[str, ...]
    entropy_families: tuple[str, ...]
    large_families: tuple[str, ...]
    real: tuple[str, ...]

    @classmethod
    def of(cls, form: str) -> Plan:
        if form == "full":
            # On a circle exact arithmetic takes the time, minutes of it, whatever the order.
            ranked = tuple(name for name in FAMILIES if name != "circle")
            return cls(
                10**6, 10**5, 3, 2, tuple(FAMILIES), ranked, ("square",), ("cities", "Gaia stars")
            )
        few = ("square", "gauss")
        return cls(20_000, 10_000, 1, 1, few, few, few, ("cities",) if form == "quick" else ())


def run(context: Context) -> Iterator[Row]:
    plan = Plan.of(context.form)
    yield from hull_rows(context)
    for name in context.left(plan.families, partial(_named, "order")):
        yield from _orders(context, name, plan)
    for name in context.left(plan.entropy_families, partial(_named, "entropy")):
        yield from _entropies(context, name, plan)
    for name in context.left(plan.large_families, partial(_named, "whole")):
        points = family(name, plan.large)
        yield from _triangulations(context, name, points, main_orders(points), plan)
        yield from _whole(context, name, points, plan)
    for name in context.left(plan.real, partial(_named, "triangulate")):
        yield from _real(context, name, plan)
    yield from entropy_net.run(context)


def _named(kind: str, points: str) -> dict[str, str]:
    """What the records of a kind share, of one set of points."""
    return {"kind": kind, "points": points}


# --- orders ---


def _orders(context: Context, name: str, plan: Plan) -> Iterator[Row]:
    context.progress(f"orders of {plan.large:,} points, {name}")
    points = family(name, plan.large)
    config = {"form": context.form, "kind": "order", "points": name, "n": len(points)}
    calls = {order: [make] for order, make in main_orders(points).items()}
    calls["numpy.argsort of x"] = [lambda: np.argsort(points[:, 0])]
    timings = measure(calls, seconds=0.5 * plan.rounds, device="cpu")
    for order, timing in timings.items():
        text = f"{name}, n={len(points):,} | {order}: {timing.median_ms:.1f} ms"
        result = {"status": "ok", **timing.as_dict()}
        yield Row({**config, "order": order}, result, text, is_ours=True)


def _entropies(context: Context, name: str, plan: Plan) -> Iterator[Row]:
    """Run times of the incremental libraries against the entropy of the order."""
    context.progress(f"entropy and run time, {name}")
    points = family(name, plan.medium)
    orders = dict(all_orders(points))
    libraries = {k: t for k, t in TRIANGULATORS.items() if t.is_incremental}
    entropies = _entropies_of(points, orders)
    yield from _timed(context, "entropy", name, points, orders, libraries, plan.rounds, entropies)


def _triangulations(
    context: Context,
    name: str,
    points: np.ndarray,
    makers: dict[str, Callable[[], np.ndarray]],
    plan: Plan,
) -> Iterator[Row]:
    context.progress(f"triangulations of {len(points):,} points, {name}")
    timings = measure({order: [make] for order, make in makers.items()}, seconds=0.3, device="cpu")
    orders = {order: make() for order, make in makers.items()}
    extra = {
        order: found | {"order_ms": timings[order].median_ms}
        for order, found in _entropies_of(points, orders).items()
    }
    # What takes minutes at random orders is measured at the medium size.
    large = len(points) > 200_000
    libraries = {k: t for k, t in TRIANGULATORS.items() if not (large and t.is_slow)}
    rounds = plan.large_rounds
    yield from _timed(context, "triangulate", name, points, orders, libraries, rounds, extra)


def _entropies_of(points: np.ndarray, orders: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Exact and soft entropies of each order, the soft ones by the same anchors."""
    x = torch.from_numpy(points)
    soft = ea.RangeEntropy(num_anchors=64)
    soft.reset(x)
    with torch.no_grad():
        return {
            name: {
                "entropy": ea.geometry.order_entropy(points, order),
                "relative": ea.geometry.order_entropy(points, order, relative=True),
                "soft": ea.geometry.soft_order_entropy(x[torch.from_numpy(order)], soft).item(),
            }
            for name, order in orders.items()
        }


def _timed(
    context: Context,
    kind: str,
    name: str,
    points: np.ndarray,
    orders: dict[str, np.ndarray],
    libraries: dict[str, Triangulator],
    rounds: int,
    extra: dict[str, dict[str, Any]],
) -> Iterator[Row]:
    """Every library on every order, in interleaved rounds."""
    config = {"form": context.form, "kind": kind, "points": name, "n": len(points)}
    calls, counts = {}, {}
    for library, found in libraries.items():
        if not found.is_installed:
            yield _absent({**config, "library": library}, found)
            continue
        for order, permutation in orders.items():
            key = library, order
            calls[key] = [partial(_count, found, points[permutation], counts, key)]
    timings = measure(calls, rounds=rounds, device="cpu") if calls else {}
    for (library, order), timing in timings.items():
        result = {
            "status": "ok",
            **timing.as_dict(),
            **extra[order],
            "triangles": counts[library, order],
            "version": TRIANGULATORS[library].version,
        }
        text = f"{name}, n={len(points):,} | {library}, {order}: {timing.median_ms:.1f} ms"
        text += f", entropy {result['entropy']:.2f} ({result['soft']:.2f} soft)"
        yield Row({**config, "library": library, "order": order}, result, text)


def _count(library: Triangulator, points: np.ndarray, counts: dict, key: tuple) -> None:
    counts[key] = len(library.run(points))


def _absent(config: dict[str, Any], library: Triangulator) -> Row:
    reason = f"{library.package} is not installed"
    result = {"status": "unavailable", "reason": reason}
    return Row(config, result, f"{config['library']} | {reason}")


# --- the whole call ---


def _whole(context: Context, name: str, points: np.ndarray, plan: Plan) -> Iterator[Row]:
    """`triangulate`, order included, against libraries on points in random order."""
    context.progress(f"whole triangulations of {len(points):,} points, {name}")
    config = {"form": context.form, "kind": "whole", "points": name, "n": len(points)}
    calls, versions, counts = {}, {}, {}
    for library in ("pythoncdt", "startinpy"):
        if TRIANGULATORS[library].is_installed:
            contestant = f"{OURS}, {library}"
            versions[contestant] = TRIANGULATORS[library].version
            calls[contestant] = [partial(_triangulate, points, library, counts, contestant)]
    for library in ("scipy", "GEOS", "pythoncdt", "Triangle", "shull"):
        found = TRIANGULATORS[library]
        if found.is_installed:
            versions[library] = found.version
            calls[library] = [partial(_count, found, points, counts, library)]
        else:
            yield _absent({**config, "library": library}, found)
    timings = measure(calls, rounds=plan.large_rounds, device="cpu")
    for contestant, timing in timings.items():
        ratio = timings["scipy"].median_ms / timing.median_ms
        result = {
            "status": "ok", **timing.as_dict(), "over_scipy": ratio,
            "triangles": counts[contestant], "version": versions[contestant],
        }  # fmt: skip
        text = f"{name}, n={len(points):,} | {contestant}: {timing.median_ms:.0f} ms, {ratio:.1f}x"
        is_ours = contestant.startswith(OURS)
        yield Row({**config, "library": contestant}, result, text, is_ours=is_ours)


def _triangulate(points: np.ndarray, library: str, counts: dict, key: str) -> None:
    counts[key] = len(ea.geometry.triangulate(points, library=library))


def _real(context: Context, name: str, plan: Plan) -> Iterator[Row]:
    config = {"form": context.form, "kind": "triangulate", "points": name}
    try:
        points = real(name)
    except PointsNotFound as error:
        result = {"status": "unavailable", "reason": str(error)}
        yield Row(config, result, f"{name} | {error}")
        return
    makers: dict[str, Callable[[], np.ndarray]] = {NATIVE: lambda: np.arange(len(points))}
    makers |= {k: v for k, v in main_orders(points).items() if k in (RANDOM, HILBERT, BRIO)}
    yield from _triangulations(context, name, points, makers, plan)
