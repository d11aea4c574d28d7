"""ViT-B/16 end to end: images a second by attention, up to 1024 pixels.

Whole forward passes in bf16, selection included. At 224 and 384 pixels attention is so small a part
that nothing is to be gained: there the package is to run dense by itself and lose nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.whole_models import (
    EAGER,
    FLASH_ONLY,
    LIMIT,
    SDPA,
    Attention,
    contest,
    ours,
    row,
)

SPARSITY = 0.8
PATCH = 16


@dataclass(frozen=True)
class Case:
    """Images of ``size`` pixels a side, ``batch`` at a time; ``depth`` None for ViT-B's."""

    size: int
    batch: int
    depth: int | None = None

    @property
    def tokens(self) -> int:
        return (self.size // PATCH) ** 2 + 1


def cases(form: str) -> list[Case]:
    if form == "small":
        return [Case(64, 1, depth=2)]
    # About as many tokens a batch: enough to keep a GPU busy.
    found = [Case(1024, 8), Case(512, 32), Case(384, 64), Case(224, 192)]
    return found if form == "full" else [found[0], found[-1]]


def attentions(form: str) -> tuple[Attention, ...]:
    always_kept = {"sink": 0, "local": 0}  # images have no start and no diagonal
    mine = ours(SPARSITY, **always_kept)
    if form == "small":
        small = ours(SPARSITY, min_length=0, block_size=16, min_queries=1, **always_kept)
        return EAGER, SDPA, small, LIMIT
    # Nothing compiled: transformers 5.17 then gives this model a mask of all its pairs, under which
    # SDPA is as slow as eager attention, so that there is nothing fair to compare with.
    return EAGER, SDPA, FLASH_ONLY, mine, LIMIT


def run(context: Context) -> Iterator[Row]:
    seconds = {"full": 2.0, "quick": 1.0, "small": 0.1}[context.form]
    for case in cases(context.form):
        name = f"ViT-B/16, {case.batch} x {case.size} px"
        model = _model(case, context.device)
        pixels = torch.randn(
            case.batch, 3, case.size, case.size, device=context.device, dtype=model.dtype
        )
        found = contest(
            attentions(context.form), model, {"pixel_values": pixels}, {"pixel_values": pixels[:1]},
            "logits", seconds=seconds,
            progress=lambda text, name=name: context.progress(f"{name}: {text}"),
        )  # fmt: skip
        config = {"form": context.form, **asdict(case), "tokens": case.tokens}
        for attention, result in found:
            yield row(name, attention, result, config, SPARSITY, case.batch, "images")


def _model(case: Case, device: torch.device) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    # With the usual 0.02 attention is next to uniform, and no check could tell it from an average.
    config = ViTConfig(
        image_size=case.size, patch_size=PATCH, num_hidden_layers=case.depth or 12,
        num_labels=1000, initializer_range=0.05,
    )  # fmt: skip
    model: nn.Module = ViTForImageClassification(config)
    return model.to(device, torch.bfloat16).eval()
