"""Small attention calls for the Hopper kernels' source on the CPU, and what is to come of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from gluon_machine import Wrong

from entropy_attn.kernels.launch import ceil_div
from entropy_attn.masks import BlockMask


@dataclass(kw_only=True)
class Call:
    """A call with random lists, and how the kernel is built and launched for it.

    Attributes:
        block_d: head_dim, as tiles have it. places: programs that run at a time.
        listed: (B, Hq, Mq, Mk) bool. q_ends, kv_ends: (B,) valid lengths.
    """

    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    block_size: tuple[int, int]
    block_d: int
    is_causal: bool
    is_listed: bool
    has_lens: bool
    stages: int
    programs: int
    places: int
    seed: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.heads = self.group * self.kv_heads
        self.blocks = ceil_div(self.q_len, self.block_size[0])
        self.key_blocks = ceil_div(self.kv_len, self.block_size[1])
        density = rng.choice((0.3, 0.7)) if self.is_listed else 1.1
        shape = (self.batch, self.heads, self.blocks, self.key_blocks)
        self.listed = rng.random(shape) < density
        self.q_ends = np.full(self.batch, self.q_len)
        self.kv_ends = np.full(self.batch, self.kv_len)
        if self.has_lens:
            self.q_ends = rng.integers(0, self.q_len + 1, self.batch)
            self.kv_ends = rng.integers(0, self.kv_len + 1, self.batch)

    @property
    def may_cut(self) -> bool:
        return self.has_lens or self.kv_len % self.block_size[1] != 0

    def seen(self) -> np.ndarray:
        """(B, Hq, Nq, Nk): which queries see which keys."""
        query, key = np.arange(self.q_len), np.arange(self.kv_len)
        block_q, block_k = self.block_size
        seen = self.listed[:, :, query // block_q][..., key // block_k].copy()
        for row in range(self.batch):
            q_end, kv_end = self.q_ends[row], self.kv_ends[row]
            seen[row] &= (query < q_end)[:, None] & (key < kv_end)[None, :]
            if self.is_causal:
                seen[row] &= key[None, :] <= query[:, None] + kv_end - q_end
        return seen

    def mask(self) -> BlockMask:
        listed = torch.from_numpy(self.listed)
        return BlockMask.from_dense(listed, self.block_size, self.q_len, self.kv_len)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys."""
        query = torch.zeros(self.batch, self.heads, self.q_len, self.block_d)
        return query, torch.zeros(self.batch, self.kv_heads, self.kv_len, self.block_d)

    def lens(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Valid keys and queries, as launchers take them."""
        if not self.has_lens:
            return None, None
        return torch.from_numpy(self.kv_ends).int(), torch.from_numpy(self.q_ends).int()

    def descriptor(self, name: str, rows: int, columns: int = 0, itemsize: int = 2) -> Any:
        """What a kernel asks of a descriptor, and a name."""
        return SimpleNamespace(
            name=name, dtype="bf16", itemsize=itemsize, layout=None,
            block_type=SimpleNamespace(shape=[1, 1, rows, columns or self.block_d]),
        )  # fmt: skip

    def run(self, module: Any) -> None:
        raise NotImplementedError


def row_by_row(sums: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """dQ, like query, of sums as the backward has them in memory, (steps, 64, 128).

    Written from what `sum_tiles` says in words, with nothing of its code.
    """
    batch, heads, length, head_dim = query.shape
    pairs = rearrange(
        sums.flatten(),
        "(bh tile row2 col16 row1 col2 col8 col1) -> bh tile (row2 row1) (col16 col8 col2 col1)",
        bh=batch * heads, row2=32, row1=2, col16=4, col8=2, col2=4, col1=2,
    )  # fmt: skip
    across = 1 if head_dim <= 64 else 2
    rows = rearrange(pairs, "bh (down across) row col -> bh (down row) (across col)", across=across)
    return rows[:, :length, :head_dim].reshape(query.shape).to(query.dtype)


def run_calls(draw: Callable[[int], Call], module: Any, seeds: range) -> None:
    """Run the kernel of a module; what is wrong is said together with the call."""
    for seed in seeds:
        call = draw(seed)
        try:
            call.run(module)
        except Wrong as error:
            raise Wrong(f"{error}, {call}") from error


def assert_found(
    draw: Callable[[int], Call], load: Callable[..., Any], fault: tuple[str, str, str]
) -> None:
    """That something is said of a fault: (the source, what stands there instead, what is said)."""
    old, new, message = fault
    module = load((old, new))
    with pytest.raises(Wrong, match=message):
        run_calls(draw, module, range(300))
