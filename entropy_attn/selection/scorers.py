"""What predicts the attention of a tile: Pooled, Envelope, Antidiagonal and TrueMass.

A scorer is any callable

    scorer(query, key, *, block_size, is_causal, scale, kv_lens, q_lens, window, backend)

that returns (B, Hq, Mq, Mk) fp32, the predicted distribution of each block of queries over the
blocks of keys: not negative, each row with the sum 1, or all 0 where no query sees a key.

All but TrueMass work on groups of consecutive tokens. A query group sees a key group if
one of its valid queries may attend to one of the group's valid keys, and a key group weighs as
many keys as are valid in it. So a group on the diagonal counts in full, keys after the query
included: what its tile is predicted is an upper estimate there, and the diagonal is always kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from entropy_attn import validation as check
from entropy_attn.selection import ops
from entropy_attn.selection.geometry import choose_backend, make_geometry

# (first tile, number of tiles) -> (B, Hq, tiles, Mk)
TileScores = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class GroupScorer:
    """Base of the scorers that take groups of tokens, a range of query tiles at a time."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        block_size: int | tuple[int, int] = 64,
        is_causal: bool = False,
        scale: float | None = None,
        kv_lens: Tensor | None = None,
        q_lens: Tensor | None = None,
        window: int | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """(B, Hq, Mq, Mk) fp32: the predicted distribution of all tiles."""
        geometry = make_geometry(query, key, block_size, is_causal, kv_lens, q_lens, window)
        scale = check.check_scale(scale, query.shape[3])
        backend = choose_backend(query, geometry, backend)
        score = self.tile_scores(query.detach(), key.detach(), geometry, scale, backend)
        return self.normalised(score(0, geometry.q_tiles))

    def tile_scores(self, query, key, geometry, scale: float, backend: str) -> TileScores:
        """A function that scores a range of tiles; its rows need not sum to 1."""
        raise NotImplementedError

    def normalised(self, mass: Tensor) -> Tensor:
        return mass

    @property
    def group(self) -> int:
        """Tokens a group."""
        raise NotImplementedError


@dataclass(frozen=True)
class Pooled(GroupScorer):
    """Means of queries against means of keys.

    A softmax over the means of ``pool`` keys for each mean of ``pool`` queries, both over valid
    tokens, summed over each block's groups and reduced over the tile's query groups. pool=1 with
    reduce="mean" is the true mass; pool=block is one row a tile.

    Attributes:
        pool: tokens a group, a power of two, at most a block and at least a 64th of one.
        reduce: "mean" over the tile's query groups that see a key, or "max": what some group
            needs is then kept, however small its share of the tile; divided by its sum.
    """

    pool: int = 8
    reduce: str = "mean"

    def __post_init__(self) -> None:
        check.check_power_of_two("pool", self.pool)
        if self.reduce not in ("mean", "max"):
            raise ValueError(f"reduce must be 'mean' or 'max', got {self.reduce!r}")

    @property
    def group(self) -> int:
        return self.pool

    def tile_scores(self, query, key, geometry, scale: float, backend: str) -> TileScores:
        check.check_group("pool", self.pool, geometry.block_size)
        groups = self.groups(query, key, geometry, backend)
        return _tile_scores(
            *groups, geometry, self.pool, False, self.reduce == "max", scale, backend
        )

    def groups(self, query, key, geometry, backend: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query groups, key groups, and what a query may find above their product."""
        lens = (geometry.q_lens, geometry.kv_lens)
        return *ops.pool_tokens(query, key, *lens, self.pool, backend), None

    def normalised(self, mass: Tensor) -> Tensor:
        if self.reduce == "mean":
            return mass
        total = mass.sum(-1, keepdim=True)
        return mass / total.masked_fill(total == 0, 1.0)


@dataclass(frozen=True)
class Envelope(Pooled):
    """Means of queries against the boxes around groups of keys.

    A mean of keys hides the one key that a query looks for. So a group of keys is taken as the
    box around its ``pool`` keys: the score is the product with the middle of the box plus
    ``spread`` times the length of the query mean times the length of the box's half diagonal.
    With spread=1 that bounds every score of the group from above (Cauchy and Schwarz), a small
    share of it predicts best. Then as `Pooled`, at its cost.

    Attributes:
        pool, reduce: as in `Pooled`.
        spread: in [0, 1].
    """

    reduce: str = "max"
    spread: float = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        check.check_share("spread", self.spread, may_be_zero=True)

    def groups(self, query, key, geometry, backend: str) -> tuple[Tensor, Tensor, Tensor | None]:
        lens = (geometry.q_lens, geometry.kv_lens)
        return ops.envelope_tokens(query, key, *lens, self.pool, float(self.spread), backend)


@dataclass(frozen=True)
class Antidiagonal(GroupScorer):
    """Sums of scores along strided antidiagonals: XAttention (Xu et al., arXiv 2503.16428).

    The score of a group of queries and a group of keys is the mean score of the pairs (query
    stride-1-t, key t): every query and every key of the groups takes part once. Then as `Pooled`:
    a softmax over key groups, summed over blocks, mean over the tile's query groups. Missing
    tokens at the end count as zero vectors. Costs a stride-th of dense QK^T, `Pooled` a pool²-th.

    Attributes:
        stride: tokens a group, a power of two, at most a block and at least a 64th of one.
    """

    stride: int = 8

    def __post_init__(self) -> None:
        check.check_power_of_two("stride", self.stride)

    @property
    def group(self) -> int:
        return self.stride

    def tile_scores(self, query, key, geometry, scale: float, backend: str) -> TileScores:
        check.check_group("stride", self.stride, geometry.block_size)
        return _tile_scores(query, key, None, geometry, self.stride, True, False, scale, backend)


def _tile_scores(
    query, key, spreads, geometry, group, antidiagonal, take_maximum, scale, backend
) -> TileScores:
    def score(first_tile: int, tiles: int) -> Tensor:
        return ops.score_tiles(
            query, key, spreads, geometry.q_lens, geometry.kv_lens, geometry.q_len, geometry.kv_len,
            *geometry.block_size, geometry.is_causal, geometry.window,
            group, antidiagonal, take_maximum, scale, first_tile, tiles, backend,
        )  # fmt: skip

    return score


@dataclass(frozen=True)
class TrueMass:
    """The true attention mass: what a perfect predictor would know, at the cost of dense QK^T."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        block_size: int | tuple[int, int] = 64,
        is_causal: bool = False,
        scale: float | None = None,
        kv_lens: Tensor | None = None,
        q_lens: Tensor | None = None,
        window: int | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """(B, Hq, Mq, Mk) fp32: the mean attention of the tile's queries that see a key."""
        from entropy_attn.api import tile_mass

        return tile_mass(
            query,
            key,
            block_size=block_size,
            is_causal=is_causal,
            scale=scale,
            kv_lens=kv_lens,
            q_lens=q_lens,
            window=window,
            backend=backend,
        )
