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

# Calls that may wait for `EntropyRegularizer.penalty`; each keeps its part of the graph alive.
MOST_WAITING = 256


@dataclass(frozen=True)
class Seen:
    """One call in training: its queries and keys, with the valid tokens first, and no value.

    Attributes:
        call: of the layer, its value the key.
        layer: index of the layer in the model.
    """

    call: AttentionCall
    layer: int


class RegularizedLayer:
    """One attention layer of a model in training.

    It changes nothing in what the model computes. Queries and keys are kept from the forward to
    the backward, as attention keeps them itself; their entropy is measured for many layers at
    once, in `EntropyRegularizer.penalty`: one layer alone would leave a GPU waiting for launches.

    Attributes:
        waiting: what the calls since `take` saw.
    """

    def __init__(self, site: AttentionSite, index: int) -> None:
        self.name = site.name
        self.module = site.module
        self.index = index
        self.before: Layer | None = site.installed()
        self.waiting: list[Seen] = []

    def take(self) -> list[Seen]:
        taken, self.waiting = self.waiting, []
        return taken

    def attend(self, call: AttentionCall) -> Tensor:
        if not (self.module.training and torch.is_grad_enabled()):
            return self._attend_as_before(call)
        if call.explicit_mask is not None:
            raise ValueError(
                f"{self.name} was given an attention mask of shape "
                f"{tuple(call.explicit_mask.shape)}, under which ea.EntropyRegularizer cannot "
                "measure entropy; pass a 2D padding mask"
            )
        if call.packing is not None:
            return call.packing.attend(call, self.attend)
        self._keep(call)
        return self._attend_as_before(call)

    def _attend_as_before(self, call: AttentionCall) -> Tensor:
        if self.before is not None:
            return self.before.attend(call)
        if call.explicit_mask is not None:
            return attend_explicit(call)
        if call.packing is not None:
            return call.packing.attend(call, attend_dense)
        return attend_dense(call)

    def _keep(self, call: AttentionCall) -> None:
        query, key = follow_autocast(call.query, call.key)
        moved, _ = valid_first(replace(call, query=query, key=key, value=key))
        # Activation checkpointing runs the layer again inside the backward: it counted before.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        if len(self.waiting) >= MOST_WAITING:
            raise RuntimeError(
                f"{self.name} ran {MOST_WAITING} times in training mode without a call of "
                "EntropyRegularizer.penalty(): add it to the loss, or .remove() the regularizer"
            )
        self.waiting.append(Seen(moved, self.index))
