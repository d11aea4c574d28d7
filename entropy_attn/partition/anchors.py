"""Where anchors lie and how sharp cells are, from data alone: k-means++, Lloyd, a median.

Everything runs on the CPU in fp64 over a sample of the points, so that a seed gives the same
anchors on every machine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Points that anchors are placed by.
SAMPLE = 8192
MOST_ANCHORS = 64
# A typical point's nearest anchor is e^6 = 400 times as likely as the next one.
TYPICAL_GAP = 6.0


def default_count(n: int) -> int:
    """Anchors for sets of n points: the root of n, from 2 to 64.

    64 cells resolve entropies up to log 64 = 4.2 nats, and with the root each cell of a small set
    still holds about as many points as there are cells.
    """
    return min(MOST_ANCHORS, max(2, math.ceil(math.sqrt(n))))


def sample_points(x: Tensor, weights: Tensor | None, generator: torch.Generator) -> Tensor:
    """(m, d) fp64 on the CPU: at most SAMPLE of the points that have weight, without repeats."""
    points = x.detach().reshape(-1, x.shape[-1])
    if weights is None:
        count, found = len(points), None
    else:
        found = (weights > 0).expand(x.shape[:-1]).reshape(-1).nonzero()[:, 0]
        count = len(found)
    chosen = torch.randperm(count, generator=generator)[:SAMPLE].to(x.device)
    return points[chosen if found is None else found[chosen]].to("cpu", torch.float64)


def place_anchors(points: Tensor, k: int, steps: int, generator: torch.Generator) -> Tensor:
    """(at most k, d) anchors: k-means++ (Arthur and Vassilvitskii, SODA 2007), then Lloyd steps.

    Fewer than k where there are fewer distinct points: two anchors at one place would split a cell
    that is one.
    """
    first = torch.randint(len(points), (1,), generator=generator)
    chosen = [points[first]]
    nearest = (points - chosen[0]).square().sum(-1)
    while len(chosen) < k and nearest.max() > 0:
        anchor = points[torch.multinomial(nearest, 1, generator=generator)]
        chosen.append(anchor)
        nearest = torch.minimum(nearest, (points - anchor).square().sum(-1))
    anchors = torch.cat(chosen)
    for _ in range(steps):
        labels = torch.cdist(points, anchors).argmin(-1)
        members = torch.nn.functional.one_hot(labels, len(anchors)).to(points.dtype)
        sizes = members.sum(0)[:, None]
        anchors = torch.where(sizes > 0, members.T @ points / sizes.clamp(min=1), anchors)
    return anchors


def median_alpha(points: Tensor, anchors: Tensor) -> float:
    """TYPICAL_GAP over the median of d2 - d1, the squared distances to the two nearest anchors.

    A softmax over anchors sees differences of squared distances alone, so this gives clear but
    soft cells in any dimension; the distance to the nearest anchor does not, since in many
    dimensions all anchors are about as far. With one anchor nothing depends on alpha.
    """
    if len(anchors) == 1:
        return 1.0
    squared = torch.cdist(points, anchors).square()
    nearest, second = squared.topk(2, largest=False).values.unbind(-1)
    gap = (second - nearest).median()
    # Half the points at equal distances: softness from the scale of all distances.
    floor = 1e-6 * squared.mean()
    return TYPICAL_GAP / max(gap.item(), floor.item())
