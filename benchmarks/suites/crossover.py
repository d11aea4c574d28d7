"""Where sparse attention, its selection included, is faster than the best dense attention.

The measured points are kept as data beside the backends, so that ``min_length="auto"`` never
takes the slower one: `write_crossover` derives the file from the result store, here beside the
records and with ``entropy-attn report`` in the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import entropy_attn as ea
from entropy_attn.benchmarks.baselines import CONTESTANTS, our_backend
from entropy_attn.benchmarks.cases import AttentionCase, Inputs, make_inputs
from entropy_attn.benchmarks.check import expected
from entropy_attn.benchmarks.contest import prepare
from entropy_attn.benchmarks.environment import sm_clock_mhz
from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.timing import measure

DATA_FILE = "crossover.json"
DENSE = ("SDPA flash", "SDPA cuDNN")
INPUT_SETS = 2
MANY = 16  # sequences, as a vision transformer has: launches cost less where a GPU is full
SCORER = ea.SparsityConfig().scorer  # what users get


def cases(form: str) -> tuple[list[AttentionCase], tuple[float, ...]]:
    """The dense cases, and the densities that are measured for each."""
    if form == "small":
        case = AttentionCase(64, 256, block=32, batch=1, heads=2, dtype="float32", is_causal=True)
        return [case, replace(case, length=512)], (0.25, 0.5)
    batches = {1: (512, 1024, 2048, 4096, 8192, 16384, 32768), MANY: (512, 1024, 2048)}
    if form == "quick":
        batches = {1: (2048, 8192), MANY: (1024,)}
    return [
        AttentionCase(head_dim, length, block=64, batch=batch, is_causal=is_causal)
        for batch, lengths in batches.items()
        for length in lengths
        for head_dim in (64, 128)
        for is_causal in (True, False)
    ], (0.1, 0.25, 0.5, 0.75)


def run(context: Context) -> Iterator[Row]:
    found, densities = cases(context.form)
    for case in context.left(found, _shared):
        context.progress(f"crossover, {case.shape}")
        yield _run_case(context, case, densities)
    write_crossover(Store(context.out), context.out / DATA_FILE)


def _run_case(context: Context, case: AttentionCase, densities: Sequence[float]) -> Row:
    sets = [make_inputs(case, context.device, seed) for seed in range(INPUT_SETS)]
    calls: dict[str, list[Callable[[], object]]] = {}
    rejected: dict[str, str] = {}
    reference = expected(sets[0], sparse=False)
    for name in DENSE:
        prepared = prepare(CONTESTANTS[name], sets, reference)
        if isinstance(prepared, list):
            calls[name] = prepared
        else:
            rejected[name] = prepared["reason"]
    dense_names = list(calls)
    if not dense_names:
        raise RuntimeError(f"no dense attention to compare with: {rejected}")
    for budget in densities:
        forwards = [_select_and_attend(inputs, budget) for inputs in sets]
        mask = _select(sets[0], budget)
        kept = mask.to_dense().expand(case.batch, case.heads, -1, -1)
        chosen = replace(sets[0], mask=mask, kept=kept)
        problem = expected(chosen, sparse=True).verdict((forwards[0](),))
        if problem is not None:
            result = {"status": "wrong", "reason": f"at budget {budget}: {problem}"}
            return Row(
                _config(context, case), result, f"{case.shape} | wrong: {problem}", is_ours=True
            )
        # The blocks that are always kept weigh in short sequences: the real density is the key.
        calls[f"{float(mask.density(is_causal=case.is_causal)):.4f}"] = forwards

    timings = measure(calls, seconds=0.3, max_rounds=30, device=context.device)
    ms = {name: timing.median_ms for name, timing in timings.items()}
    best = min(dense_names, key=ms.__getitem__)
    sparse_ms = {name: ms[name] for name in calls if name not in dense_names}
    result = {
        "status": "ok",
        "dense_ms": ms[best],
        "dense": best,
        "dense_all_ms": {name: ms[name] for name in dense_names},
        "dense_rejected": rejected,
        "sparse_ms": sparse_ms,
        "break_even_density": break_even_density(sparse_ms, ms[best]),
        "rounds": timings[best].rounds,
        "sm_clock_mhz": sm_clock_mhz(),
        "backend": our_backend(context.device),
    }
    text = (
        f"{case.shape} | {best} {ms[best]:.3f} ms, sparse "
        + ", ".join(f"{value:.3f} ms at {density}" for density, value in sparse_ms.items())
        + f"; break-even at density {result['break_even_density']:.3f}"
    )
    return Row(_config(context, case), result, text, is_ours=True)


def _config(context: Context, case: AttentionCase) -> dict[str, Any]:
    return {"form": context.form, **_shared(case)}


def _shared(case: AttentionCase) -> dict[str, Any]:
    return {k: v for k, v in case.config().items() if k not in ("density", "irregular")}


def _select(inputs: Inputs, density: float) -> ea.BlockMask:
    return ea.select_blocks(
        inputs.query,
        inputs.key,
        block_size=inputs.case.block,
        scorer=SCORER,
        budget=ea.TopK(density),
        is_causal=inputs.case.is_causal,
        backend=our_backend(inputs.device),
    )


def _select_and_attend(inputs: Inputs, density: float) -> Callable[[], object]:
    return lambda: ea.block_sparse_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        _select(inputs, density),
        is_causal=inputs.case.is_causal,
        backend=our_backend(inputs.device),
    )


def break_even_density(sparse_ms: dict[str, float], dense_ms: float) -> float:
    """The density at which sparse attention takes as long as dense, linear between points.

    0 where sparse is slower at every measured density; the largest measured density where it is
    faster at all of them (nothing is extrapolated).
    """
    points = sorted((float(density), ms) for density, ms in sparse_ms.items())
    slower = next((i for i, (_, ms) in enumerate(points) if ms > dense_ms), None)
    if slower is None:
        return points[-1][0]
    if slower == 0:
        return 0.0
    (low, low_ms), (high, high_ms) = points[slower - 1], points[slower]
    return low + (high - low) * (dense_ms - low_ms) / (high_ms - low_ms)


def write_crossover(store: Store, path: Path) -> int:
    """Write the latest full measurements of every architecture to ``path``; returns how many.

    Where several GPUs of one architecture measured the same point, the last one counts. Points of
    other architectures that the file already holds stay.
    """
    records = [r for r in store.latest("crossover", form="full") if r.result["status"] == "ok"]
    if not records:
        return 0
    by_place = {
        (r.environment["arch"], json.dumps(r.config, sort_keys=True)): _point(r)
        for r in sorted(records, key=lambda r: r.time)
    }
    fresh = list(by_place.values())
    measured = {point["arch"] for point in fresh}
    kept = []
    if path.exists():
        kept = [p for p in json.loads(path.read_text()) if p["arch"] not in measured]
    lines = ",\n".join(json.dumps(point) for point in kept + fresh)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n")
    return len(fresh)


def _point(record: Record) -> dict[str, Any]:
    config, result = record.config, record.result
    return {
        "arch": record.environment["arch"],
        "head_dim": config["head_dim"],
        "dtype": config["dtype"],
        "block": config["block"],
        "is_causal": config["is_causal"],
        "batch": config["batch"],
        "heads": config["heads"],
        "kv_len": config["length"],
        "dense_ms": round(result["dense_ms"], 5),
        "sparse_ms": {density: round(ms, 5) for density, ms in result["sparse_ms"].items()},
        "break_even_density": round(result["break_even_density"], 4),
    }
