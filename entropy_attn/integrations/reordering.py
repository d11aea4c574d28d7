"""Reordering in a model: tokens sorted by their cells, in one gather with the move of padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.padding import stable_partition, valid_tokens
from entropy_attn.reorder import Reorder, leading_tokens, sort_tokens
from entropy_attn.validation import check_reorderable


def check_can_reorder(name: str, is_causal: bool, window: int | None = None) -> None:
    """That the attention of the layer ``name`` may be reordered.

    Raises:
        ValueError: it is causal or has a window.
    """
    try:
        check_reorderable(is_causal, window)
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}, for this layer with SparsityConfig(layers={{{name!r}: "
            "{'reorder': None}})"
        ) from None


def reordered(
    call: AttentionCall, reorder: Reorder
) -> tuple[AttentionCall, Callable[[Tensor], Tensor]]:
    """The call with valid tokens first, sorted by their cells, and what puts the output back.

    Padding is told by ``codes`` or by lengths; the new call has lengths.
    """
    if call.codes is None:
        lens = {"q_lens": call.q_lens, "kv_lens": call.kv_lens}
        q_valid = leading_tokens(call.query, call.q_lens)
        kv_valid = leading_tokens(call.key, call.kv_lens)
    else:
        q_valid, kv_valid = valid_tokens(call)
        q_lens = None if q_valid is None else stable_partition(q_valid)[2]
        lens = {"q_lens": q_lens, "kv_lens": stable_partition(kv_valid)[2]}
        if q_valid is None:
            q_valid = leading_tokens(call.query, None)
    tokens = sort_tokens(call.query, call.key, call.value, reorder, q_valid, kv_valid)
    query, key, value, back = tokens
    return replace(call, query=query, key=key, value=value, codes=None, **lens), back
