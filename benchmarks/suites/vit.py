"""ViT-B/16 end to end: images a second by attention, up to 1024 pixels.

Whole forward passes in bf16, selection included. At 224 and 384 pixels attention is so small a part
that nothing is to be gained: there the package is to run dense by itself and lose nothing. The
model is transformers', eager, and timm's, eager and under torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.whole_models import (
    CUDNN,
    EAGER,
    FLASH_ONLY,
    LIMIT,
    OURS,
    SDPA,
    Attention,
    contest,
    ours,
    registered,
    row,
)

SPARSITY = 0.8
PATCH = 16
TRANSFORMERS, TIMM = "transformers", "timm"
# With the usual 0.02 attention is next to uniform, and no check could tell it from an average.
SPREAD = 0.05


@dataclass(frozen=True)
class Case:
    """Images of ``size`` pixels a side, ``batch`` at a time.

    Attributes:
        depth: layers, None for ViT-B's.
        library: whose model, "transformers" or "timm".
    """

    size: int
    batch: int
    depth: int | None = None
    library: str = TRANSFORMERS

    @property
    def tokens(self) -> int:
        return (self.size // PATCH) ** 2 + 1

    @property
    def name(self) -> str:
        return f"ViT-B/16 of {self.library}, {self.batch} x {self.size} px"

    def config(self) -> dict[str, Any]:
        """For records, the older of which know transformers' model only and do not say so."""
        found = {**asdict(self), "tokens": self.tokens}
        if self.library == TRANSFORMERS:
            del found["library"]
        return found


def cases(form: str) -> list[Case]:
    if form == "small":
        return [Case(64, 1, depth=2), Case(64, 1, depth=2, library=TIMM)]
    # About as many tokens a batch: enough to keep a GPU busy.
    found = [Case(1024, 8), Case(512, 32), Case(384, 64), Case(224, 192)]
    compiled = [Case(1024, 8, library=TIMM), Case(512, 32, library=TIMM)]
    return [*found, *compiled] if form == "full" else [found[0], found[-1]]


def attentions(form: str, library: str = TRANSFORMERS) -> tuple[Attention, ...]:
    always_kept = {"sink": 0, "local": 0}  # images have no start and no diagonal
    mine = ours(SPARSITY, **always_kept)
    if form == "small":
        small = ours(SPARSITY, min_length=0, block_size=16, min_queries=1, **always_kept)
        return EAGER, SDPA, small, LIMIT
    eager = (EAGER, SDPA, FLASH_ONLY, CUDNN, mine, LIMIT)
    if library == TIMM:
        return (*eager, SDPA.in_graph, mine.in_graph, LIMIT.in_graph)
    # Nothing compiled: transformers 5.17 then gives this model a mask of all its pairs, under which
    # SDPA is as slow as eager attention, so that there is nothing fair to compare with.
    return eager


def run(context: Context) -> Iterator[Row]:
    seconds = {"full": 2.0, "quick": 1.0, "small": 0.1}[context.form]
    for library, make in MODELS.items():
        mine = [case for case in cases(context.form) if case.library == library]
        others = registered() if library == TRANSFORMERS else ()
        names = (OURS, LIMIT.name, *(attention.name for attention in others))
        for case in context.left(mine, lambda c: {"library": None} | c.config(), names):
            config = {"form": context.form, **case.config()}
            try:
                model = make(case).to(context.device, torch.bfloat16).eval()
            except ImportError as error:
                reason = f"{library} cannot be imported: {error}"
                yield Row(config, {"status": "unavailable", "reason": reason}, reason)
                break
            pixels = torch.randn(case.batch, 3, case.size, case.size, device=context.device)
            pixels = pixels.to(torch.bfloat16)
            found = contest(
                attentions(context.form, library) + others, model,
                {PIXELS[library]: pixels}, {PIXELS[library]: pixels[:1]}, "logits", seconds=seconds,
                progress=lambda text, name=case.name: context.progress(f"{name}: {text}"),
            )  # fmt: skip
            for attention, result in found:
                yield row(case.name, attention, result, config, SPARSITY, case.batch, "images")


def _of_transformers(case: Case) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(
        image_size=case.size, patch_size=PATCH, num_hidden_layers=case.depth or 12,
        num_labels=1000, initializer_range=SPREAD,
    ))  # fmt: skip


def _of_timm(case: Case) -> nn.Module:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_base_patch16_224", pretrained=False, img_size=case.size, depth=case.depth or 12
    )
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            nn.init.trunc_normal_(parameter, std=SPREAD)
    return model


MODELS: dict[str, Callable[[Case], nn.Module]] = {TRANSFORMERS: _of_transformers, TIMM: _of_timm}
PIXELS = {TRANSFORMERS: "pixel_values", TIMM: "x"}
