"""Which blocks of queries are measured in a step: a systematic sample, unbiased.

Of M blocks, m are taken at equal distances from a random start: block floor((k + u) M / m) for
k = 0 .. m-1 and u uniform in [0, 1). Each block is taken with probability m / M, and under causal
attention, where entropy grows along the sequence, every sample has its share of late blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_size(tiles: int, fraction: float) -> int:
    """How many of ``tiles`` blocks are taken: at least one, if there is one."""
    return min(tiles, max(1, round(tiles * fraction)))


def sampled_tiles(tiles: int, size: int, start: Tensor) -> Tensor:
    """(M,) bool: which of ``tiles`` blocks are in the sample.

    Args:
        size: of the sample.
        start: u, a tensor without dimensions, on the device of the result.
    """
    if size == 0:
        return torch.zeros(tiles, dtype=torch.bool, device=start.device)
    places = (torch.arange(size, device=start.device) + start) * (tiles / size)
    places = places.long().clamp(max=tiles - 1)  # the last one may be rounded up to M
    return torch.zeros(tiles, dtype=torch.bool, device=start.device).index_fill(0, places, True)
