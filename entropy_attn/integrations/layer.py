"""SparseLayer: decides for each call of one attention layer whether it runs sparse or dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from entropy_attn.config import SparsityConfig
from entropy_attn.integrations.cache import CacheFollower
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.decoding import attend_cached, is_decoding, reason_for_dense
from entropy_attn.integrations.dense import attend_dense, attend_explicit
from entropy_attn.integrations.padding import restore, valid_first
from entropy_attn.integrations.reordering import check_can_reorder, reordered
from entropy_attn.integrations.statistics import (
    DECODED,
    SPARSE,
    Recorder,
    count_visible_blocks,
    note_traced,
)
from entropy_attn.min_length import MinLength
from entropy_attn.prefill import attend_selected
from entropy_attn.validation import check_block_size


class Layer(Protocol):
    """What an adapter calls in place of a model's attention."""

    name: str

    def attend(self, call: AttentionCall) -> Tensor:
        """(B, Hq, Nq, D), any strides."""
        ...


class SparseLayer:
    """One attention layer with its settings and its statistics.

    Args:
        name: of the attention module in the model.
        config: the settings of this layer.
        dense: always run dense.

    Attributes:
        follower: of the caches that it is called with, if it decodes sparsely; an adapter shows it
            the cache before each call.
    """

    def __init__(self, name: str, config: SparsityConfig, dense: bool) -> None:
        self.name = name
        self.config = config
        self.block_size = check_block_size(config.block_size)
        self.min_length = MinLength(config)
        self.dense = dense
        self.recorder = Recorder()
        decodes = config.decode is not None and not dense
        self.follower = CacheFollower(config.decode) if decodes else None

    def attend(self, call: AttentionCall) -> Tensor:
        if self.follower is None:
            return self._attend(call)
        try:
            return self._attend_following(call, self.follower)
        finally:
            if not torch.compiler.is_compiling():
                self.follower.finished()

    def _attend_following(self, call: AttentionCall, follower: CacheFollower) -> Tensor:
        decodes = is_decoding(call)
        if decodes:
            reason = reason_for_dense(call, follower)
            self._record(reason or DECODED, call)
            if reason is None:
                totals = self.recorder.decoding_totals(call.key.device)
                return attend_cached(call, follower, totals, self.config.backend)
        if not torch.compiler.is_compiling():
            follower.passed(call.key, call.q_len)
        return attend_dense(call, self.config.backend) if decodes else self._attend(call)

    def _attend(self, call: AttentionCall) -> Tensor:
        if call.explicit_mask is not None:
            return self._attend_explicit(call)
        if self.config.reorder is not None and not self.dense:
            check_can_reorder(self.name, call.is_causal, call.window)
        if call.packing is not None:
            return call.packing.attend(call, self._attend)
        reason = self._reason_for_dense(call)
        self._record(reason or SPARSE, call)
        if reason is not None:
            return attend_dense(call, self.config.backend)
        return self._attend_sparse(call)

    def _reason_for_dense(self, call: AttentionCall) -> str | None:
        """No values decide: the lengths of a padded batch stay on the device."""
        if self.dense:
            return "the layer is in dense_layers"
        if call.q_len < self.config.min_queries:
            return f"fewer than min_queries={self.config.min_queries} queries"
        return self.min_length.too_short(call.query, call.kv_len, call.is_causal, call.window)

    def _attend_sparse(self, call: AttentionCall) -> Tensor:
        config = self.config
        sink, local = config.always_kept
        call, back = self._arranged(call)
        out, counts = attend_selected(
            call.query,
            call.key,
            call.value,
            block_size=self.block_size,
            scorer=config.scorer,
            budget=config.budget,
            sink=sink,
            local=local,
            backend=config.backend,
            **call.geometry,
        )
        if not torch.compiler.is_compiling():
            self._record_density(call, counts)
        return back(out)

    def _arranged(self, call: AttentionCall) -> tuple[AttentionCall, Callable[[Tensor], Tensor]]:
        """The call with its valid tokens first, sorted if so set, and what undoes it."""
        if self.config.reorder is not None:
            return reordered(call, self.config.reorder)
        call, place = valid_first(call)
        return call, lambda out: restore(out, place)

    def _attend_explicit(self, call: AttentionCall) -> Tensor:
        if self.config.explicit_mask == "raise":
            raise ValueError(
                f"{self.name} was given attn_mask of shape {tuple(call.explicit_mask.shape)} and "
                f"dtype {call.explicit_mask.dtype}, which a block list cannot express. Pass a 2D "
                "padding mask, or SparsityConfig(explicit_mask='dense') to run such calls dense "
                "under that mask"
            )
        self._record("an explicit mask is given and explicit_mask='dense'", call)
        return attend_explicit(call)

    def _record(self, reason: str, call: AttentionCall) -> None:
        if torch.compiler.is_compiling():
            note_traced(self.recorder.key, reason)
        else:
            self.recorder.call(reason, call.kv_len)

    def _record_density(self, call: AttentionCall, counts: Tensor) -> None:
        batch, heads = call.query.shape[:2]
        visible = count_visible_blocks(
            batch,
            call.q_len,
            call.kv_len,
            self.block_size,
            is_causal=call.is_causal,
            window=call.window,
            kv_lens=call.kv_lens,
            q_lens=call.q_lens,
        )
        self.recorder.density(counts, batch, heads, visible)
