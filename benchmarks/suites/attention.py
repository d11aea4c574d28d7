"""Speed of attention kernels on fixed masks, forward and backward, against all baselines.

The masks are given, not selected: this suite is about the kernels alone. Selection is timed in
`select`, both together in `crossover`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from entropy_attn.benchmarks.baselines import (
    CONTESTANTS,
    OURS,
    OURS_DETERMINISTIC,
    OURS_WITH_ENTROPY,
)
from entropy_attn.benchmarks.cases import AttentionCase
from entropy_attn.benchmarks.contest import Outcome, contest
from entropy_attn.benchmarks.model import ModelNotFound
from entropy_attn.benchmarks.model_masks import SMOLLM2
from entropy_attn.benchmarks.plugins import REGISTERED
from entropy_attn.benchmarks.registry import Context, Row

# In sparse cases these stand for dense attention.
DENSE_ANCHORS = ("SDPA flash", "SDPA cuDNN")


def cases(form: str) -> list[AttentionCase]:
    """The cases of a form ("full", "quick" or "small"), the most important ones first."""
    if form == "small":
        dense = AttentionCase(64, 256, block=32, batch=1, heads=2, dtype="float32")
        sparse = replace(dense, density=0.25)
        return [dense, sparse, replace(sparse, direction="backward")]
    if form == "quick":
        dense = AttentionCase(128, 4096)
        sparse = replace(dense, density=0.25)
        return [dense, sparse, replace(sparse, direction="backward")]

    dense, dense_64 = AttentionCase(128, 16384), AttentionCase(64, 16384)
    quarter, fifth = replace(dense, density=0.25), replace(dense_64, density=0.2)
    back = replace(quarter, length=8192, direction="backward")
    found = [dense, quarter, dense_64, fifth, back, replace(back, head_dim=64)]
    found += [replace(back, head_dim=head_dim, density=1.0) for head_dim in (128, 64)]
    found += [replace(case, block=64) for case in (quarter, fifth)]
    found += [
        replace(case, density=density, block_k=64)
        for case, middle in ((dense, 0.25), (dense_64, 0.2)) for density in (0.5, middle, 0.1)
    ]  # fmt: skip
    found += [
        replace(case, density=density, block=block)
        for density in (0.5, 0.1) for case in (dense, dense_64) for block in (128, 64)
    ]  # fmt: skip
    found += [replace(case, is_causal=True) for case in (dense, quarter)]
    found += [replace(quarter, irregular=True, block=block) for block in (128, 64)]
    found += [replace(back, head_dim=head_dim, block=64) for head_dim in (128, 64)]
    found.append(replace(back, irregular=True))
    found += [replace(quarter, pattern=pattern) for pattern in ("banded", "clustered")]
    found += [replace(quarter, density=0.05), replace(quarter, block=32)]
    # Other lengths: where launches weigh, and long ones.
    found += [replace(quarter, length=length) for length in (1024, 2048, 4096, 65536)]
    found += [
        replace(quarter, length=length, head_dim=head_dim, direction="backward")
        for length in (2048, 4096, 32768)
        for head_dim in (128, 64)
    ]
    found += [replace(back, is_causal=True, density=density) for density in (1.0, 0.25)]
    # What a model looks at instead of blocks drawn at random.
    real = replace(fifth, length=8192, density=0.25, heads=9, is_causal=True, pattern=SMOLLM2)
    found += [real, replace(real, block=64), replace(real, direction="backward")]
    found.append(replace(quarter, length=131072, batch=1))
    return found


def contestants(case: AttentionCase) -> list[str]:
    """Who takes part: in sparse cases all that take block lists, and the dense anchors.

    What a plugin registered takes part in all cases.
    """
    if case.density < 1:
        chosen = {name for name, c in CONTESTANTS.items() if c.sparse} | {*DENSE_ANCHORS}
    else:
        chosen = {name for name, c in CONTESTANTS.items() if not c.sparse}
        chosen |= {OURS, OURS_WITH_ENTROPY, OURS_DETERMINISTIC}
    chosen |= set(REGISTERED)
    return [name for name in CONTESTANTS if name in chosen]


def run(context: Context) -> Iterator[Row]:
    seconds = {"full": 1.0, "quick": 0.3, "small": 0.05}[context.form]
    told: set[tuple[str, str]] = set()
    for case in context.left(cases(context.form), contestants=(OURS, *REGISTERED)):
        context.progress(str(case))
        try:
            yield from _run_case(context, case, seconds, told)
        except ModelNotFound as error:
            context.progress(f"{case} is left out: {error}")


def _run_case(
    context: Context, case: AttentionCase, seconds: float, told: set[tuple[str, str]]
) -> Iterator[Row]:
    """``told``: contestants that are unavailable, and why; each is told once."""
    for outcome in contest(case, contestants(case), context.device, seconds=seconds):
        absence = (outcome.contestant.name, outcome.result.get("reason", ""))
        if outcome.result["status"] == "unavailable":
            if absence in told:
                continue
            told.add(absence)
        config = {"form": context.form, **case.config(), "contestant": outcome.contestant.name}
        yield Row(config, outcome.result, _text(case, outcome), outcome.is_ours)


def _text(case: AttentionCase, outcome: Outcome) -> str:
    result = outcome.result
    if result["status"] != "ok":
        return f"{case} | {outcome.contestant.name}: {result['status']}: {result['reason']}"
    return (
        f"{case} | {outcome.contestant.name}: {result['median_ms']:.3f} ms, "
        f"{result['tflops']:.4g} TFLOP/s"
    )
