"""What the kernel suites run on: one attention problem with its tensors, mask and work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_attn.benchmarks.model_masks import SMOLLM2, smollm2_blocks
from entropy_attn.masks import BlockMask


@dataclass(frozen=True)
class AttentionCase:
    """Self-attention of ``batch`` x ``heads`` sequences of ``length`` tokens.

    Attributes:
        density: share of the visible blocks that the mask keeps; 1 is dense attention.
        block: edge of the square blocks, in tokens; block_k: keys of a block where these are not as
            many as its queries.
        kv_heads: heads of keys and values, as many as of queries if None.
        pattern: which blocks are kept: "banded", those next to the diagonal; "clustered", those of
            the row's own cluster, which lie anywhere; `SMOLLM2`, those that a layer of this model
            looks at, which has 9 heads; None for random ones.
        irregular: each query block keeps its own number of blocks, uniform around the mean.
        direction: "forward" or "backward".
    """

    head_dim: int
    length: int
    density: float = 1.0
    block: int = 128
    batch: int = 2
    heads: int = 16
    dtype: str = "bfloat16"
    is_causal: bool = False
    irregular: bool = False
    direction: str = "forward"
    kv_heads: int | None = None
    pattern: str | None = None
    block_k: int | None = None

    def config(self) -> dict[str, Any]:
        """What is set, for records."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def block_size(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        return self.block, self.block_k or self.block

    @property
    def num_blocks(self) -> int:
        """Of queries."""
        return -(-self.length // self.block)

    @property
    def num_key_blocks(self) -> int:
        return -(-self.length // self.block_size[1])

    @property
    def shape(self) -> str:
        """Size and kind without the mask, for people."""
        grouped = f" {self.heads}/{self.kv_heads} heads" if self.kv_heads else ""
        causal = " causal" if self.is_causal else ""
        return f"D={self.head_dim} N={self.length}{grouped}{causal}"

    def __str__(self) -> str:
        mask = mask_words(self.config())
        words = [self.direction, self.shape, mask, "irregular" * self.irregular, self.pattern]
        return " ".join(word for word in words if word)


def mask_words(config: Mapping[str, Any]) -> str:
    """How a table names the share of the blocks of a case, and their size."""
    if config["density"] == 1:
        return "dense"
    return f"{config['density']:g} of {blocks_words(config)}"


def blocks_words(config: Mapping[str, Any]) -> str:
    keys = f" x {config['block_k']}" if "block_k" in config else ""
    return f"{config['block']}{keys}-blocks"


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a case: query, key, value and grad_out (B, H, N, D) and the block mask."""

    case: AttentionCase
    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    mask: BlockMask
    kept: Tensor

    @property
    def device(self) -> torch.device:
        return self.query.device

    def flops(self, *, sparse: bool) -> float:
        """Floating-point operations on visited tiles: of the kept tiles, or of all visible ones.

        A visited tile counts in full. The forward multiplies two matrices per tile, the backward
        five.
        """
        case = self.case
        visible = _visible_blocks(case, self.device)
        tiles = self.kept.sum() if sparse else visible.sum() * case.batch * case.heads
        products = 2 if case.direction == "forward" else 5
        queries, keys = case.block_size
        return products * 2.0 * case.head_dim * queries * keys * tiles.item()


def make_inputs(case: AttentionCase, device: torch.device | str, seed: int) -> Inputs:
    """Random inputs, reproducible per seed; requires_grad follows the case's direction."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(heads: int) -> Tensor:
        shape = (case.batch, heads, case.length, case.head_dim)
        values = torch.randn(shape, generator=generator, device=device)
        return values.to(getattr(torch, case.dtype))

    kv_heads = case.kv_heads or case.heads
    query, key, value, grad_out = map(normal, (case.heads, kv_heads, kv_heads, case.heads))
    for tensor in (query, key, value):
        tensor.requires_grad_(case.direction == "backward")
    if case.pattern == SMOLLM2:
        shape = case.batch, case.length, case.block, case.density
        kept = smollm2_blocks(*shape, seed, torch.device(device))
    else:
        kept = random_blocks(case, generator, device)
    if case.density == 1:
        mask = BlockMask.full(
            case.batch, case.heads, case.length, case.length, case.block_size, device=device
        )
    else:
        mask = BlockMask.from_dense(kept, case.block_size, case.length, case.length)
    return Inputs(case, query, key, value, grad_out, mask, kept)


def random_blocks(
    case: AttentionCase, generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """(B, H, Mq, Mk) bool: the kept blocks, all visible; at least one in every row.

    Every row keeps the share ``density`` of its visible blocks, chosen uniformly, the diagonal
    one first in the causal case; irregular rows draw their own share between 0 and 2 x density.
    """
    count = case.num_blocks
    shape = (case.batch, case.heads, count, case.num_key_blocks)
    visible = _visible_blocks(case, device)
    score = torch.rand(shape, generator=generator, device=device)
    if case.pattern == "banded":
        place = torch.arange(count, device=device)
        score = (place[:, None] - place).abs() / count + score / count**2
    elif case.pattern == "clustered":
        clusters = max(1, round(1 / case.density))
        cluster = torch.randint(clusters, shape[:3], generator=generator, device=device)
        score = (score + (cluster[..., :, None] != cluster[..., None, :])) / 2
    score = score.expand(shape).masked_fill(~visible, 2.0)
    if case.is_causal:
        score.diagonal(dim1=-2, dim2=-1).fill_(-1.0)
    share = torch.full(shape[:3], case.density, device=device)
    if case.irregular:
        share *= 2 * torch.rand(shape[:3], generator=generator, device=device)
    wanted = (share * visible.sum(-1)).round().clamp(min=1)
    rank = score.argsort(-1).argsort(-1)
    return (rank < wanted[..., None]) & visible


def _visible_blocks(case: AttentionCase, device: torch.device | str) -> Tensor:
    if case.block_k is not None and (case.is_causal or case.pattern is not None):
        raise ValueError(
            f"block_k is {case.block_k}; causal cases and those of a pattern have square blocks, "
            "leave it out"
        )
    blocks = torch.ones(case.num_blocks, case.num_key_blocks, dtype=torch.bool, device=device)
    return blocks.tril() if case.is_causal else blocks
