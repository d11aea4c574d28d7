"""Masses of soft cells and their gradients in plain PyTorch, a chunk of points at a time.

The CPU backend of `entropy_attn.partition` and the yardstick of its kernels. Nothing of size
points x cells is stored beyond a chunk. Half precision is computed in fp32, fp64 in fp64. The
formulas stand at the top of `kernels/range_primitives.py` and `kernels/halfspace_entropy.py`.

Shapes: points (B0, B1, n, d); cells of balls come from anchors (B0, B1, k, d) and alpha (B0, B1),
cells of halfspaces from normals (B0, B1, T, d), offsets (B0, B1, T) and tau (B0, B1); weights
(B0, B1, n) or None. Gradients take surprise (B0, B1, cells) and scale (B0, B1), the incoming
gradient over the sum of weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from entropy_attn.reference.precision import without_autocast

# Entries of a chunk's (points, cells) or (points, d) tensor.
CHUNK_ENTRIES = 1 << 21


def entropy_of_masses(mass: Tensor) -> Tensor:
    """-sum P log P over the last dimension, in nats; a mass of 0 adds 0."""
    return 0.0 - torch.special.xlogy(mass, mass).sum(-1).clamp(max=0)


def surprise(mass: Tensor, entropy: Tensor) -> Tensor:
    """-log P - H, how much rarer a cell is than the mean one; 0 where P is 0.

    Less H, which leaves every gradient as it is, since what is small needs no digits for H.
    """
    entropy = entropy[..., None]
    return torch.where(mass > 0, -torch.where(mass > 0, mass, 1.0).log() - entropy, 0.0)


def per_weight(values: Tensor, weights: Tensor | None, points: Tensor) -> Tensor:
    """(B0, B1, ...) values over the sum of weights; 0 where it is 0."""
    if weights is None:
        return values / max(1, points.shape[2])
    total = weights.sum(-1)
    total = total.reshape(*total.shape, *[1] * (values.ndim - 2))
    return torch.where(total > 0, values / total, 0.0)


def weight_gradient(expected: Tensor, scale: Tensor, needed: bool) -> Tensor:
    """(B0, B1, n) or empty; ``scale`` is the incoming gradient over the sum of weights."""
    return expected * scale[..., None] if needed else expected.new_empty(0)


def row_chunks(points: Tensor, cells: int) -> Iterator[slice]:
    """Slices of the points."""
    widest = points.shape[:-2].numel() * max(cells, points.shape[-1], 1)
    step = max(1, CHUNK_ENTRIES // max(1, widest))
    for start in range(0, points.shape[-2], step):
        yield slice(start, start + step)


def _weighted(values: Tensor, weights: Tensor | None, rows: slice) -> Tensor:
    """(..., m, any) times the points' weights; 0, and never NaN, where the weight is 0."""
    if weights is None:
        return values
    weight = weights[..., rows, None]
    return torch.where(weight > 0, values * weight, 0.0)


def _unmasked(values: Tensor, weights: Tensor | None, rows: slice) -> Tensor:
    """(..., m, any) with 0 for points of weight 0, whatever they hold."""
    return values if weights is None else torch.where(weights[..., rows, None] > 0, values, 0.0)


class _Balls:
    """Anchors relative to their mean: distances stay, and lose no digits far from the origin."""

    def __init__(self, anchors: Tensor) -> None:
        self.centre = anchors.mean(-2, keepdim=True)
        self.anchors = anchors - self.centre

    def centred(self, points: Tensor) -> Tensor:
        return points.to(self.anchors.dtype) - self.centre

    def closeness(self, centred: Tensor) -> Tensor:
        """(..., m, k) 2 x.c - |c|^2: the squared distance from its negative, less |x|^2."""
        product = centred @ self.anchors.transpose(-1, -2)
        return 2 * product - self.anchors.square().sum(-1)[..., None, :]


