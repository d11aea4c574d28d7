"""EntropyNet in the suite ``geometry``: its cuts beside the best, its order beside others.

Kinds of records: "net-cut" is what a cut lowers the entropy of pieces by that training never saw;
"net-order" is the time of an incremental library, the order included (the network too); "moved",
the paper's form, is in `moved_points`.

Two orders take EntropyNet apart: "Hilbert, sample first" has its first round without its cells,
"medians, sample first" has cells too, those of a k-d tree that was not learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import entropy_attn as ea
from entropy_attn.benchmarks import moved_points
from entropy_attn.benchmarks.orders import BRIO, HILBERT, NATIVE, RANDOM
from entropy_attn.benchmarks.points import REAL, REAL_HULLS, PointsNotFound, distinct, family
from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.timing import measure
from entropy_attn.benchmarks.triangulators import TRIANGULATORS, Triangulator

if TYPE_CHECKING:
    from entropy_attn.geometry.train import Pieces

ENTROPY_NET, SAMPLE_FIRST = "EntropyNet", "Hilbert, sample first"
MEDIANS = "medians, sample first"
# What takes many times as long, called once.
_SLOW = (RANDOM, NATIVE)
_SEED_OF_PIECES = 2026

# Lines of coasts, every fourth point of them.
_COAST = {"coast": lambda: REAL_HULLS["coast, high"]()[::4]}
_REAL: dict[str, Callable[[], np.ndarray]] = REAL | _COAST


@dataclass(frozen=True)
class Plan:
    """Sizes of a form.

    Attributes:
        size: points of a family. rounds: of the contest. pieces: that cuts are judged by.
        move: what the paper's form is measured with.
    """

    size: int
    rounds: int
    pieces: int
    families: tuple[str, ...]
    real: tuple[str, ...]
    move: moved_points.Plan

    @classmethod
    def of(cls, form: str) -> Plan:
        families = ("square", "gauss", "clusters")
        if form == "full":
            sets = tuple(_REAL)
            return cls(100_000, 5, 256, families, sets, moved_points.Plan())
        small = moved_points.Plan(size=5000, steps=10, rounds=1, families=("square",))
        return cls(5000, 1, 32, ("square",), ("cities",) if form == "quick" else (), small)


def run(context: Context, plan: Plan | None = None) -> Iterator[Row]:
    plan = plan or Plan.of(context.form)
    if not context.is_measured({"form": context.form, "kind": "net-cut"}):
        yield from _cuts(context, plan)
    for name in context.left(plan.families, _shared):
        yield from _contest(context, name, family(name, plan.size), plan)
    for name in context.left(plan.real, _shared):
        try:
            points = distinct(_REAL[name]())
        except PointsNotFound as error:
            config = {"form": context.form, "kind": "net-order", "points": name}
            yield Row(config, {"status": "unavailable", "reason": str(error)}, f"{name} | {error}")
        else:
            yield from _contest(context, name, points, plan, is_ordered=True)
    yield from moved_points.run(context, plan.move)


def _shared(points: str) -> dict[str, str]:
    return {"kind": "net-order", "points": points}


# --- cuts ---


def _cuts(context: Context, plan: Plan) -> Iterator[Row]:
    from entropy_attn.geometry.learned_order import one_thread
    from entropy_attn.geometry.train import random_pieces

    context.progress("cuts of EntropyNet")
    net = ea.geometry.EntropyNet.pretrained()
    generator = torch.Generator().manual_seed(_SEED_OF_PIECES)
    with one_thread():
        found = gains(net, random_pieces(net, plan.pieces, generator))
    for by, gain in found.items():
        config = {"form": context.form, "kind": "net-cut", "by": by, "pieces": plan.pieces}
        yield Row(config, {"status": "ok", "gain": gain}, f"cuts {by}: {gain:.3f} nats", True)


def gains(net: ea.geometry.EntropyNet, pieces: Pieces) -> dict[str, float]:
    """Mean nats by which a cut lowers the entropy of pieces, by who cuts."""
    from entropy_attn.geometry.train import Cuts

    inside = pieces.inside[..., None]
    seen = torch.where(inside, pieces.points, torch.nan)
    extent = (seen.nan_to_num(nan=-torch.inf).amax(1)) - seen.nan_to_num(nan=torch.inf).amin(1)
    wider = (extent[:, 1] > extent[:, 0])[:, None]

    def at(quantile: float) -> Tensor:
        """(2, batch) gains of the lines across both axes, so many points before them."""
        lines = seen.nanquantile(quantile, 1, keepdim=True)
        beyond = (pieces.points > lines).double()
        return torch.stack([pieces.gain(beyond[..., axis]) for axis in range(2)])

    medians = at(0.5)
    tried = torch.stack([at(quantile) for quantile in np.linspace(0.2, 0.8, 25).tolist()])
    chosen = Cuts.of(net, pieces.points, pieces.inside).sides().double()
    found = {
        ENTROPY_NET: pieces.gain(chosen),
        "the median of the wider side": torch.where(wider[:, 0], medians[1], medians[0]),
        "a median, the side at random": medians.mean(0),
        "the best of 50 lines": tried.amax((0, 1)),
    }
    return {by: gain.mean().item() for by, gain in found.items()}


# --- orders ---


def contestants(points: np.ndarray, is_ordered: bool) -> dict[str, Callable[[], np.ndarray]]:
    """Orders by name, each as a call that makes the permutation."""
    order = ea.geometry.entropy_order
    native = {NATIVE: lambda: np.arange(len(points))} if is_ordered else {}
    return {
        **native,
        RANDOM: lambda: order(points, "random"),
        HILBERT: lambda: order(points),
        BRIO: lambda: order(points, "brio"),
        SAMPLE_FIRST: lambda: sample_first(points),
        MEDIANS: lambda: by_medians(points),
        ENTROPY_NET: lambda: order(points, "learned"),
    }


def sample_first(points: np.ndarray) -> np.ndarray:
    """Hilbert order of the sample that EntropyNet would see, then of the other points."""
    from entropy_attn.geometry import learned_order as learned

    order = ea.geometry.entropy_order(points)
    return learned.sample_first(order, learned.choose_sample(len(points), seed=0))


def by_medians(points: np.ndarray) -> np.ndarray:
    """EntropyNet's order with each piece cut at the median of its wider side."""
    from entropy_attn.geometry.learned_order import learned_order

    return learned_order(_at_medians, points, 0)


