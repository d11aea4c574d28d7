"""How many blocks a tile keeps: TopK, TopP and Perplexity.

A budget looks at the distribution of a tile's predicted mass over its V visible blocks of keys
and asks for the n heaviest. Always-kept blocks (sink, local) come on top where they are not among
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from entropy_attn import validation as check

# Numbers of blocks are rounded up; what the rounding of fp32 adds must not count as a block.
ROUNDING = 1e-6
# The entropy of a tile is a sum of many roundings: 16 equal blocks have perplexity 16.00001.
ENTROPY_ROUNDING = 1e-4


@dataclass(frozen=True)
class Budget:
    """Bounds that every budget has.

    Attributes:
        min_blocks: keep at least so many blocks (of those visible). Wins over max_density.
        max_density: keep at most this share of the visible blocks, in (0, 1], always-kept blocks
            not counted. It also bounds the memory of the lists: without it TopP and Perplexity
            must have room for all blocks.
    """

    min_blocks: int = field(default=1, kw_only=True)
    max_density: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check.check_integer("min_blocks", self.min_blocks, minimum=1)
        check.check_share("max_density", self.max_density)

    @property
    def rule(self) -> tuple[str, float]:
        """Name and amount, as `keep_tiles` takes them."""
        raise NotImplementedError

    @property
    def density_bound(self) -> float:
        return self.max_density * (1 + ROUNDING)

    def most(self, visible: int) -> int:
        """The largest number that can be asked for among at most ``visible`` blocks."""
        most = int(visible * (self.max_density * (1 + 2 * ROUNDING)))
        return min(visible, max(self.min_blocks, most))


@dataclass(frozen=True)
class TopK(Budget):
    """The same number of blocks whatever the attention looks like.

    Attributes:
        fraction: keep ceil(fraction * V) of the V visible blocks, in (0, 1].
        count: or so many blocks; exactly one of the two is given.
    """

    fraction: float | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.fraction is None) == (self.count is None):
            raise ValueError(
                "TopK takes either fraction or count, for example TopK(0.25) or TopK(count=16), "
                f"got fraction={self.fraction!r}, count={self.count!r}"
            )
        if self.count is not None:
            check.check_integer("count", self.count, minimum=1)
        elif isinstance(self.fraction, int):
            raise ValueError(
                f"fraction must be a float in (0, 1], got {self.fraction!r}; for a number of "
                f"blocks write TopK(count={self.fraction!r})"
            )
        else:
            check.check_share("fraction", self.fraction)

    @property
    def rule(self) -> tuple[str, float]:
        if self.count is not None:
            return "count", float(self.count)
        return "fraction", self.fraction * (1 - ROUNDING)

    def most(self, visible: int) -> int:
        wanted = self.count if self.count is not None else math.ceil(visible * self.fraction)
        return min(super().most(visible), max(self.min_blocks, wanted))


@dataclass(frozen=True)
class TopP(Budget):
    """The fewest blocks that hold a share of the predicted mass.

    Attributes:
        p: the share, in (0, 1]; 1.0 leaves out only blocks that together hold less than 1e-6.
    """

    p: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check.check_share("p", self.p)

    @property
    def rule(self) -> tuple[str, float]:
        return "mass", self.p * (1 - ROUNDING)


@dataclass(frozen=True)
class Perplexity(Budget):
    """ceil(c * exp(H)) blocks, H the entropy of the tile's predicted mass over blocks.

    exp(H) is the effective number of blocks, so that a tile gets what its attention needs.

    Attributes:
        c: factor, > 0.
    """

    c: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check.check_positive("c", self.c)

    @property
    def rule(self) -> tuple[str, float]:
        return "perplexity", self.c * (1 - ENTROPY_ROUNDING)
