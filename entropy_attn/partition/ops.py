"""The custom ops of soft partitions: masses of cells, their entropy, and its gradients.

Each picks the Triton launcher or the PyTorch reference by name and has a fake for tracing.
Points are (B0, B1, n, d) in any dtype; all else is fp32, or fp64 for fp64 points. Anchors, and so
their gradients, may also be in the dtype of the points: a cast would be a kernel of its own.
Arguments are valid when they arrive here: `entropy_attn.partition` checks them.

With W the sum of weights and G_i = sum_j p_ij (-log P_j - H), the gradient of a weight is G_i / W.
A set without weight has masses, entropy and gradients 0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from entropy_attn.custom_ops import custom_op
from entropy_attn.reference import soft_entropy as reference


def _range(backend: str) -> Any:
    """The module that implements the masses of balls."""
    if backend == "reference":
        return reference
    from entropy_attn.kernels import range_entropy

    return range_entropy


def _range_gradients(backend: str) -> Any:
    """The module that implements their gradients."""
    if backend == "reference":
        return reference
    from entropy_attn.kernels import range_gradients

    return range_gradients


def _halfspace(backend: str) -> Any:
    """The module that implements halfspaces."""
    if backend == "reference":
        return reference
    from entropy_attn.kernels import halfspace_entropy

    return halfspace_entropy


@custom_op("range_forward")
def range_forward(
    points: Tensor,
    anchors: Tensor,
    alpha: Tensor,
    weights: Tensor | None,
    with_peak: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """entropy (B0, B1), mass (B0, B1, k), log-sum-exp (B0, B1, n) in the backend's own base, and
    the largest p of each point (B0, B1, n), empty without ``with_peak``."""
    return _range(backend).range_mass(points, anchors, alpha, weights, with_peak)


@range_forward.register_fake
def _(points, anchors, alpha, weights, with_peak, backend):
    rows = points.shape[:3]
    return (
        alpha.new_empty(points.shape[:2]),
        alpha.new_empty(*points.shape[:2], anchors.shape[2]),
        alpha.new_empty(rows),
        alpha.new_empty(rows if with_peak else (0,)),
    )


@custom_op("range_backward")
def range_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of points, anchors, alpha and weights; empty where they are not needed."""
    return _range_gradients(backend).range_gradients(
        grad, points, anchors, alpha, weights, entropy, mass, lse, need_points, need_anchors,
        need_weights,
    )  # fmt: skip


@range_backward.register_fake
def _(
    grad, points, anchors, alpha, weights, entropy, mass, lse, need_points, need_anchors,
    need_weights, backend,
):  # fmt: skip
    return (
        points.new_empty(points.shape if need_points else (0,)),
        anchors.new_empty(anchors.shape if need_anchors else (0,)),
        alpha.new_empty(alpha.shape if need_anchors else (0,)),
        alpha.new_empty(points.shape[:3] if need_weights else (0,)),
    )


range_backward.refuse_gradients()


def _save_range(ctx, inputs, output):
    points, anchors, alpha, weights, _, backend = inputs
    entropy, mass, lse, peak = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mass, lse, peak)
    ctx.save_for_backward(points, anchors, alpha, weights, entropy, mass, lse)
    ctx.backend = backend


def _range_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    needs = ctx.needs_input_grad
    wanted = (needs[0], needs[1] or needs[2], needs[3])
    grads = range_backward(grad, *ctx.saved_tensors, *wanted, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs[:4], strict=True)), None, None


range_forward.register_autograd(_range_backward, setup_context=_save_range)


@custom_op("halfspace_forward")
def halfspace_forward(
    points: Tensor,
    normals: Tensor,
    offsets: Tensor,
    tau: Tensor,
    weights: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """entropy (B0, B1), mass (B0, B1, 2^T)."""
    sums = _halfspace(backend).halfspace_mass(points, normals, offsets, tau, weights)
    mass = reference.per_weight(sums, weights, points)
    return reference.entropy_of_masses(mass), mass


@halfspace_forward.register_fake
def _(points, normals, offsets, tau, weights, backend):
    batch = points.shape[:2]
    return normals.new_empty(batch), normals.new_empty(*batch, 1 << normals.shape[2])


@custom_op("halfspace_backward")
def halfspace_backward(
    grad: Tensor,
    points: Tensor,
    normals: Tensor,
    offsets: Tensor,
    tau: Tensor,
    weights: Tensor | None,
    entropy: Tensor,
    mass: Tensor,
    need_points: bool,
    need_planes: bool,
    need_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of points, normals, offsets, tau and weights; empty where not needed."""
    scale = reference.per_weight(grad, weights, points)
    dx, dnormals, doffsets, dtau, expected = _halfspace(backend).halfspace_gradients(
        points, normals, offsets, tau, weights, reference.surprise(mass, entropy), scale,
        need_points, need_planes,
    )  # fmt: skip
    return dx, dnormals, doffsets, dtau, reference.weight_gradient(expected, scale, need_weights)


@halfspace_backward.register_fake
def _(
    grad, points, normals, offsets, tau, weights, entropy, mass, need_points, need_planes,
    need_weights, backend,
):  # fmt: skip
    planes = (t.new_empty(t.shape if need_planes else (0,)) for t in (normals, offsets, tau))
    return (
        points.new_empty(points.shape if need_points else (0,)),
        *planes,
        normals.new_empty(points.shape[:3] if need_weights else (0,)),
    )


halfspace_backward.refuse_gradients()


def _save_halfspace(ctx, inputs, output):
    *tensors, backend = inputs
    entropy, mass = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mass)
    ctx.save_for_backward(*tensors, entropy, mass)
    ctx.backend = backend


def _halfspace_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    needs = ctx.needs_input_grad
    wanted = (needs[0], any(needs[1:4]), needs[4])
    grads = halfspace_backward(grad, *ctx.saved_tensors, *wanted, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs[:5], strict=True)), None


halfspace_forward.register_autograd(_halfspace_backward, setup_context=_save_halfspace)
