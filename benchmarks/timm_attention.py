"""The attention of a vision transformer of timm: switched by its own flag, or left out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ValuesOnly(nn.Module):
    """An attention module without attention: its projections alone."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.proj(self.qkv(x).chunk(3, -1)[2])


def set_attention(model: nn.Module, implementation: str) -> None:
    """Let a model of timm attend by "sdpa", "eager" or not at all, "left_out"."""
    for block in model.blocks:
        if implementation == "left_out":
            block.attn = ValuesOnly(block.attn)
        else:
            block.attn.fused_attn = {"sdpa": True, "eager": False}[implementation]
