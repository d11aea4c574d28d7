"""Perplexity of a real language model against density: what choosing blocks costs in quality.

SmolLM2-135M reads prose through the real drop-in. The oracle knows the true attention mass of
every tile; predictors guess it from a few products. Ideas are tuned on the development text and
judged on the others; the defaults were fixed before the docstrings were read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import entropy_attn as ea
from entropy_attn.benchmarks.baselines import our_backend
from entropy_attn.benchmarks.model import (
    MODEL_NAME,
    KeptMass,
    LocalWindow,
    Setting,
    load_model,
    perplexity,
    sparsify,
    windows,
)
from entropy_attn.benchmarks.prose import PARTS, Prose, prose
from entropy_attn.benchmarks.registry import Context, Row


def settings(form: str) -> list[Setting]:
    """Oracle, predictors and a local window, each at several budgets that make a curve."""
    oracle = [Setting("true mass", ea.TrueMass(), ea.Perplexity(1.0))]
    pooled_max = [Setting("pooled 8, max", ea.Pooled(8, reduce="max"), ea.Perplexity(1.0))]
    envelope = [Setting("envelope 8", ea.Envelope(8), ea.TopP(0.945))]
    if form == "small":
        return oracle + envelope
    pooled = [Setting("pooled 8", ea.Pooled(8), ea.TopP(0.95))]
    local = [Setting("local window", LocalWindow(), ea.TopK(0.27))]
    if form == "quick":
        return oracle + envelope + pooled_max + pooled + local
    oracle += [
        Setting("true mass", ea.TrueMass(), ea.Perplexity(1.0), block) for block in (32, 128)
    ]
    oracle += [
        Setting("true mass", ea.TrueMass(), budget)
        for budget in (ea.Perplexity(0.5), ea.Perplexity(2.0), ea.TopP(0.95), ea.TopK(0.25))
    ]
    envelope += [Setting("envelope 8", ea.Envelope(8), ea.TopP(p)) for p in (0.9, 0.93, 0.955)]
    envelope += [
        Setting("envelope 8", ea.Envelope(8), ea.Perplexity(c)) for c in (0.5, 1.0, 1.5, 1.65, 2.0)
    ]
    envelope += [
        Setting(f"envelope 8, spread {s:g}", ea.Envelope(8, spread=s), ea.TopP(0.945))
        for s in (0.0, 0.2, 0.5)
    ]
    envelope += [Setting(f"envelope {pool}", ea.Envelope(pool), ea.TopP(0.945)) for pool in (4, 16)]
    pooled_max += [
        Setting("pooled 8, max", ea.Pooled(8, reduce="max"), ea.Perplexity(c))
        for c in (0.5, 1.5, 1.75, 2.0)
    ]
    pooled += [Setting("pooled 8", ea.Pooled(8), b) for b in (ea.TopP(0.9), ea.Perplexity(1.0))]
    others = [
        Setting(f"antidiagonal {stride}", ea.Antidiagonal(stride), ea.TopP(0.95))
        for stride in (8, 16)
    ]
    others += [
        Setting("pooled 64", ea.Pooled(64), budget) for budget in (ea.TopP(0.95), ea.TopK(0.25))
    ]
    return oracle + envelope + pooled_max + pooled + others + local


@dataclass(frozen=True)
class Plan:
    """How much is read: ``windows`` of ``length`` tokens of each text."""

    length: int
    windows: int
    texts: tuple[str, ...]

    @classmethod
    def of(cls, form: str) -> Plan:
        if form == "small":
            return cls(1024, 1, ("held-out",))
        if form == "quick":
            return cls(8192, 1, ("held-out",))
        return cls(8192, 2, tuple(PARTS))


def run(context: Context) -> Iterator[Row]:
    plan = Plan.of(context.form)
    context.progress(f"loading {MODEL_NAME}")
    # fp32, so that rounding cannot hide what is lost by leaving blocks out.
    model, tokenizer = load_model(context.device, torch.float32)
    for part in plan.texts:
        text = prose(part)
        ids = windows(tokenizer, text.text, plan.length, plan.windows, context.device)
        config = _shared_config(text, plan)
        left = context.left(settings(context.form), lambda s, shared=config: shared | s.config())
        if not left:
            continue
        shared = {"form": context.form, **config}
        context.progress(f"dense perplexity on {text.name}")
        dense = perplexity(model, ids)
        row = {"status": "ok", "perplexity": dense, "change": 0.0, "density": 1.0, "kept_mass": 1.0}
        yield Row({**shared, "family": "dense"}, row, f"{text.name} | dense: {dense:.3f}", True)
        for setting in left:
            context.progress(f"{setting.name} on {text.name}")
            result = measure_setting(model, ids, setting, dense)
            result["backend"] = our_backend(context.device)
            line = (
                f"{text.name} | {setting.name}: density {result['density']:.3f}, kept mass "
                f"{result['kept_mass']:.3f}, perplexity {result['change']:+.3f}"
            )
            yield Row({**shared, **setting.config()}, result, line, is_ours=True)


def measure_setting(model: Any, ids: Tensor, setting: Setting, dense: float) -> dict[str, Any]:
    """Perplexity through the drop-in, with density and kept mass noted on the way."""
    probe = KeptMass(setting.scorer, setting.budget, setting.sink, setting.local)
    with sparsify(model, setting, scorer=probe):
        found = perplexity(model, ids)
    return {
        "status": "ok",
        "perplexity": found,
        "change": found - dense,
        "density": probe.density,
        "kept_mass": probe.mass,
    }


def _shared_config(text: Prose, plan: Plan) -> dict[str, Any]:
    return {
        "model": MODEL_NAME,
        "dtype": "float32",
        "text": text.name,
        "text_digest": text.digest,
        "length": plan.length,
        "windows": plan.windows,
    }
