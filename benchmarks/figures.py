"""What the pictures of speed show, taken from the result store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entropy_attn.benchmarks.baselines import OURS, OURS_WITH_ENTROPY, is_sparse
from entropy_attn.benchmarks.cases import blocks_words
from entropy_attn.benchmarks.store import Record

# Dense bf16 TFLOP/s of the tensor cores by NVIDIA's data sheets (SXM boards).
PEAK_TFLOPS = {"sm_80": 312.0, "sm_90": 989.0, "sm_100": 2250.0}
Points = dict[str, list[tuple[float, float]]]


def of_one_length(records: list[Record]) -> list[Record]:
    """Records of ``attention`` of the length of the first record, which its main cases have."""
    return [r for r in records if r.config["length"] == records[0].config["length"]]


def speedups(records: list[Record], head_dim: int, direction: str = "forward") -> Points:
    """(density, speed-up over the best dense attention) of what attends sparsely, by name.

    Bidirectional cases with regular counts; ours once for each block size.
    """
    chosen = [
        r
        for r in records
        if (r.config["head_dim"], r.config["direction"]) == (head_dim, direction)
        and not r.config["is_causal"]
        and not r.config["irregular"]
        and r.config["contestant"] != OURS_WITH_ENTROPY
    ]
    # The main cases have blocks at random.
    chosen = [r for r in of_one_length(chosen) if "pattern" not in r.config]
    dense = [r.result["median_ms"] for r in chosen if r.config["density"] == 1.0]
    if not dense:
        return {}
    found: Points = {}
    for record in chosen:
        config = record.config
        if config["density"] == 1.0 or not is_sparse(config["contestant"], record.result):
            continue
        name = f"{config['contestant']}, {blocks_words(config)}"
        point = (config["density"], min(dense) / record.result["median_ms"])
        found.setdefault(name, []).append(point)
    return {name: points for name, points in found.items() if len(points) > 1}


def crossover_case(config: Mapping[str, Any]) -> str:
    """A case of the suite ``crossover`` but for its length."""
    causal = ", causal" if config["is_causal"] else ""
    return f"D={config['head_dim']}{causal}, {config['batch'] * config['heads']} heads"


def times_by_length(records: list[Record]) -> dict[str, list[tuple[int, float]]]:
    """Of the suite ``crossover``: the best dense attention, and the sparsest that was measured.

    Of one sequence: with more of them the lines would be too many.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for record in (r for r in records if r.config["batch"] == 1):
        config, result = record.config, record.result
        case = crossover_case(config)
        sparsest = result["sparse_ms"][min(result["sparse_ms"], key=float)]
        found.setdefault(f"dense, {case}", []).append((config["length"], result["dense_ms"]))
        found.setdefault(f"sparse, {case}", []).append((config["length"], sparsest))
    return found


def roofline(attention: list[Record], entropy: list[Record]) -> tuple[Points, float, float] | None:
    """What `plots.roofline` takes of a machine's records: points, and the roof in TFLOP/s, GB/s."""
    copies = [r.result["copy_gb_s"] for r in entropy]
    peak = PEAK_TFLOPS.get(entropy[-1].environment.get("arch", "")) if entropy else None
    points = roofline_points(attention, entropy)
    return (points, peak, max(copies)) if copies and peak and points else None


def roofline_points(attention: list[Record], entropy: list[Record]) -> Points:
    """(FLOP a byte, TFLOP/s) of this package's kernels, by kind.

    Attention has to move queries, keys, values and outputs once (backward: their gradients too),
    soft entropy its points (backward: and their gradients).
    """
    found: Points = {}
    for record in attention:
        config, result = record.config, record.result
        if config["contestant"] != OURS or config["is_causal"]:
            continue
        is_backward = config["direction"] == "backward"
        rows = config["batch"] * config["heads"] * config["length"]
        moved = 2 * rows * config["head_dim"] * (8 if is_backward else 4)
        flop = result["tflops"] * result["median_ms"] * 1e9
        found.setdefault(f"attention, {config['direction']}", []).append(
            (flop / moved, result["tflops"])
        )
    for record in entropy:
        config, result = record.config, record.result
        if config["contestant"] != OURS:
            continue
        is_backward = config["direction"] == "backward"
        size = 2 if config["dtype"] == "bfloat16" else 4
        moved = size * config["points"] * config["dim"] * (2 if is_backward else 1)
        flop = 2 * config["points"] * config["dim"] * config["anchors"] * (3 if is_backward else 1)
        found.setdefault(f"soft entropy, {config['direction']}", []).append(
            (flop / moved, flop / result["median_ms"] / 1e9)
        )
    return found
