"""Dense attention for the calls of a model that do not run sparse."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from entropy_attn.api import block_sparse_attention
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.padding import restore, valid_first, visible
from entropy_attn.masks import BlockMask

# A mask with more (query, key) pairs is not stored: such calls run in this package's kernels
# with every block kept, which know lengths and windows.
LARGEST_MASK = 4096 * 4096


def attend_dense(call: AttentionCall, backend: str = "auto") -> Tensor:
    """(B, Hq, Nq, D) with no block left out.

    Calls without padding, window or cache offset go to SDPA without a mask, where torch picks
    FlashAttention; small ones and single queries to SDPA with a boolean mask; the rest to
    `block_sparse_attention` with a full block mask.
    """
    window_binds = call.window is not None and call.window < call.kv_len
    lengths = call.codes is not None or call.kv_lens is not None or call.q_lens is not None
    if not lengths and not window_binds:
        if not call.is_causal or call.q_len == 1:
            return _sdpa(call, None, is_causal=False)
        if call.q_len == call.kv_len:
            return _sdpa(call, None, is_causal=True)
    if call.q_len * call.kv_len <= LARGEST_MASK or call.q_len == 1:
        mask = visible(call)
        # A query that sees no key gives 0; not all of SDPA's kernels agree on that.
        empty = ~mask.any(-1, keepdim=True)
        return _sdpa(call, mask | empty, is_causal=False).masked_fill(empty, 0.0)
    call, place = valid_first(call)
    full = BlockMask.full(1, 1, call.q_len, call.kv_len, device=call.query.device)
    out = block_sparse_attention(
        call.query, call.key, call.value, full, **call.geometry, backend=backend
    )
    return restore(out, place)


def attend_explicit(call: AttentionCall) -> Tensor:
    """(B, Hq, Nq, D) under the mask that the user made: boolean, or added to the scores."""
    return _sdpa(call, call.explicit_mask, is_causal=False)


def _sdpa(call: AttentionCall, mask: Tensor | None, is_causal: bool) -> Tensor:
    query, key, value = call.query, call.key, call.value
    group = query.shape[1] // key.shape[1]
    if group == 1 or mask is None:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            scale=call.scale,
            enable_gqa=group > 1,
        )
    # With a mask SDPA's fast kernels take no grouped heads. One query a head becomes a group of
    # queries that share a key head, which copies nothing; else the keys are repeated.
    if call.q_len == 1 and mask.shape[1] == 1:
        packed = query.squeeze(2).unflatten(1, (key.shape[1], group))
        out = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=call.scale)
        return out.flatten(1, 2).unsqueeze(2)
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=call.scale)
