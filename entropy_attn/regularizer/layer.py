"""RegularizedLayer: attends as the model did, and keeps what its entropy is measured on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_attn.autocast import follow_autocast
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.dense import attend_dense, attend_explicit
from entropy_attn.integrations.layer import Layer
from entropy_attn.integrations.padding import valid_first
from entropy_attn.integrations.sites import AttentionSite
from entropy_attn.regularizer.rows import with_run
from entropy_attn.regularizer.sampling import Sample

# Calls that may wait for `EntropyRegularizer.penalty`; each keeps its part of the graph alive.
MOST_WAITING = 256


@dataclass(frozen=True)
class Seen:
    """What is measured of one call: queries and keys, and no value.

    Attributes:
        call: of the layer, only the batch rows of the sample, its value the key.
        sample: how much of the call is taken.
        draw: which part, a number in [0, 1).
        layer: index of the layer in the model.
    """

    call: AttentionCall
    sample: Sample
    draw: float
    layer: int


class RegularizedLayer:
    """One attention layer of a model in training.

    It changes nothing in what the model computes. Queries and keys are kept from the forward to
    the backward, as attention keeps them itself; their entropy is measured for many layers at
    once, in `EntropyRegularizer.penalty`: one layer alone would leave a GPU waiting for launches.

    Args:
        index: of the layer in the model.
        tile_fraction: of all blocks of queries, which is measured.
        block_q: size of these blocks.

    Attributes:
        draw: which part of its calls is measured, a number in [0, 1); None for nothing.
    """

    def __init__(
        self, site: AttentionSite, index: int, tile_fraction: float = 1.0, block_q: int = 64
    ) -> None:
        self.name = site.name
        self.module = site.module
        self.index = index
        self.tile_fraction = tile_fraction
        self.block_q = block_q
        self.before: Layer | None = site.installed()
        self.draw: float | None = 0.0
        self._waiting: list[Seen | AttentionCall] = []

    @property
    def follower(self) -> object | None:
        """That of the layer below, which is told of caches through this one."""
        return getattr(self.before, "follower", None)

    def take(self) -> list[Seen]:
        """What was seen since the last time.

        Padding is sorted out here: in the forward pass it would keep tensors that the second one
        of activation checkpointing does not keep.
        """
        taken, self._waiting = self._waiting, []
        if self.draw is None:
            found = [seen for seen in taken if isinstance(seen, Seen)]
        else:
            found = [
                seen if isinstance(seen, Seen) else self._sampled(seen, self.draw)[1]
                for seen in taken
            ]
        return [replace(seen, call=valid_first(seen.call)[0]) for seen in found]

    def attend(self, call: AttentionCall) -> Tensor:
        if not (self.module.training and torch.is_grad_enabled()):
            return self._attend_as_before(call)
        if call.explicit_mask is not None:
            raise ValueError(
                f"{self.name} was given an attention mask of shape "
                f"{tuple(call.explicit_mask.shape)}, under which ea.EntropyRegularizer cannot "
                "measure entropy; pass a 2D padding mask"
            )
        if torch.compiler.is_compiling():
            return self._attend_in_a_graph(call)
        # Activation checkpointing runs the layer again inside the backward: it counted before.
        if self.draw is None or torch._C._current_graph_task_id() != -1:
            return self._attend_as_before(call)
        if call.packing is not None:
            return call.packing.attend(call, self.attend)
        call, seen = self._sampled(call, self.draw)
        self._keep(seen)
        return self._attend_as_before(call)

    def _attend_in_a_graph(self, call: AttentionCall) -> Tensor:
        """Keeps every call whole: a graph that knew the draw would be compiled anew each step."""
        if call.packing is not None:
            return call.packing.attend(call, self.attend)
        query, key = follow_autocast(call.query, call.key)
        self._keep(replace(call, query=query, key=key, value=key))
        return self._attend_as_before(call)

    def _attend_as_before(self, call: AttentionCall) -> Tensor:
        if self.before is not None:
            return self.before.attend(call)
        if call.explicit_mask is not None:
            return attend_explicit(call)
        if call.packing is not None:
            return call.packing.attend(call, attend_dense)
        return attend_dense(call)

    def _sampled(self, call: AttentionCall, draw: float) -> tuple[AttentionCall, Seen]:
        """The call, for attention, and what is measured of it."""
        batch = call.query.shape[0]
        sample = Sample.of(self.tile_fraction, batch, -(-call.q_len // self.block_q))
        query, key = query_rows, key_rows = follow_autocast(call.query, call.key)
        of_rows = {}
        if sample.rows < batch:
            first = sample.first_row(draw)
            query, key, query_rows, key_rows = with_run(query, key, first, sample.rows)
            of_rows = {
                name: tensor.narrow(0, first, sample.rows)
                for name in ("codes", "kv_lens", "q_lens")
                if (tensor := getattr(call, name)) is not None
            }
        rows = replace(call, query=query_rows, key=key_rows, value=key_rows, **of_rows)
        return replace(call, query=query, key=key), Seen(rows, sample, draw, self.index)

    def _keep(self, seen: Seen | AttentionCall) -> None:
        if len(self._waiting) >= MOST_WAITING:
            raise RuntimeError(
                f"{self.name} ran {MOST_WAITING} times in training mode without a call of "
                "EntropyRegularizer.penalty(): add it to the loss, or .remove() the regularizer"
            )
        self._waiting.append(seen)
