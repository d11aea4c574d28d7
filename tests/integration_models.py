"""Tiny transformers models of random weights, and what they are compared with."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import entropy_attn as ea
from entropy_attn.testing import assert_close_to_reference

transformers = pytest.importorskip("transformers")

VOCABULARY = 97
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOW = 48

# Everything sparse, however short, and every visible block kept: must equal dense attention.
KEEP_ALL = ea.SparsityConfig(block_size=16, budget=ea.TopK(1.0), min_length=0, min_queries=1)
KEEP_FEW = ea.SparsityConfig(block_size=16, budget=ea.TopK(0.2), min_length=0, min_queries=1)


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def _mistral():
    config = transformers.MistralConfig(**GROUPED, sliding_window=WINDOW, head_dim=16)
    return transformers.MistralForCausalLM(config)


def _qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED))


def _qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED, head_dim=16))


def _phi():
    return transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES))


def _gemma():
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED, head_dim=16))


def _bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def _vit():
    sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = transformers.ViTConfig(**sizes, image_size=48, patch_size=4, num_labels=10)
    return transformers.ViTForImageClassification(config)


DECODERS = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "phi": _phi,
    "gemma": _gemma,
}
MODELS = DECODERS | {"bert": _bert, "vit": _vit}


def build(family: str):
    """A model in eval mode that runs SDPA."""
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    # The usual initial weights are so small that attention is nearly uniform.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name or "query.weight" in name:
                parameter.mul_(15)
    return model


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def inputs_of(family: str, batch: int = 2, length: int = 200) -> dict[str, Tensor]:
    if family == "vit":
        generator = torch.Generator().manual_seed(1)
        return {"pixel_values": torch.randn(batch, 3, 48, 48, generator=generator)}
    return {"input_ids": tokens(batch, length)}


def padding_mask(side: str, length: int = 200) -> Tensor:
    """(3, length): no padding, a little and a lot, on one side, or on both."""
    mask = torch.ones(3, length, dtype=torch.int64)
    if side in ("left", "both"):
        mask[1, :37] = 0
        mask[2, :150] = 0
    if side in ("right", "both"):
        mask[1, length - 20 :] = 0
        mask[2, length - 45 :] = 0
    return mask


@dataclass
class Dense:
    """Logits of a model that runs SDPA, in fp32 and in fp64."""

    single: Tensor
    double: Tensor

    def check(self, actual: Tensor, where: Tensor | None = None) -> None:
        """That ``actual`` is as good as SDPA, at the tokens ``where`` is true."""
        pick = (lambda x: x) if where is None else (lambda x: x[where.bool()])
        assert_close_to_reference(pick(actual), pick(self.single), pick(self.double), "logits")


@torch.no_grad()
def dense_logits(model, **inputs) -> Dense:
    assert model.config._attn_implementation == "sdpa"
    double = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    return Dense(model(**inputs).logits, copy.deepcopy(model).double()(**double).logits)


def all_sparse(handle: ea.integrations.Handle) -> bool:
    """Whether every layer ran, and never dense."""
    return all(layer.sparse > 0 and not layer.dense for layer in handle.stats().layers)
