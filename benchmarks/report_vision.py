"""Tables and pictures of the suite ``vision``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from entropy_attn.benchmarks.corruptions import mean_corruption_error
from entropy_attn.benchmarks.statistics import mean_interval, with_interval
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.suites.vision import ABLATION, METHODS, SUITE, UNTRAINED
from entropy_attn.benchmarks.tables import (
    EMPTY,
    Newest,
    full_records,
    markdown,
    per_machine,
    slug,
)

PLAIN, OURS = "plain", "density (ours)"
SURROGATE = "range entropy of keys (paper)"
SCORERS = ("true mass", "default")
SHOWN = {PLAIN: "plain, pruned by magnitude"}
Result = dict[str, Any]
Runs = dict[str, dict[int, Result]]  # by method, then by seed


def runs_of(records: Iterable[Record], task: str) -> Runs:
    """The results on a task, in the order of the suite's methods.

    Where a unit was measured in several settings, the last one.
    """
    order = [method.name for method in (*METHODS, *ABLATION, UNTRAINED)]

    def place(record: Record) -> tuple[int, int, float]:
        name = record.config["method"]
        known = order.index(name) if name in order else len(order)
        return known, record.config["seed"], record.time

    found: Runs = {}
    for record in sorted(records, key=place):
        if record.config["task"] == task:
            found.setdefault(record.config["method"], {})[record.config["seed"]] = record.result
    return found


def tasks_of(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record.config["task"] for record in records))


def relative_errors(runs: Runs, method: str) -> list[float]:
    """mCE relative to plain training of the same seed, of each seed that has both."""
    plain = runs.get(PLAIN, {})
    return [
        mean_corruption_error(result["errors"], plain[seed]["errors"])
        for seed, result in runs.get(method, {}).items()
        if seed in plain and result["errors"]
    ]


def _accuracy(store: Store) -> str:
    def table(records: list[Record]) -> str:
        return "\n\n".join(_accuracy_of_task(records, task) for task in tasks_of(records))

    return per_machine(store, SUITE, table, part="methods")


def _accuracy_of_task(records: list[Record], task: str) -> str:
    runs = runs_of(records, task)
    first = next(iter(next(iter(runs.values())).values()))
    sparse = {
        (scorer, sparsity): found["density"]
        for scorer in SCORERS
        for sparsity, found in first["sparse"][scorer].items()
    }
    header = ["method", "dense", "needed density"]
    header += [f"{density:.0%} kept by {scorer}" for (scorer, _), density in sparse.items()]
    rows = []
    for method, by_seed in runs.items():
        results = list(by_seed.values())
        cells = [_percent(r["accuracy"] for r in results)]
        cells += [_percent(r["natural_density"] for r in results)]
        cells += [
            _percent(r["sparse"][scorer][sparsity]["accuracy"] for r in results)
            for scorer, sparsity in sparse
        ]
        rows.append([SHOWN.get(method, method), *cells])
    return f"**{task}**, {_setup(records, task)}; accuracy in %.\n\n{markdown(header, rows)}"


def _setup(records: list[Record], task: str) -> str:
    config = next(r.config for r in reversed(records) if r.config["task"] == task)
    seeds = sorted({r.config["seed"] for r in records if r.config["task"] == task})
    return (
        f"{config['layers']} layers of {config['hidden']}, patches of {config['patch']} pixels, "
        f"blocks of {config['block']} tokens, {config['steps']} steps of {config['batch']}, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    )


def _robustness(store: Store) -> str:
    def table(records: list[Record]) -> str:
        tasks = tasks_of(records)
        runs = {task: runs_of(records, task) for task in tasks}
        methods = list(dict.fromkeys(method for task in tasks for method in runs[task]))
        rows = []
        for method in methods:
            cells = []
            for task in tasks:
                results = runs[task].get(method, {}).values()
                cells.append(_percent(_error(r) for r in results if r["errors"]))
                cells.append(_percent(relative_errors(runs[task], method)))
            rows.append([method, *cells])
        header = ["method"]
        header += [cell for task in tasks for cell in (f"{task}: error", f"{task}: mCE")]
        return markdown(header, rows)

    return per_machine(store, SUITE, table, part="methods")


def _error(result: Result) -> float:
    """Mean over corruptions and severities."""
    errors = [error for severities in result["errors"].values() for error in severities]
    return sum(errors) / len(errors)


def _overlap(store: Store) -> str:
    def table(records: list[Record]) -> str:
        shown = [r for r in records if "overlap" in r.result and r.config["part"] != "ablation"]
        runs = runs_of(shown, "scenes")
        if not runs:
            return EMPTY
        rows = []
        for method, by_seed in runs.items():
            found = [result["overlap"] for result in by_seed.values()]
            rows.append([
                SHOWN.get(method, method),
                with_interval([o["blocks"] for o in found], ".3f"),
                with_interval([max(o["by_layer"]) for o in found], ".3f"),
                with_interval([o["attention"] for o in found], ".3f"),
            ])  # fmt: skip
        known = next(iter(next(iter(runs.values())).values()))["overlap"]
        limits = (
            f"Keeping everything gives {known['everything']:.3f}; the choice of blocks that knows "
            f"the object gives {known['best_blocks']:.3f}."
        )
        header = ["method", "kept blocks, all layers", "best layer", "class token's attention"]
        return f"{limits}\n\n{markdown(header, rows)}"

    return per_machine(store, SUITE, table)


def _ablation(store: Store) -> str:
    def table(records: list[Record]) -> str:
        runs = runs_of(records, "scenes")
        changed = {r.config["method"] for r in records if r.config["part"] == "ablation"}
        if not changed:
            return EMPTY
        seeds = {seed for method in changed for seed in runs[method]}
        names = sorted(changed | ({OURS, SURROGATE} & runs.keys()))
        rows = []
        for name in ([PLAIN] if PLAIN in runs else []) + names:
            found = {seed: result for seed, result in runs[name].items() if seed in seeds}
            results = list(found.values())
            relative = relative_errors({PLAIN: runs.get(PLAIN, {}), name: found}, name)
            rows.append([
                name,
                _percent(r["accuracy"] for r in results),
                _percent(r["natural_density"] for r in results),
                _percent(r["sparse"]["true mass"]["0.8"]["accuracy"] for r in results),
                with_interval([r["overlap"]["blocks"] for r in results], ".3f"),
                _percent(relative),
            ])  # fmt: skip
        header = ["method", "accuracy", "needed density", "at sparsity 80 %", "IoU", "mCE"]
        return markdown(header, rows)

    return per_machine(store, SUITE, table)


def _claims(store: Store) -> str:
    """What the paper says of vision beside what was measured, and whether it holds here."""

    def table(records: list[Record]) -> str:
        rows = []
        for task in tasks_of(records):
            runs = runs_of(records, task)
            for method in (OURS, SURROGATE):
                rows.append(_claim(
                    f"{task}, accuracy at sparsity 80 %",
                    "80.1 % (ViT-B, ImageNet)",
                    runs, method, lambda r: r["sparse"]["true mass"]["0.8"]["accuracy"], 100, ".1f",
                ))  # fmt: skip
        scenes = runs_of(records, "scenes")
        for method in (OURS, SURROGATE):
            rows.append(_claim(
                "scenes, IoU of kept blocks", "0.73 against 0.41",
                scenes, method, lambda r: r["overlap"]["blocks"], 1, ".3f",
            ))  # fmt: skip
        for task in tasks_of(records):
            runs = runs_of(records, task)
            for method in (OURS, SURROGATE):
                errors = relative_errors(runs, method)
                rows.append([
                    f"{task}, mCE of plain training = 100",
                    "88 (48.7 against 55.4, CIFAR-100-C)",
                    method,
                    _percent(errors),
                    "100",
                    verdict([1.0 - error for error in errors]),
                ])  # fmt: skip
        header = ["claim", "paper", "method", "with it", "pruned by magnitude", "better?"]
        return markdown(header, rows)

    return per_machine(store, SUITE, table, part="methods")


def _claim(
    claim: str, paper: str, runs: Runs, method: str,
    value: Callable[[Result], float], scale: float, form: str,
) -> list[str]:  # fmt: skip
    mine, plain = runs.get(method, {}), runs.get(PLAIN, {})
    return [
        claim,
        paper,
        method,
        with_interval([value(r) for r in mine.values()], form, scale),
        with_interval([value(r) for r in plain.values()], form, scale),
        verdict([value(mine[seed]) - value(plain[seed]) for seed in mine if seed in plain]),
    ]


def verdict(gains: Sequence[float]) -> str:
    """Whether gains of paired seeds are above 0, by their 95 % confidence interval."""
    if len(gains) < 2:
        return "not shown (one seed)" if gains else "–"
    mean, half = mean_interval(gains)
    if mean - half > 0:
        return "yes"
    return "no, worse" if mean + half < 0 else "not shown"


def _percent(values: Iterable[float]) -> str:
    return with_interval(list(values), ".1f", 100.0)


TABLES: dict[str, Callable[[Store], str]] = {
    "vision-accuracy": _accuracy,
    "vision-robustness": _robustness,
    "vision-overlap": _overlap,
    "vision-ablation": _ablation,
    "vision-claims": _claims,
}


def draw(store: Store, folder: Path) -> list[Path]:
    """Accuracy against density, a picture a task, on the machine measured last."""
    from entropy_attn.benchmarks import plots

    records = full_records(Newest(store.directory), SUITE, part="methods")
    drawn = []
    for task in tasks_of(records):
        drawn.append(folder / f"vision_{slug(task)}.png")
        title = f"{task}, blocks by true mass"
        plots.accuracy_against_density(curves(records, task), title, drawn[-1])
    return drawn


def curves(records: Iterable[Record], task: str) -> dict[str, list[tuple[float, float, float]]]:
    """(density, accuracy, half width of its interval) by method, blocks by true mass."""
    return {
        SHOWN.get(method, method): _curve(list(by_seed.values()))
        for method, by_seed in runs_of(records, task).items()
    }


def _curve(results: list[Result]) -> list[tuple[float, float, float]]:
    def point(density: float, values: list[float]) -> tuple[float, float, float]:
        mean, half = mean_interval(values)
        return density, mean, 0.0 if math.isnan(half) else half

    points = [point(1.0, [r["accuracy"] for r in results])]
    for sparsity, first in results[0]["sparse"]["true mass"].items():
        values = [r["sparse"]["true mass"][sparsity]["accuracy"] for r in results]
        points.append(point(first["density"], values))
    return points
