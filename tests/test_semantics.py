"""Results that one can work out by hand, and results that are defined by decree."""

from __future__ import annotations

import math

import pytest
import torch

import entropy_attn as ea

pytestmark = pytest.mark.parametrize("backend", ["reference", "triton"])


def uniform(length: int, device: str, heads: int = 1, head_dim: int = 16):
    """Zero queries: every visible key gets the same weight. Values count the keys."""
    query = torch.zeros(1, heads, length, head_dim, device=device)
    key = torch.randn(1, heads, length, head_dim, device=device)
    value = torch.arange(length, device=device, dtype=torch.float32)
    return query, key, value[None, None, :, None].expand(1, heads, length, head_dim)


def test_uniform_attention_has_the_entropy_of_counting(backend: str, device: str) -> None:
    query, key, value = uniform(64, device)
    out, entropy = ea.attention_with_entropy(query, key, value, block_size=16, backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 31.5))
    torch.testing.assert_close(entropy.row, torch.full_like(entropy.row, math.log(64)))
    torch.testing.assert_close(entropy.block, torch.full_like(entropy.block, math.log(4)))
    torch.testing.assert_close(entropy.effective_blocks, torch.full_like(entropy.tile, 4.0))


def test_causal_uniform_attention_averages_the_past(backend: str, device: str) -> None:
    query, key, value = uniform(40, device)
    mask = ea.BlockMask.full(1, 1, 40, 40, 16, device=device)
    out, lse = ea.block_sparse_attention(
        query, key, value, mask, is_causal=True, return_lse=True, backend=backend
    )
    rows = torch.arange(40, device=device, dtype=torch.float32)
    torch.testing.assert_close(out[0, 0, :, 0], rows / 2)
    torch.testing.assert_close(lse[0, 0], (rows + 1).log())


def test_one_hot_attention_has_no_entropy(backend: str, device: str) -> None:
    query = 200.0 * torch.eye(16, device=device)[None, None].repeat(1, 1, 4, 1)
    key = torch.zeros(1, 1, 64, 16, device=device)
    key[0, 0, :16] = torch.eye(16, device=device)
    value = torch.randn(1, 1, 64, 16, device=device)
    out, entropy = ea.attention_with_entropy(
        query, key, value, block_size=16, scale=1.0, backend=backend
    )
    torch.testing.assert_close(out[0, 0, :16], value[0, 0, :16])
    for kind in (entropy.row, entropy.block, entropy.tile):
        torch.testing.assert_close(kind, torch.zeros_like(kind))


def test_lists_pick_their_blocks(backend: str, device: str) -> None:
    query, key, value = uniform(64, device)
    blocks = torch.zeros(1, 1, 4, 4, dtype=torch.bool, device=device)
    blocks[0, 0, 0, 2] = True  # keys 32..47
    blocks[0, 0, 1, [0, 3]] = True  # keys 0..15 and 48..63
    mask = ea.BlockMask.from_dense(blocks, 16, 64, 64)
    out, lse = ea.block_sparse_attention(query, key, value, mask, return_lse=True, backend=backend)
    expected = torch.tensor([39.5, 31.5, 0.0, 0.0], device=device).repeat_interleave(16)
    torch.testing.assert_close(out[0, 0, :, 0], expected)
    counts = torch.tensor([16.0, 32.0, 0.0, 0.0], device=device).repeat_interleave(16)
    torch.testing.assert_close(lse[0, 0], counts.log())


def test_heads_of_a_group_have_lists_of_their_own(backend: str, device: str) -> None:
    query, _, _ = uniform(32, device, heads=2)
    _, key, value = uniform(32, device, heads=1)
    blocks = torch.tensor([[[True, False]] * 2, [[False, True]] * 2], device=device)[None]
    mask = ea.BlockMask.from_dense(blocks, 16, 32, 32)
    out = ea.block_sparse_attention(query, key, value, mask, backend=backend)
    assert out[0, :, 0, 0].tolist() == [7.5, 23.5]


def test_rows_without_a_key_give_zero_and_no_gradient(backend: str, device: str) -> None:
    inputs = [torch.randn(1, 1, 32, 16, device=device, requires_grad=True) for _ in range(3)]
    blocks = torch.tensor([[[[True, True], [False, False]]]], device=device)
    mask = ea.BlockMask.from_dense(blocks, 16, 32, 32)
    out, lse = ea.block_sparse_attention(*inputs, mask, return_lse=True, backend=backend)
    assert (out[:, :, 16:] == 0).all()
    assert (lse[:, :, 16:] == -math.inf).all()
    gradients = torch.autograd.grad(out.square().sum() + lse[:, :, :16].sum(), inputs)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert (gradients[0][:, :, 16:] == 0).all()
    _, entropy = ea.attention_with_entropy(*inputs, block_mask=mask, backend=backend)
    assert (entropy.row[:, :, 16:] == 0).all()
    assert (entropy.block[:, :, 16:] == 0).all()
    assert (entropy.tile[:, :, 1] == 0).all()


@pytest.mark.parametrize("shape", [(0, 2, 32, 32), (1, 2, 0, 32), (1, 2, 32, 0)])
def test_zero_sizes(backend: str, device: str, shape: tuple[int, ...]) -> None:
    batch, heads, q_len, kv_len = shape
    query = torch.randn(batch, heads, q_len, 16, device=device, requires_grad=True)
    key = torch.randn(batch, heads, kv_len, 16, device=device, requires_grad=True)
    mask = ea.BlockMask.full(1, 1, q_len, kv_len, 16, device=device)
    out, lse = ea.block_sparse_attention(query, key, key, mask, return_lse=True, backend=backend)
    assert out.shape == query.shape
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    for gradient in torch.autograd.grad(out.sum(), (query, key)):
        assert (gradient == 0).all()


def test_merging_halves_gives_the_whole(backend: str, device: str) -> None:
    query, key, value = (torch.randn(1, 2, 64, 16, device=device) for _ in range(3))
    full = ea.BlockMask.full(1, 1, 64, 64, 16, device=device)
    blocks = torch.rand(1, 2, 4, 4, device=device) < 0.5
    blocks[:, :, 1], blocks[:, :, 2] = True, False
    halves = []
    for part in (blocks, ~blocks):
        mask = ea.BlockMask.from_dense(part, 16, 64, 64)
        halves += ea.block_sparse_attention(
            query, key, value, mask, return_lse=True, backend=backend
        )
    out, lse = ea.merge_attention(*halves)
    whole = ea.block_sparse_attention(query, key, value, full, return_lse=True, backend=backend)
    torch.testing.assert_close((out, lse), whole)


def test_nan_in_a_block_that_is_not_listed_stays_out(backend: str, device: str) -> None:
    query, key, value = (torch.randn(1, 1, 32, 16, device=device) for _ in range(3))
    blocks = torch.tensor([[[[True, False]] * 2]], device=device)
    mask = ea.BlockMask.from_dense(blocks, 16, 32, 32)
    clean = ea.block_sparse_attention(query, key, value, mask, backend=backend)
    key[:, :, 16:], value[:, :, 16:] = math.nan, math.nan
    assert torch.equal(ea.block_sparse_attention(query, key, value, mask, backend=backend), clean)
