"""Tables and pictures of the suite ``finetune``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from entropy_attn.benchmarks.statistics import mean_interval, with_interval
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.suites.finetune import NAME as SUITE
from entropy_attn.benchmarks.suites.finetune import (
    ORACLE,
    PLAIN,
    PREDICTED,
    TOP_K,
    VERSION,
    Plan,
    methods,
)
from entropy_attn.benchmarks.tables import Newest, full_records, markdown, per_machine

# Perplexity over that of plain fine-tuning with dense attention, at which densities are compared.
LEVELS = (0.05, 0.1, 0.2, 0.4)
# Perplexity over the best, up to which a method is drawn.
WORST = 0.6
FAMILIES = (PREDICTED, ORACLE, TOP_K)
Runs = dict[str, dict[int, dict[str, Any]]]  # by method, then by seed


def title(config: dict[str, Any]) -> str:
    """A method as one writes it, with the length of its training."""
    return f"{_title(config)}, {config['steps']} steps"


def _title(config: dict[str, Any]) -> str:
    name = config["method"]
    if config["strength"]:
        name += f" {config['strength']:g}"
    if config["attends"] != "dense":
        name += f", sparse by {config['attends']}"
    return name


def plain_of(method: str) -> str:
    """Plain fine-tuning of as many steps, by its title."""
    return f"{PLAIN}, {method.rsplit(', ', 1)[1]}"


def runs_of(records: Sequence[Record]) -> Runs:
    """In the order of the suite's methods; processes that share them finish in another."""
    plan = Plan.of("full")
    order = [_title(method.config(plan)) for method in methods("full")]

    def place(record: Record) -> tuple[int, int, int]:
        name, config = _title(record.config), record.config
        return config["steps"], order.index(name) if name in order else len(order), config["seed"]

    found: Runs = {}
    for record in sorted(records, key=place):
        found.setdefault(title(record.config), {})[record.config["seed"]] = record.result
    return found


def frontier(result: dict[str, Any], family: str) -> list[tuple[float, float]]:
    """(density, perplexity) of a family's points, from sparse to dense."""
    points = [p for p in result["points"] if p["family"] == family]
    return sorted((p["density"], p["perplexity"]) for p in points)


def density_at(points: Sequence[tuple[float, float]], perplexity: float) -> float | None:
    """The least density that reaches a perplexity, between points by the density's logarithm.

    None where the frontier begins below it or never reaches it: nothing is extrapolated.
    """
    for (low, worse), (high, better) in itertools.pairwise(points):
        if worse >= perplexity >= better and worse > better:
            share = (worse - perplexity) / (worse - better)
            return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return None


def ratios(runs: Runs, method: str, family: str, level: float) -> list[float]:
    """Density over that of plain fine-tuning at the same perplexity, of each seed."""
    found = []
    for seed, result in runs[method].items():
        plain = runs.get(plain_of(method), {}).get(seed)
        if plain is None:
            continue
        target = plain["perplexity"] + level
        ours = density_at(frontier(result, family), target)
        theirs = density_at(frontier(plain, family), target)
        if ours is not None and theirs is not None:
            found.append(ours / theirs)
    return found


def _table(store: Store) -> str:
    def table(records: list[Record]) -> str:
        runs = runs_of(records)
        rows = []
        for method, by_seed in runs.items():
            results = list(by_seed.values())
            cells = [str(len(results))]
            cells += [with_interval([r["perplexity"] for r in results], ".2f")]
            cells += [with_interval([r["density"] for r in results], ".3f")]
            cells += [with_interval(_densities(runs, method, level), ".3f") for level in LEVELS]
            rows.append([method, *cells])
        header = ["fine-tuning", "seeds", "dense perplexity", "needed density"]
        header += [f"density at {level:+g}" for level in LEVELS]
        return f"{_setup(records)}\n\n{markdown(header, rows)}"

    return per_machine(store, SUITE, table, version=VERSION)


def _densities(runs: Runs, method: str, level: float) -> list[float]:
    """Predicted density at a perplexity over plain fine-tuning's, of each seed that reaches it."""
    found = []
    for seed, result in runs[method].items():
        plain = runs.get(plain_of(method), {}).get(seed)
        if plain is not None:
            density = density_at(frontier(result, PREDICTED), plain["perplexity"] + level)
            found += [] if density is None else [density]
    return found


def _ratios(store: Store) -> str:
    def table(records: list[Record]) -> str:
        runs = runs_of(records)
        rows = []
        for method in runs:
            cells = [
                with_interval(ratios(runs, method, family, level), ".2f")
                for family in FAMILIES[:2]
                for level in LEVELS
            ]
            rows.append([method, *cells])
        header = ["fine-tuning"]
        header += [f"{family}, {level:+g}" for family in FAMILIES[:2] for level in LEVELS]
        return markdown(header, rows)

    return per_machine(store, SUITE, table, version=VERSION)


def _setup(records: list[Record]) -> str:
    config = records[-1].config
    return (
        f"{config['model']}, steps of {config['batch']} x {config['length']} "
        f"tokens, learning rate {config['learning_rate']:g}; {config['windows']} x "
        f"{config['length']} tokens of {config['held_out']}, blocks of {config['block']}."
    )


TABLES: dict[str, Callable[[Store], str]] = {"finetune": _table, "finetune-ratios": _ratios}


def draw(store: Store, folder: Path) -> list[Path]:
    """Perplexity against density, a curve a method, on the machine measured last."""
    from entropy_attn.benchmarks import plots

    records = full_records(Newest(store.directory), SUITE, version=VERSION)
    if not records:
        return []
    path = folder / "finetune.png"
    plots.perplexity_against_density(
        curves(records), "held-out prose, blocks chosen by the predictor", path
    )
    return [path]


def curves(records: Sequence[Record]) -> dict[str, list[tuple[float, float]]]:
    """(density, perplexity) by method, means over the seeds, blocks chosen by the predictor.

    Left out is what never comes within WORST of the best: one such line would flatten the others.
    """
    found = {
        method: _mean_curve([frontier(r, PREDICTED) for r in by_seed.values()])
        for method, by_seed in runs_of(records).items()
    }
    least = {method: min(p for _, p in points) for method, points in found.items()}
    best = min(least.values(), default=0.0)
    return {method: p for method, p in found.items() if least[method] <= best + WORST}


def _mean_curve(curves: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Means over the seeds of the points of the same budget."""
    return [
        (mean_interval([d for d, _ in points])[0], mean_interval([p for _, p in points])[0])
        for points in zip(*curves, strict=True)
    ]
