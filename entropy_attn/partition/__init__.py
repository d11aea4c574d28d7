"""Entropy of partitions of point sets: soft, differentiable surrogates, and hard labels.

The range-partition entropy of n points is the least entropy of a partition whose parts each lie
in a range of a given family (Eppstein, Goodrich, Illickan and To, arXiv 2508.20489); adaptive
geometric algorithms run in O(n (1 + entropy)). The surrogates replace the minimum by soft cells
around anchors or between halfspaces (arXiv 2509.03733), which have gradients.

All entropies are in nats, fp32 (fp64 for fp64 points). Points are (..., n, d) with any strides;
leading dimensions of all arguments broadcast. Weights are not normalised by the caller: a point
of weight 0 is as if it were not there, whatever it holds, and a set without weight has entropy 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_attn import backend as backend_table
from entropy_attn import validation as check
from entropy_attn.partition import ops


def range_entropy(
    x: Tensor,
    anchors: Tensor,
    alpha: float | Tensor,
    weights: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Entropy of soft cells around anchors, the ball surrogate of arXiv 2509.03733.

    With p_ij = softmax_j(-alpha |x_i - c_j|^2) and P_j the weighted mean of p_ij over the points,
    H = -sum_j P_j log P_j. Differentiable once in every tensor. Nothing of size n x k is stored,
    forward or backward, and gradients are the same in every run.

    Args:
        x: (..., n, d) fp16, bf16, fp32 or fp64.
        anchors: (..., k, d) in the dtype of x, or fp32 beside half precision; (k, d) are shared.
        alpha: sharpness > 0, one over a squared distance; a number, or a tensor of the leading
            dimensions, whose values are not read.
        weights: (..., n) >= 0 or bool, 1 for each point by default. The values are not read.
        backend: "auto", "triton" or "reference".

    Returns:
        (...) nats, from 0 (all points in one cell) to log k.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
        BackendUnavailable: a named backend cannot run this call.
    """
    given = _Balls(x, anchors, alpha, weights, backend)
    return given.forward(with_peak=False)[0].reshape(given.leading)


