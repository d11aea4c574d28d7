"""Tables and the picture of EntropyNet, from records of the suite ``geometry``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

from entropy_attn.benchmarks import moved_points
from entropy_attn.benchmarks.entropy_net import ENTROPY_NET, MEDIANS, SAMPLE_FIRST
from entropy_attn.benchmarks.orders import BRIO, HILBERT, NATIVE, RANDOM
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.tables import full_records, markdown, per_machine

SUITE = "geometry"
ORDERS = (RANDOM, NATIVE, BRIO, SAMPLE_FIRST, MEDIANS, ENTROPY_NET)
TARGET = 1.25


def _cuts(store: Store) -> str:
    def table(records: list[Record]) -> str:
        best = max(r.result["gain"] for r in records)
        ordered = sorted(records, key=lambda r: -r.result["gain"])
        rows = [
            [r.config["by"], f"{r.result['gain']:.3f}", f"{r.result['gain'] / best:.0%}"]
            for r in ordered
        ]
        setup = (
            f"Means over {records[0].config['pieces']} pieces; a cut gains at most log 2 = 0.693."
        )
        return f"{setup}\n\n{markdown(['cut by', 'nats gained', 'of the best'], rows)}"

    return per_machine(store, SUITE, table, kind="net-cut")


def _contests(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    """Records by set and library, then by order."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        title = f"{record.config['points']}, {record.config['n']:,}"
        by_order = found.setdefault((title, record.config["library"]), {})
        by_order[record.config["order"]] = record
    return found


def _times(store: Store) -> str:
    def table(records: list[Record]) -> str:
        rows = []
        for (points, library), by_order in _contests(records).items():
            ratios = [
                f"{by_order[order].result['over_hilbert']:.2f}" if order in by_order else "–"
                for order in ORDERS
            ]
            ms = by_order[HILBERT].result["median_ms"]
            rows.append([points, library, f"{ms:,.0f}", *ratios])
        header = ["points", "library", f"{HILBERT}, ms", *ORDERS]
        return markdown(header, rows)

    return per_machine(store, SUITE, table, kind="net-order")


def _orders(store: Store) -> str:
    """What an order costs and what its entropy is, whichever library follows."""

    def table(records: list[Record]) -> str:
        rows = {}
        for (points, _), by_order in _contests(records).items():
            shown = (HILBERT, BRIO, SAMPLE_FIRST, MEDIANS, ENTROPY_NET)
            found = [by_order[order].result for order in shown]
            times = [by_order[order].result["order_ms"] for order in (HILBERT, ENTROPY_NET)]
            rows[points] = [
                points,
                *(f"{ms:.1f}" for ms in times),
                *(f"{result['relative']:.3f}" for result in found),
            ]
        header = ["points", f"{HILBERT}, ms", f"{ENTROPY_NET}, ms", f"entropy: {HILBERT}"]
        header += [BRIO, SAMPLE_FIRST, MEDIANS, ENTROPY_NET]
        return markdown(header, rows.values())

    return per_machine(store, SUITE, table, kind="net-order")


def _verdict(store: Store) -> str:
    def text(records: list[Record]) -> str:
        contests = _contests(records)
        measured = {k: v for k, v in contests.items() if ENTROPY_NET in v}
        ratios = {k: v[ENTROPY_NET].result["over_hilbert"] for k, v in measured.items()}
        slowest, fastest = max(ratios, key=ratios.get), min(ratios, key=ratios.get)
        # A slow library skips the order of a large set as it comes.
        ordered = {points for (points, _), by_order in contests.items() if NATIVE in by_order}
        real = {key: ratio for key, ratio in ratios.items() if key[0] in ordered}
        better = [k for k, r in real.items() if r < 1]
        within = "within" if ratios[slowest] <= TARGET else "not within"
        lines = [
            f"EntropyNet's order takes {ratios[fastest]:.2f} ({', '.join(fastest)}) to "
            f"{ratios[slowest]:.2f} ({', '.join(slowest)}) of the time of the Hilbert order, the "
            f"network included: {within} the {TARGET} that was aimed at. On the real sets it is "
            f"faster in {len(better)} of {len(real)} pairs of set and library.",
            "Geometric means over all pairs, relative to Hilbert: "
            + ", ".join(f"{order} {_mean(measured, order):.3f}" for order in ORDERS[2:])
            + ".",
            _credit(measured),
        ]
        return "\n".join(f"- {line}" for line in lines)

    return per_machine(store, SUITE, text, kind="net-order")


