"""Tables and pictures of the suite ``geometry``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.tables import by_machine, full_records, markdown, per_machine, slug

SUITE = "geometry"
MEASURES = {"entropy": "exact", "relative": "relative", "soft": "soft"}


def spearman(records: Sequence[Record], measure: str) -> float:
    """Rank correlation of a measure of the order with the run time, over records of one library."""
    return _spearman([r.result[measure] for r in records], [r.result["median_ms"] for r in records])


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def _groups(records: Iterable[Record], *names: str) -> dict[tuple, list[Record]]:
    """Records by the values of these names in their configuration, in the order of appearance."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.config[name] for name in names), []).append(record)
    return found


def _correlations(store: Store) -> str:
    def table(records: list[Record]) -> str:
        rows = []
        for (points,), found in _groups(records, "points").items():
            libraries = [group for (_,), group in _groups(found, "library").items()]
            cells = [f"{spearman(g, name):.2f}" for g in libraries for name in MEASURES]
            pairs = itertools.combinations(libraries, 2)
            between = [f"{_times_agree(a, b):.2f}" for a, b in pairs]
            one = libraries[0]
            agree = _spearman([r.result["entropy"] for r in one], [r.result["soft"] for r in one])
            rows.append([points, *cells, f"{agree:.2f}", ", ".join(between)])
        libraries = [library for (library,) in _groups(records, "library")]
        header = ["points"]
        header += [f"{library}: {name}" for library in libraries for name in MEASURES.values()]
        header += ["soft with exact", "library with library"]
        orders = len(_groups(records, "order"))
        setup = (
            f"Spearman's rank correlation over {orders} orders of "
            f"{records[0].config['n']:,} points. The last column is that of the run times of two "
            "libraries, in the order of the columns: where they disagree no one measure can follow "
            "both."
        )
        return f"{setup}\n\n{markdown(header, rows)}"

    return per_machine(store, SUITE, table, kind="entropy")


def _times_agree(first: Sequence[Record], second: Sequence[Record]) -> float:
    times = {r.config["order"]: r.result["median_ms"] for r in second}
    shared = [r for r in first if r.config["order"] in times]
    return _spearman(
        [r.result["median_ms"] for r in shared], [times[r.config["order"]] for r in shared]
    )


def _by_order(kind: str, unit: Callable[[Record], str]) -> Callable[[Store], str]:
    """A row for each set (and library), a column for each order."""

    def table(records: list[Record]) -> str:
        names = ("points", "n", "library") if kind != "order" else ("points", "n")
        orders = list(dict.fromkeys(r.config["order"] for r in records))
        rows = []
        for key, found in _groups(records, *names).items():
            cells = {r.config["order"]: unit(r) for r in found}
            title = f"{key[0]}, {key[1]:,}" + "".join(f", {part}" for part in key[2:])
            row = [title, *(cells.get(order, "–") for order in orders)]
            rows.append(row + ([_gain(found)] if kind != "order" else []))
        header = ["points", *orders] + (["random over best"] if kind != "order" else [])
        return markdown(header, rows)

    return lambda store: per_machine(store, SUITE, table, kind=kind)


def _gain(found: list[Record]) -> str:
    """Run time of the random order over the best one with the time of ordering."""
    random = [r.result["median_ms"] for r in found if r.config["order"] == "random"]
    others = [
        r.result["median_ms"] + r.result.get("order_ms", 0.0)
        for r in found
        if r.config["order"] != "random"
    ]
    return f"{random[0] / min(others):.1f}" if random and others else "–"


def _ms(record: Record) -> str:
    value = record.result["median_ms"]
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _versions(store: Store) -> str:
    def table(records: list[Record]) -> str:
        rows = {r.config["library"]: str(r.result["version"]) for r in records}
        return markdown(["library", "version"], sorted(rows.items()))

    return per_machine(store, SUITE, table, kind="triangulate")


def _whole(store: Store) -> str:
    def table(records: list[Record]) -> str:
        ordered = sorted(records, key=lambda r: (r.config["points"], r.result["median_ms"]))
        rows = [
            [
                f"{r.config['points']}, {r.config['n']:,}",
                r.config["library"],
                _ms(r),
                f"{r.result['over_scipy']:.1f}",
                f"{r.result['triangles']:,}",
            ]
            for r in ordered
        ]
        header = ["points", "by", "ms", "times as fast as scipy", "triangles"]
        return markdown(header, rows)

    return per_machine(store, SUITE, table, kind="whole")


TABLES: dict[str, Callable[[Store], str]] = {
    "geometry-orders": _by_order("order", _ms),
    "geometry-correlations": _correlations,
    "geometry-triangulations": _by_order("triangulate", _ms),
    "geometry-whole": _whole,
    "geometry-versions": _versions,
}


def draw(store: Store, folder: Path) -> list[Path]:
    """Run time against entropy, one picture a machine; and the orders themselves."""
    from entropy_attn.benchmarks import plots_geometry as plots

    drawn = []
    for machine, records in by_machine(full_records(store, SUITE, kind="entropy")):
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for (library, points), found in _groups(records, "library", "points").items():
            best = min(r.result["median_ms"] for r in found)
            curve = [(r.result["relative"], r.result["median_ms"] / best) for r in found]
            panels.setdefault(library, {})[points] = curve
        titles = {
            library: f"{library}\nSpearman {_typical(records, library):.2f}" for library in panels
        }
        path = folder / f"geometry_entropy_{slug(machine)}.png"
        count = records[0].config["n"]
        title = f"{count:,} points in many orders, {machine}"
        plots.time_against_entropy({titles[k]: v for k, v in panels.items()}, title, path)
        drawn.append(path)
    if drawn and find_spec("numba") is not None:
        path = folder / "geometry_orders.png"
        plots.pictures_of_orders(path)
        drawn.append(path)
    return drawn


def _typical(records: Sequence[Record], library: str) -> float:
    """The median over sets of points of the correlation that the picture shows."""
    mine = [r for r in records if r.config["library"] == library]
    return median(spearman(found, "relative") for found in _groups(mine, "points").values())
