"""Masks for the tests of block masks, and brute-force ways to look at them."""

from __future__ import annotations

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st

from entropy_attn.masks import BlockMask

SIZES = (16, 32, 64)
quick = settings(max_examples=40, deadline=None)


@st.composite
def masks(draw) -> BlockMask:
    """Masks of odd lengths with empty rows, garbage past the counts and spare or no width."""
    block_q, block_k = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    q_len, kv_len = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        math.ceil(q_len / block_q),
        math.ceil(kv_len / block_k),
    )
    dense = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.1, 0.5, 0.9)))
    dense &= torch.rand(shape[:3], generator=generator)[..., None] < 0.8
    mask = BlockMask.from_dense(dense, (block_q, block_k), q_len, kv_len)
    if draw(st.booleans()):
        mask = mask.compact()
    return with_garbage(mask, generator)


def with_garbage(mask: BlockMask, generator: torch.Generator) -> BlockMask:
    """The same mask with other entries past the counts."""
    garbage = torch.randint(
        0, mask.num_columns, mask.kv_indices.shape, generator=generator, dtype=torch.int32
    )
    listed = torch.arange(mask.width) < mask.kv_num_blocks[..., None]
    indices = torch.where(listed, mask.kv_indices, garbage)
    return BlockMask(
        mask.kv_num_blocks, indices, mask.block_size, mask.q_len, mask.kv_len, validate=False
    )


def checked(mask: BlockMask) -> BlockMask:
    """The mask rebuilt by the public constructor, which must find it sound as it is."""
    again = BlockMask(
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.block_size,
        mask.q_len,
        mask.kv_len,
        is_full=mask.is_full,
    )
    assert again.kv_indices is mask.kv_indices, "the constructor had to repair the lists"
    return again


def tile_dense(visible: torch.Tensor, block_size: tuple[int, int]) -> torch.Tensor:
    """(B, H, Mq, Mk): whether any pair of the tile is True in (B, H, Nq, Nk)."""
    *_, q_len, kv_len = visible.shape
    pad = (0, -kv_len % block_size[1], 0, -q_len % block_size[0])
    tiles = torch.nn.functional.pad(visible, pad)
    tiles = tiles.unflatten(-1, (-1, block_size[1])).unflatten(-3, (-1, block_size[0]))
    return tiles.any(-1).any(-2)
