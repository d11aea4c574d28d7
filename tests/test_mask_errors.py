"""Bad block lists and arguments: the message names the argument, the value, what is allowed."""

from __future__ import annotations

import math
import re

import pytest
import torch

from entropy_attn.masks import BlockMask


def lists_of(counts, indices):
    """Counts (1, 1, Mq) and indices (1, 1, Mq, W) int32."""
    return torch.tensor([[counts]]).int(), torch.tensor([[indices]]).int()


# Two rows and three key blocks: q_len=32, kv_len=48, blocks of 16.
COUNTS, INDICES = lists_of([1, 2], [[0, 0], [0, 2]])
GEOMETRY = {"block_size": 16, "q_len": 32, "kv_len": 48}


@pytest.mark.parametrize(
    "counts, indices, message",
    [
        ([[1]], INDICES, "kv_num_blocks must be an int32 tensor, got list"),
        (COUNTS, INDICES.long(), "kv_indices must be an int32 tensor, got torch.int64"),
    ],
)
def test_list_types(counts, indices, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        BlockMask(counts, indices, **GEOMETRY)


@pytest.mark.parametrize(
    "counts, indices, message",
    [
        (COUNTS[0], INDICES, "kv_num_blocks must have shape (batch or 1, heads or 1, query blocks"),
        (COUNTS, INDICES[0], "query blocks, width), got (1, 2, 2)"),
        (COUNTS, INDICES[:, :, :1], "kv_indices has shape (1, 1, 1, 2); its first three sizes"),
        (COUNTS, INDICES.expand(1, 2, 2, 2), "must be those of kv_num_blocks, (1, 1, 2)"),
        (COUNTS, INDICES.to("meta"), "kv_indices is on meta but kv_num_blocks is on cpu"),
    ],
)
def test_list_shapes(counts, indices, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BlockMask(counts, indices, **GEOMETRY)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q_len": 40}, "kv_num_blocks has 2 query blocks; q_len=40 with blocks of 16 has 3"),
        ({"block_size": 24}, "block_size must be a power of two from 16 to 256"),
        ({"block_size": (16, 512)}, "got (16, 512)"),
        ({"block_size": (16, 16, 16)}, "got (16, 16, 16)"),
        ({"q_len": -1}, "q_len must be an int >= 0, got -1"),
        ({"kv_len": 4.0}, "kv_len must be an int >= 0, got 4.0"),
        ({"is_full": True}, "is_full=True but not every row lists all 3 key blocks"),
    ],
)
def test_geometry(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BlockMask(COUNTS, INDICES, **(GEOMETRY | change))


@pytest.mark.parametrize(
    "counts, indices, message",
    [
        ([1, -1], [[0], [0]], "kv_num_blocks[0, 0, 1] is -1; allowed are 0 to 1"),
        ([1, 3], [[0, 1], [0, 1]], "kv_num_blocks[0, 0, 1] is 3; allowed are 0 to 2"),
        (
            [4, 1],
            [[0, 1, 2, 0]] * 2,
            "allowed are 0 to 3: kv_indices has room for 4 and there are 3",
        ),
        ([1, 2], [[0, 0], [-1, 2]], "kv_indices[0, 0, 1, 0] is -1; allowed are 0 to 2"),
        ([1, 2], [[0, 0], [0, 3]], "kv_indices[0, 0, 1, 1] is 3; allowed are 0 to 2"),
        ([1, 2], [[0, 0], [2, 2]], "[0, 0, 1] lists key block 2 twice, at entries 0 and 1"),
        ([1, 3], [[0, 0, 0], [2, 0, 2]], "lists key block 2 twice, at entries 0 and 2"),
    ],
)
def test_list_values(counts, indices, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BlockMask(*lists_of(counts, indices), **GEOMETRY)


def test_constructor_repairs_shared_lists():
    counts, indices = (t.expand(2, 3, *t.shape[2:]) for t in lists_of([2, 1], [[2, 0], [1, 0]]))
    mask = BlockMask(counts, indices, **GEOMETRY)
    assert mask.shape[:2] == (2, 3)
    assert mask.kv_indices[1, 2, 0].tolist() == [0, 2]
    counts, indices = (t.expand(2, 3, *t.shape[2:]) for t in lists_of([1, 1], [[0], [3]]))
    with pytest.raises(ValueError, match=r"kv_indices\[0, 0, 1, 0\] is 3; allowed are 0 to 2"):
        BlockMask(counts, indices, **GEOMETRY)


def test_constructor_finds_the_bad_head_among_many():
    counts, indices = (t.repeat(2, 3, *[1] * (t.ndim - 2)) for t in (COUNTS, INDICES))
    indices[1, 2, 1, 0] = 2
    with pytest.raises(ValueError, match=r"kv_indices\[1, 2, 1\] lists key block 2 twice"):
        BlockMask(counts, indices, **GEOMETRY)


def test_constructor_repairs_order_and_padding():
    counts, indices = lists_of([2, 1], [[2, 0, 7], [1, -1, -1]])
    mask = BlockMask(counts, indices, **GEOMETRY)
    assert mask.block_size == (16, 16)
    assert mask.kv_indices[0, 0, 0, :2].tolist() == [0, 2]
    assert mask.kv_indices[0, 0, 1, 0].item() == 1
    assert 0 <= mask.kv_indices.min() <= mask.kv_indices.max() < 3
    assert indices.tolist() == [[[[2, 0, 7], [1, -1, -1]]]], "the argument was changed"


TILES = torch.ones(1, 1, 2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, arguments, message",
    [
        (
            "from_dense",
            (TILES.float(), 16, 32, 32),
            "dense must be a bool tensor, one entry a block",
        ),
        (
            "from_dense",
            (TILES, 16, 32, 33),
            "(batch or 1, heads or 1, 2, 3) for q_len=32, kv_len=33",
        ),
        ("from_dense", (TILES[0, 0], 16, 32, 32), "block_size=(16, 16), got (2, 2)"),
        (
            "from_lists",
            ([[0]], 16, 32, 32),
            "lists must hold 2 rows (q_len=32, block_size=(16, 16))",
        ),
        ("from_lists", ([[[[0]], [[0]]], [[[0]]]], 16, 16, 16), "as many heads for each batch"),
        ("from_lists", ([[5]], 16, 16, 16), "kv_indices[0, 0, 0, 0] is 5; allowed are 0 to 0"),
        ("sliding_window", (1, 1, 32, 32, 0), "window must be an int >= 1, got 0"),
        ("sliding_window", (1, 1, 32, 32, 8, -2), "sink must be an int >= 0, got -2"),
        ("random", (1, 1, 32, 32, 1.5), "density must be a number in (0, 1], got 1.5"),
        ("random", (1, 1, 32, 32, math.nan), "got nan"),
        ("random", (1, 0, 32, 32, 0.5), "heads must be an int >= 1, got 0"),
        ("full", (-1, 1, 32, 32), "batch must be an int >= 0, got -1"),
        ("causal", (1, 1, True, 32), "q_len must be an int >= 0, got True"),
        ("causal", (1, 1, 32, 32, 100), "block_size must be a power of two from 16 to 256"),
    ],
)
def test_constructor_arguments(call, arguments, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        getattr(BlockMask, call)(*arguments)


def test_with_size_argument():
    with pytest.raises(ValueError, match=r"block_size must be .* got 8"):
        BlockMask.full(1, 1, 32, 32).with_size(8)
