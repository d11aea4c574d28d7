"""The filter of convex hulls on tensors: where geometry meets the kernels.

The rigour of the filter is in the planes of a polytope that a few extreme points span. In Triton
all of it runs on the device (`kernels/hull_filter.py`); in plain PyTorch the polytope is found on
the CPU (`entropy_attn.geometry.polytope`).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from entropy_attn.geometry.filter import directions
from entropy_attn.geometry.polytope import halfspaces

# More than on a CPU: a GPU has arithmetic to spare while it reads the points, and what is kept has
# to cross over to the CPU.
SAMPLE = 65536
DIRECTIONS = 64


def candidates(points: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Batch indices and row indices of what may be a vertex, or is not finite; ascending.

    Args:
        points: (B, n, 2 or 3) floating point, any strides, not empty.
    """
    towards = _directions(DIRECTIONS, points.shape[2], points.device)
    if backend == "triton":
        from entropy_attn.kernels import hull_filter

        return hull_filter.candidates(points, towards, SAMPLE)
    from entropy_attn.reference import hull_filter as reference

    sample = points[:, :: max(1, points.shape[1] // SAMPLE)]
    extremes = reference.extreme_points(sample, towards)
    vertices = sample.gather(1, extremes[..., None].expand(-1, -1, points.shape[2]))
    polytopes = [_halfspaces(each) for each in vertices.double().cpu().numpy()]
    normals, thresholds, boxes = (torch.from_numpy(each) for each in _padded(polytopes))
    limits = (each.to(points.device) for each in (normals, thresholds, boxes))
    which, index = reference.outside(points, *limits).nonzero(as_tuple=True)
    return which, index


@cache
def _directions(count: int, dim: int, device: torch.device) -> Tensor:
    """On the device, where they stay: a copy to it would wait for it each time."""
    return torch.from_numpy(directions(count, dim)).to(device)


def _halfspaces(vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    finite = vertices[np.isfinite(vertices).all(1)]
    return halfspaces(np.unique(finite, axis=0))


def _padded(
    polytopes: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B, F, d), (B, F) and (B, d) of all: polytopes with fewer halfspaces get some that hold all.

    0 . x > -1 is true for every finite x.
    """
    dim, most = len(polytopes[0][2]), max(len(each[0]) for each in polytopes)
    normals = np.zeros((len(polytopes), most, dim))
    thresholds = np.full((len(polytopes), most), -1.0)
    for i, (normal, threshold, _) in enumerate(polytopes):
        normals[i, : len(normal)], thresholds[i, : len(normal)] = normal, threshold
    return normals, thresholds, np.stack([box for _, _, box in polytopes])
