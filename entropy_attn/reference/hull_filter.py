"""The filter of convex hulls in plain PyTorch; see `entropy_attn.geometry.filter`."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 16  # points at once


def extreme_points(points: Tensor, directions: Tensor) -> Tensor:
    """(B, K) int64 indices of the points that lie furthest along each direction, up to rounding.

    Args:
        points: (B, n, d) floating point, n > 0.
        directions: (K, d) fp64.
    """
    reach = points.double() @ directions.T
    return reach.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(1)


def outside(points: Tensor, normals: Tensor, thresholds: Tensor, box: Tensor) -> Tensor:
    """(B, n) bool: whether a point is not found to be strictly inside.

    Args:
        points: (B, n, d) floating point.
        normals: (B, F, d) fp64, thresholds: (B, F) fp64, box: (B, d) fp64.
    """
    kept = []
    for part in points.split(CHUNK, 1):
        exact = part.double()
        inside = (exact.abs() <= box[:, None]).all(2)
        for normal, threshold in zip(normals.unbind(1), thresholds.unbind(1), strict=True):
            # A sum over coordinates one after the other: its rounding is that of the bound.
            value = -threshold[:, None]
            for axis in range(points.shape[2]):
                value = value + exact[..., axis] * normal[:, axis, None]
            inside &= value > 0
        kept.append(~inside)
    return torch.cat(kept, 1)