@torch.no_grad()
def entropy_interval(
    x: Tensor,
    anchors: Tensor,
    alpha: float | Tensor,
    weights: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Bounds on the entropy of the hard partition by nearest anchors, from the soft one.

    With delta the weighted mean of 1 - max_j p_ij, soft and hard masses differ by at most delta in
    total variation, so their entropies by at most delta log(k - 1) + h(delta), h the entropy of a
    coin (Audenaert, arXiv quant-ph/0610146; Zhang, IEEE Trans. Inf. Theory 53, 2007), cut to
    [0, log k]. delta is widened by four roundings of its dtype, and the bounds by as many of an
    entropy.

    The cells of nearest anchors are convex. Where the family of ranges holds them, the hard
    partition is one of those that range-partition entropy takes the minimum over: ``high`` bounds
    it too. ``low`` does not.

    Args:
        See `range_entropy`.

    Returns:
        low, high: (...) nats. Not differentiable.
    """
    given = _Balls(x, anchors, alpha, weights, backend)
    soft, _, _, peak = given.forward(with_peak=True)
    k, miss = given.anchors.shape[2], 1 - peak
    weight = torch.ones_like(miss) if given.weights is None else given.weights
    # Where the weight is 0 the point may hold NaN.
    missed = torch.where(weight > 0, miss * weight, 0.0).sum(-1)
    total = weight.sum(-1)
    delta = torch.where(total > 0, missed / total, 0.0)
    roundings = 4 * torch.finfo(delta.dtype).eps
    delta = (delta + roundings).clamp(0, 1 - 1 / k)
    rest = 1 - delta
    coin = 0.0 - torch.special.xlogy(delta, delta) - torch.special.xlogy(rest, rest)
    slack = delta * math.log(max(k - 1, 1)) + coin + roundings * (1 + math.log(k))
    low, high = (soft - slack).clamp(min=0), (soft + slack).clamp(max=math.log(k))
    return low.reshape(given.leading), high.reshape(given.leading)


def halfspace_entropy(
    x: Tensor,
    normals: Tensor,
    offsets: Tensor,
    tau: float | Tensor,
    weights: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Entropy of soft cells cut out by halfspaces, the halfspace surrogate of arXiv 2509.03733.

    Plane t splits softly by h_t(x) = sigmoid((w_t.x - b_t) / tau). The cells are the 2^T patterns
    s of sides, m_s(x) = prod_t h_t^{s_t} (1 - h_t)^{1 - s_t}, P_s is the weighted mean of m_s over
    the points and H = -sum_s P_s log P_s. Differentiable once in every tensor. A point costs
    2 * 2^(T/2) exponentials, and nothing of size n x 2^T is stored.

    Args:
        x: (..., n, d) fp16, bf16, fp32 or fp64.
        normals: (..., T, d), offsets: (..., T), T at most 12, in the dtype of x, or fp32 beside
            half precision. A normal's length sharpens its plane as 1 / tau does.
        tau: softness > 0 in the unit of w.x; a number, or a tensor of the leading dimensions.
        weights, backend: as in `range_entropy`.

    Returns:
        (...) nats, from 0 to T log 2.

    Raises:
        See `range_entropy`.
    """
    dtype = check.check_points(x)
    check.check_beside_points("normals", normals, x, "T", x.shape[-1])
    check.check_planes(normals)
    check.check_beside_points("offsets", offsets, x, normals.shape[-2])
    check.check_sharpness("tau", tau, x)
    check.check_point_weights(weights, x, x.shape[:-1])
    tau = _as_tensor(tau, x, dtype)
    leading = check.check_leading(
        x=x.shape[:-2], normals=normals.shape[:-2], offsets=offsets.shape[:-1], tau=tau.shape,
        weights=() if weights is None else weights.shape[:-1],
    )  # fmt: skip
    entropy, _ = ops.halfspace_forward(
        _two_leading(x, leading, 2),
        _two_leading(normals.to(dtype), leading, 2),
        _two_leading(offsets.to(dtype), leading, 1),
        _two_leading(tau, leading, 0),
        None if weights is None else _two_leading(weights.to(dtype), leading, 1),
        _choose(x, 1 << normals.shape[-2], backend),
    )
    return entropy.reshape(leading)


def partition_entropy(labels: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """Entropy of a hard partition: -sum_j P_j log P_j, P_j the share of points with label j.

    Args:
        labels: (..., n) integers from 0 to k - 1. Values on a GPU are not read, an index outside
            is an error of the device.
        k: number of parts; empty ones add nothing.
        weights: (..., n) >= 0 or bool, 1 for each point by default; differentiable.

    Returns:
        (...) nats, fp32, or fp64 with fp64 weights; 0 for a set without weight.
    """
    check.check_labels(labels, k)
    check.check_point_weights(weights, labels, labels.shape)
    if weights is None:
        weights = torch.ones((), dtype=torch.float32, device=labels.device).expand(labels.shape)
    leading = check.check_leading(labels=labels.shape[:-1], weights=weights.shape[:-1])
    labels = labels.expand(*leading, labels.shape[-1]).long()
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    # Counts are exact in fp64, in any order of summation.
    weights = weights.expand(labels.shape).double()
    mass = weights.new_zeros(*leading, k).scatter_add(-1, labels, weights)
    total = mass.sum(-1, keepdim=True)
    mass = torch.where(total > 0, mass / torch.where(total > 0, total, 1.0), 0.0)
    surprise = -torch.where(mass > 0, mass, 1.0).log()
    return (mass * surprise).sum(-1).to(dtype)


class _Balls:
    """Validated arguments of the ball surrogate, in the form that the custom ops take."""

    def __init__(
        self,
        x: Tensor,
        anchors: Tensor,
        alpha: float | Tensor,
        weights: Tensor | None,
        backend: str,
    ) -> None:
        dtype = check.check_points(x)
        check.check_beside_points("anchors", anchors, x, "k", x.shape[-1])
        check.check_sharpness("alpha", alpha, x)
        check.check_point_weights(weights, x, x.shape[:-1])
        alpha = _as_tensor(alpha, x, dtype)
        self.leading = check.check_leading(
            x=x.shape[:-2], anchors=anchors.shape[:-2], alpha=alpha.shape,
            weights=() if weights is None else weights.shape[:-1],
        )  # fmt: skip
        self.points = _two_leading(x, self.leading, 2)
        if anchors.shape[:-2].numel() != math.prod(self.leading):
            anchors = anchors.to(dtype)  # gradients of sets that share anchors are added up
        self.anchors = _two_leading(anchors, self.leading, 2)
        self.alpha = _two_leading(alpha, self.leading, 0)
        self.weights = weights
        if weights is not None:
            self.weights = _two_leading(weights.to(dtype), self.leading, 1)
        self.backend = _choose(x, anchors.shape[-2], backend)

    def forward(self, with_peak: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `ops.range_forward`: the leading dimensions are two."""
        return ops.range_forward(
            self.points, self.anchors, self.alpha, self.weights, with_peak, self.backend
        )


def _as_tensor(value: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A number as a tensor beside x, without a copy from the host that would wait."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.full((), float(value), dtype=dtype, device=x.device)


def _two_leading(tensor: Tensor, leading: torch.Size, trailing: int) -> Tensor:
    """The tensor with two leading dimensions; a view if there are at most two to begin with, or
    if the others lie in memory as one."""
    own = tensor.shape[tensor.ndim - trailing :]
    outer = math.prod(leading[:-1])
    inner = leading[-1] if leading else 1
    return tensor.expand((*leading, *own)).reshape(outer, inner, *own)


def _choose(x: Tensor, cells: int, backend: str) -> str:
    call = backend_table.Call(
        device=x.device.type,
        dtype=x.dtype,
        head_dim=x.shape[-1],
        q_len=x.shape[-2],
        kv_len=cells,
        keeps_all=True,
        is_causal=False,
        has_lens=False,
        has_window=False,
        wants_statistics=True,
    )
    return backend_table.choose(call, backend).backend
