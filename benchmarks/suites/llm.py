"""Prefill of language models of 7B parameters: tokens a second by attention, up to 64k tokens.

The shapes of LLaMA-2-7B, Mistral-7B and Phi-2 with random weights, and the real SmolLM2. Whole
forward passes in bf16, one sequence, without a cache; selection included, whose budget keeps a
quarter of the blocks of any attention. What that does to quality is measured in ``quality``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from entropy_attn.benchmarks.model import ModelNotFound, load_model
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

SPARSITY = 0.75
CHECKED_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """A model and the tokens of its prompt; ``depth`` None for the model's own layers."""

    model: str
    tokens: int
    depth: int | None = None


def cases(form: str) -> list[Case]:
    if form == "small":
        return [Case("LLaMA, tiny", 64)]
    if form == "quick":
        return [Case("LLaMA-2-7B", 16384, depth=4)]
    found = [Case("LLaMA-2-7B", n) for n in (32768, 65536, 16384, 4096)]
    found += [Case("Mistral-7B", 32768), Case("Mistral-7B", 65536), Case("Phi-2", 32768)]
    return [*found, Case("SmolLM2-135M", 8192)]


def attentions(form: str) -> tuple[Attention, ...]:
    if form == "small":
        return EAGER, SDPA, ours(SPARSITY, min_length=0, block_size=16, min_queries=1), LIMIT
    return SDPA, FLASH_ONLY, CUDNN, ours(SPARSITY), LIMIT


def run(context: Context) -> Iterator[Row]:
    seconds = {"full": 6.0, "quick": 3.0, "small": 0.1}[context.form]
    made: tuple[str, Any] = ("", None)
    others = registered()
    names = (OURS, *(attention.name for attention in others))
    for case in context.left(cases(context.form), _shared, names):
        name = f"{case.model}, {case.tokens} tokens"
        if made[0] != case.model:
            made = ("", None)  # the old one must be gone before there is a new one
            context.progress(f"making {case.model}")
            try:
                made = (case.model, MODELS[case.model](case, context))
            except ModelNotFound as error:
                context.progress(f"{name} is left out: {error}")
                continue
        model = made[1]
        ids = torch.randint(model.config.vocab_size, (1, case.tokens), device=context.device)
        shared = {"use_cache": False, "logits_to_keep": 1}
        found = contest(
            attentions(context.form) + others, model, {"input_ids": ids},
            {"input_ids": ids[:, :CHECKED_TOKENS]}, "logits", options=shared, seconds=seconds,
            progress=lambda text, name=name: context.progress(f"{name}: {text}"),
        )  # fmt: skip
        config = {"form": context.form, **_shared(case)}
        for attention, result in found:
            yield row(name, attention, result, config, SPARSITY, case.tokens, "tokens")


def _shared(case: Case) -> dict[str, Any]:
    return {**asdict(case), "phase": "prefill"}


# --- models -------------------------------------------------------------------------------------


def _llama(case: Case, context: Context) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _random(LlamaForCausalLM, LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=case.depth or 32,
        num_attention_heads=32, vocab_size=32000, max_position_embeddings=131072,
    ), context)  # fmt: skip


def _mistral(case: Case, context: Context) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    # Version 0.3, which has no sliding window.
    return _random(MistralForCausalLM, MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=case.depth or 32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=32768,
        max_position_embeddings=131072, sliding_window=None,
    ), context)  # fmt: skip


def _phi(case: Case, context: Context) -> Any:
    from transformers import PhiConfig, PhiForCausalLM

    return _random(PhiForCausalLM, PhiConfig(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=case.depth or 32,
        num_attention_heads=32, vocab_size=51200, max_position_embeddings=131072,
    ), context)  # fmt: skip


def _tiny(case: Case, context: Context) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _random(LlamaForCausalLM, LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, initializer_range=0.2,
    ), context)  # fmt: skip


def _random(kind: Any, config: Any, context: Context) -> Any:
    """A model with random weights, made where it will run: on the host it would take minutes."""
    torch.manual_seed(0)
    config.dtype = torch.bfloat16
    with torch.device(context.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return kind(config).eval()
        finally:
            torch.set_default_dtype(default)


def _smollm2(case: Case, context: Context) -> Any:
    return load_model(context.device, torch.bfloat16)[0]


MODELS: dict[str, Callable[[Case, Context], Any]] = {
    "LLaMA-2-7B": _llama,
    "Mistral-7B": _mistral,
    "Phi-2": _phi,
    "SmolLM2-135M": _smollm2,
    "LLaMA, tiny": _tiny,
}
