"""The numbers of the paper's abstract (arXiv 2509.03733), beside what the result store has.

A claim that was not measured says so; one that was measured on a stand-in says on which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from entropy_attn.benchmarks import report_hulls
from entropy_attn.benchmarks import report_models as models
from entropy_attn.benchmarks import report_vision as vision
from entropy_attn.benchmarks.prose import PARTS
from entropy_attn.benchmarks.statistics import with_interval
from entropy_attn.benchmarks.store import Store
from entropy_attn.benchmarks.suites import train
from entropy_attn.benchmarks.tables import Newest, full_records

NOT_YET = ("–", "not measured yet")


@dataclass(frozen=True)
class Claim:
    """One number of the abstract.

    Attributes:
        text: what is claimed. paper: the number.
        limit: what bounds it, or on what else it was measured.
        judge: (what was measured, the verdict), from the records.
    """

    text: str
    paper: str
    limit: str
    judge: Callable[[Store], tuple[str, str]]


def rows(store: Store) -> list[tuple[str, str, str, str, str]]:
    """(claim, paper, measured, limit, verdict) of every claim."""
    judged = [(claim, *claim.judge(store)) for claim in CLAIMS]
    return [(c.text, c.paper, measured, c.limit, verdict) for c, measured, verdict in judged]


def _not_measured(store: Store) -> tuple[str, str]:
    return NOT_YET


def judge_perplexity(store: Store) -> tuple[str, str]:
    """The predictor of least change that keeps 20 to 30 % of the blocks of 64, held-out prose."""
    found = [
        r
        for r in full_records(store, "quality", text=PARTS["held-out"], block=64)
        if r.config["family"].startswith("envelope 8") and 0.2 <= r.result["density"] <= 0.3
    ]
    if not found:
        return NOT_YET
    best = min(found, key=lambda r: r.result["change"])
    change, density = best.result["change"], best.result["density"]
    held = "holds, and without training" if change <= 0.9 else "does not hold"
    return f"{change:+.2f} at sparsity {1 - density:.0%}", held


def _of_any_machine(store: Store) -> Store:
    """What runs on a CPU was measured on another machine than the page is about: the last one."""
    return Newest(store.directory)


def _hulls(store: Store) -> tuple[str, str]:
    """Families of a million random points; in the plane results are exact, in space as Qhull's."""
    found = full_records(_of_any_machine(store), "geometry", kind="hull", n=10**6)
    found = [r for r in found if r.config["library"] == report_hulls.OURS]
    texts, worst = [], []
    for dim, where in ((2, "plane"), (3, "space")):
        mine = [r for r in found if r.config["dim"] == dim and "over_qhull" in r.result]
        if mine:
            ratios = [r.result["over_qhull"] for r in mine]
            errors = sum(report_hulls.wrong_vertices(r) or 0 for r in mine)
            texts.append(
                f"{where}: {min(ratios):.1f} to {max(ratios):.0f} x, {errors} wrong vertices"
            )
            worst.append(min(ratios))
    if not texts:
        return NOT_YET
    verdict = "exceeded, exactly and without learning"
    return "; ".join(texts), verdict if min(worst) > 5 else f"{verdict}, but for some sets in space"


def _triangulations(store: Store) -> tuple[str, str]:
    """A million random points along a Hilbert curve, ordering included, over a random order."""
    found = full_records(_of_any_machine(store), "geometry", kind="triangulate", points="square")
    times = {(r.config["library"], r.config["order"]): r.result for r in found}
    texts, ratios = [], []
    for library in dict.fromkeys(library for library, _ in times):
        slow, fast = times.get((library, "random")), times.get((library, "Hilbert"))
        if slow and fast:
            ratios.append(slow["median_ms"] / (fast["median_ms"] + fast["order_ms"]))
            texts.append(f"{library} {ratios[-1]:.1f} x")
    if not ratios:
        return NOT_YET
    reached = "reached by a sort" if max(ratios) >= 4 else "not reached"
    return ", ".join(texts), f"{reached}, exactly; what it is worth depends on the library"


