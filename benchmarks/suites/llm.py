"""Language models of 7B parameters: tokens a second by attention, in prefill and in decoding.

The shapes of LLaMA-2-7B, Mistral-7B and Phi-2 with random weights, and the real SmolLM2. Whole
forward passes in bf16; selection included, whose budget keeps a quarter of the blocks of any
attention. What that does to quality is measured in ``quality``.

Prefill takes one sequence of up to 64k tokens without a cache. Decoding is one token a sequence
against a full cache, as a CUDA graph: else a step waits for the host, whatever its attention is. So
does the prefill of SmolLM2, which is small: it is measured both ways.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from entropy_attn.benchmarks.model import ModelNotFound, load_model
from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.whole_models import (
    ALL_BLOCKS,
    CHECKED_LAYERS,
    CUDNN,
    EAGER,
    FLASH_ONLY,
    LIMIT,
    OURS,
    SDPA,
    Attention,
    contest,
    ours,
    ours_decoding,
    registered,
    row,
)

SPARSITY = 0.75
CHECKED_TOKENS = 256
PREFILL, DECODE = "prefill", "decode"
GRAPH = ", as a CUDA graph"


@dataclass(frozen=True)
class Case:
    """A model and the tokens of its prompt; ``depth`` None for the model's own layers.

    Attributes:
        batch: sequences; 0 for prefill of one.
        captured: prefill runs as a CUDA graph; decoding always does, where there is a GPU.
    """

    model: str
    tokens: int
    depth: int | None = None
    batch: int = 0
    captured: bool = False

    @property
    def phase(self) -> str:
        return DECODE if self.batch else PREFILL

    @property
    def name(self) -> str:
        if self.phase == PREFILL:
            return f"{self.model}, {self.tokens} tokens" + (GRAPH if self.captured else "")
        return f"{self.model}, decoding {self.batch} x {self.tokens}"


def cases(form: str) -> list[Case]:
    if form == "small":
        return [Case("LLaMA, tiny", 64), Case("LLaMA, tiny", 80, batch=2)]
    if form == "quick":
        return [Case("LLaMA-2-7B", 16384, 4), Case("LLaMA-2-7B", 16384, 4, batch=8)]
    found = [Case("LLaMA-2-7B", n) for n in (32768, 65536, 16384, 4096)]
    # Eight caches of 32k tokens and the weights would not fit one GPU.
    found += [Case("LLaMA-2-7B", n, batch=b) for n, b in ((16384, 1), (32768, 1), (16384, 8))]
    found += [Case("Mistral-7B", 32768), Case("Mistral-7B", 65536)]
    found += [Case("Mistral-7B", n, batch=b) for b in (1, 8) for n in (16384, 32768)]
    found += [Case("Mistral-7B", 65536, batch=8)]  # 64 GiB of keys and values
    found += [Case("Phi-2", 32768), Case("SmolLM2-135M", 8192)]
    return [*found, Case("SmolLM2-135M", 8192, captured=True)]


def attentions(form: str, captured: bool = False) -> tuple[Attention, ...]:
    """Of prefill."""
    if form == "small":
        return EAGER, SDPA, ours(SPARSITY, min_length=0, block_size=16, min_queries=1), LIMIT
    # A graph does not wait for the host, which the default cannot know (docs/integrations.md).
    sparse = ours(SPARSITY, min_length=4096) if captured else ours(SPARSITY)
    return SDPA, FLASH_ONLY, CUDNN, sparse, LIMIT


def decoding_attentions(form: str) -> tuple[Attention, ...]:
    if form == "small":
        return SDPA, ALL_BLOCKS, ours_decoding(1 - SPARSITY, min_length=0, block_size=16), LIMIT
    return SDPA, CUDNN, ALL_BLOCKS, ours_decoding(1 - SPARSITY), LIMIT


def run(context: Context) -> Iterator[Row]:
    made: tuple[str, Any] = ("", None)
    others = registered()
    names = (OURS, LIMIT.name, *(attention.name for attention in others))
    for case in context.left(cases(context.form), _shared, names):
        if made[0] != case.model:
            made = ("", None)  # the old one must be gone before there is a new one
            context.progress(f"making {case.model}")
            try:
                made = (case.model, MODELS[case.model](case, context))
            except ModelNotFound as error:
                context.progress(f"{case.name} is left out: {error}")
                continue
        yield from _run_case(context, case, made[1], others)
        if context.on_gpu:
            gc.collect()  # a cache of the next case may need what this one's took
            torch.cuda.empty_cache()


def _run_case(
    context: Context, case: Case, model: Any, others: tuple[Attention, ...]
) -> Iterator[Row]:
    seconds = {"full": 6.0, "quick": 3.0, "small": 0.1}[context.form]
    if case.phase == PREFILL:
        among, options = attentions(context.form, case.captured), {"use_cache": False}
    else:
        among, options = decoding_attentions(context.form), {}
    if context.on_gpu and (case.captured or case.phase == DECODE):
        among, others = (
            tuple(attention.in_capture(case.phase == PREFILL) for attention in each)
            for each in (among, others)
        )
    found = contest(
        among + others, model, *_inputs(case, model, context.device), "logits",
        options={"logits_to_keep": 1, **options}, seconds=seconds,
        progress=lambda text: context.progress(f"{case.name}: {text}"),
    )  # fmt: skip
    config = {"form": context.form, **_shared(case)}
    count = case.tokens if case.phase == PREFILL else case.batch
    for attention, result in found:
        yield row(case.name, attention, result, config, SPARSITY, count, "tokens")


def _shared(case: Case) -> dict[str, Any]:
    config = {**asdict(case), "phase": case.phase}
    if case.phase == PREFILL:
        del config["batch"]
    if not case.captured:  # records that are older do not say so
        del config["captured"]
    return config


def _inputs(case: Case, model: Any, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is timed, and what the contestants are checked on."""
    vocabulary = model.config.vocab_size
    if case.phase == PREFILL:
        ids = torch.randint(vocabulary, (1, case.tokens), device=device)
        return {"input_ids": ids}, {"input_ids": ids[:, :CHECKED_TOKENS]}
    from entropy_attn.benchmarks.full_cache import FullCache

    ids = torch.randint(vocabulary, (case.batch, 1), device=device)

    def inputs(layers: int, tokens: int) -> dict[str, Any]:
        cache = FullCache.random(model.config, layers, case.batch, tokens, device)
        return {"input_ids": ids, "past_key_values": cache}

    return (
        inputs(model.config.num_hidden_layers, case.tokens),
        inputs(CHECKED_LAYERS, min(case.tokens, CHECKED_TOKENS)),
    )


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
