"""Tables and pictures of the convex hulls of the suite ``geometry``."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.tables import by_machine, full_records, markdown, per_machine, slug

SUITE = "geometry"
# As the records have them; importing `hull_contestants` would need numba.
OURS = "ea.geometry.convex_hull"
QHULL = "Qhull (scipy)"

Contest = dict[str, Record]


def contests(records: list[Record], dim: int) -> dict[tuple[str, int], Contest]:
    """Records of kind "hull" by set and number of points, then by library."""
    found: dict[tuple[str, int], Contest] = {}
    for record in records:
        if record.config["dim"] == dim:
            key = record.config["points"], record.config["n"]
            found.setdefault(key, {})[record.config["library"]] = record
    return found


def wrong_vertices(record: Record) -> int | None:
    """Vertices that are missing, and that are none; None where the truth is not known."""
    if "missing" not in record.result:
        return None
    return record.result["missing"] + record.result["surplus"]


def gain(contest: Contest) -> tuple[float, str] | None:
    """How many times as fast as the fastest other library this package is, and which that is."""
    others = {name: r.result["median_ms"] for name, r in contest.items() if name != OURS}
    if OURS not in contest or not others:
        return None
    name = min(others, key=others.__getitem__)
    return others[name] / contest[OURS].result["median_ms"], name


def _table(dim: int) -> Callable[[Store], str]:
    def table(records: list[Record]) -> str:
        found = contests(records, dim)
        libraries = list(dict.fromkeys(name for contest in found.values() for name in contest))
        rows = []
        for (points, n), contest in found.items():
            cells = [_cell(contest[name]) if name in contest else "–" for name in libraries]
            best = gain(contest)
            over_qhull = contest[OURS].result.get("over_qhull")
            rows.append([
                f"{points}, {n:,}",
                f"{contest[OURS].result['vertices']:,}",
                *cells,
                f"{over_qhull:.1f}" if over_qhull else "–",
                f"{best[0]:.1f} ({best[1].split()[0]})" if best else "–",
            ])  # fmt: skip
        header = ["points", "vertices", *libraries, "over Qhull", "over the fastest other"]
        return markdown(header, rows)

    return lambda store: per_machine(store, SUITE, table, kind="hull")


def _cell(record: Record) -> str:
    text, wrong = _ms(record), wrong_vertices(record)
    if wrong is None:
        return f"{text} (unchecked)"
    if wrong == 0:
        return text
    kinds = [
        f"{record.result[kind]:,} {kind}" for kind in ("missing", "surplus") if record.result[kind]
    ]
    return f"{text} (wrong: {', '.join(kinds)})"


def _ms(record: Record) -> str:
    value = record.result["median_ms"]
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _claim(store: Store) -> str:
    """The least and the largest gain over families of a million points."""

    def table(records: list[Record]) -> str:
        rows = []
        for dim, where in ((2, "in the plane"), (3, "in space")):
            found = [c for c in contests(records, dim).values() if OURS in c and QHULL in c]
            if not found:
                continue
            over_qhull = [c[OURS].result["over_qhull"] for c in found]
            over_best = [gain(c)[0] for c in found]
            wrong = [sum(wrong_vertices(c[name]) or 0 for c in found) for name in (OURS, QHULL)]
            spans = (f"{min(each):.1f} to {max(each):.1f}" for each in (over_qhull, over_best))
            rows.append([where, str(len(found)), *spans, *(f"{each:,}" for each in wrong)])
        header = ["1,000,000 points", "sets", "over Qhull", "over the fastest other"]
        return markdown([*header, "wrong vertices", "Qhull's"], rows)

    return per_machine(store, SUITE, table, kind="hull", n=10**6)


def _orders(store: Store) -> str:
    def table(records: list[Record]) -> str:
        sets = list(dict.fromkeys((r.config["points"], r.config["n"]) for r in records))
        orders = list(dict.fromkeys(r.config["order"] for r in records))
        cells = {(r.config["points"], r.config["order"]): r for r in records}
        rows = []
        for order in orders:
            present = [cells[name, order] for name, _ in sets if (name, order) in cells]
            entropy = f"{present[0].result['entropy']:.1f}"
            rows.append([order, entropy, *(_ms(record) for record in present)])
        header = ["order", "left to sort, nats a point", *(f"{name}, {n:,}" for name, n in sets)]
        return markdown(header, rows)

    return per_machine(store, SUITE, table, kind="hull-order")


def _versions(store: Store) -> str:
    def table(records: list[Record]) -> str:
        rows = {r.config["library"]: str(r.result["version"]) for r in records}
        rows["numba, which compiles ours"] = rows.pop(OURS)
        return markdown(["library", "version"], rows.items())

    return per_machine(store, SUITE, table, kind="hull")


def _on_a_gpu(store: Store) -> str:
    def table(records: list[Record]) -> str:
        rows = []
        for r in records:
            config, result = r.config, r.result
            share, times = result.get("bandwidth"), result.get("over_qhull")
            points = f"{config['points']:,}, {config['dim']}D, {config['dtype']}"
            rows.append([
                points, config["contestant"], f"{result['median_ms']:.3f}",
                f"{share:.0%}" if share else "–", f"{times:.0f} x" if times else "–",
            ])  # fmt: skip
        return markdown(["points", "by", "ms", "of a copy's bandwidth", "over Qhull"], rows)

    return per_machine(store, "hull", table)


TABLES: dict[str, Callable[[Store], str]] = {
    "hulls-gpu": _on_a_gpu,
    "hulls-plane": _table(2),
    "hulls-space": _table(3),
    "hulls-claim": _claim,
    "hulls-order": _orders,
    "hulls-versions": _versions,
}


def draw(store: Store, folder: Path) -> list[Path]:
    """Speed-ups over Qhull, the time against the order, and what the filter keeps."""
    from entropy_attn.benchmarks import plots_hulls as plots

    drawn = []
    for machine, records in by_machine(full_records(store, SUITE, kind="hull")):
        panels = {}
        for dim, title in ((2, "in the plane"), (3, "in space")):
            sets = {
                f"{points}, {n:,}": {
                    name: (r.result["over_qhull"], bool(wrong_vertices(r)))
                    for name, r in contest.items()
                    if name != QHULL and "over_qhull" in r.result
                }
                for (points, n), contest in contests(records, dim).items()
                if n != 10**5
            }
            panels[title] = {name: each for name, each in sets.items() if each}
        path = folder / f"hulls_{slug(machine)}.png"
        title = f"convex hulls, times as fast as Qhull, {machine}"
        plots.speed_ups({k: v for k, v in panels.items() if v}, title, path)
        drawn.append(path)
    for machine, records in by_machine(full_records(store, SUITE, kind="hull-order")):
        curves: dict[str, list[tuple[float, float, str]]] = {}
        for r in records:
            point = r.result["entropy"], r.result["median_ms"], r.config["order"]
            curves.setdefault(r.config["points"], []).append(point)
        path = folder / f"hull_orders_{slug(machine)}.png"
        title = f"hull of {records[0].config['n']:,} points, {machine}"
        plots.time_against_order(curves, title, path)
        drawn.append(path)
    if drawn and find_spec("numba") is not None:
        path = folder / "hull_filter.png"
        plots.pictures_of_the_filter(path)
        drawn.append(path)
    return drawn
