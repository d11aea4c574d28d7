"""Orders of tokens in which the cells of a partition lie side by side, in plain PyTorch.

The cells are those of nearest anchors, placed by a few steps of k-means (Lloyd, IEEE Trans. Inf.
Theory 28, 1982) over a sample. The cells are sorted by a smooth function of their anchors, the
first principal coordinate diffused over the graph of near anchors (Coifman and Lafon, Diffusion
maps, 2006): a block that holds the ends of two cells then holds similar tokens as well, and where
one natural cluster is cut into several cells, they stay together.

Nothing here is random, reads a value on the host or depends on the data in its shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_attn.reference.precision import without_autocast

# Distances to all anchors, which are stored for a run of tokens at a time, take no more than this.
WORKSPACE_BYTES = 256 * 2**20
# 2^16 over the golden ratio: multiples of it modulo 2^16 spread evenly and hit no grid's columns.
GOLDEN = 40503
SQUARINGS = 5  # of a matrix of inner products, to find its leading eigenvector
DIFFUSIONS = 3  # squarings of the walk over near anchors: 8 steps


@torch.no_grad()
@without_autocast
def cell_order(
    x: Tensor, valid: Tensor, cells: int, iterations: int, sample: int, prefix: int
) -> Tensor:
    """(B, H, N) int64: where each row of the new order comes from, for each head of x (B, H, N, D).

    First the first ``prefix`` valid tokens, then the cells, then the padding; all in the order in
    which they were.

    Args:
        valid: (B, N) bool.
        cells: number of anchors; iterations: steps of k-means.
        sample: tokens that the anchors are placed by.
    """
    batch, heads, length, _ = x.shape
    if batch * heads * length == 0:
        return torch.zeros(batch, heads, length, dtype=torch.int64, device=x.device)
    seen = valid.cumsum(1)
    anchors = fit_anchors(spread_sample(x, seen, min(sample, length), prefix), cells, iterations)
    rank = anchor_ranks(anchors).gather(2, nearest(x, anchors))
    place = torch.where((seen > prefix)[:, None], rank + 1, 0)
    place = torch.where(valid[:, None], place, cells + 1)
    # Sorting takes as many passes as the numbers have bytes.
    return place.to(torch.int16).sort(dim=-1, stable=True).indices


def spread_sample(x: Tensor, seen: Tensor, count: int, prefix: int) -> Tensor:
    """(B, H, count, D) of the valid tokens after the prefix at even steps, in fp32 or fp64.

    ``seen`` (B, N) counts the valid tokens up to each; where too few are valid they repeat.
    """
    free = (seen[:, -1:] - prefix).clamp(min=1)
    step = torch.arange(count, device=x.device)
    number = prefix + 1 + step * free // count  # of the valid token, from 1 on
    index = torch.searchsorted(seen, number).clamp(max=x.shape[2] - 1)
    index = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index).to(_precision(x))


def fit_anchors(points: Tensor, cells: int, iterations: int) -> Tensor:
    """(B, H, cells, D): k-means from evenly spread points; a cell that runs empty stays."""
    count = points.shape[2]
    number = torch.arange(cells, device=points.device)
    anchors = points[:, :, number * GOLDEN % 2**16 * count // 2**16]
    for _ in range(iterations):
        member = (nearest(points, anchors)[..., None] == number).to(points.dtype)
        size = member.sum(2)[..., None]
        anchors = torch.where(size > 0, member.mT @ points / size.clamp(min=1), anchors)
    return anchors


def nearest(x: Tensor, anchors: Tensor) -> Tensor:
    """(B, H, N) int64: which anchor (B, H, k, D) each token of x (B, H, N, D) is nearest to."""
    centre = anchors.mean(2, keepdim=True)
    # |x - a|^2 less |x - centre|^2: without the offset that tokens may have in common.
    shifted = anchors - centre
    bias = (shifted * (anchors + centre)).sum(-1)[:, :, None]
    row_bytes = anchors.shape[:3].numel() * anchors.element_size()
    run = max(1, WORKSPACE_BYTES // max(row_bytes, 1))
    if x.shape[2] <= run:
        return _nearest(x, shifted, bias)
    return torch.cat([_nearest(part, shifted, bias) for part in x.split(run, 2)], 2)


def _nearest(x: Tensor, shifted: Tensor, bias: Tensor) -> Tensor:
    points, shifted, bias = (t.flatten(0, 1) for t in (x, shifted, bias))
    distances = torch.baddbmm(bias, points.to(bias.dtype), shifted.mT, alpha=-2)
    return distances.argmin(-1).unflatten(0, x.shape[:2])


def anchor_ranks(anchors: Tensor) -> Tensor:
    """(B, H, k) int64: places 0 to k - 1 of the anchors (B, H, k, D) on a line, the near ones
    near each other."""
    centred = anchors - anchors.mean(2, keepdim=True)
    products = centred @ centred.mT  # (k, k)
    squares = products.diagonal(dim1=-2, dim2=-1)
    distances = (squares[..., None] + squares[..., None, :] - 2 * products).clamp(min=0)
    itself = torch.eye(anchors.shape[2], dtype=torch.bool, device=anchors.device)
    width = distances.masked_fill(itself, torch.inf).amin(-1).mean(-1)[..., None, None]
    tiny = torch.finfo(anchors.dtype).tiny
    walk = (-distances.masked_fill(itself, 0) / width.clamp(min=tiny)).softmax(-1)
    for _ in range(DIFFUSIONS):
        walk = walk @ walk
    coordinate = walk @ _leading_vector(products)
    return coordinate[..., 0].argsort(-1).argsort(-1)


def _leading_vector(products: Tensor) -> Tensor:
    """(B, H, k, 1): about the eigenvector of the largest eigenvalue, up to a factor."""
    tiny = torch.finfo(products.dtype).tiny
    for _ in range(SQUARINGS):
        trace = products.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        products = products / trace.clamp(min=tiny)
        products = products @ products
    column = products.diagonal(dim1=-2, dim2=-1).argmax(-1)
    index = column[..., None, None].expand(*products.shape[:-1], 1)
    return products.gather(3, index)


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
