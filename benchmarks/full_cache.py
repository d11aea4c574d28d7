"""FullCache: a cache that stays at its last token, for timing one step of decoding again and again.

A cache that grows is another one at each step, and runs out. Here the token of a step is written
over the last one. The keys are random: time depends on shapes alone, and to fill a cache of 32k
tokens with 7B parameters takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class _FullLayer(DynamicLayer):
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        new = key_states.shape[2]
        if new != 1:
            raise ValueError(f"a FullCache takes 1 token a step, got {new}")
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Of what is there before the step."""
        return self.keys.shape[2] - 1


class FullCache(Cache):
    """``tokens`` keys and values of every layer, standard normal, the last of them the step's."""

    @classmethod
    def random(cls, config: Any, layers: int, batch: int, tokens: int, device: Any) -> FullCache:
        generator = torch.Generator(device).manual_seed(0)
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads

        def normal() -> Tensor:
            return torch.randn(
                batch, heads, tokens, width, device=device, dtype=config.dtype, generator=generator
            )

        return cls([_FullLayer(normal(), normal()) for _ in range(layers)])

    def float(self) -> FullCache:
        """A copy in fp32."""
        return FullCache([_FullLayer(x.keys.float(), x.values.float()) for x in self.layers])
