"""Attention to a cache that lies in pages, as servers of language models keep it."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_attn import backend as backend_table
from entropy_attn import ops
from entropy_attn import validation as check
from entropy_attn.api import DEFAULT_BLOCK_SIZE, with_positive_scale
from entropy_attn.autocast import follow_autocast
from entropy_attn.masks import BlockMask


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    block_mask: BlockMask | None = None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of the last few tokens of each sequence to a paged cache.

    Key j of batch row b is row ``j % page`` of page ``block_table[b, j // page]``; only the first
    ``kv_lens[b]`` keys are read, and only those of the blocks that ``block_mask`` keeps. No
    gradients: this is for inference.

    Args:
        query: (B, Hq, Nq, D), Nq from 1 to 16: the last tokens of each sequence.
        key_pages, value_pages: (P, Hkv, page, D), any strides; pages of any number of tokens.
        block_table: (B, M) int32, the page of every run of ``page`` tokens. Entries past a
            sequence's length are never followed; those before it must be in [0, P).
        kv_lens: (B,) int32, tokens of each sequence, those of the query among them.
        block_mask: for Nq queries and M * page keys, with 1, Hkv or Hq heads; None keeps all.
            Heads that share their lists with the others of their key head read keys once.
        is_causal: query i stands at ``kv_lens[b] - Nq + i`` and sees no later key.
        scale, window, return_lse, backend: as in `block_sparse_attention`.

    Returns:
        out (B, Hq, Nq, D); with return_lse also lse (B, Hq, Nq) in nats, fp32. A query that sees
        no key gives 0 and lse -inf.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
        BackendUnavailable: a named backend cannot run this call.
    """
    query, key_pages, value_pages = follow_autocast(query, key_pages, value_pages)
    check.check_pages(query, key_pages, value_pages, block_table)
    if torch.is_grad_enabled():
        check.check_no_gradient(query=query, key_pages=key_pages, value_pages=value_pages)
    if kv_lens is None:
        raise TypeError("kv_lens must be an int32 tensor of shape (batch,), got None")
    kv_lens = check.check_lens("kv_lens", kv_lens, query)
    scale = check.check_scale(scale, query.shape[3])
    kv_len = block_table.shape[1] * key_pages.shape[2]
    block_size = (DEFAULT_BLOCK_SIZE, DEFAULT_BLOCK_SIZE)
    lists: tuple[Tensor | None, Tensor | None] = (None, None)
    if block_mask is not None:
        check.check_block_mask(block_mask, query, key_pages, kv_len)
        block_size = block_mask.block_size
        if not block_mask.is_full:
            lists = (block_mask.kv_num_blocks, block_mask.kv_indices)
    query, scale = with_positive_scale(query, scale)
    call = backend_table.Call(
        device=query.device.type, dtype=query.dtype, head_dim=query.shape[3],
        q_len=query.shape[2], kv_len=kv_len, keeps_all=lists[0] is None, is_causal=is_causal,
        has_lens=True, has_window=window is not None, wants_statistics=return_lse,
    )  # fmt: skip
    choice = backend_table.choose(call, backend)
    out, lse = ops.paged_forward(
        query, key_pages, value_pages, block_table, *lists, kv_lens, *block_size,
        bool(is_causal), check.check_window(window, is_causal), scale, choice.backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out
