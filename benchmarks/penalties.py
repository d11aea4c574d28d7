"""Other loss terms that are said to make attention sparse, to compare `EntropyRegularizer` with.

They see what it sees: the queries and keys of every attention layer in training. Each has
``penalty()``, to be added to the loss, ``step()`` and ``remove()`` as it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import entropy_attn as ea
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.sites import Installation, check_reach, find_sites
from entropy_attn.regularizer.layer import RegularizedLayer

ROWS = 64  # queries of a call that are sampled
DENSITY, FEW_LAYERS = "density", "density, few layers a step"
# As much as by default, but of fewer layers.
FEW_LAYERS_SHARES = {"tile_fraction": 0.5, "layer_fraction": 0.125}


class AttentionPenalty(ABC, nn.Module):
    """weight * the mean over all attention layers of what a subclass measures.

    A module, so that an optimizer and a checkpoint can take what it learns.

    Args:
        model: what `EntropyRegularizer` takes.
        weight: loss per unit of the measure.
        seed: of the samples.
        warmup_steps: in which the weight grows to its full size, as `EntropyRegularizer`'s does.
    """

    def __init__(
        self, model: nn.Module, weight: float, seed: int = 0, *, warmup_steps: int = 0
    ) -> None:
        super().__init__()
        sites = find_sites(model)
        check_reach(model, sites, partial=False)
        self.weight = weight
        self.warmup_steps = warmup_steps
        self.steps = 0
        self.layers = tuple(RegularizedLayer(site, index) for index, site in enumerate(sites))
        self._generator = torch.Generator().manual_seed(seed)
        self._installation = Installation(sites, self.layers)

    def get_extra_state(self) -> dict[str, Any]:
        """For `state_dict`: where the warm-up and the samples go on."""
        return {"steps": self.steps, "generator": self._generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self._generator.set_state(state["generator"])

    @abstractmethod
    def measure(self, call: AttentionCall, layer: int) -> Tensor:
        """Of one call, a tensor without dimensions, in fp32."""

    def penalty(self) -> Tensor:
        seen = [call for layer in self.layers for call in layer.take()]
        if not seen:
            raise RuntimeError("no attention was seen: run the model in training mode first")
        weight = self.weight * min(1.0, (self.steps + 1) / max(1, self.warmup_steps))
        return weight * torch.stack([self.measure(s.call, s.layer) for s in seen]).mean()

    def step(self) -> None:
        self.steps += 1

    def remove(self) -> None:
        self._installation.remove()


class ScoreMagnitude(AttentionPenalty):
    """L1 of attention: the mean |score| of sampled queries with the keys that they see.

    The L1 norm of attention itself is 1 in every row and has no gradient, so that what is called
    L1 on attention can only be that of the scores before the softmax.
    """

    def measure(self, call: AttentionCall, layer: int) -> Tensor:
        q_len, kv_len = call.q_len, call.kv_len
        rows = torch.randint(q_len, (min(ROWS, q_len),), generator=self._generator)
        rows = rows.to(call.query.device, non_blocking=True)
        query = call.query.index_select(2, rows)
        key = call.key.repeat_interleave(query.shape[1] // call.key.shape[1], dim=1)
        scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        scores = (query @ key.mT).float().abs() * scale  # (B, H, rows, Nk)
        if not call.is_causal:
            return scores.mean()
        seen = torch.arange(kv_len, device=rows.device) <= rows[:, None] + kv_len - q_len
        return (scores * seen).sum() / (seen.sum() * scores.shape[0] * scores.shape[1])


class KeyRangeEntropy(AttentionPenalty):
    """The paper's surrogate: range-partition entropy of the keys of each head (arXiv 2509.03733).

    Keys are scaled to length 1 first: entropy would fall by shrinking all of them into one cell.

    Args:
        sharpness: factor of the alpha that `RangeEntropy` sets by the data.
        num_anchors, learn_anchors, lloyd_steps: of `RangeEntropy`; one a layer, for all heads.
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float,
        seed: int = 0,
        *,
        warmup_steps: int = 0,
        sharpness: float = 1.0,
        num_anchors: int | None = None,
        learn_anchors: bool = False,
        lloyd_steps: int = 5,
    ) -> None:
        super().__init__(model, weight, seed, warmup_steps=warmup_steps)
        self.sharpness = sharpness
        self.entropies = nn.ModuleList(
            ea.RangeEntropy(
                num_anchors, learn_anchors=learn_anchors, lloyd_steps=lloyd_steps, seed=seed
            )
            for _ in self.layers
        )

    @torch.no_grad()
    def start(self) -> None:
        """Place the anchors by the calls that were seen; an optimizer may be made afterwards."""
        for layer in self.layers:
            for seen in layer.take()[:1]:
                entropy = self.entropies[layer.index]
                entropy.to(seen.call.key.device)
                entropy.reset(_directions(seen.call.key))
                entropy.log_alpha.add_(torch.tensor(self.sharpness).log())

    def measure(self, call: AttentionCall, layer: int) -> Tensor:
        return self.entropies[layer](_directions(call.key)).mean()


def _directions(key: Tensor) -> Tensor:
    return F.normalize(key.float(), dim=-1)


def outputs_penalty(logits: Tensor, kind: str) -> Tensor:
    """Regularizers of the output distribution, which leave attention alone; logits (..., C).

    "label smoothing": mean cross-entropy with the uniform distribution. "confidence": minus the
    mean entropy of the prediction (Pereyra et al., arXiv 1701.06548).
    """
    log_p = logits.float().log_softmax(-1)
    if kind == "label smoothing":
        return -log_p.mean()
    if kind == "confidence":
        return (log_p.exp() * log_p).sum(-1).mean()
    raise ValueError(f"kind must be 'label smoothing' or 'confidence', got {kind!r}")


def make_penalty(
    name: str, model: nn.Module, strength: float, *, block_size: Any, steps: int, seed: int,
    options: dict[str, Any] | None = None,
) -> ea.EntropyRegularizer | AttentionPenalty:  # fmt: skip
    """A regularizer of attention by its name in the experiments.

    Args:
        name: DENSITY or FEW_LAYERS (strength: the target density); "row entropy", "block entropy",
            "tile entropy", "L1 of scores" or "range entropy of keys" (strength: the weight).
        steps: of the training; the first half is the warm-up.
        options: more keyword arguments of the regularizer.
    """
    options = {"warmup_steps": steps // 2, **(options or {})}
    if name == "L1 of scores":
        return ScoreMagnitude(model, strength, seed, **options)
    if name == "range entropy of keys":
        return KeyRangeEntropy(model, strength, seed, **options)
    shares = FEW_LAYERS_SHARES if name == FEW_LAYERS else {}
    shared = {"block_size": block_size, "seed": seed, **shares, **options}
    if name in (DENSITY, FEW_LAYERS):
        return ea.EntropyRegularizer(model, target_density=strength, **shared)
    measure = name.removesuffix(" entropy")
    if measure not in ("row", "block", "tile"):
        raise ValueError(f"no regularizer is called {name!r}")
    return ea.EntropyRegularizer(model, weight=strength, measure=measure, **shared)