def _at_medians(points: Tensor, pieces: Tensor, count: int) -> tuple[Tensor, Tensor]:
    axes, offsets = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.float64)
    by_piece = points[pieces.argsort(stable=True)]
    for piece, rows in enumerate(by_piece.split(pieces.bincount(minlength=count).tolist())):
        if len(rows) > 0:
            axes[piece] = (rows.amax(0) - rows.amin(0)).argmax()
            offsets[piece] = rows[:, axes[piece]].median()
    return axes, offsets


def _contest(
    context: Context, name: str, points: np.ndarray, plan: Plan, is_ordered: bool = False
) -> Iterator[Row]:
    """Every library on every order, the making of the order in the time."""
    context.progress(f"EntropyNet's order of {len(points):,} points, {name}")
    config = {"form": context.form, "kind": "net-order", "points": name, "n": len(points)}
    makers = contestants(points, is_ordered)
    timings = measure({k: [make] for k, make in makers.items()}, seconds=0.5, device="cpu")
    relative = {
        k: ea.geometry.order_entropy(points, make(), relative=True) for k, make in makers.items()
    }
    calls, counts = {}, {}
    for library, found in TRIANGULATORS.items():
        # In random order a walk of startinpy crosses the set: minutes.
        if found.is_incremental and found.is_installed:
            for order, make in makers.items():
                if not (found.is_slow and order in _SLOW and len(points) > 200_000):
                    key = library, order
                    calls[key] = [partial(_triangulate, found, points, make, counts, key)]
    slow = {key: call for key, call in calls.items() if key[1] in _SLOW}
    fast = {key: call for key, call in calls.items() if key not in slow}
    whole = measure(slow, rounds=1, device="cpu") if slow else {}
    whole |= measure(fast, rounds=plan.rounds, device="cpu") if fast else {}
    for (library, order), timing in whole.items():
        result = {
            "status": "ok",
            **timing.as_dict(),
            "order_ms": timings[order].median_ms,
            "relative": relative[order],
            "over_hilbert": timing.median_ms / whole[library, HILBERT].median_ms,
            "triangles": counts[library, order],
            "version": TRIANGULATORS[library].version,
        }
        text = f"{name}, n={len(points):,} | {library}, {order}: {timing.median_ms:.1f} ms"
        text += f", {result['over_hilbert']:.2f} of Hilbert's"
        yield Row({**config, "library": library, "order": order}, result, text, is_ours=True)


def _triangulate(
    library: Triangulator,
    points: np.ndarray,
    make: Callable[[], np.ndarray],
    counts: dict,
    key: tuple,
) -> None:
    counts[key] = len(library.run(points[make()]))
