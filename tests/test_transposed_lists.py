"""The kernel that transposes block lists, against `column_lists`, which sorts."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case
from conftest import HAS_GPU
from hypothesis import given, settings
from mask_cases import masks, with_garbage

from entropy_attn import ops
from entropy_attn.block_lists import column_lists, column_order
from entropy_attn.masks import BlockMask

pytest.importorskip("triton")

from entropy_attn.kernels import transposed_lists
from entropy_attn.kernels.launch import adjacent_lists
from entropy_attn.kernels.transposed_lists import is_faster_than_sort, transpose_lists

DEVICE = "cuda" if HAS_GPU else "cpu"


def assert_same(counts, indices, num_columns):
    """Bit for bit what the sort finds, up to the last offset; 0 from there on."""
    counts, indices = adjacent_lists(counts.to(DEVICE), indices.to(DEVICE))
    offsets, rows, order = transpose_lists(counts, indices, num_columns, True)
    expected, expected_rows = column_lists(counts, indices, num_columns)
    _, expected_order = column_order(counts, indices, num_columns)
    assert offsets.dtype == expected.dtype
    assert torch.equal(offsets, expected)
    used = torch.arange(rows.shape[-1], device=DEVICE) < expected[..., -1:]
    for found, true in ((rows, expected_rows), (order, expected_order)):
        assert found.dtype == true.dtype
        assert torch.equal(found, torch.where(used, true, 0))


@settings(max_examples=8, deadline=None)
@given(masks())
def test_any_lists(mask):
    assert_same(mask.kv_num_blocks, mask.kv_indices, mask.num_columns)


@pytest.mark.parametrize("columns", [8, 32])
@pytest.mark.parametrize(
    ("rows", "blocks", "density"), [(1, 1, 1.1), (3, 32, 1.1), (130, 33, 0.4), (3, 7, 0.0)]
)
def test_tiles_of_rows_and_columns(rows, blocks, density, columns, monkeypatch):
    """More than a program takes, a column more than a word has, all blocks, none."""
    monkeypatch.setattr(transposed_lists, "MANY_PROGRAMS", 0 if columns == 32 else 10**9)
    dense = torch.rand(1, 1, rows, blocks) < density
    mask = BlockMask.from_dense(dense, 16, 16 * rows, 16 * blocks)
    mask = with_garbage(mask, torch.Generator().manual_seed(0))
    assert_same(mask.kv_num_blocks, mask.kv_indices, mask.num_columns)


def test_lists_of_one_entry():
    counts = torch.tensor([1, 0, 1, 1], dtype=torch.int32).expand(1, 1, 4)
    indices = torch.tensor([2, 4, 2, 0], dtype=torch.int32).view(1, 1, 4, 1)
    assert_same(counts, indices, 5)


def test_strides():
    """Lists that heads or batch rows share, parts of larger ones, entries that are apart."""
    mask = BlockMask.random(2, 2, 48, 100, 0.5, block_size=16)
    counts, indices = mask.kv_num_blocks, mask.kv_indices
    assert_same(counts[:1, :1].expand(1, 3, -1), indices[:1, :1].expand(1, 3, -1, -1), 7)
    assert_same(counts[:, :1].expand(-1, 2, -1), indices[:, :1].expand(-1, 2, -1, -1), 7)
    assert_same(counts[:, 1:, ::2].clamp(max=2), indices[:, 1:, ::2, :2], 7)
    assert_same(counts.transpose(0, 1), indices.transpose(0, 1), 7)
    apart = indices.transpose(2, 3).contiguous().transpose(2, 3)
    assert_same(counts, apart, 7)
    with pytest.raises(AssertionError, match="freed"):
        transpose_lists(counts, apart, 7, True)


def test_without_order(device):
    mask = BlockMask.random(1, 2, 48, 100, 0.5, block_size=16, device=device)
    lists = mask.kv_num_blocks, mask.kv_indices, 7
    *expected, _ = transpose_lists(*lists, True)
    *found, order = transpose_lists(*lists, False)
    assert order is None
    assert all(map(torch.equal, found, expected))


def test_without_what_is_past_the_last_offset(device):
    blocks = torch.rand(1, 2, 3, 7, device=device) < 0.5
    mask = BlockMask.from_dense(blocks, 16, 48, 112)
    lists = mask.kv_num_blocks, mask.kv_indices, 7
    offsets, expected, _ = transpose_lists(*lists, False)
    again, rows, _ = transpose_lists(*lists, False, fill=False)
    assert torch.equal(again, offsets)
    used = torch.arange(rows.shape[-1], device=device) < offsets[..., -1:]
    assert used.any()
    assert not used.all()
    assert torch.equal(rows[used], expected[used])


@pytest.mark.parametrize(
    ("shape", "columns"),
    [((0, 2, 3, 4), 5), ((1, 2, 0, 4), 5), ((1, 2, 3, 0), 5), ((1, 2, 3, 4), 0)],
)
def test_nothing_to_transpose(shape, columns):
    counts = torch.zeros(shape[:3], dtype=torch.int32)
    assert_same(counts, torch.zeros(shape, dtype=torch.int32), columns)


@pytest.mark.parametrize("entries", [[40, 2], [5, 5]])
def test_lists_that_are_not_ascending_harm_nobody(entries):
    """All numbers are valid, whatever they say."""
    counts = torch.full((1, 1, 1), 2, dtype=torch.int32, device=DEVICE)
    indices = torch.tensor(entries, dtype=torch.int32, device=DEVICE).view(1, 1, 1, 2)
    offsets, rows, order = transpose_lists(counts, indices, 64, True)
    assert 0 <= offsets.min() <= offsets.max() <= 2
    assert torch.equal(rows, torch.zeros_like(rows))
    assert 0 <= order.min() <= order.max() <= 1


def test_gradients_are_those_of_sorted_lists(device, monkeypatch):
    """With the gradient of the tile entropy, whose terms are gathered by the order."""
    problem = Case(head_dim=16, q_len=30, kv_len=40, batch=1, density=0.7).build(device)
    mask = problem.block_mask
    lists = (mask.kv_num_blocks, mask.kv_indices, None, None)
    geometry = (16, 16, False, 0, problem.scale)
    out, lse, *_, tile, mass = ops.attention_forward(
        *problem.inputs, *lists, *geometry, False, False, True, True, "triton"
    )
    grads, saved = (out, None, None, None, tile), (out, lse, None, None, mass)

    def gradients():
        arguments = (*grads, *problem.inputs, *saved, *lists, *geometry)
        return ops.attention_backward(*arguments, "triton")

    with monkeypatch.context() as patch:
        patch.setattr(ops, "_is_transposed", lambda *_: True)
        own = gradients()
    monkeypatch.setattr(transposed_lists, "is_faster_than_sort", lambda *_: False)
    for found, expected in zip(own, gradients(), strict=True):
        assert torch.equal(found, expected)
        assert found.any()


def test_what_is_left_to_the_sort():
    """Many tokens that see 33 blocks of 64 each: most words would be empty. Or very many rows."""
    indices = torch.empty(1, 1, 8192, 33, dtype=torch.int32, device="meta")
    assert not is_faster_than_sort(indices, 16384)
    assert is_faster_than_sort(indices[:, :, :2048], 16384)
    assert is_faster_than_sort(indices.expand(8, 32, -1, -1), 1024)
    assert not is_faster_than_sort(indices.new_empty(1, 1, 8193, 33), 32)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "heads", "rows", "blocks", "width"),
    [
        (1, 32, 128, 128, 32),
        (2, 32, 32, 32, 20),
        (1, 32, 1024, 1024, 256),
        (2, 3, 1000, 517, 77),
        (1, 1, 4096, 4096, 400),
        (1, 2, 5000, 3, 2),
    ],
)
def test_at_size(batch, heads, rows, blocks, width, forbid_waiting):
    scores = torch.rand(batch, heads, rows, blocks, device="cuda")
    indices = scores.topk(width).indices.to(torch.int32).sort(-1).values
    counts = torch.randint(0, width + 1, (batch, heads, rows), dtype=torch.int32, device="cuda")
    assert is_faster_than_sort(indices, blocks)
    assert_same(counts, indices, blocks)
    with forbid_waiting():
        transpose_lists(counts, indices, blocks, True)


@pytest.mark.gpu
def test_more_entries_than_int32_counts():
    mask = BlockMask.random(1, 1, 16 * 1024, 16 * 1024, 0.5, block_size=16, device="cuda")
    heads = 2**31 // mask.kv_indices.numel() + 1
    expected, expected_rows = column_lists(mask.kv_num_blocks, mask.kv_indices, 1024)
    lists = mask.kv_num_blocks.expand(1, heads, -1), mask.kv_indices.expand(1, heads, -1, -1)
    offsets, rows, _ = transpose_lists(*lists, 1024, False)
    assert offsets.dtype == torch.int64
    assert offsets.eq(expected).all()
    used = int(expected[..., -1])
    for head in (0, heads // 2, heads - 1):
        assert torch.equal(rows[0, head, :used], expected_rows[0, 0, :used])
        assert not rows[0, head, used:].any()