def _training_step(store: Store) -> tuple[str, str]:
    found = full_records(store, "train", regularizer=train.DEFAULT)
    if not found:
        return NOT_YET
    ratios = [(r.config["model"], r.config["size"], r.result["ratio"]) for r in found]
    text = ", ".join(f"{model} at {size}: {ratio:.2f} x" for model, size, ratio in ratios)
    worst = max(ratio for *_, ratio in ratios)
    return text, "holds" if worst <= 1.12 else "holds in part"


def _vision(
    value: Callable[[vision.Result], float | None], form: str, scale: float, tasks: tuple[str, ...]
) -> Callable[[Store], tuple[str, str]]:
    """Ours against plain training pruned by magnitude, seed by seed."""

    def judge(store: Store) -> tuple[str, str]:
        records = full_records(store, vision.SUITE, part="methods")
        texts, verdicts = [], []
        for task in tasks:
            runs = vision.runs_of(records, task)
            pairs = _pairs(runs, value)
            if pairs:
                ours, plain = (
                    with_interval(list(v), form, scale) for v in zip(*pairs, strict=True)
                )
                texts.append(f"{task} {ours} against {plain}")
                verdicts.append(f"{task}: {vision.verdict([a - b for a, b in pairs])}")
        return ("; ".join(texts), "; ".join(verdicts)) if texts else NOT_YET

    return judge


def _pairs(
    runs: vision.Runs, value: Callable[[vision.Result], float | None]
) -> list[tuple[float, float]]:
    ours, plain = runs.get(vision.OURS, {}), runs.get(vision.PLAIN, {})
    both = [(value(ours[seed]), value(plain[seed])) for seed in ours if seed in plain]
    return [(a, b) for a, b in both if a is not None and b is not None]


def _robustness(store: Store) -> tuple[str, str]:
    records = full_records(store, vision.SUITE, part="methods")
    texts, verdicts = [], []
    for task in vision.tasks_of(records):
        errors = vision.relative_errors(vision.runs_of(records, task), vision.OURS)
        if errors:
            texts.append(f"{task} {with_interval(errors, '.0f', 100.0)}")
            verdicts.append(f"{task}: {vision.verdict([1.0 - error for error in errors])}")
    return ("; ".join(texts), "; ".join(verdicts)) if texts else NOT_YET


def _sparse_accuracy(result: vision.Result) -> float | None:
    found = result["sparse"]["true mass"].get("0.8")
    return None if found is None else found["accuracy"]


def _overlap(result: vision.Result) -> float | None:
    found = result.get("overlap")
    return None if found is None else found["blocks"]


CLAIMS = (
    Claim(
        "convex hull, less than 0.2 % error", "4 to 5 x",
        "over Qhull; an exact filter needs no network", _hulls,
    ),
    Claim(
        "triangulation, less than 0.2 % error", "4 to 5 x",
        "a Hilbert order over a random one; no network", _triangulations,
    ),
    Claim(
        "ViT-B, ImageNet, top-1 at sparsity 80 %", "80.1 %",
        "stand-ins: a small ViT; ImageNet is not to be had without a network",
        _vision(_sparse_accuracy, ".1f", 100.0, ("scenes", "photographs", "digits")),
    ),
    Claim(
        "ViT-B throughput: alone, with FlashAttention, FlashAttention alone",
        "1.60, 2.07, 1.63 x", "attention is a small part of ViT-B at 224 px",
        lambda store: models.judge_vit(store) or NOT_YET,
    ),
    Claim(
        "inference of 7B language models at sparsity 70 to 75 %", "1.48 to 1.60 x",
        "the share of attention in prefill; random weights",
        lambda store: models.judge_llm(store) or NOT_YET,
    ),
    Claim(
        "perplexity at sparsity 70 to 75 %", "+0.9", "stand-in: SmolLM2-135M, 8192 tokens",
        judge_perplexity,
    ),
    Claim(
        "IoU of kept blocks and objects, against magnitude pruning", "0.73, 0.41",
        "stand-in: procedural scenes", _vision(_overlap, ".2f", 1.0, ("scenes",)),
    ),
    Claim(
        "mean corruption error against the unregularized model (= 100)", "88",
        "stand-ins: three small tasks", _robustness,
    ),
    Claim("cost of a training step", "1.02 to 1.12 x", "", _training_step),
)  # fmt: skip
