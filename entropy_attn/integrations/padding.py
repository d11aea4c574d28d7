"""Padding: which keys are valid and where the queries stand, as one small tensor of codes.

A mask function sees the offsets of the cache, an attention function sees the keys, and only one
tensor travels between them. So each key gets a code, (B, Nk) int8, a sum of

    VALID = 1   the key may be attended to,
    QUERY = 2   a query of this call stands at this key (it may itself be padding).

With them causal attention and windows are exact for padding on either side, for chunks of a
prefill and for static caches whose keys run past the last query. All work stays on the device.

What scans over the tokens is a custom op each: Inductor fuses scans with reductions over the same
tokens, its own or those of transformers, and then cannot generate the kernel (torch 2.11).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from entropy_attn.custom_ops import custom_op
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.reference.dense import visible_pairs
from entropy_attn.traced import is_capturing

VALID, QUERY = 1, 2


def codes_from_validity(valid: Tensor, q_len: int) -> Tensor:
    """Codes of a plain padding mask (B, Nk), nonzero where valid; the queries are the last keys."""
    column = torch.arange(valid.shape[1], device=valid.device)
    query = column >= valid.shape[1] - q_len
    return encode(valid != 0, query)


def encode(valid: Tensor, query: Tensor) -> Tensor:
    """Codes from two boolean tensors that broadcast to (B, Nk)."""
    return (valid.to(torch.int8) * VALID + query.to(torch.int8) * QUERY).contiguous()


@custom_op("query_columns")
def query_columns(codes: Tensor, q_len: int) -> Tensor:
    """(B, Nq) int64: at which key each query stands."""
    first = (codes >= QUERY).to(torch.int8).argmax(1, keepdim=True)
    column = first + torch.arange(q_len, device=codes.device)
    return column.clamp(max=codes.shape[1] - 1)


@query_columns.register_fake
def _(codes, q_len):
    return codes.new_empty(codes.shape[0], q_len, dtype=torch.int64)


_ends: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def query_ends(call: AttentionCall) -> Tensor:
    """(B,) int32: keys up to the last query's own, of a call with codes.

    All layers of a forward pass have one mask, so it is found once.
    """
    source = call.mask
    # A captured graph must find it anew in each replay, and what is known of a tensor of inference
    # mode may be out of date.
    if source is None or source.is_inference() or is_capturing(source.device):
        return _query_ends(call.codes)
    version = source._version
    known, ends = _ends.get(source, (None, None))
    if ends is None or known != version:
        ends = _query_ends(call.codes)
        _ends[source] = (version, ends)
    return ends


def _query_ends(codes: Tensor) -> Tensor:
    column = torch.arange(1, codes.shape[1] + 1, dtype=torch.int32, device=codes.device)
    return torch.where(codes >= QUERY, column, 0).amax(1)


def visible(call: AttentionCall) -> Tensor:
    """(B, 1, Nq, Nk) bool: the mask of a call as a matrix, for calls that are small."""
    if call.codes is None:
        return visible_pairs(
            call.query.shape[0],
            call.q_len,
            call.kv_len,
            is_causal=call.is_causal,
            window=call.window,
            kv_lens=call.kv_lens,
            q_lens=call.q_lens,
            device=call.query.device,
        )
    mask = (call.codes & VALID).bool()[:, None, None, :]
    if call.is_causal:
        position = query_columns(call.codes, call.q_len)[:, None, :, None]
        column = torch.arange(call.kv_len, device=mask.device)
        mask = mask & (column <= position)
        if call.window is not None:
            mask = mask & (position - column < call.window)
    return mask.expand(-1, -1, call.q_len, -1)


def valid_first(call: AttentionCall) -> tuple[AttentionCall, Tensor | None]:
    """Move the valid tokens to the front, so that lengths describe the padding.

    Returns:
        The call with ``kv_lens`` and ``q_lens`` in place of ``codes``, and where each query went,
        (B, Nq) int64, for `restore`; None if the queries did not move.
    """
    if call.codes is None:
        return call, None
    q_valid, kv_valid = valid_tokens(call)
    kv_order, _, kv_lens = stable_partition(kv_valid)
    key = _take(call.key, kv_order)
    moved = {
        "key": key,
        "value": key if call.value is call.key else _take(call.value, kv_order),
        "kv_lens": kv_lens,
        "codes": None,
    }
    if q_valid is None:
        return replace(call, **moved), None
    q_order, q_place, q_lens = stable_partition(q_valid)
    moved |= {"query": _take(call.query, q_order), "q_lens": q_lens}
    return replace(call, **moved), q_place


def valid_tokens(call: AttentionCall) -> tuple[Tensor | None, Tensor]:
    """Of a call with codes, (B, Nq) and (B, Nk) bool: the valid queries and keys; None for all."""
    kv_valid = (call.codes & VALID).bool()
    if not call.is_causal and call.q_len != call.kv_len:  # cross-attention: every query counts
        return None, kv_valid
    return kv_valid.gather(1, query_columns(call.codes, call.q_len)), kv_valid


def restore(out: Tensor, place: Tensor | None) -> Tensor:
    """Move the rows of (B, H, Nq, D) back to where `valid_first` found them."""
    return out if place is None else _take(out, place)


@custom_op("stable_partition")
def stable_partition(valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row of the valid-first order comes from, the inverse, and how many are valid.

    The orders are (B, N) int64, the count is (B,) int32.
    """
    seen = valid.cumsum(1)
    count = seen[:, -1:]
    source = torch.arange(valid.shape[1], device=valid.device).expand_as(seen)
    place = torch.where(valid, seen - 1, count + source - seen)
    order = torch.zeros_like(place).scatter_(1, place, source)
    return order, place, count[:, 0].to(torch.int32)


@stable_partition.register_fake
def _(valid):
    order = valid.new_empty(valid.shape, dtype=torch.int64)
    return order, torch.empty_like(order), valid.new_empty(valid.shape[0], dtype=torch.int32)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, N) of each head of (B, H, N, D)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
