"""Tables and pictures of README and docs, generated from the result store and never typed.

A table stands between ``<!-- begin:NAME -->`` and ``<!-- end:NAME -->``; NAME is one of `TABLES`.
It covers every machine that was measured, or with ``<!-- begin:NAME:newest -->`` the last one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_attn.benchmarks import (
    figures,
    report_entropy_net,
    report_finetune,
    report_geometry,
    report_hulls,
    report_models,
    report_vision,
)
from entropy_attn.benchmarks.baselines import OURS, OURS_WITH_ENTROPY, is_sparse
from entropy_attn.benchmarks.cases import mask_words
from entropy_attn.benchmarks.prose import PARTS
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.tables import (
    EMPTY,
    Newest,
    by_machine,
    commit,
    full_records,
    markdown,
    per_machine,
    slug,
)

if TYPE_CHECKING:
    from entropy_attn.benchmarks import plots

_NEWEST = ":newest"
_MARKED = re.compile(rf"(<!-- begin:([\w-]+)({_NEWEST})? -->\n).*?(<!-- end:\2 -->)", re.DOTALL)
_BEGIN = re.compile(rf"<!-- begin:([\w-]+)(?:{_NEWEST})? -->")


def fill(text: str, store: Store) -> str:
    """``text`` with every marked table replaced by the current one.

    Raises:
        ValueError: a marker names no table, or has no end.
    """
    names = _BEGIN.findall(text)
    unknown = sorted(set(names) - set(TABLES))
    if unknown:
        raise ValueError(f"no table is called {unknown[0]!r}; there are {sorted(TABLES)}")

    def table(match: re.Match[str]) -> str:
        begin, name, newest, end = match.groups()
        return f"{begin}{TABLES[name](Newest(store.directory) if newest else store)}\n{end}"

    filled, count = _MARKED.subn(table, text)
    if count != len(names):
        raise ValueError("a <!-- begin:NAME --> has no <!-- end:NAME --> after it")
    return filled


def case_name(config: dict) -> str:
    """A short name of an attention case."""
    words = [f"D={config['head_dim']}"]
    if config["is_causal"]:
        words.append("causal")
    words.append(mask_words(config))
    words += ["irregular"] * config["irregular"] + [config.get("pattern")] * ("pattern" in config)
    return ", ".join(words)


def cases_of(records: list[Record]) -> dict[str, dict[str, Record]]:
    """Records of the suite ``attention`` by case, then by contestant."""
    cases: dict[str, dict[str, Record]] = {}
    for record in records:
        case = cases.setdefault(case_name(record.config), {})
        case[record.config["contestant"]] = record
    return cases


def _attention(direction: str) -> Callable[[Store], str]:
    def table(records: list[Record]) -> str:
        records = figures.of_one_length(records)
        cases = cases_of(records)
        names = list(dict.fromkeys(name for case in cases.values() for name in case))
        names = [name for name in names if name != OURS_WITH_ENTROPY]
        rows = []
        for title, case in cases.items():
            fastest = min(r.result["median_ms"] for n, r in case.items() if n in names)
            cells = []
            for name in names:
                if name not in case:
                    cells.append("–")
                    continue
                found = case[name].result
                cell = f"{found['tflops']:.0f} ({found['median_ms']:.2f} ms)"
                cells.append(f"**{cell}**" if found["median_ms"] == fastest else cell)
            rows.append([title, *cells])
        config = records[0].config
        setup = (
            f"TFLOP/s on visited tiles, {direction}, {config['dtype']}, B={config['batch']} "
            f"H={config['heads']} N={config['length']}. Dense contestants visit every tile; the "
            "fastest is in bold."
        )
        return f"{setup}\n\n{markdown(['case', *names], rows)}"

    return lambda store: per_machine(store, "attention", table, direction=direction)


def _attention_lengths(direction: str) -> Callable[[Store], str]:
    def table(records: list[Record]) -> str:
        main = records[0].config["length"]
        others = [r for r in records if r.config["length"] != main]
        if not others:
            return EMPTY
        found: dict[tuple[int, str], dict[str, str]] = {}
        for r in sorted(others, key=lambda r: r.config["length"]):
            cells = found.setdefault((r.config["length"], case_name(r.config)), {})
            speed, time = r.result["tflops"], r.result["median_ms"]
            cells[r.config["contestant"]] = f"{speed:.0f} ({time:.3g} ms)"
        names = list(dict.fromkeys(name for cells in found.values() for name in cells))
        names = [name for name in names if name != OURS_WITH_ENTROPY]
        rows = [
            [str(n), case, *(cells.get(name, "–") for name in names)]
            for (n, case), cells in found.items()
        ]
        return markdown(["N", "case", *names], rows)

    return lambda store: per_machine(store, "attention", table, direction=direction)


def _entropy_overhead(store: Store) -> str:
    def table(records: list[Record]) -> str:
        rows = []
        for title, case in cases_of(figures.of_one_length(records)).items():
            if OURS in case and OURS_WITH_ENTROPY in case:
                plain, both = (case[n].result["median_ms"] for n in (OURS, OURS_WITH_ENTROPY))
                rows.append([title, f"{plain:.2f}", f"{both:.2f}", f"{both / plain - 1:+.1%}"])
        return markdown(["case", "output, ms", "and both entropies, ms", "more"], rows)

    return per_machine(store, "attention", table, direction="forward")


def _selection(store: Store) -> str:
    def table(records: list[Record]) -> str:
        # Older records of more combinations, and without the steps, where there are no others.
        records = [r for r in records if "copy_ms" in r.result] or records
        rows = [
            [
                f"D={r.config['head_dim']}, blocks of {r.config['block']}"
                + (", causal" if r.config["is_causal"] else "")
                + (f", {r.config['kv_heads']} heads of keys" if "kv_heads" in r.config else ""),
                r.config["scorer"],
                r.config["budget"],
                f"{r.result['median_ms']:.3f}",
                _ms(r.result.get("pool_ms")),
                _ms(r.result.get("copy_ms")),
                f"{r.result['attention_ms']:.3f}",
                f"{r.result['share']:.1%}",
            ]
            for r in records
        ]
        header = [
            "case", "scorer", "budget", "selection, ms", "of it pooling, ms",
            "a copy of as many bytes, ms", "attention at 0.2, ms", "share",
        ]  # fmt: skip
        return markdown(header, rows)

    return per_machine(store, "select", table, kind="select")


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _crossed(
    records: list[Record], row: str, column: str, value: str
) -> tuple[list[str], list[list[str]]]:
    """The columns, and the rows of a table: a value of the results by two of the configuration."""
    table: dict[str, dict[str, str]] = {}
    for r in records:
        cells = table.setdefault(str(r.config[row]), {})
        cells[r.config[column]] = f"{r.result[value]:.3f}"
    names = list(dict.fromkeys(name for cells in table.values() for name in cells))
    rows = [[title, *(cells.get(name, "–") for name in names)] for title, cells in table.items()]
    return names, rows


def _reordering(store: Store) -> str:
    def table(records: list[Record]) -> str:
        names, rows = _crossed(records, "length", "step", "median_ms")
        config = records[0].config
        setup = (
            f"ms; D={config['head_dim']}, B={config['batch']}, H={config['heads']}, "
            f"{config['dtype']}; sparse attention at a density of {config['density']:g} of blocks "
            f"of {config['block']}."
        )
        return f"{setup}\n\n{markdown(['N', *names], rows)}"

    return per_machine(store, "reorder", table, kind="time")


def _reordering_density(store: Store) -> str:
    def table(records: list[Record]) -> str:
        names, rows = _crossed(records, "tokens", "order", "density")
        config = records[0].config
        setup = (
            f"Share of the blocks of {config['block']} that holds {config['share']:.0%} of the "
            f"mass of every tile; N={config['length']}, D={config['head_dim']}."
        )
        return f"{setup}\n\n{markdown(['tokens', *names], rows)}"

    return per_machine(store, "reorder", table, kind="density")


def _crossover(store: Store) -> str:
    def table(records: list[Record]) -> str:
        rows = []
        for r in records:
            sparse = ", ".join(f"{ms:.3f} at {d}" for d, ms in r.result["sparse_ms"].items())
            rows.append([
                figures.crossover_case(r.config),
                str(r.config["length"]),
                f"{r.result['dense_ms']:.3f} ({r.result['dense']})",
                sparse,
                f"{r.result['break_even_density']:.2f}",
            ])  # fmt: skip
        header = ["case", "N", "best dense, ms", "sparse with selection, ms", "break-even density"]
        return markdown(header, rows)

    return per_machine(store, "crossover", table)


def _quality(store: Store) -> str:
    def table(records: list[Record]) -> str:
        texts = dict.fromkeys(r.config["text"] for r in records)
        return "\n\n".join(
            _quality_of_text([r for r in records if r.config["text"] == text]) for text in texts
        )

    return per_machine(store, "quality", table)


def _quality_at_a_quarter(store: Store) -> str:
    """Of the held-out text, what keeps about a quarter of the blocks, the best first."""

    def table(records: list[Record]) -> str:
        mine = [r for r in records if r.config["text"] == PARTS["held-out"]]
        near = [r for r in mine if r.config["family"] == "dense" or _near_a_quarter(r)]
        if not near:  # a run that was cut short
            return EMPTY
        return _quality_of_text(sorted(near, key=lambda r: r.result["change"]))

    return per_machine(store, "quality", table)


def _near_a_quarter(record: Record) -> bool:
    return record.config["block"] == 64 and 0.2 <= record.result["density"] <= 0.3


def _quality_of_text(records: list[Record]) -> str:
    dense = next(r for r in records if r.config["family"] == "dense")
    config = dense.config
    rows = [
        [
            r.config["family"],
            r.config["budget"],
            str(r.config["block"]),
            f"{r.result['density']:.3f}",
            f"{r.result['kept_mass']:.3f}",
            f"{r.result['change']:+.3f}",
        ]
        for r in records
        if r is not dense
    ]
    header = ["choice by", "budget", "block", "density", "kept mass", "perplexity"]
    return (
        f"{config['model']}, {config['dtype']}, {config['windows']} x {config['length']} "
        f"tokens of {config['text']}; dense perplexity {dense.result['perplexity']:.2f}.\n\n"
        + markdown(header, rows)
    )


def _training(store: Store) -> str:
    def table(records: list[Record]) -> str:
        rows = [
            [
                f"{r.config['model']}, {r.config['batch']} x {r.config['size']}",
                r.config["regularizer"],
                f"{r.result['median_ms']:.1f}",
                f"{r.result['ratio']:.3f}",
                commit(r),
            ]
            for r in records
        ]
        return markdown(["model", "measured", "step, ms", "relative", "commit"], rows)

    return per_machine(store, "train", table)


def _decode(store: Store) -> str:
    def table(records: list[Record]) -> str:
        rows = [
            [
                f"{r.config['batch']} x {r.config['length'] // 1024}k, {r.config['heads']}/"
                f"{r.config['kv_heads']} heads, density {r.config['density']:g}"
                + (f", {r.config['queries']} queries" if r.config["queries"] > 1 else ""),
                r.config["contestant"],
                f"{r.result['median_ms']:.3f}",
                f"{r.result['bandwidth']:.0%}",
                f"{r.result['of_sum']:.0%}" if "of_sum" in r.result else "–",
            ]
            for r in records
            if "bandwidth" in r.result
        ]
        return markdown(["case", "by", "ms", "bandwidth", "of a sum of as many bytes"], rows)

    return per_machine(store, "decode", table)


def _soft_entropy(store: Store) -> str:
    def table(records: list[Record]) -> str:
        rows = [
            [
                f"n={r.config['points']:,} d={r.config['dim']} k={r.config['anchors']} "
                f"{r.config['dtype']}, {r.config['direction']}",
                r.config["contestant"],
                f"{r.result['median_ms']:.3f}",
                f"{r.result['bandwidth']:.0%}",
                f"{r.result['peak_bytes'] / 2**20:.0f}" if r.result["peak_bytes"] else "–",
            ]
            for r in records
            if "bandwidth" in r.result
        ]
        return markdown(["case", "by", "ms", "bandwidth", "memory, MiB"], rows)

    return per_machine(store, "entropy", table)


TABLES: dict[str, Callable[[Store], str]] = {
    "attention-forward": _attention("forward"),
    "attention-backward": _attention("backward"),
    "attention-forward-lengths": _attention_lengths("forward"),
    "attention-backward-lengths": _attention_lengths("backward"),
    "entropy-overhead": _entropy_overhead,
    "selection": _selection,
    "reordering": _reordering,
    "reordering-density": _reordering_density,
    "crossover": _crossover,
    "training": _training,
    "decode": _decode,
    "soft-entropy": _soft_entropy,
    "quality": _quality,
    "quality-at-a-quarter": _quality_at_a_quarter,
    **report_models.TABLES,
    **report_finetune.TABLES,
    **report_vision.TABLES,
    **report_geometry.TABLES,
    **report_hulls.TABLES,
    **report_entropy_net.TABLES,
}


def visited_speed(records: list[Record]) -> dict[str, dict[str, float]]:
    """TFLOP/s on visited tiles by case, then by contestant, of records of ``attention``."""
    # Dense contestants do other work where the mask is sparse; the table has their times.
    return {
        title: {
            name: r.result["tflops"]
            for name, r in case.items()
            if name != OURS_WITH_ENTROPY and (is_sparse(name, r.result) or r.config["density"] == 1)
        }
        for title, case in cases_of(figures.of_one_length(records)).items()
    }


def quality_points(records: list[Record]) -> list[plots.Point]:
    """Of records of ``quality``; variants of one idea, such as other spreads, are for the table."""
    from entropy_attn.benchmarks import plots

    return [
        plots.Point(r.config["family"], r.config["budget"], r.result["density"], r.result["change"])
        for r in records
        if r.config.get("block") == 64 and "spread" not in r.config["family"]
    ]


# Each has one colour in all pictures, that of its place here.
CONTESTANTS = (
    "entropy-attn", "FlexAttention", "SDPA flash", "SDPA cuDNN", "SDPA efficient", "flash-attn-4",
    "FlexAttention, block lists", "flash-attn-4, block lists", "entropy-attn, deterministic",
)  # fmt: skip
HEADS_TITLE = "SmolLM2-135M on prose: the attention of four heads, and the blocks that are chosen"


def heads(store: Store) -> list[plots.HeadPicture]:
    """The pictures of the suite ``masks``, of one machine."""
    from entropy_attn.benchmarks.mask_pictures import decoded

    runs = [records for _, records in by_machine(full_records(store, "masks"))]
    return [decoded(r.result) for r in runs[-1]] if runs else []


def speed_bars(records: list[Record], title: str, path: Path) -> None:
    """The picture of `visited_speed`."""
    from entropy_attn.benchmarks import plots

    plots.bars(visited_speed(records), "TFLOP/s on visited tiles", title, path, CONTESTANTS)


def draw(store: Store, folder: Path) -> list[Path]:
    """Draw every picture that there are full records for, one per machine; returns the files."""
    from entropy_attn.benchmarks import plots

    drawn = []
    for direction in ("forward", "backward"):
        for machine, records in by_machine(full_records(store, "attention", direction=direction)):
            path = folder / f"attention_{direction}_{slug(machine)}.png"
            speed_bars(records, f"{direction}, {machine}", path)
            drawn.append(path)
    attention = dict(by_machine(full_records(store, "attention")))
    for machine, records in by_machine(full_records(store, "entropy")):
        roofline = figures.roofline(attention.get(machine, []), records)
        if roofline is not None:
            path = folder / f"roofline_{slug(machine)}.png"
            plots.roofline(*roofline, f"this package's kernels, {machine}", path)
            drawn.append(path)
    for machine, records in by_machine(full_records(store, "crossover")):
        curves: dict[str, list[tuple[int, float]]] = {}
        for r in records:
            point = (r.config["length"], r.result["break_even_density"])
            curves.setdefault(figures.crossover_case(r.config), []).append(point)
        path = folder / f"crossover_{slug(machine)}.png"
        plots.break_even(curves, f"sparse beats dense below the curve, {machine}", path)
        drawn.append(path)
    for machine, records in by_machine(full_records(store, "quality")):
        for text in dict.fromkeys(r.config["text"] for r in records):
            points = quality_points([r for r in records if r.config["text"] == text])
            if len({point.family for point in points}) < 2:  # a run that was cut short
                continue
            part = next((part for part, name in PARTS.items() if name == text), text)
            path = folder / f"quality_{slug(part)}_{slug(machine)}.png"
            plots.frontier(points, f"SmolLM2-135M, {text}", path)
            drawn.append(path)
    if pictures := heads(store):
        drawn.append(folder / "masks.png")
        plots.mask_heat_maps(pictures, HEADS_TITLE, drawn[-1])
    geometry = (report_geometry, report_hulls, report_entropy_net)
    for part in (report_models, report_finetune, report_vision, *geometry):
        drawn += part.draw(store, folder)
    return drawn
