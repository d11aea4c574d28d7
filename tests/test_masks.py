"""BlockMask: lists, constructors, transposition, density, resizing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import SIZES, checked, masks, quick, tile_dense

from entropy_attn.masks import BlockMask, column_lists
from entropy_attn.reference.dense import visible_pairs

# Lists and dense masks


def test_lists_by_hand():
    dense = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    mask = BlockMask.from_dense(dense[None, None], (16, 32), 40, 100)
    assert mask.kv_num_blocks.tolist() == [[[2, 0, 4]]]
    assert mask.kv_indices[0, 0, 0, :2].tolist() == [1, 3]
    assert mask.kv_indices[0, 0, 2].tolist() == [0, 1, 2, 3]
    assert mask.kv_num_blocks.dtype == mask.kv_indices.dtype == torch.int32
    assert (mask.shape, mask.width) == ((1, 1, 3, 4), 4)
    assert mask.num_blocks().item() == 6
    assert mask.density().item() == 0.5


@quick
@given(masks())
def test_dense_round_trip(mask):
    dense = mask.to_dense()
    expected = torch.zeros(mask.shape, dtype=torch.bool)
    for b, h, m in itertools.product(*map(range, mask.shape[:3])):
        for slot in range(mask.kv_num_blocks[b, h, m]):
            expected[b, h, m, mask.kv_indices[b, h, m, slot]] = True
    assert torch.equal(dense, expected)
    again = BlockMask.from_dense(dense, mask.block_size, mask.q_len, mask.kv_len)
    assert checked(again).same_blocks(mask)
    assert mask.same_blocks(again)
    assert mask.num_blocks().item() == dense.sum().item()


@quick
@given(masks())
def test_from_lists_round_trip(mask):
    lists = [
        [
            [row[:count].tolist() for row, count in zip(*head, strict=True)]
            for head in zip(indices, counts, strict=True)
        ]
        for indices, counts in zip(mask.kv_indices, mask.kv_num_blocks, strict=True)
    ]
    again = BlockMask.from_lists(lists, mask.block_size, mask.q_len, mask.kv_len)
    assert again.same_blocks(mask)


def test_from_lists_of_one_head_in_any_order():
    mask = BlockMask.from_lists([[2, 0], [], [1]], 16, 48, 48)
    assert mask.shape == (1, 1, 3, 3)
    assert mask.kv_indices[0, 0, 0].tolist() == [0, 2]
    assert mask.to_dense()[0, 0].tolist() == [
        [True, False, True],
        [False, False, False],
        [False, True, False],
    ]


# Transposed lists


@quick
@given(masks())
def test_column_lists_against_brute_force(mask):
    offsets, rows = column_lists(mask.kv_num_blocks, mask.kv_indices, mask.num_columns)
    assert offsets.shape == (*mask.shape[:2], mask.num_columns + 1)
    assert rows.shape == (*mask.shape[:2], mask.num_rows * mask.width)
    assert offsets.dtype == rows.dtype == torch.int32
    assert offsets[..., 0].eq(0).all()
    if rows.numel():
        assert 0 <= rows.min() <= rows.max() < mask.num_rows
    dense = mask.to_dense()
    for b, h, n in itertools.product(
        range(mask.shape[0]), range(mask.shape[1]), range(mask.shape[3])
    ):
        got = rows[b, h, offsets[b, h, n] : offsets[b, h, n + 1]]
        assert got.tolist() == dense[b, h, :, n].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("heads", [1, 3, 70, 700])
def test_column_lists_with_every_key_type(heads):
    """Few, many and very many (head, key block) pairs sort by 16- and 32-bit keys."""
    mask = BlockMask.random(2, heads, 800, 800, 0.3, block_size=16)
    offsets, rows = mask.column_lists()
    counts, indices = mask.to_dense().sum(2), mask.to_dense().transpose(2, 3)
    assert torch.equal(offsets.diff(), counts)
    rows = rows[torch.arange(rows.shape[-1]) < offsets[..., -1:]]
    assert torch.equal(rows.long(), indices.nonzero()[:, 3])


def test_column_lists_reads_expanded_lists():
    mask = BlockMask.causal(2, 3, 100, 130, block_size=16)
    offsets, rows = mask.column_lists()
    dense = mask.to_dense()
    assert torch.equal(offsets.diff(), dense.sum(2))
    assert rows[1, 2, : offsets[1, 2, -1]].tolist() == dense[1, 2].T.nonzero()[:, 1].tolist()


@quick
@given(masks())
def test_transposed(mask):
    transposed = checked(mask.transposed())
    assert torch.equal(transposed.to_dense(), mask.to_dense().transpose(2, 3))
    assert transposed.block_size == mask.block_size[::-1]
    assert (transposed.q_len, transposed.kv_len) == (mask.kv_len, mask.q_len)
    assert transposed.transposed().same_blocks(mask)
    assert mask.transposed(width=mask.num_rows).same_blocks(transposed)


# Patterns

LENGTHS = [(1, 1), (64, 64), (97, 150), (150, 97), (15, 130), (130, 5)]


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
@pytest.mark.parametrize("block_size", [(16, 16), (64, 16), (16, 32)])
def test_full_and_causal(q_len, kv_len, block_size):
    full = checked(BlockMask.full(2, 3, q_len, kv_len, block_size))
    assert full.is_full
    assert full.to_dense().all()
    assert full.shape[:2] == (2, 3)
    causal = checked(BlockMask.causal(1, 2, q_len, kv_len, block_size))
    visible = visible_pairs(1, q_len, kv_len, is_causal=True)
    assert torch.equal(causal.to_dense(), tile_dense(visible, block_size).expand(1, 2, -1, -1))


@pytest.mark.parametrize("q_len, kv_len", LENGTHS)
@pytest.mark.parametrize("block_size", [(16, 16), (64, 16), (16, 32)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sliding_window(q_len, kv_len, block_size, is_causal):
    position = torch.arange(q_len)[:, None] + kv_len - q_len
    key = torch.arange(kv_len)
    behind = position - key
    for window, sink in itertools.product((1, 2, 16, 17, 40, 1000), (0, 1, 16, 40, 1000)):
        mask = checked(
            BlockMask.sliding_window(
                1, 2, q_len, kv_len, window, sink, block_size, is_causal=is_causal
            )
        )
        near = (behind < window) & ((behind >= 0) if is_causal else (behind > -window))
        # All keys of a block that holds a sink are kept.
        sinks = key < math.ceil(sink / block_size[1]) * block_size[1]
        near |= sinks & (behind >= 0) if is_causal else sinks
        expected = tile_dense(near[None, None], block_size).expand(1, 2, -1, -1)
        assert torch.equal(mask.to_dense(), expected), (window, sink)


@quick
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(SIZES),
    st.sampled_from(SIZES),
    st.floats(0.01, 1.0),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_random(q_len, kv_len, block_q, block_k, density, is_causal, irregular, seed):
    options = {"is_causal": is_causal, "irregular": irregular, "seed": seed}
    arguments = (2, 3, q_len, kv_len, density, (block_q, block_k))
    mask = checked(BlockMask.random(*arguments, **options))
    assert mask.same_blocks(BlockMask.random(*arguments, **options))
    dense = mask.to_dense()
    visible = visible_pairs(1, q_len, kv_len, is_causal=is_causal)
    allowed = tile_dense(visible, mask.block_size)
    assert not (dense & ~allowed).any()
    seen = allowed.sum(-1)
    if not irregular:
        # Rounded to whole blocks, and never none.
        wanted = seen * torch.tensor(density)
        assert (((mask.kv_num_blocks - wanted).abs() <= 0.5) | (wanted < 1)).all()
    assert (mask.kv_num_blocks > 0).eq(seen > 0).all()
    last = torch.arange(1, mask.num_rows + 1).mul(block_q).clamp(max=q_len) - 1 + kv_len - q_len
    diagonal = last.clamp(min=0) // block_k
    rows = torch.arange(mask.num_rows)
    assert dense[:, :, rows, diagonal].eq(allowed[:, :, rows, diagonal]).all()


def test_random_density_and_seed():
    size = (4, 8, 4096, 4096)
    for irregular, is_causal in itertools.product((False, True), repeat=2):
        options = {"irregular": irregular, "is_causal": is_causal, "block_size": 32}
        mask = BlockMask.random(*size, 0.25, **options)
        # 4096 rows: the mean of independent uniform shares has a standard error of
        # 0.5/sqrt(12 · 4096); rounding to whole blocks and the floor of one block add at most
        # half a block of the (mean) 64.5 or 128 that a row sees.
        slack = 5 * 0.5 / math.sqrt(12 * 4096) * irregular + 0.5 / 64.5
        assert abs(mask.density(is_causal).item() - 0.25) < slack
        assert not mask.same_blocks(BlockMask.random(*size, 0.25, **options, seed=1))
        spread = mask.kv_num_blocks[..., -1].unique().numel()
        assert spread == 1 if not irregular else spread > 10
    assert BlockMask.random(1, 1, 500, 500, 1.0).to_dense().all()


# Density, token masks


@quick
@given(masks())
def test_density(mask):
    dense = mask.to_dense().float()
    causal = tile_dense(
        visible_pairs(1, mask.q_len, mask.kv_len, is_causal=True), mask.block_size
    ).float()
    torch.testing.assert_close(mask.density(), dense.mean())
    torch.testing.assert_close(mask.density(per_head=True), dense.mean((-1, -2)))
    expected = (dense * causal).sum((-1, -2)) / causal.sum().clamp(min=1)
    torch.testing.assert_close(mask.density(is_causal=True, per_head=True), expected)
    torch.testing.assert_close(mask.density(is_causal=True), expected.mean())


def test_density_of_causal_is_one():
    mask = BlockMask.causal(1, 1, 500, 700, block_size=(32, 16))
    assert mask.density(is_causal=True).item() == 1.0
    assert mask.density().item() < 1.0
    assert BlockMask.full(1, 1, 0, 100).density().item() == 0.0
    assert BlockMask.causal(1, 1, 0, 100).density(is_causal=True).item() == 0.0


@quick
@given(masks())
def test_token_mask(mask):
    tokens = mask.to_token_mask()
    dense = mask.to_dense()
    row = torch.arange(mask.q_len) // mask.block_size[0]
    column = torch.arange(mask.kv_len) // mask.block_size[1]
    assert torch.equal(tokens, dense[:, :, row[:, None], column])
    causal = visible_pairs(1, mask.q_len, mask.kv_len, is_causal=True)
    assert torch.equal(mask.to_token_mask(is_causal=True), tokens & causal)


def test_token_mask_with_lengths_and_window():
    lens = torch.tensor([20, 33, 0], dtype=torch.int32)
    options = {"is_causal": True, "window": 9, "kv_lens": lens, "q_lens": lens}
    tokens = BlockMask.full(1, 1, 40, 40, 16).to_token_mask(**options)
    assert torch.equal(tokens, visible_pairs(3, 40, 40, **options))


def test_token_mask_is_guarded():
    mask = BlockMask.full(1, 2, 1 << 20, 1 << 20)
    with pytest.raises(ValueError, match=r"\(1, 2, 1048576, 1048576\).*max_elements=268435456"):
        mask.to_token_mask()


# Other masks of the same blocks


@quick
@given(masks(), st.sampled_from((16, 32, 64, 128)), st.sampled_from((16, 32, 64, 128)))
def test_with_size(mask, block_q, block_k):
    resized = checked(mask.with_size((block_q, block_k)))
    assert torch.equal(resized.to_dense(), tile_dense(mask.to_token_mask(), (block_q, block_k)))
    if block_q <= mask.block_size[0] and block_k <= mask.block_size[1]:
        assert resized.with_size(mask.block_size).same_blocks(mask)


@quick
@given(masks())
def test_compact(mask):
    compact = checked(mask.compact())
    assert compact.same_blocks(mask)
    assert compact.width == max(1, int(mask.kv_num_blocks.max()))


def test_expand_and_select():
    mask = BlockMask.random(2, 3, 100, 100, 0.4, 16)
    picked = mask.select(batch=1, heads=[2, 0])
    assert picked.shape[:2] == (1, 2)
    assert torch.equal(picked.to_dense(), mask.to_dense()[1:, [2, 0]])
    assert mask.select(heads=slice(0, 2)).shape[:2] == (2, 2)
    one = mask.select(0, 1)
    wide = one.expand(4, 5)
    assert wide.shape[:2] == (4, 5)
    assert wide.kv_indices.untyped_storage().nbytes() == one.kv_indices.untyped_storage().nbytes()
    assert wide.same_blocks(one)
    with pytest.raises(ValueError, match="heads=4, but the mask has 3; only 1 can be expanded"):
        mask.expand(2, 4)


def test_same_blocks():
    mask = BlockMask.from_lists([[0, 1], [2]], 16, 32, 48)
    assert not mask.same_blocks(BlockMask.from_lists([[0, 2], [2]], 16, 32, 48))
    assert not mask.same_blocks(BlockMask.from_lists([[0], [2]], 16, 32, 48))
    assert not mask.same_blocks(BlockMask.from_lists([[0, 1], [2]], 16, 32, 47))
    assert not mask.expand(1, 2).same_blocks(mask.expand(1, 3))
    assert mask.expand(2, 1).same_blocks(mask.expand(1, 3))


def test_to_device_keeps_the_mask():
    mask = BlockMask.full(1, 2, 100, 50).to("meta")
    assert mask.device.type == "meta"
    assert mask.is_full
    assert mask.shape == (1, 2, 2, 1)
    assert "call .density()" in repr(mask)


def test_repr():
    mask = BlockMask.from_lists([[0, 1], [2]], (16, 32), 32, 90)
    assert repr(mask) == (
        "BlockMask(shape=(1, 1, 2, 3), block_size=(16, 32), q_len=32, kv_len=90, width=2, "
        "device=cpu, density=0.5)"
    )
    assert repr(BlockMask.full(1, 1, 16, 16, 16)).endswith("density=1, is_full=True)")


# Zero sizes


@pytest.mark.parametrize("q_len, kv_len", [(0, 100), (100, 0), (0, 0)])
def test_zero_lengths(q_len, kv_len):
    for mask in (
        BlockMask.full(1, 2, q_len, kv_len),
        BlockMask.causal(1, 2, q_len, kv_len),
        BlockMask.sliding_window(1, 2, q_len, kv_len, 10, 5),
        BlockMask.sliding_window(1, 2, q_len, kv_len, 10, 5, is_causal=False),
        BlockMask.random(1, 2, q_len, kv_len, 0.5),
    ):
        assert checked(mask).to_dense().shape == mask.shape
        assert mask.num_blocks().item() == 0
        assert mask.density().item() == mask.density(is_causal=True).item() == 0.0
        offsets, _ = mask.column_lists()
        assert offsets.shape == (1, 2, mask.num_columns + 1)
        assert not offsets.any()
        assert mask.transposed().transposed().same_blocks(mask)
        assert mask.with_size(16).num_blocks().item() == 0
        assert mask.compact().same_blocks(mask)


def test_public_name():
    import entropy_attn as ea

    assert ea.BlockMask is BlockMask
