"""BlockMask: which blocks of keys each block of queries visits, as counts and indices."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Block lists, one per block of queries.

    Attributes:
        kv_num_blocks: (B|1, H|1, Mq) int32, how many key blocks each query block visits.
        kv_indices: (B|1, H|1, Mq, W) int32, the key blocks in ascending order, W >= the largest
            count; entries past the count are unspecified but lie in [0, Mk).
        block_size: (block_q, block_k) in tokens.
        q_len, kv_len: lengths in tokens; Mq = ceil(q_len / block_q), Mk = ceil(kv_len / block_k).
        is_full: known on the host to keep every block.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    block_size: tuple[int, int]
    q_len: int
    kv_len: int
    is_full: bool = False
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        pass

    @classmethod
    def from_dense(cls, dense: Tensor, block_size, q_len: int, kv_len: int) -> BlockMask:
        block_size = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
        counts = dense.sum(-1, dtype=torch.int32)
        order = torch.argsort((~dense).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
        return cls(counts, order, block_size, q_len, kv_len, validate=False)

    @classmethod
    def full(cls, batch, heads, q_len, kv_len, block_size=64, device=None) -> BlockMask:
        bq, bk = (block_size, block_size) if isinstance(block_size, int) else block_size
        mq, mk = -(-q_len // bq), -(-kv_len // bk)
        counts = torch.full((batch, heads, mq), mk, dtype=torch.int32, device=device)
        idx = torch.arange(mk, dtype=torch.int32, device=device).expand(batch, heads, mq, mk)
        return cls(counts, idx, (bq, bk), q_len, kv_len, is_full=True, validate=False)

    def to_dense(self) -> Tensor:
        mk = -(-self.kv_len // self.block_size[1])
        dense = torch.zeros(*self.kv_indices.shape[:3], mk + 1, dtype=torch.bool,
                            device=self.kv_indices.device)
        slot = torch.arange(self.kv_indices.shape[-1], device=dense.device)
        idx = torch.where(slot < self.kv_num_blocks[..., None], self.kv_indices.long(), mk)
        return dense.scatter_(-1, idx, True)[..., :mk]


def column_lists(kv_num_blocks: Tensor, kv_indices: Tensor, num_columns: int):
    """Temporary."""
    B, H, Mq, W = kv_indices.shape
    slot = torch.arange(W, device=kv_indices.device)
    col = torch.where(slot < kv_num_blocks[..., None], kv_indices, num_columns).reshape(B, H, -1)
    order = torch.argsort(col, dim=-1, stable=True)
    rows = (order // max(W, 1)).to(torch.int32)
    hist = torch.zeros(B, H, num_columns + 2, dtype=torch.int32, device=col.device)
    hist.scatter_add_(-1, col.long() + 1, torch.ones_like(col, dtype=torch.int32))
    return hist.cumsum(-1).to(torch.int32)[..., :-1].contiguous(), rows
