"""Cost of choosing blocks: selection and mask building as a share of the attention they serve.

``select`` is the whole of `ea.select_blocks`; ``pool``, ``score`` and ``keep`` are its steps:
groups of tokens, the mass of every tile predicted from them (pooling included), and block lists
from masses. ``copy`` moves as many bytes as queries and keys have, the least that pooling can take.
The share is of the time of sparse attention at a density of 0.2 in the same interleaved run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

import entropy_attn as ea
from entropy_attn.benchmarks.baselines import our_backend
from entropy_attn.benchmarks.cases import AttentionCase, Inputs, make_inputs
from entropy_attn.benchmarks.environment import sm_clock_mhz
from entropy_attn.benchmarks.registry import Context, Row, short
from entropy_attn.benchmarks.timing import measure
from entropy_attn.selection import keep_blocks
from entropy_attn.selection.geometry import Geometry, make_geometry
from entropy_attn.selection.scorers import GroupScorer, Pooled
from entropy_attn.testing import assert_close_to_reference

DENSITY = 0.2
INPUT_SETS = 3
ATTENTION, COPY = "attention", "copy"
SCORERS = (ea.Pooled(8), ea.Envelope(8), ea.Envelope(16), ea.Antidiagonal(16))
# All of them with the default scorer, else the first: what a budget takes depends on no scorer.
BUDGETS = (ea.TopK(DENSITY), ea.TopP(0.95), ea.Perplexity(1.0))
DEFAULT = ea.SparsityConfig().scorer


@dataclass(frozen=True)
class Step:
    """Something that is timed: kind "select", "pool", "score" or "keep", of a scorer and a budget,
    "copy" or "attention"."""

    kind: str
    scorer: Callable[..., Tensor] | None = None
    budget: object | None = None

    def __str__(self) -> str:
        return " ".join([self.kind, *(short(x) for x in (self.scorer, self.budget) if x)])


def cases(form: str) -> list[AttentionCase]:
    if form == "small":
        return [AttentionCase(64, 512, DENSITY, 64, batch=1, heads=2, dtype="float32")]
    found = [AttentionCase(128, 16384, DENSITY, 64)]
    if form == "full":
        found += [replace(found[0], head_dim=64), replace(found[0], block=128)]
    # As language models run it: grouped queries, causal.
    found += [replace(case, is_causal=True, kv_heads=4) for case in found]
    return found


def run(context: Context) -> Iterator[Row]:
    for case in context.left(cases(context.form), lambda c: asdict(c) | {"kind": ATTENTION}):
        yield from _run_case(context, case)


def _run_case(context: Context, case: AttentionCase) -> Iterator[Row]:
    context.progress(f"selection, {_name(case)}")
    sets = [make_inputs(case, context.device, seed) for seed in range(INPUT_SETS)]
    calls: dict[Step, list[Callable[[], object]]] = {}
    wrong: dict[object, str] = {}
    for scorer in SCORERS:
        problem = _wrong_scores(scorer, sets[0])
        if problem:
            wrong[scorer] = problem
            continue
        masses = [_score(scorer, inputs) for inputs in sets]
        calls[Step("score", scorer)] = [_bind(_masses, scorer, inputs) for inputs in sets]
        if isinstance(scorer, Pooled):
            calls[Step("pool", scorer)] = [_bind(_pool, scorer, inputs) for inputs in sets]
        for budget in BUDGETS if scorer == DEFAULT else BUDGETS[:1]:
            if scorer == DEFAULT:
                calls[Step("keep", None, budget)] = [
                    _bind(_keep, mass, budget, case) for mass in masses
                ]
            calls[Step("select", scorer, budget)] = [
                _bind(_select, scorer, budget, inputs) for inputs in sets
            ]
    attention = Step(ATTENTION)
    calls[attention] = [_attention(inputs) for inputs in sets]
    calls[Step(COPY)] = [_copy(inputs) for inputs in sets]

    seconds = {"full": 1.0, "quick": 0.3, "small": 0.05}[context.form]
    names = {str(step): step for step in calls}
    timings = measure(
        {str(step): c for step, c in calls.items()}, seconds=seconds, device=context.device
    )
    attention_ms = timings[str(attention)].median_ms
    shared = {"attention_ms": attention_ms, "sm_clock_mhz": sm_clock_mhz()}
    shared["backend"] = our_backend(context.device)
    shared["copy_ms"] = timings[COPY].median_ms
    for name, step in names.items():
        timing = timings[name]
        result = {"status": "ok", **timing.as_dict(), **shared}
        text = f"{_name(case)} | {name}: {timing.median_ms:.3f} ms"
        if step.kind not in (ATTENTION, COPY):
            result["share"] = timing.median_ms / attention_ms
            text += f", {result['share']:.1%} of the attention"
        if step.kind == "select":
            mask = _select(step.scorer, step.budget, sets[0])
            result["density"] = float(mask.density(is_causal=case.is_causal))
            pool = str(Step("pool", step.scorer))
            result["pool_ms"] = timings[pool].median_ms if pool in timings else None
        yield Row(_config(context, case, step), result, text, is_ours=True)
    for scorer, reason in wrong.items():
        step = Step("score", scorer)
        result = {"status": "wrong", "reason": reason}
        yield Row(
            _config(context, case, step), result, f"{_name(case)} | {step}: wrong: {reason}", True
        )


def _name(case: AttentionCase) -> str:
    return f"{case.shape}, blocks of {case.block}"


def _config(context: Context, case: AttentionCase, step: Step) -> dict:
    return {
        "form": context.form,
        **case.config(),
        "kind": step.kind,
        "scorer": short(step.scorer) if step.scorer else None,
        "budget": short(step.budget) if step.budget else None,
    }


def _bind(function: Callable, *args: object) -> Callable[[], object]:
    return lambda: function(*args)


def _score(scorer, inputs: Inputs, query: Tensor | None = None, backend: str | None = None):
    case = inputs.case
    query = inputs.query if query is None else query
    return scorer(
        query,
        inputs.key.to(query.dtype),
        block_size=(case.block, case.block),
        is_causal=case.is_causal,
        scale=case.head_dim**-0.5,
        kv_lens=None,
        q_lens=None,
        window=None,
        backend=backend or our_backend(inputs.device),
    )


def _masses(scorer: GroupScorer, inputs: Inputs):
    """As the selection takes them: not normalised, which `_score` does on top."""
    scale, backend = inputs.case.head_dim**-0.5, our_backend(inputs.device)
    geometry = _geometry(inputs)
    score = scorer.tile_scores(inputs.query, inputs.key, geometry, scale, backend)
    return score(0, geometry.q_tiles)


def _pool(scorer: Pooled, inputs: Inputs):
    backend = our_backend(inputs.device)
    return scorer.groups(inputs.query, inputs.key, _geometry(inputs), backend)


def _geometry(inputs: Inputs) -> Geometry:
    case = inputs.case
    blocks = (case.block, case.block)
    return make_geometry(inputs.query, inputs.key, blocks, case.is_causal, None, None, None)


def _copy(inputs: Inputs) -> Callable[[], object]:
    half = torch.empty((inputs.query.nbytes + inputs.key.nbytes) // 2, dtype=torch.uint8,
                       device=inputs.device)  # fmt: skip
    target = torch.empty_like(half)
    return lambda: target.copy_(half)  # reads a half and writes a half


def _keep(mass: Tensor, budget, case: AttentionCase):
    return keep_blocks(
        mass,
        budget,
        block_size=(case.block, case.block),
        q_len=case.length,
        kv_len=case.length,
        is_causal=case.is_causal,
        sink=1,
        local=2,
        backend=our_backend(mass.device),
    )


def _select(scorer, budget, inputs: Inputs):
    return ea.select_blocks(
        inputs.query,
        inputs.key,
        block_size=inputs.case.block,
        scorer=scorer,
        budget=budget,
        is_causal=inputs.case.is_causal,
        backend=our_backend(inputs.device),
    )


def _attention(inputs: Inputs) -> Callable[[], object]:
    mask = _select(SCORERS[0], BUDGETS[0], inputs)
    return lambda: ea.block_sparse_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        mask,
        is_causal=inputs.case.is_causal,
        backend=our_backend(inputs.device),
    )


def _wrong_scores(scorer, inputs: Inputs) -> str | None:
    """Compare the kernel's scores with the plain PyTorch ones in the same and in fp64."""
    exact = _score(scorer, inputs, inputs.query.double(), "reference")
    plain = _score(scorer, inputs, backend="reference")
    # Rounding a score of size s to fp32 changes its exponential by a relative eps * s.
    query, key = (t[0, 0].float() for t in (inputs.query, inputs.key))
    size = inputs.case.head_dim**-0.5 * (query @ key.T).abs().max().item()
    try:
        assert_close_to_reference(
            _score(scorer, inputs), plain, exact, short(scorer), magnitude=size
        )
    except AssertionError as error:
        return str(error)
    return None
