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


def sampled_tiles(tiles: int, size: int, starts: Tensor) -> Tensor:
    """(B, M) bool: which of ``tiles`` blocks are in the sample of each row.

    Args:
        size: of the samples.
        starts: (B,) the u of each row, on the device of the result.
    """
    chosen = torch.zeros(len(starts), tiles, dtype=torch.bool, device=starts.device)
    if size == 0:
        return chosen
    steps = torch.arange(size, device=starts.device)
    places = ((steps + starts[:, None]) * (tiles / size)).long()
    return chosen.scatter(1, places.clamp(max=tiles - 1), True)  # the last may be rounded up to M
