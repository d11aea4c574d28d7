"""KeyBoxes: the boxes around the blocks of one layer's cache, and attention by them."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_attn import backend as backend_table
from entropy_attn import validation as check
from entropy_attn.api import block_sparse_attention, with_positive_scale
from entropy_attn.autocast import follow_autocast
from entropy_attn.decoding import ops
from entropy_attn.decoding.settings import SparseDecoding
from entropy_attn.masks import BlockMask

# Room for blocks of keys to come, so that a growing cache seldom moves its boxes.
SPARE = 64


class KeyBoxes:
    """Boxes around the blocks of a cache's keys; nothing here waits for the device.

    Attributes:
        boxes: (B, Hkv, M, 2, D), the lower and upper ends of M blocks, of which a cache may not
            yet have all.
        fresh: (B,) int32, tokens up to which they are right; `choose` moves it on.
    """

    def __init__(self, key: Tensor, settings: SparseDecoding) -> None:
        self.settings = settings
        # Written to in place, with inference mode or without.
        with torch.inference_mode(False):
            self.fresh = torch.zeros(key.shape[0], dtype=torch.int32, device=key.device)
            self.boxes = self._room(key, self._blocks(key))

    def fits(self, key: Tensor) -> bool:
        """Whether they can be those of ``key`` (B, Hkv, Nk, D), but for its length."""
        mine = (self.boxes.shape[:2], self.boxes.shape[4], self.boxes.dtype, self.boxes.device)
        return mine == (key.shape[:2], key.shape[3], key.dtype, key.device)

    def distrust(self, length: int) -> None:
        """Only the first ``length`` keys are still what they were when `choose` saw them."""
        self.fresh.clamp_(max=length)

    def choose(
        self,
        query: Tensor,
        key: Tensor,
        totals: Tensor,
        *,
        valid: Tensor | None = None,
        kv_lens: Tensor | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> BlockMask:
        """Lists for the last queries, one a head of keys, after the boxes were brought up to date.

        Args:
            query: (B, Hq, Nq, D), the queries of the last Nq keys; key: (B, Hkv, Nk, D).
            totals: (2,) int64, to which the numbers of kept and of visible blocks are added.
            valid, kv_lens: as in `entropy_attn.decoding.ops.choose_blocks`.
            scale, backend: as in `ea.block_sparse_attention`.

        Raises:
            ValueError: there are more blocks than one program can choose from.
        """
        settings, blocks = self.settings, self._blocks(key)
        check.check_decoding_blocks(blocks, key.shape[2], settings.block_size)
        if blocks > self.boxes.shape[2]:
            with torch.inference_mode(False):
                room = self._room(key, blocks)
            room[:, :, : self.boxes.shape[2]] = self.boxes
            self.boxes = room
        query, scale = with_positive_scale(query, check.check_scale(scale, query.shape[3]))
        counts, indices = ops.choose_blocks(
            query.detach(), key.detach(), self.boxes, self.fresh, totals, valid, kv_lens,
            settings.block_size, settings.sink, settings.local, settings.share, settings.least,
            settings.width(blocks), scale, chosen_backend(query, key, backend),
        )  # fmt: skip
        size = (check.MOST_PAGED_QUERIES, settings.block_size)
        return BlockMask(counts, indices, size, query.shape[2], key.shape[2], validate=False)

    def _blocks(self, key: Tensor) -> int:
        return -(-key.shape[2] // self.settings.block_size)

    def _room(self, key: Tensor, blocks: int) -> Tensor:
        # What is not yet written is never read.
        shape = (*key.shape[:2], blocks + max(SPARE, blocks // 4), 2, key.shape[3])
        return torch.zeros(shape, dtype=key.dtype, device=key.device)


def attend_listed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    valid: Tensor | None,
    kv_lens: Tensor | None,
    scale: float | None,
    backend: str,
) -> Tensor:
    """(B, Hq, Nq, D): causal attention to the valid keys of the listed blocks.

    Without ``valid`` it is `ea.block_sparse_attention`; its kernel for few queries runs either way.
    """
    if valid is None:
        out = block_sparse_attention(
            query, key, value, mask, is_causal=True, kv_lens=kv_lens, scale=scale, backend=backend
        )
        assert isinstance(out, Tensor)  # without return_lse
        return out
    query, key, value = follow_autocast(query, key, value)
    chosen = chosen_backend(query, key, backend)
    query, scale = with_positive_scale(query, check.check_scale(scale, query.shape[3]))
    return ops.decode_forward(
        query, key, value, mask.kv_num_blocks, mask.kv_indices, valid, kv_lens,
        mask.block_size[1], scale, chosen,
    )  # fmt: skip


def chosen_backend(query: Tensor, key: Tensor, backend: str) -> str:
    """ "triton" or "reference"; a named backend that cannot run here raises."""
    call = backend_table.Call(
        device=query.device.type, dtype=query.dtype, head_dim=query.shape[3],
        q_len=query.shape[2], kv_len=key.shape[2], keeps_all=False, is_causal=True,
        has_lens=True, has_window=False, wants_statistics=False,
    )  # fmt: skip
    return backend_table.choose(call, backend).backend
