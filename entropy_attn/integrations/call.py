"""AttentionCall: one call of one attention layer, in the terms of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from entropy_attn.integrations.packing import Packing


@dataclass(frozen=True)
class AttentionCall:
    """What an adapter (transformers, timm) hands to a layer.

    Attributes:
        query: (B, Hq, Nq, D), any strides; key, value: (B, Hkv, Nk, D).
        is_causal: causal, each query aligned as ``codes`` or the lengths say, else to the last key.
        scale: factor of the scores, None for head_dim ** -0.5.
        window: sliding window in tokens, None for none.
        codes: (B, Nk) int8, see `entropy_attn.integrations.padding`; None where every key is
            valid and the queries are the last Nq keys.
        packing: the sequences that the tokens consist of, None for one a batch row.
        explicit_mask: a mask over (query, key) that the user made, boolean or additive.
        mask: the tensor that ``codes`` are a view of, one for all layers of a forward pass.
        kv_lens, q_lens: (B,) int32, valid lengths once the valid tokens stand first.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool
    scale: float | None = None
    window: int | None = None
    codes: Tensor | None = None
    mask: Tensor | None = None
    packing: Packing | None = None
    explicit_mask: Tensor | None = None
    kv_lens: Tensor | None = None
    q_lens: Tensor | None = None

    @property
    def q_len(self) -> int:
        return self.query.shape[2]

    @property
    def kv_len(self) -> int:
        return self.key.shape[2]

    @property
    def geometry(self) -> dict:
        """The keyword arguments that every op of this package shares."""
        return {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "window": self.window,
            "kv_lens": self.kv_lens,
            "q_lens": self.q_lens,
        }
