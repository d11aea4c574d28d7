"""BlockMask to and from FlexAttention, to flash-attn-4, and on disk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import checked, masks, quick, tile_dense
from torch.nn.attention import flex_attention

from entropy_attn.masks import BlockMask

# FlexAttention


def flex_tokens(flex, q_len: int, kv_len: int) -> torch.Tensor:
    """What compiled FlexAttention computes: full blocks whole, mask_mod on the partial ones."""
    batch, heads = flex.kv_indices.shape[:2]
    block_q, block_k = flex.BLOCK_SIZE

    def tokens(counts, indices):
        lists = BlockMask(counts, indices, (block_q, block_k), q_len, kv_len)
        return lists.to_token_mask()

    mod = flex_attention.create_mask(flex.mask_mod, batch, heads, q_len, kv_len, device="cpu")
    full = tokens(flex.full_kv_num_blocks, flex.full_kv_indices)
    return full | (tokens(flex.kv_num_blocks, flex.kv_indices) & mod)


@quick
@given(masks(), st.booleans(), st.booleans())
def test_flex_round_trip(mask, is_causal, exact):
    flex = mask.to_flex(is_causal, exact_mask_mod=exact)
    tokens = mask.to_token_mask(is_causal=is_causal)
    assert flex.seq_lengths == (mask.q_len, mask.kv_len)
    assert torch.equal(flex_tokens(flex, mask.q_len, mask.kv_len), tokens)
    if exact:
        # Eager FlexAttention reads the mask_mod alone.
        args = (*mask.shape[:2], mask.q_len, mask.kv_len)
        mod = flex_attention.create_mask(flex.mask_mod, *args, device="cpu")
        assert torch.equal(mod, tokens)
    again = checked(BlockMask.from_flex(mask.to_flex(is_causal, exact_mask_mod=False), is_causal))
    kept = tile_dense(tokens, mask.block_size)
    assert torch.equal(again.to_dense(), kept)


def test_flex_transposes_what_we_give_it():
    mask = BlockMask.random(1, 2, 200, 150, 0.3, (16, 32))
    flex = mask.to_flex()
    again = BlockMask(flex.full_q_num_blocks, flex.full_q_indices, (32, 16), 150, 200)
    assert again.same_blocks(mask.transposed())


def test_from_flex_of_create_block_mask():
    def causal(batch, head, query, key):
        return query >= key

    flex = flex_attention.create_block_mask(causal, None, None, 250, 250, "cpu", BLOCK_SIZE=32)
    mask = BlockMask.from_flex(flex, is_causal=True)
    assert mask.same_blocks(BlockMask.causal(1, 1, 250, 250, 32))
    with pytest.raises(ValueError, match="it equals the causal mask: pass is_causal=True"):
        BlockMask.from_flex(flex)


def test_from_flex_refuses_what_lists_cannot_say():
    def window(batch, head, query, key):
        return (query >= key) & (query - key < 40)

    flex = flex_attention.create_block_mask(window, None, None, 256, 256, "cpu", BLOCK_SIZE=64)
    for is_causal in (False, True):
        with pytest.raises(ValueError, match=f"mask_mod is not .* is_causal={is_causal} cannot"):
            BlockMask.from_flex(flex, is_causal)

    def top_left_causal(batch, head, query, key):
        return query >= key

    flex = flex_attention.create_block_mask(
        top_left_causal, None, None, 128, 256, "cpu", BLOCK_SIZE=64
    )
    with pytest.raises(ValueError, match="partial blocks whose mask_mod is not the causal mask"):
        BlockMask.from_flex(flex, is_causal=True)

    full = BlockMask.full(1, 1, 128, 128, 64).to_flex(exact_mask_mod=False)
    with pytest.raises(ValueError, match=r"full blocks that is_causal=True would hide .*\(3 of"):
        BlockMask.from_flex(full, is_causal=True)
    with pytest.raises(TypeError, match=r"flex_mask must be a .* got Tensor"):
        BlockMask.from_flex(torch.zeros(1))
    odd = flex_attention.create_block_mask(
        top_left_causal, None, None, 128, 128, "cpu", BLOCK_SIZE=48
    )
    with pytest.raises(ValueError, match=r"flex_mask.BLOCK_SIZE .* got \(48, 48\)"):
        BlockMask.from_flex(odd)


def test_from_flex_keeps_partial_blocks_that_are_whole():
    """Lists given as partial blocks without a mask_mod, as from_kv_blocks builds them."""
    mask = BlockMask.random(1, 2, 256, 256, 0.4, 64)
    indices = torch.nn.functional.pad(mask.kv_indices, (0, mask.num_columns - mask.width))
    flex = flex_attention.BlockMask.from_kv_blocks(mask.kv_num_blocks, indices, BLOCK_SIZE=64)
    assert BlockMask.from_flex(flex).same_blocks(mask)


# flash-attn-4


@quick
@given(masks(), st.booleans())
def test_flash_attn_lists(mask, is_causal):
    geometry = (mask.block_size, mask.q_len, mask.kv_len)
    lists = mask.to_flash_attn(is_causal)
    assert lists._fields == (
        "mask_block_cnt",
        "mask_block_idx",
        "full_block_cnt",
        "full_block_idx",
        "block_size",
    )
    partial = BlockMask(lists.mask_block_cnt, lists.mask_block_idx, *geometry)
    full = BlockMask(lists.full_block_cnt, lists.full_block_idx, *geometry)
    tokens = mask.to_token_mask(is_causal=is_causal)
    assert not (partial.to_dense() & full.to_dense()).any()
    assert torch.equal(partial.to_token_mask(is_causal=is_causal) | full.to_token_mask(), tokens)

    lists = mask.to_flash_attn(is_causal, backward=True)
    swapped = (mask.block_size[::-1], mask.kv_len, mask.q_len)
    for counts, indices, forward in (
        (lists.mask_block_cnt, lists.mask_block_idx, partial),
        (lists.full_block_cnt, lists.full_block_idx, full),
    ):
        assert BlockMask(counts, indices, *swapped).transposed().same_blocks(forward)


# Files


@quick
@given(masks())
def test_save_and_load(tmp_path_factory, mask):
    path = tmp_path_factory.mktemp("masks") / "mask.pt"
    mask.save(path)
    again = BlockMask.load(path)
    assert again.same_blocks(mask)
    assert again.kv_indices.dtype == torch.int32


def test_load_keeps_what_is_known(tmp_path):
    path = tmp_path / "mask.pt"
    BlockMask.full(8, 32, 1 << 17, 1 << 17).save(path)
    assert path.stat().st_size < 1 << 17, "expanded lists must not be written out"
    assert BlockMask.load(path).is_full


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "other"}, "is not a block mask"),
        ({"version": 2}, "has block mask version 2; this release reads 1"),
        ({"kv_indices": torch.full((1, 1, 2, 2), 9, dtype=torch.int32)}, r"\[0, 0, 0, 0\] is 9"),
        ({"block_size": (16, 17)}, "block_size must be a power of two"),
    ],
)
def test_load_refuses(tmp_path, change, message):
    path = tmp_path / "mask.pt"
    BlockMask.full(1, 1, 32, 32, 16).save(path)
    torch.save(torch.load(path) | change, path)
    with pytest.raises(ValueError, match=message):
        BlockMask.load(path)
