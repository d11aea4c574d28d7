"""Sparse decoding in a model: which calls it takes, and why not the others."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_attn.decoding.boxes import attend_listed
from entropy_attn.integrations.cache import CacheFollower
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.padding import query_ends
from entropy_attn.validation import MOST_PAGED_QUERIES


def is_decoding(call: AttentionCall) -> bool:
    """Whether a few tokens are appended to a cache that is longer."""
    plain = call.explicit_mask is None and call.packing is None and call.kv_lens is None
    return plain and call.is_causal and call.q_len <= MOST_PAGED_QUERIES < call.kv_len


def reason_for_dense(call: AttentionCall, follower: CacheFollower) -> str | None:
    """Why a decoding call cannot run sparse, or None."""
    least = follower.settings.min_length
    if torch.compiler.is_compiling():
        return "decoding in a graph of torch.compile, which cannot tell one cache from another"
    if call.kv_len < least:
        return f"fewer than decode.min_length={least} keys"
    if call.window is not None:
        return "decoding with a sliding window, which bounds the keys already"
    tensors = (call.query, call.key, call.value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "decoding with gradients: run it under torch.no_grad()"
    if call.query.dtype != call.key.dtype:
        return f"decoding with queries in {call.query.dtype} and keys in {call.key.dtype}"
    if not follower.follows(call.key):
        return "decoding with keys that are not those of a cache that can be followed"
    return None


def attend_cached(
    call: AttentionCall, follower: CacheFollower, totals: Tensor, backend: str
) -> Tensor:
    """(B, Hq, Nq, D): a decoding call, sparse; ``totals`` as in `KeyBoxes.choose`."""
    boxes = follower.boxes(call.key)
    shared = {
        "valid": call.codes,
        "kv_lens": None if call.codes is None else query_ends(call),
        "scale": call.scale,
        "backend": backend,
    }
    mask = boxes.choose(call.query, call.key, totals, **shared)
    return attend_listed(call.query, call.key, call.value, mask, **shared)
