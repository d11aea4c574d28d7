"""AttentionEntropy: how spread out attention is, per row, per block of keys and per tile."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionEntropy:
    """Entropies of attention in nats, fp32; a kind that was not asked for is None.

    Attributes:
        row: (B, Hq, Nq), entropy of each query's distribution over keys.
        block: (B, Hq, Nq), entropy of each query's distribution over blocks of keys.
        tile: (B, Hq, Mq), entropy of the mean distribution over blocks of keys of each block of
            queries; a block of queries that sees no key has 0.
        block_size: (block_q, block_k) in tokens.
    """

    row: Tensor | None
    block: Tensor | None
    tile: Tensor | None
    block_size: tuple[int, int]

    @property
    def effective_blocks(self) -> Tensor:
        """(B, Hq, Mq): exp(tile entropy), the number of key blocks that a tile really needs."""
        if self.tile is None:
            raise ValueError(
                "effective_blocks needs the tile entropy: ask for it with kinds=('tile', …)"
            )
        return self.tile.exp()
