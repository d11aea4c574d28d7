"""RegularizedLayer: attends as the model did, and measures how spread out that attention is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from entropy_attn.api import attention_with_entropy
from entropy_attn.entropy import AttentionEntropy
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.dense import attend_dense, attend_explicit
from entropy_attn.integrations.layer import Layer
from entropy_attn.integrations.padding import restore, valid_first
from entropy_attn.integrations.sites import AttentionSite
from entropy_attn.integrations.statistics import visible_blocks
from entropy_attn.masks import BlockMask
from entropy_attn.regularizer.sampling import sample_size, sampled_tiles

MEASURES = ("density", "tile", "block", "row")
# Calls that may wait for `EntropyRegularizer.penalty`; each keeps its part of the graph alive.
MOST_WAITING = 256


@dataclass(frozen=True)
class Sums:
    """Over what one call attended to, tensors without dimensions.

    Attributes:
        measure: of the measure, with a gradient; count: of what it is summed over.
        kept: blocks that the tiles effectively need, exp(tile entropy); 0 if it is not known.
        visible: blocks with a visible pair; tiles: blocks of queries with one.
    """

    measure: Tensor
    count: Tensor
    kept: Tensor
    visible: Tensor
    tiles: Tensor


@dataclass(frozen=True)
class Settings:
    """What the layers of a regularizer share.

    Attributes:
        measure: one of MEASURES.
        block_size: (block_q, block_k) in tokens.
        tile_fraction: of the blocks of queries that are measured.
        backend: of the measurement.
    """

    measure: str
    block_size: tuple[int, int]
    tile_fraction: float
    backend: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """The entropies that are needed."""
        return ("tile",) if self.measure in ("density", "tile") else (self.measure,)


class RegularizedLayer:
    """One attention layer of a model in training.

    Outside training, and in steps that leave this layer out, it only passes calls on. The output
    is always that of the attention before: where all blocks of queries are measured and that was
    dense, one pass gives both; else the sample is measured by an attention of its own.

    Attributes:
        active: whether the layer is measured in this step.
        start: random start of the sample, a tensor without dimensions.
        waiting: sums of the calls since `take`.
    """

    def __init__(self, site: AttentionSite, settings: Settings, start: Tensor) -> None:
        self.name = site.name
        self.module = site.module
        self.before: Layer | None = site.installed()
        self.settings = settings
        self.start = start
        self.active = True
        self.waiting: list[Sums] = []

    def take(self) -> list[Sums]:
        taken, self.waiting = self.waiting, []
        return taken

    def attend(self, call: AttentionCall) -> Tensor:
        if not (self.active and self.module.training and torch.is_grad_enabled()):
            return self._attend_as_before(call)
        if call.explicit_mask is not None:
            raise ValueError(
                f"{self.name} was given an attention mask of shape "
                f"{tuple(call.explicit_mask.shape)}, under which ea.EntropyRegularizer cannot "
                "measure entropy; pass a 2D padding mask, or leave the layer out"
            )
        if call.packing is not None:
            return call.packing.attend(call, self.attend)
        if self.before is None and self.settings.tile_fraction == 1.0:
            moved, place = valid_first(call)
            out, entropy = self._measure(moved, None)
            self._note(moved, entropy, None)
            return restore(out, place)
        out = self._attend_as_before(call)
        moved, _ = valid_first(call)
        tiles = -(-call.q_len // self.settings.block_size[0])
        size = sample_size(tiles, self.settings.tile_fraction)
        chosen = sampled_tiles(tiles, size, self.start.to(call.query.device))
        _, entropy = self._measure(moved, chosen)
        self._note(moved, entropy, chosen)
        return out

    def _attend_as_before(self, call: AttentionCall) -> Tensor:
        if self.before is not None:
            return self.before.attend(call)
        if call.explicit_mask is not None:
            return attend_explicit(call)
        if call.packing is not None:
            return call.packing.attend(call, attend_dense)
        return attend_dense(call)

    def _measure(
        self, call: AttentionCall, chosen: Tensor | None
    ) -> tuple[Tensor, AttentionEntropy]:
        """Dense attention of the chosen blocks of queries (Mq,), None for all of them."""
        settings, value, mask = self.settings, call.value, None
        if chosen is not None:
            value = value.detach()  # only the entropies are used
            blocks = -(-call.kv_len // settings.block_size[1])
            counts = torch.where(chosen, blocks, 0).to(torch.int32)
            indices = torch.arange(blocks, dtype=torch.int32, device=chosen.device)
            mask = BlockMask(
                counts[None, None],
                indices.expand(1, 1, len(chosen), blocks),
                settings.block_size,
                call.q_len,
                call.kv_len,
                validate=False,
            )
        return attention_with_entropy(
            call.query,
            call.key,
            value,
            block_mask=mask,
            block_size=settings.block_size,
            kinds=settings.kinds,
            backend=settings.backend,
            **call.geometry,
        )

    def _note(self, call: AttentionCall, entropy: AttentionEntropy, chosen: Tensor | None) -> None:
        sums = sum_up(call, entropy, chosen, self.settings)
        # Activation checkpointing runs the layer again inside the backward: it counted before.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        if len(self.waiting) >= MOST_WAITING:
            raise RuntimeError(
                f"{self.name} ran {MOST_WAITING} times in training mode without a call of "
                "EntropyRegularizer.penalty(): add it to the loss, or .remove() the regularizer"
            )
        self.waiting.append(sums)


def sum_up(
    call: AttentionCall, entropy: AttentionEntropy, chosen: Tensor | None, settings: Settings
) -> Sums:
    """The sums of one call, of a sample scaled up to the whole."""
    batch, heads = call.query.shape[:2]
    visible = _visible_blocks(call, settings.block_size)  # (B or 1, Mq)
    repeats = heads * batch // visible.shape[0]
    seen = visible > 0
    scale = 1.0
    if chosen is not None:
        scale = len(chosen) / sample_size(len(chosen), settings.tile_fraction)
    where = seen if chosen is None else seen & chosen

    def total(x: Tensor, where: Tensor) -> Tensor:
        """Of (B, H, M), where (B or 1, M)."""
        return torch.where(where[:, None], x, 0.0).sum() * scale

    zero = torch.zeros((), device=call.query.device)
    effective = zero if entropy.tile is None else total(entropy.tile.exp(), where)
    if settings.measure == "density":
        measure, count = effective, visible.sum() * repeats
    elif settings.measure == "tile":
        measure, count = total(entropy.tile, where), seen.sum() * repeats
    else:
        rows = entropy.row if settings.measure == "row" else entropy.block
        # A query that sees no key has entropy 0; it stands in a tile that others may see from.
        valid = _queries_with_keys(call)  # (B or 1, Nq)
        measured = valid if chosen is None else valid & _rows_of(chosen, call, settings)
        measure, count = total(rows, measured), valid.sum() * (heads * batch // valid.shape[0])
    blocks, tiles = visible.sum().float() * repeats, seen.sum().float() * repeats
    return Sums(measure, count.float(), effective.detach(), blocks, tiles)


def _rows_of(chosen: Tensor, call: AttentionCall, settings: Settings) -> Tensor:
    """(1, Nq) bool: the queries of the chosen blocks."""
    return chosen.repeat_interleave(settings.block_size[0])[None, : call.q_len]


def _queries_with_keys(call: AttentionCall) -> Tensor:
    """(B or 1, Nq) bool: which queries see a key. One that sees any key at all sees its last."""
    return _visible_blocks(call, (1, max(1, call.kv_len))) > 0


def _visible_blocks(call: AttentionCall, block_size: tuple[int, int]) -> Tensor:
    """(B, Mq) with lengths, else (1, Mq): blocks of keys with a visible pair."""
    if call.kv_lens is None and call.q_lens is None:
        sizes = (call.q_len, call.kv_len, block_size, call.is_causal, call.window)
        if torch.compiler.is_compiling():
            return _visible_without_lens.__wrapped__(*sizes, call.query.device)
        return _visible_without_lens(*sizes, call.query.device)
    return visible_blocks(
        call.q_len,
        call.kv_len,
        block_size,
        is_causal=call.is_causal,
        window=call.window,
        kv_lens=call.kv_lens,
        q_lens=call.q_lens,
        batch=call.query.shape[0],
    )


@lru_cache(maxsize=64)
def _visible_without_lens(q_len, kv_len, block_size, is_causal, window, device) -> Tensor:
    return visible_blocks(
        q_len, kv_len, block_size, is_causal=is_causal, window=window, device=device
    )
