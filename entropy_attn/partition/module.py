"""RangeEntropy: a module with learnable anchors that sets itself up from the first batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from entropy_attn import validation as check
from entropy_attn.partition import entropy_interval, range_entropy
from entropy_attn.partition.anchors import (
    default_count,
    median_alpha,
    place_anchors,
    sample_points,
)
from entropy_attn.reference.soft_entropy import nearest_anchor


class RangeEntropy(nn.Module):
    """`range_entropy` with anchors of its own; needs no hyperparameter.

    The first forward pass, or `reset`, places the anchors by at most 8192 points of the batch
    (k-means++, then Lloyd steps) and sets alpha so that a typical point's nearest anchor is
    e^6 = 400 times as likely as the next one: alpha = 6 / median(d2 - d1), the squared distances to
    the two nearest anchors. Anchors are shared by all sets of a batch. After that the module
    compiles; an optimizer may be made before or after.

    Args:
        num_anchors: k at most; fewer if there are fewer distinct points. By default the root of n,
            from 2 to 64, with n the points of a set in the first batch.
        alpha: sharpness > 0, if not from the data.
        learn_anchors, learn_alpha: whether they have gradients.
        lloyd_steps: refinements of the anchors.
        seed: of the choice of anchors.
        backend: "auto", "triton" or "reference".

    Attributes:
        anchors: (k, d) parameter, fp32, or fp64 if the first batch is.
        log_alpha: () parameter.
    """

    def __init__(
        self,
        num_anchors: int | None = None,
        *,
        alpha: float | None = None,
        learn_anchors: bool = True,
        learn_alpha: bool = False,
        lloyd_steps: int = 5,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_anchors is not None:
            check.check_integer("num_anchors", num_anchors, minimum=1, besides="None")
        self.num_anchors = num_anchors
        self._alpha = None if alpha is None else check.check_positive("alpha", alpha)
        self.lloyd_steps = check.check_integer("lloyd_steps", lloyd_steps, minimum=0)
        self.seed = check.check_integer("seed", seed, minimum=0)
        self.backend = backend
        self.anchors: nn.Parameter | UninitializedParameter = UninitializedParameter(
            requires_grad=learn_anchors
        )
        self.log_alpha = nn.Parameter(torch.zeros(()), requires_grad=learn_alpha)
        self.is_initialised = False

    @property
    def alpha(self) -> Tensor:
        """() the sharpness, one over a squared distance."""
        return self.log_alpha.exp()

    @torch.compiler.disable
    @torch.inference_mode(False)  # parameters made in inference mode could not learn
    @torch.no_grad()
    def reset(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Place the anchors and set alpha anew by x (..., n, d); reads values.

        An optimizer goes on with the same parameters unless the number of anchors changes.
        """
        dtype = check.check_points(x)
        check.check_point_weights(weights, x, x.shape[:-1])
        generator = torch.Generator().manual_seed(self.seed)
        points = sample_points(x, weights, generator)
        check.check_sample(points)
        count = self.num_anchors or default_count(x.shape[-2])
        anchors = place_anchors(points, count, self.lloyd_steps, generator)
        alpha = median_alpha(points, anchors) if self._alpha is None else self._alpha
        anchors = anchors.to(x.device, dtype)
        if not self.is_initialised:
            self._materialize(anchors.shape, x.device, dtype)
        if self.anchors.shape != anchors.shape:
            self.anchors = nn.Parameter(anchors, requires_grad=self.anchors.requires_grad)
        self.anchors.copy_(anchors)
        self.log_alpha.fill_(math.log(alpha))

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """(...) nats for x (..., n, d) and weights (..., n); see `range_entropy`."""
        self._ensure(x, weights)
        return range_entropy(x, self.anchors, self.alpha, weights, backend=self.backend)

    def interval(self, x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """low, high: (...) bounds on the entropy of `labels`; see `entropy_interval`."""
        self._ensure(x, weights)
        return entropy_interval(x, self.anchors, self.alpha, weights, backend=self.backend)

    @torch.no_grad()
    def labels(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """(..., n) int64, the nearest anchor of each point. Weights count in a first call alone."""
        self._ensure(x, weights)
        dtype = check.check_points(x)
        check.check_beside_points("anchors", self.anchors, x, "k", x.shape[-1])
        return nearest_anchor(x, self.anchors.to(dtype))

    def extra_repr(self) -> str:
        shape = tuple(self.anchors.shape) if self.is_initialised else "set by the first batch"
        return f"anchors={shape}, backend={self.backend!r}"

    def _ensure(self, x: Tensor, weights: Tensor | None) -> None:
        if not self.is_initialised:
            self.reset(x, weights)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.is_initialised:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        if not self.is_initialised:
            anchors = state_dict.get(f"{prefix}anchors")
            if anchors is None:
                return  # saved before its first batch
            self._materialize(anchors.shape, self.log_alpha.device, anchors.dtype)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _materialize(self, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> None:
        if isinstance(self.anchors, UninitializedParameter):
            self.anchors.materialize(shape, device, dtype)
        self.log_alpha.data = self.log_alpha.data.to(device, dtype)
        self.is_initialised = True
