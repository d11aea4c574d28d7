"""BlockMask in other libraries' formats and on disk.

FlexAttention and flash-attn-4 keep two lists a row: *full* blocks, of which every pair is
visible, and *partial* blocks, to which a token-level function (``mask_mod``) is applied. A
BlockMask lists blocks only, and causality is an argument of the attention call. So a conversion
is told ``is_causal``: the partial blocks are then those that the diagonal crosses.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from entropy_attn import block_lists
from entropy_attn.validation import check_block_size

if TYPE_CHECKING:
    from entropy_attn.masks import BlockMask

FORMAT = "entropy_attn.BlockMask"
VERSION = 1
# Token pairs of partial blocks that from_flex looks at in one go.
_PAIRS_AT_ONCE = 1 << 24


class FlashAttentionLists(NamedTuple):
    """The fields of flash-attn-4's ``BlockSparseTensorsTorch`` that a mask determines.

    ``BlockSparseTensorsTorch(**lists._asdict())`` is what ``flash_attn.cute`` takes. Counts are
    (B|1, H|1, M) int32, indices (B|1, H|1, M, W) int32 and ascending; block_size is (query, key)
    tokens. Source: Dao-AILab/flash-attention, ``flash_attn/cute/block_sparsity.py``.
    """

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


def split_by_visibility(
    mask: BlockMask, is_causal: bool
) -> tuple[block_lists.Lists, block_lists.Lists]:
    """Lists of the partial and of the full blocks; blocks with no visible pair are in neither."""
    counts, indices = mask.kv_num_blocks, mask.kv_indices
    if not is_causal:
        return (torch.zeros_like(counts), indices), (counts, indices)
    first_position, last_position = mask.grid.positions(indices.device)
    first_key, last_key = mask.grid.keys(indices.device)
    listed = block_lists.listed(counts, indices)
    full = listed & (last_key[indices] <= first_position[:, None])
    visible = listed & (first_key[indices] <= last_position[:, None])
    full_counts = full.sum(-1, dtype=torch.int32)
    partial_counts = visible.sum(-1, dtype=torch.int32) - full_counts
    # Along an ascending list come the full blocks, then the partial, then the invisible ones.
    partial = block_lists.run_of_lists(indices, full_counts)
    return (partial_counts, partial), (full_counts, indices)


def to_flash_attn(
    mask: BlockMask, is_causal: bool, backward: bool, width: int | None
) -> FlashAttentionLists:
    """See `BlockMask.to_flash_attn`."""
    partial, full = split_by_visibility(mask, is_causal)
    if backward:
        size = (mask.num_columns, mask.num_rows if width is None else width)
        partial = block_lists.transposed_lists(*partial, *size)
        full = block_lists.transposed_lists(*full, *size)
    return FlashAttentionLists(*partial, *full, mask.block_size)


def to_flex(mask: BlockMask, is_causal: bool, exact_mask_mod: bool) -> Any:
    """See `BlockMask.to_flex`."""
    from torch.nn.attention import flex_attention

    partial, full = split_by_visibility(mask, is_causal)
    # FlexAttention takes the number of key blocks from the width of the lists.
    pad = (0, mask.num_columns - mask.width)
    padded = [torch.nn.functional.pad(indices, pad) for _, indices in (partial, full)]
    dense = mask.to_dense() if exact_mask_mod else None
    return flex_attention.BlockMask.from_kv_blocks(
        kv_num_blocks=partial[0].contiguous(),
        kv_indices=padded[0].contiguous(),
        full_kv_num_blocks=full[0].contiguous(),
        full_kv_indices=padded[1].contiguous(),
        BLOCK_SIZE=mask.block_size,
        mask_mod=_mask_mod(dense, mask, is_causal),
        seq_lengths=(mask.q_len, mask.kv_len),
    )


def _mask_mod(dense: Tensor | None, mask: BlockMask, is_causal: bool) -> Callable | None:
    block_q, block_k = mask.block_size
    offset = mask.kv_len - mask.q_len

    def causal(batch, head, query, key):
        return key <= query + offset

    def kept(batch, head, query, key):
        # A dimension of 1 stands for every batch or head.
        batch = batch if dense.shape[0] > 1 else 0
        head = head if dense.shape[1] > 1 else 0
        return dense[batch, head, query // block_q, key // block_k]

    def kept_and_causal(batch, head, query, key):
        return kept(batch, head, query, key) & causal(batch, head, query, key)

    if dense is None:
        return causal if is_causal else None
    return kept_and_causal if is_causal else kept


def from_flex(flex: Any, is_causal: bool) -> BlockMask:
    """See `BlockMask.from_flex`."""
    from torch.nn.attention import flex_attention

    from entropy_attn.masks import BlockMask

    if not isinstance(flex, flex_attention.BlockMask):
        raise TypeError(
            "flex_mask must be a torch.nn.attention.flex_attention.BlockMask, "
            f"got {type(flex).__name__}"
        )
    if flex.kv_indices.ndim != 4:
        raise ValueError(
            "flex_mask must have batch and head dimensions, got kv_indices of shape "
            f"{tuple(flex.kv_indices.shape)}"
        )
    block_size = check_block_size(flex.BLOCK_SIZE, "flex_mask.BLOCK_SIZE")
    q_len, kv_len = flex.seq_lengths
    partial = BlockMask(flex.kv_num_blocks, flex.kv_indices, block_size, q_len, kv_len)
    _check_partial_blocks(partial, flex.mask_mod, is_causal)
    if flex.full_kv_num_blocks is None or flex.full_kv_indices is None:
        return partial
    full = replace(
        partial,
        kv_num_blocks=flex.full_kv_num_blocks,
        kv_indices=flex.full_kv_indices,
        validate=True,
    )
    if is_causal:
        _check_full_blocks(full)
    candidates = torch.cat(
        [
            m.kv_indices.masked_fill(
                ~block_lists.listed(m.kv_num_blocks, m.kv_indices), m.num_columns
            )
            for m in (partial, full)
        ],
        dim=-1,
    )
    width = min(candidates.shape[-1], partial.num_columns)
    lists = block_lists.lists_from_candidates(candidates, partial.num_columns, width)
    return replace(partial, kv_num_blocks=lists[0], kv_indices=lists[1], validate=False)


def _check_partial_blocks(partial: BlockMask, mask_mod: Callable, is_causal: bool) -> None:
    """Raise unless ``mask_mod`` on the partial blocks is what our attention will compute there."""
    block_q, block_k = partial.block_size
    listed = block_lists.listed(partial.kv_num_blocks, partial.kv_indices)
    batch, head, row, slot = listed.nonzero(as_tuple=True)
    column = partial.kv_indices[batch, head, row, slot]
    over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_queries = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    over_blocks = torch.vmap(over_queries, in_dims=(0, 0, 0, 0))
    tokens_q, tokens_k = (torch.arange(size, device=row.device) for size in partial.block_size)
    step = max(1, _PAIRS_AT_ONCE // (block_q * block_k))
    for start in range(0, row.numel(), step):
        part = slice(start, start + step)
        query = row[part, None] * block_q + tokens_q
        key = column[part, None] * block_k + tokens_k
        inside = (query < partial.q_len)[:, :, None] & (key < partial.kv_len)[:, None, :]
        query, key = query.clamp(max=partial.q_len - 1), key.clamp(max=partial.kv_len - 1)
        allowed = over_blocks(batch[part], head[part], query, key)
        causal = key[:, None, :] <= query[:, :, None] + partial.kv_len - partial.q_len
        expected = causal if is_causal else torch.ones_like(causal)
        if not ((allowed == expected) | ~inside).all():
            if not is_causal and ((allowed == causal) | ~inside).all():
                hint = "so far it equals the causal mask: pass is_causal=True here and to attention"
            else:
                hint = "use FlexAttention for it, or build the mask with from_dense"
            meaning = "the causal mask" if is_causal else "true"
            raise ValueError(
                f"flex_mask has partial blocks whose mask_mod is not {meaning} for every pair in "
                f"them, which block lists with is_causal={is_causal} cannot express; {hint}"
            )


def _check_full_blocks(full: BlockMask) -> None:
    """Raise if causality would hide pairs of a full block."""
    _, (full_counts, _) = split_by_visibility(full, is_causal=True)
    if not torch.equal(full_counts, full.kv_num_blocks):
        raise ValueError(
            "flex_mask lists full blocks that is_causal=True would hide in part or whole "
            f"({(full.kv_num_blocks - full_counts).sum().item()} of them); the two do not describe "
            "one mask: pass is_causal=False or fix the mask"
        )


def save(mask: BlockMask, path: str | os.PathLike) -> None:
    """See `BlockMask.save`."""
    torch.save(
        {
            "format": FORMAT,
            "version": VERSION,
            "kv_num_blocks": mask.kv_num_blocks.cpu(),
            "kv_indices": mask.kv_indices.cpu(),
            "block_size": mask.block_size,
            "q_len": mask.q_len,
            "kv_len": mask.kv_len,
            "is_full": mask.is_full,
        },
        path,
    )


def load(path: str | os.PathLike, device: torch.device | str | None) -> BlockMask:
    """See `BlockMask.load`."""
    from entropy_attn.masks import BlockMask

    # A file is untrusted: no code is unpickled, and the constructor checks every value.
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"{os.fspath(path)} is not a block mask; BlockMask.save writes them")
    version = content.pop("version", None)
    if version != VERSION:
        raise ValueError(
            f"{os.fspath(path)} has block mask version {version!r}; this release reads {VERSION}"
        )
    mask = BlockMask(**content)
    return mask if device is None else mask.to(device)