@without_autocast
def range_mass(
    points: Tensor, anchors: Tensor, alpha: Tensor, weights: Tensor | None, with_peak: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """entropy (B0, B1), masses (B0, B1, k), log-sum-exp of the scores and the largest p of each
    point (B0, B1, n), the latter empty without ``with_peak``."""
    anchors = anchors.to(alpha.dtype)
    balls, alpha, k = _Balls(anchors), alpha[..., None, None], anchors.shape[-2]
    sums = anchors.new_zeros(*points.shape[:-2], k)
    lse = anchors.new_empty(points.shape[:-1])
    peak = anchors.new_empty(points.shape[:-1] if with_peak else (0,))
    for rows in row_chunks(points, k):
        scores = alpha * balls.closeness(balls.centred(points[..., rows, :]))
        lse[..., rows] = scores.logsumexp(-1)
        p = scores.softmax(-1)
        sums += _weighted(p, weights, rows).sum(-2)
        if with_peak:
            peak[..., rows] = p.amax(-1)
    mass = per_weight(sums, weights, points)
    return entropy_of_masses(mass), mass, lse, peak


@without_autocast
def range_gradients(
    grad: Tensor,
    points: Tensor,
    anchors: Tensor,
    alpha: Tensor,
    weights: Tensor | None,
    entropy: Tensor,
    mass: Tensor,
    lse: Tensor,
    need_points: bool,
    need_anchors: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, danchors, dalpha and dweights, empty where not needed."""
    dtype, anchors = anchors.dtype, anchors.to(alpha.dtype)
    balls, scale = _Balls(anchors), per_weight(grad, weights, points)
    k, g = anchors.shape[-2], surprise(mass, entropy)[..., None, :]
    out_scale = (2 * alpha * scale)[..., None, None]
    typical = torch.where(alpha != 0, 1 / alpha, 0.0)[..., None] * lse
    point_grad = points.new_empty(points.shape if need_points else (0,))
    product = torch.zeros_like(anchors, memory_format=torch.contiguous_format)
    flow, slope = mass.new_zeros(mass.shape), alpha.new_zeros(alpha.shape)
    expected = lse.new_empty(lse.shape)
    for rows in row_chunks(points, k):
        x = balls.centred(points[..., rows, :])
        closeness = balls.closeness(x)
        p = (alpha[..., None, None] * closeness - lse[..., rows, None]).exp()
        mean = (p * g).sum(-1)
        expected[..., rows] = mean
        e = _weighted(p * (g - mean[..., None]), weights, rows)
        if need_points:
            point_grad[..., rows, :] = ((e @ balls.anchors) * out_scale).to(points.dtype)
        if need_anchors:
            product += e.transpose(-1, -2) @ _unmasked(x, weights, rows)
            flow += e.sum(-2)
            # e sums to 0 over the anchors: less a number for each point, nothing large cancels.
            closeness = closeness - typical[..., rows, None]
            slope += (e * _unmasked(closeness, weights, rows)).sum((-1, -2))
    weight_grad = weight_gradient(expected, scale, need_weights)
    if not need_anchors:
        return point_grad, lse.new_empty(0, dtype=dtype), lse.new_empty(0), weight_grad
    gradient = (product - balls.anchors * flow[..., None]) * out_scale
    return point_grad, gradient.to(dtype), slope * scale, weight_grad


@without_autocast
def nearest_anchor(points: Tensor, anchors: Tensor) -> Tensor:
    """(..., n) int64: the anchor that is closest to each point, the first of equals."""
    balls = _Balls(anchors)
    labels = [
        balls.closeness(balls.centred(points[..., rows, :])).argmax(-1)
        for rows in row_chunks(points, anchors.shape[-2])
    ]
    return torch.cat(labels, -1) if labels else points.new_empty(points.shape[:-1]).long()


class _Planes:
    """Halfspaces with their patterns of sides, split into two factors."""

    def __init__(self, normals: Tensor, offsets: Tensor, tau: Tensor) -> None:
        self.normals, self.offsets, self.tau = normals, offsets, tau[..., None, None]
        self.split = normals.shape[-2] // 2
        self.left_signs = _signs(self.split, normals)
        self.right_signs = _signs(normals.shape[-2] - self.split, normals)
        self.cells = (len(self.right_signs), len(self.left_signs))

    def signed_distances(self, points: Tensor) -> Tensor:
        """(..., m, T)"""
        along = points.to(self.normals.dtype) @ self.normals.transpose(-1, -2)
        return (along - self.offsets[..., None, :]) / self.tau

    def factors(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        """(..., m, R) and (..., m, L): cell number r * L + l has the product as its share."""
        left, right = distances[..., : self.split], distances[..., self.split :]
        return (right @ self.right_signs.T).softmax(-1), (left @ self.left_signs.T).softmax(-1)


def _signs(planes: int, like: Tensor) -> Tensor:
    """(2^planes, planes) half the sign of each side in each pattern; bit t is plane t."""
    patterns = torch.arange(1 << planes, device=like.device)[:, None]
    return ((patterns >> torch.arange(planes, device=like.device)) & 1).to(like.dtype) - 0.5


@without_autocast
def halfspace_mass(
    points: Tensor, normals: Tensor, offsets: Tensor, tau: Tensor, weights: Tensor | None
) -> Tensor:
    """Weighted sums of m (B0, B1, 2^T)."""
    planes = _Planes(normals, offsets, tau)
    sums = normals.new_zeros(*points.shape[:-2], *planes.cells)
    for rows in row_chunks(points, max(planes.cells)):
        distances = planes.signed_distances(points[..., rows, :])
        right, left = planes.factors(_unmasked(distances, weights, rows))
        sums += _weighted(right, weights, rows).transpose(-1, -2) @ left
    return sums.flatten(-2)


@without_autocast
def halfspace_gradients(
    points: Tensor,
    normals: Tensor,
    offsets: Tensor,
    tau: Tensor,
    weights: Tensor | None,
    surprise: Tensor,
    scale: Tensor,
    need_points: bool,
    need_planes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dnormals, doffsets, dtau (empty where not needed) and G (B0, B1, n)."""
    planes = _Planes(normals, offsets, tau)
    g = surprise.unflatten(-1, planes.cells)
    factor = (scale / tau)[..., None, None]
    point_grad = points.new_empty(points.shape if need_points else (0,))
    product = torch.zeros_like(normals, memory_format=torch.contiguous_format)
    flow, slope = offsets.new_zeros(offsets.shape), tau.new_zeros(tau.shape)
    expected = normals.new_empty(points.shape[:-1])
    for rows in row_chunks(points, max(planes.cells)):
        x = points[..., rows, :].to(normals.dtype)
        distances = planes.signed_distances(x)
        right, left = planes.factors(distances)
        left_grad, right_grad = right @ g, left @ g.transpose(-1, -2)
        mean = (left * left_grad).sum(-1, keepdim=True)
        expected[..., rows] = mean[..., 0]
        e = torch.cat(
            (
                (left * (left_grad - mean)) @ planes.left_signs,
                (right * (right_grad - mean)) @ planes.right_signs,
            ),
            -1,
        )
        e = _weighted(e, weights, rows)
        if need_points:
            point_grad[..., rows, :] = ((e @ normals) * factor).to(points.dtype)
        if need_planes:
            product += e.transpose(-1, -2) @ _unmasked(x, weights, rows)
            flow += e.sum(-2)
            slope += (e * _unmasked(distances, weights, rows)).sum((-1, -2))
    if not need_planes:
        empty = normals.new_empty(0), offsets.new_empty(0), tau.new_empty(0)
        return point_grad, *empty, expected
    dnormals, doffsets = product * factor, -flow * factor[..., 0]
    return point_grad, dnormals, doffsets, -slope * factor[..., 0, 0], expected
