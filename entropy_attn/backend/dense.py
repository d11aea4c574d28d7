"""Dense attention by torch's SDPA or a flash-attn package, in this package's layout."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(
    name: str, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float
) -> Tensor:
    """(B, Hq, Nq, D) from the dense backend ``name``."""
    if name == "sdpa":
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    # flash-attn's layout is (batch, seq, heads, head_dim).
    inputs = [t.transpose(1, 2) for t in (query, key, value)]
    out = _flash_function(name)(*inputs, softmax_scale=scale, causal=is_causal)
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(1, 2)


def _flash_function(name: str):
    if name == "flash-attn-4":
        from flash_attn.cute import flash_attn_func
    elif name == "flash-attn-3":
        from flash_attn_interface import flash_attn_func
    elif name == "flash-attn-2":
        from flash_attn import flash_attn_func
    else:
        raise ValueError(f"{name!r} is not a dense backend")
    return flash_attn_func
