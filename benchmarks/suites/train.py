"""What the regularizer adds to a training step, and to the memory it takes.

Whole steps, forward, backward and AdamW, of models of real shape and random weights under bf16
autocast. Contestants take turns, each with a copy of the model: plain, and regularized with several
shares of the blocks of queries and of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import entropy_attn as ea
from entropy_attn.benchmarks.environment import sm_clock_mhz
from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.timing import measure, peak_bytes

PLAIN = "plain"
DEFAULT = "1/8 of the blocks, half of the layers"


@dataclass(frozen=True)
class Case:
    """A model in training.

    Attributes:
        model: "SmolLM2-135M" or "ViT-B/16".
        batch: sequences or images a step.
        size: tokens a sequence, or pixels along an image.
        block: of the regularizer, in tokens.
        depth: layers, None for the model's own.
    """

    model: str
    batch: int
    size: int
    block: int
    depth: int | None = None

    @property
    def name(self) -> str:
        unit = "px" if self.model.startswith("ViT") else "tokens"
        return f"{self.model}, {self.batch} x {self.size} {unit}"


def cases(form: str) -> list[Case]:
    if form == "small":
        return [Case("SmolLM2-135M", 1, 256, 32, depth=2), Case("ViT-B/16", 1, 64, 16, depth=2)]
    found = [Case("SmolLM2-135M", 4, 4096, 64), Case("ViT-B/16", 256, 224, 32)]
    if form == "quick":
        return found
    # With few images a step waits for launches, and so does what the regularizer adds.
    return [*found, Case("ViT-B/16", 64, 512, 64), Case("ViT-B/16", 32, 224, 32)]


def settings(form: str) -> dict[str, dict[str, float]]:
    """The regularizers, by name."""
    found: dict[str, dict[str, float]] = {
        DEFAULT: {"tile_fraction": 0.125, "layer_fraction": 0.5},
        "half of the blocks, 1/8 of the layers": {"tile_fraction": 0.5, "layer_fraction": 0.125},
        "1/8 of the blocks": {"tile_fraction": 0.125, "layer_fraction": 1.0},
        "1/16 of the blocks": {"tile_fraction": 0.0625, "layer_fraction": 1.0},
        "all blocks": {"tile_fraction": 1.0, "layer_fraction": 1.0},
        "all blocks, 1/8 of the layers": {"tile_fraction": 1.0, "layer_fraction": 0.125},
    }
    return found if form == "full" else {DEFAULT: found[DEFAULT]}


def run(context: Context) -> Iterator[Row]:
    for case in context.left(cases(context.form)):
        context.progress(f"training step, {case.name}")
        yield from _run_case(context, case)


def _run_case(context: Context, case: Case) -> Iterator[Row]:
    contestants: dict[str, Callable[[], object]] = {}
    memory: dict[str, int] = {}
    for name, options in {PLAIN: None, **settings(context.form)}.items():
        contestants[name] = _training_step(case, options, context.device)
        contestants[name]()  # AdamW makes its state
        memory[name] = peak_bytes(contestants[name], context.device)
    seconds = {"full": 4.0, "quick": 2.0, "small": 0.2}[context.form]
    timings = measure(
        {name: [step] for name, step in contestants.items()}, seconds=seconds, device=context.device
    )
    plain = timings[PLAIN].median_ms
    for name, timing in timings.items():
        ratio = timing.median_ms / plain
        result: dict[str, Any] = {
            "status": "ok",
            **timing.as_dict(),
            "ratio": ratio,
            "peak_bytes": memory[name] or None,
            "sm_clock_mhz": sm_clock_mhz(),
        }
        text = f"{case.name} | {name}: {timing.median_ms:.1f} ms, {ratio:.3f} x plain"
        yield Row({"form": context.form, **asdict(case), "regularizer": name}, result, text, True)


def _training_step(
    case: Case, options: dict[str, float] | None, device: torch.device
) -> Callable[[], object]:
    torch.manual_seed(0)
    make = _language_model if case.model.startswith("Smol") else _vision_model
    model, loss_of = make(case, device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device.type == "cuda")
    regularizer = None
    if options is not None:
        regularizer = ea.EntropyRegularizer(
            model, target_density=0.05, block_size=case.block, **options
        )

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of()
            if regularizer is not None:
                loss = loss + regularizer.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if regularizer is not None:
            regularizer.step()

    return step


def _language_model(case: Case, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=case.depth or 30,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
        max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device).train()
    ids = torch.randint(config.vocab_size, (case.batch, case.size), device=device)
    return model, lambda: model(ids, labels=ids, use_cache=False).loss


def _vision_model(case: Case, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=case.size, patch_size=16, num_hidden_layers=case.depth or 12, num_labels=1000
    )
    model = ViTForImageClassification(config).to(device).train()
    images = torch.randn(case.batch, 3, case.size, case.size, device=device)
    labels = torch.randint(1000, (case.batch,), device=device)
    return model, lambda: model(images, labels=labels).loss
