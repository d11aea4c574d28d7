"""What is measured in a step: systematic samples of batch rows and of blocks of queries, unbiased.

A share of all blocks of queries is asked for. Whole batch rows come first, as they cost a GPU
least: a run of R of the B rows. Where a share of less than one row is asked for, a part of the
blocks of that row: of M blocks m at equal distances from a random start, block
floor((k + u) M / m) for k = 0 .. m-1 and u uniform in [0, 1). Each row and each block is as likely
as any other, and under causal attention, where entropy grows along the sequence, every sample has
its share of late blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """How much of calls with ``batch`` rows of ``tiles`` blocks of queries is taken.

    Attributes:
        rows: R, a divisor of the batch, so that runs of rows do not overlap.
        size: m, of the blocks of each of these rows.
    """

    batch: int
    tiles: int
    rows: int
    size: int

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, fraction: float, batch: int, tiles: int) -> Sample:
        """At most the fraction, but at least one row and one block."""
        asked = fraction * batch
        rows = max(
            (r for r in range(1, batch + 1) if batch % r == 0 and r <= asked + 1e-9), default=1
        )
        size = round(tiles * min(1.0, asked / rows)) if rows <= 1 else tiles
        return cls(batch, tiles, rows, min(tiles, max(1, size)))

    @property
    def scale(self) -> float:
        """What a sum over the sample is multiplied by for the sum over all blocks."""
        return self.batch / self.rows * (self.tiles / max(1, self.size))

    def first_row(self, draw: float) -> int:
        runs = self.batch // self.rows
        return min(int(draw * runs), runs - 1) * self.rows

    def chosen_tiles(self, draws: Sequence[float]) -> Tensor | None:
        """(n * R, M) bool on the CPU, which blocks are taken of the rows of n calls; None for all.

        The part of a draw u that chooses rows, floor(u B / R), and the part that is left over,
        which chooses blocks, are independent.

        Args:
            draws: n numbers in [0, 1), those of the calls.
        """
        if self.size == self.tiles:
            return None
        starts = torch.tensor(draws, dtype=torch.float64) * (self.batch // self.rows)
        steps = torch.arange(self.size)
        places = ((steps + starts.frac()[:, None]) * (self.tiles / self.size)).long()
        places = places.clamp(max=self.tiles - 1)  # the last one may be rounded up to M
        chosen = torch.zeros(len(starts), self.tiles, dtype=torch.bool).scatter(1, places, True)
        return chosen.repeat_interleave(self.rows, dim=0)