def _mean(contests: dict[tuple[str, str], dict[str, Record]], order: str) -> float:
    logs = [math.log(by_order[order].result["over_hilbert"]) for by_order in contests.values()]
    return math.exp(fmean(logs))


def _credit(contests: dict[tuple[str, str], dict[str, Record]]) -> str:
    """What the network adds to its own ablation, in words that follow the numbers."""
    net, plain = _mean(contests, ENTROPY_NET), _mean(contests, SAMPLE_FIRST)
    change = net / plain - 1
    if change < -0.02:
        return f"Of that the learned cells are worth {-change:.1%} beside the sample alone."
    owed = "the gain is the sample's" if net < 1 else "neither gains"
    return f"The learned cells change the time by {change:+.1%} beside the sample alone: {owed}."


def _moved_hulls(store: Store) -> str:
    def table(records: list[Record]) -> str:
        rows = []
        for r in _of_the_plan(records):
            found = r.result
            rows.append([
                f"{r.config['points']}, {r.config['n']:,}", f"{r.config['lambda']:g}",
                f"{found['moved_by']:.1%}",
                f"{found['entropy_before']:.2f} → {found['entropy_after']:.2f}",
                _ms(found["net_ms"]), _ms(found["hull_ms"]), f"**{_ms(found['hull_total_ms'])}**",
                _ms(found["qhull_ms"]), f"**{_ms(found['exact_hull_ms'])}**",
                f"{found['area_error']:+.2%}",
                f"{found['vertices_right']} of {found['vertices']}, {found['vertices_wrong']}",
            ])  # fmt: skip
        header = [
            "points", "lambda", "moved by", "H", "network, ms", "Qhull after it", "together",
            "Qhull alone", "ea.geometry.convex_hull", "error of the area", "corners found, wrong",
        ]  # fmt: skip
        return markdown(header, rows)

    return per_machine(store, SUITE, table, kind="moved")


def _moved_triangulations(store: Store) -> str:
    def table(records: list[Record]) -> str:
        rows = [
            [
                f"{r.config['points']}, {r.config['n']:,}",
                f"{r.config['lambda']:g}",
                _ms(r.result["triangulation_total_ms"]),
                _ms(r.result["triangulation_ms"]),
                _ms(r.result["hilbert_ms"]),
                f"{r.result['triangles_kept']:.1%}",
            ]
            for r in _of_the_plan(records)
        ]
        header = [
            "points", "lambda", "network and triangulation, ms", "triangulation alone",
            "Hilbert order and triangulation", "triangles that are right",
        ]  # fmt: skip
        return markdown(header, rows)

    return per_machine(store, SUITE, table, kind="moved")


def _of_the_plan(records: Sequence[Record]) -> list[Record]:
    """Those of the lambdas that are measured now, by set."""
    kept = [r for r in records if r.config["lambda"] in moved_points.Plan.lambdas]
    names = list(dict.fromkeys(r.config["points"] for r in kept))
    return sorted(kept, key=lambda r: (names.index(r.config["points"]), r.config["lambda"]))


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


TABLES: dict[str, Callable[[Store], str]] = {
    "entropy-net-cuts": _cuts,
    "entropy-net-times": _times,
    "entropy-net-orders": _orders,
    "entropy-net-verdict": _verdict,
    "moved-hulls": _moved_hulls,
    "moved-triangulations": _moved_triangulations,
}


def draw(store: Store, folder: Path) -> list[Path]:
    """The cells and the order of EntropyNet, beside Hilbert's."""
    if find_spec("numba") is None or not full_records(store, SUITE, kind="net-order"):
        return []
    from entropy_attn.benchmarks.plots_entropy_net import pictures_of_cells

    path = folder / "entropy_net.png"
    return [path] if pictures_of_cells(path) else []
