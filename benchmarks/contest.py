"""One attention case with its contestants: check each, then time all that are right together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from entropy_attn.benchmarks.baselines import CONTESTANTS, Contestant, our_backend
from entropy_attn.benchmarks.cases import AttentionCase, Inputs, make_inputs
from entropy_attn.benchmarks.check import Expected, expected
from entropy_attn.benchmarks.environment import sm_clock_mhz
from entropy_attn.benchmarks.timing import measure

INPUT_SETS = 3


@dataclass(frozen=True)
class Outcome:
    """What became of one contestant; result["status"] says ok, unavailable, failed or wrong."""

    contestant: Contestant
    result: dict[str, Any]

    @property
    def is_ours(self) -> bool:
        return self.contestant.package == "entropy-attn"


def contest(
    case: AttentionCase,
    names: Iterable[str],
    device: torch.device | str,
    *,
    seconds: float = 1.0,
    input_sets: int = INPUT_SETS,
) -> Iterator[Outcome]:
    """Run a case; yields one outcome per contestant, in the order of ``names``.

    A contestant that cannot run is reported with the reason, one whose output or gradients differ
    from the reference is reported as wrong; neither is timed.
    """
    device = torch.device(device)
    inputs = [make_inputs(case, device, seed) for seed in range(input_sets)]
    references: dict[bool, Expected] = {}
    calls: dict[str, list[Callable[[], object]]] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        contestant = CONTESTANTS[name]
        sparse = contestant.sparse and case.density < 1
        if sparse not in references and contestant.refuses(case, device) is None:
            references[sparse] = expected(inputs[0], sparse=sparse)
        prepared = prepare(contestant, inputs, references.get(sparse))
        if isinstance(prepared, list):
            calls[name] = prepared
        else:
            results[name] = prepared
    references.clear()

    timings = measure(calls, seconds=seconds, device=device) if calls else {}
    clock = sm_clock_mhz()
    for name, timing in timings.items():
        flops = _mean_flops(inputs, sparse=CONTESTANTS[name].sparse)
        results[name] = {
            "status": "ok",
            **timing.as_dict(),
            "tflops": flops / timing.median_ms / 1e9,
            "sm_clock_mhz": clock,
        }
    for name in names:
        contestant = CONTESTANTS[name]
        known = {"version": contestant.version, "sparse": contestant.sparse}
        if contestant.package == "entropy-attn":
            known["backend"] = our_backend(device)
        yield Outcome(contestant, results[name] | known)


def prepare(
    contestant: Contestant, inputs: list[Inputs], reference: Expected | None
) -> list[Callable[[], object]] | dict[str, Any]:
    """The contestant's calls, one per input set, once the first is checked; or why not, a result.

    ``reference`` belongs to ``inputs[0]``; it may be None only if the contestant refuses the case.
    """
    reason = contestant.refuses(inputs[0].case, inputs[0].device)
    if reason is not None:
        return {"status": "unavailable", "reason": reason}
    try:
        calls = [contestant.call(each) for each in inputs]
        actual = calls[0]()
    except Exception as error:  # a rival that breaks is a finding, not the end of the suite
        return {"status": "failed", "reason": first_line(error)}
    wrong = reference.verdict(actual if isinstance(actual, tuple) else (actual,))
    return calls if wrong is None else {"status": "wrong", "reason": wrong}


def _mean_flops(inputs: list[Inputs], *, sparse: bool) -> float:
    return sum(each.flops(sparse=sparse) for each in inputs) / len(inputs)


def first_line(error: Exception) -> str:
    """What a record says of an error: its type and the first line of its text."""
    text = str(error).strip() or repr(error)
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"
