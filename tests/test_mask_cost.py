"""What masks cost: memory at a million tokens, no waiting for the device, no graph breaks."""

from __future__ import annotations

import pytest
import torch
from mask_cases import checked
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from entropy_attn.masks import BlockMask

# Cost


class LargestTensor(TorchDispatchMode):
    """Records the most bytes that any single result holds."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


def test_a_million_tokens_cost_what_they_keep():
    """16,384 x 16,384 blocks of 64: a dense bool mask alone would be 268 MB."""
    length, window, sink = 1 << 20, 4096, 128
    with LargestTensor() as largest:
        mask = BlockMask.sliding_window(1, 1, length, length, window, sink)
        offsets, rows = mask.column_lists()
        density = mask.density(is_causal=True)
        coarse = mask.with_size(128)
        # Without a sink: padded lists are as wide as the most visited key block needs.
        window_only = BlockMask.sliding_window(1, 1, length, length, window)
        transposed = window_only.transposed()
        window_only.to_flash_attn(is_causal=True, backward=True, width=transposed.width)
    blocks = mask.num_rows * mask.width
    assert mask.width <= (window + 62) // 64 + 2 + 2
    # Eight bytes (an int64) an entry, twice over where the halves of two rows are merged.
    assert largest.bytes <= 16 * blocks
    assert mask.num_blocks() == offsets[..., -1]
    assert rows.numel() == blocks
    assert transposed.num_blocks() == window_only.num_blocks()
    assert 0 < density.item() < 0.02
    assert coarse.width <= 2 * mask.width


def test_a_million_tokens_of_shared_rows():
    length = 1 << 20
    for build in (BlockMask.full, BlockMask.causal):
        with LargestTensor() as largest:
            mask = build(8, 32, length, length)
        assert mask.shape == (8, 32, 16384, 16384)
        assert largest.bytes <= 8 * 16384


def test_a_million_random_tokens():
    with LargestTensor() as largest:
        mask = BlockMask.random(1, 2, 1 << 20, 1 << 20, 0.002, is_causal=True)
    assert mask.width == 33
    assert largest.bytes <= 8 * 2 * mask.num_rows * mask.width


def build_without_values(dense: torch.Tensor) -> list:
    """Every constructor and method that promises not to wait for the device."""
    made = [
        BlockMask.from_dense(dense, 16, 100, 130),
        BlockMask.full(2, 3, 100, 130, 16),
        BlockMask.causal(2, 3, 100, 130, 16),
        BlockMask.sliding_window(2, 3, 100, 130, 40, 3, 16),
        BlockMask.sliding_window(2, 3, 100, 130, 40, 3, 16, is_causal=False),
    ]
    for mask in list(made):
        mask.density(), mask.density(True, per_head=True), mask.num_blocks(), mask.to_dense()
        mask.to_flash_attn(True), mask.to_flash_attn(True, backward=True)
        mask.column_lists(), mask.to_token_mask(is_causal=True), repr(mask)
        made += [mask.transposed(width=mask.num_rows), mask.with_size(32), mask.with_size((64, 16))]
        made += [mask.select(0, [0]), mask.select(0, 0).expand(3, 4)]
        mask.to_flex(is_causal=True)
    return made


def test_nothing_waits_for_the_device():
    """Fake tensors have no values: reading one raises."""
    with FakeTensorMode():
        dense = torch.ones(2, 3, 7, 9, dtype=torch.bool)
        made = build_without_values(dense)
        with pytest.raises(DataDependentOutputException):
            made[0].compact()
    for fake, real in zip(made, build_without_values(torch.ones(2, 3, 7, 9).bool()), strict=True):
        assert fake.kv_indices.shape == real.kv_indices.shape
        checked(real)


# torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
class TestCompile:
    def compile(self, function, backend):
        torch._dynamo.reset()
        return torch.compile(function, backend=backend, fullgraph=True)

    def test_argument(self, backend):
        def function(mask: BlockMask, x):
            return mask.to_dense() & x, mask.density(is_causal=True), mask.num_rows

        mask = BlockMask.random(1, 2, 100, 130, 0.4, 16)
        x = torch.ones(mask.shape, dtype=torch.bool)
        dense, density, rows = self.compile(function, backend)(mask, x)
        assert torch.equal(dense, mask.to_dense())
        assert density == mask.density(is_causal=True)
        assert rows == mask.num_rows

    def test_made_inside_and_returned(self, backend):
        def function(dense):
            kept = BlockMask.from_dense(dense, (16, 32), 50, 100)
            inner = BlockMask(
                kept.kv_num_blocks, kept.kv_indices, (16, 32), 50, 100, validate=False
            )
            return inner.select(0, [0]), inner.column_lists()

        dense = torch.rand(2, 3, 4, 4) < 0.5
        mask, (offsets, rows) = self.compile(function, backend)(dense)
        expected, columns = function(dense)
        assert isinstance(mask, BlockMask)
        assert mask.same_blocks(expected)
        assert (mask.block_size, mask.q_len, mask.kv_len) == ((16, 32), 50, 100)
        assert torch.equal(offsets, columns[0])
        assert torch.equal(rows, columns[1])

    def test_patterns_inside(self, backend):
        def function(x):
            length = x.shape[0]
            window = BlockMask.sliding_window(1, 2, length, length, 40, 16, 16)
            causal = BlockMask.causal(1, 2, length, length, 16)
            return window.to_dense() & causal.to_dense(), window.transposed(width=9).kv_indices

        x = torch.zeros(130)
        got, expected = self.compile(function, backend)(x), function(x)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)

    def test_lengths_may_be_dynamic(self, backend):
        def function(x):
            length = x.shape[0]
            window = BlockMask.sliding_window(1, 2, length, length, 40, 16, 16)
            full = BlockMask.full(1, 1, length, length, 16)
            return window.density(is_causal=True), full.kv_num_blocks, window.kv_indices

        torch._dynamo.reset()
        compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
        for length in (130, 500, 777):
            x = torch.zeros(length)
            for a, b in zip(compiled(x), function(x), strict=True):
                assert torch.equal(a, b)

    def test_new_mask_of_the_same_shape_is_no_recompilation(self, backend):
        def function(mask: BlockMask):
            return mask.to_dense()

        compiled = self.compile(function, backend)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(3):
                mask = BlockMask.random(1, 2, 100, 130, 0.4, 16, seed=seed)
                assert torch.equal(compiled(mask), mask.to_dense())
