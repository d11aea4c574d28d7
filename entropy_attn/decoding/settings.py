"""SparseDecoding: how many blocks of a cache are kept, and from which length on."""

from __future__ import annotations

from dataclasses import dataclass

from entropy_attn import validation as check
from entropy_attn.selection.budgets import ROUNDING


@dataclass(frozen=True)
class SparseDecoding:
    """Sparse attention of few queries to a cache; for `SparsityConfig(decode=...)`.

    Each sequence and head of keys keeps the blocks with the largest predicted mass, and besides
    them the first and the last ones.

    Attributes:
        keep: a float in (0, 1] is the share of the visible blocks, rounded up; an int is a number
            of tokens, rounded up to whole blocks.
        block_size: keys a block, a power of two from 16 to 256.
        sink: the first ``sink`` blocks with a valid key are always kept.
        local: the block of the first query and ``local - 1`` before it are always kept, and all
            blocks after it; at least 1.
        min_length: calls with fewer keys run dense. Of a static cache the whole length counts.
    """

    keep: float | int = 0.25
    block_size: int = 32
    sink: int = 1
    local: int = 2
    min_length: int = 4096

    def __post_init__(self) -> None:
        if isinstance(self.keep, float):
            check.check_share("keep", self.keep)
        else:
            check.check_integer("keep", self.keep, 1, besides="a float in (0, 1], a share,")
        check.check_power_of_two("block_size", self.block_size)
        check.check_block_size(self.block_size)
        check.check_integer("sink", self.sink, 0)
        check.check_integer("local", self.local, 1)
        check.check_integer("min_length", self.min_length, 0)

    @property
    def share(self) -> float:
        """Of the visible blocks; 0 where a number is given."""
        return self.keep * (1 - ROUNDING) if isinstance(self.keep, float) else 0.0

    @property
    def least(self) -> int:
        """Blocks that are asked for however few are visible."""
        return 1 if isinstance(self.keep, float) else -(-self.keep // self.block_size)

    def width(self, blocks: int) -> int:
        """The most blocks that a list can hold, of so many."""
        asked = max(self.least, int(blocks * self.share) + 1)
        # The few queries lie in two blocks at most.
        return min(blocks, asked + self.sink + self.local + 1)
