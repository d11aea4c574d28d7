"""Rows of each head put in another order and back, each the gradient of the other."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse(order: Tensor) -> Tensor:
    """(..., N) int64: where each row went, if row i of the new order comes from ``order[i]``."""
    source = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter_(-1, order, source)


def permute(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """Rows ``order`` (B, H, N) of x (B, H, N, ...); ``place`` is the inverse of ``order``.

    The gradient is gathered, where that of `torch.gather` is added up by atomics.
    """
    return _Permute.apply(x, order, place)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return _take(x, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return _take(grad, place), None, None


def _take(x: Tensor, order: Tensor) -> Tensor:
    index = order.reshape(*order.shape, *[1] * (x.ndim - 3))
    return x.gather(2, index.expand(*order.shape, *x.shape[3:]))
