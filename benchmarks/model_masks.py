"""Block masks of a real model: what is chosen of SmolLM2's own queries and keys, on real prose."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import entropy_attn as ea
from entropy_attn.benchmarks.model import load_model, shared_copy, windows
from entropy_attn.benchmarks.prose import prose

SMOLLM2 = "9 heads, blocks of SmolLM2"  # the pattern of such cases, as tables show it
LAYERS = (4, 14, 24)  # of 30: each set of inputs takes another one
CHOOSING = "chooses_blocks"  # in transformers' registry


@cache
def smollm2_blocks(
    batch: int, length: int, block: int, density: float, number: int, device: torch.device
) -> Tensor:
    """(B, 9, M, M) bool: blocks chosen in a layer that reads ``batch`` windows of prose.

    By the default scorer, the share ``density`` of each row's visible blocks, the diagonal one
    among them.

    Raises:
        ModelNotFound: the model is not on this machine.
    """
    model, tokenizer = _loaded(device)
    ids = windows(tokenizer, prose("held-out").text, length, batch, device)
    return chosen_blocks(model, ids, LAYERS[number % len(LAYERS)], block, density)


@cache
def _loaded(device: torch.device) -> tuple[Any, Any]:
    return load_model(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


@torch.inference_mode()
def chosen_blocks(model: Any, ids: Tensor, layer: int, block: int, density: float) -> Tensor:
    """(B, H, M, M) bool: the blocks of a layer of a causal model of transformers on ids (B, N)."""
    from transformers import AttentionInterface

    chosen: list[Tensor] = []

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        if module.layer_idx == layer:
            mask = ea.select_blocks(
                query, key, block_size=block, budget=ea.TopK(density), is_causal=True, sink=0,
                local=1,
            )  # fmt: skip
            chosen.append(mask.to_dense())
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(CHOOSING, attention)
    copied = shared_copy(model)
    copied.set_attn_implementation(CHOOSING)
    copied.base_model(input_ids=ids, use_cache=False)
    return chosen[0]
