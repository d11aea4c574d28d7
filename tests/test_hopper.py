"""The Hopper kernel: its order of work anywhere, its results on a Hopper GPU."""

from __future__ import annotations

from importlib import import_module
from itertools import groupby

import pytest
import torch

import entropy_attn as ea
from entropy_attn import ops
from entropy_attn.kernels.hopper.order import heads_together, work_order

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
hopper = pytest.mark.skipif(not HAS_HOPPER, reason="needs a GPU of compute capability 9.0")

# batch, query heads, key heads, queries, keys, blocks, causal
PROBLEMS = [
    (2, 4, 2, 1000, 911, (128, 128), False),
    (1, 6, 2, 700, 1100, (128, 64), True),
    (2, 3, 3, 517, 300, (64, 64), True),
    (1, 2, 1, 512, 512, (256, 64), True),
    (1, 4, 4, 1, 7, (64, 64), False),
]


def irregular_blocks(batch, heads, q_len, kv_len, block_size, device) -> torch.Tensor:
    """Rows of all densities, some empty."""
    rows, columns = -(-q_len // block_size[0]), -(-kv_len // block_size[1])
    share = torch.rand(batch, heads, rows, 1, device=device)
    dense = torch.rand(batch, heads, rows, columns, device=device) < share
    dense[:, 0, 0] = False
    return dense


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_work_order(problem, is_listed, device):
    batch, heads, kv_heads, q_len, kv_len, block_size, is_causal = problem
    dense = irregular_blocks(batch, heads, q_len, kv_len, block_size, device)
    mask = ea.BlockMask.from_dense(dense, block_size, q_len, kv_len)
    query = torch.zeros(batch, heads, q_len, 64, dtype=torch.bfloat16, device=device)
    key = torch.zeros(batch, kv_heads, kv_len, 64, dtype=torch.bfloat16, device=device)
    lists = (mask.kv_num_blocks, mask.kv_indices) if is_listed else (None, None)
    block_m, l2_bytes = min(block_size[0], 128), 1 << 20
    items = work_order(query, key, *lists, block_size, block_m, is_causal, l2_bytes).tolist()

    tiles = -(-q_len // block_m)
    assert items.pop()[0] == 0
    assert sorted(item[0] for item in items) == list(range(batch * heads * tiles))
    together = heads_together(batch * heads, heads // kv_heads, tiles, kv_len, 64, 2, l2_bytes)
    groups = [item[0] // tiles // together for item in items]
    assert groups == sorted(groups)
    if not (is_causal and is_listed):  # there the lengths that order them are bounds
        for _, group in groupby(items, lambda item: item[0] // tiles // together):
            lengths = [item[1] for item in group]
            assert lengths == sorted(lengths, reverse=True)

    if not is_listed:
        dense = torch.ones_like(dense)
    visible = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    if is_causal:
        visible = visible.tril(kv_len - q_len)
    for number, last, full, _ in items:
        head, tile = divmod(number, tiles)
        rows = visible[tile * block_m : (tile + 1) * block_m]
        row = dense[head // heads, head % heads, tile * block_m // block_size[0]]
        seen = []
        for column in row.nonzero().flatten().tolist():
            keys = rows[:, column * block_size[1] : (column + 1) * block_size[1]]
            is_whole = (column + 1) * block_size[1] <= kv_len
            seen.append((bool(keys.any()), bool(keys.all()) and is_whole))
        assert last == sum(some for some, _ in seen)
        assert full == sum(every for _, every in seen)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_forward(problem, dtype, head_dim):
    from entropy_attn.kernels.hopper.forward import hopper_forward, unsupported

    batch, heads, kv_heads, q_len, kv_len, block_size, is_causal = problem
    dense = irregular_blocks(batch, heads, q_len, kv_len, block_size, "cuda")
    mask = ea.BlockMask.from_dense(dense, block_size, q_len, kv_len)
    # Sharp scores raise the running maximum by more than its lag.
    query = 8 * torch.randn(batch, heads, q_len, head_dim, device="cuda", dtype=dtype)
    key, value = torch.randn(2, batch, kv_heads, kv_len, head_dim, device="cuda", dtype=dtype)
    scale = head_dim**-0.5
    assert unsupported(query, key, value, block_size, scale) is None
    lists = mask.kv_num_blocks, mask.kv_indices
    out, lse = hopper_forward(query, key, value, *lists, block_size, is_causal, scale)

    def reference(*tensors):
        return ea.block_sparse_attention(
            *tensors, mask, is_causal=is_causal, return_lse=True, backend="reference"
        )

    truth, true_lse = reference(query.double(), key.double(), value.double())
    own, _ = reference(query, key, value)
    rounding = torch.finfo(dtype).eps * truth.abs().max()
    assert (out - truth).abs().max() <= 2 * (own - truth).abs().max() + rounding
    assert torch.equal(lse.isinf(), true_lse.isinf())
    torch.testing.assert_close(lse, true_lse.float(), atol=1e-4, rtol=1e-5)
    assert (out[lse.isinf()] == 0).all()


@hopper
@pytest.mark.gpu
def test_kept_order_and_many_launches():
    """The counter in a kept order is 0 again after each launch."""
    from entropy_attn.kernels.hopper.forward import hopper_forward

    query, key, value = torch.randn(3, 1, 8, 4096, 64, device="cuda", dtype=torch.bfloat16)
    mask = ea.BlockMask.random(1, 8, 4096, 4096, 0.3, 128, irregular=True, device="cuda")
    lists = mask.kv_num_blocks, mask.kv_indices
    order = work_order(query, key, *lists, (128, 128), 128, False, 50 << 20)
    expected = hopper_forward(query, key, value, *lists, (128, 128), False, 0.125)
    for _ in range(20):
        again = hopper_forward(query, key, value, *lists, (128, 128), False, 0.125, order=order)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert order[-1, 0] == 0


def test_so_many_tiles_are_not_all_compared():
    assert heads_together(64, 1, 8192, 512, 64, 2, 50 << 20) == 2
    assert heads_together(64, 1, 100_000, 512, 64, 2, 50 << 20) == 1


@pytest.mark.parametrize(
    ("change", "kernel", "why"),
    [
        ({}, ops.HOPPER, "memory accelerator"),
        ({"length": 4096}, ops.PORTABLE, "so small"),
        ({"length": 16}, ops.DECODE, "at most 16 queries"),
        ({"entropy": True}, ops.PORTABLE, "no entropies"),
        ({"entropy": True, "length": 16}, ops.PORTABLE, ""),
        ({"window": 100}, ops.PORTABLE, "no window"),
        ({"dtype": torch.float32}, ops.PORTABLE, "fp16 and bf16"),
        ({"head_dim": 72}, ops.HOPPER, ""),
        ({"head_dim": 100}, ops.PORTABLE, "multiple of 8"),
        ({"block": 32}, ops.PORTABLE, "no tiles for blocks"),
        ({"arch": "sm80"}, ops.PORTABLE, "every GPU"),
    ],
)
def test_which_kernel_runs(change, kernel, why, monkeypatch):
    case = {"length": 16384, "head_dim": 64, "dtype": torch.bfloat16, "block": 64, "arch": "sm90"}
    case |= change
    for module in ("launch", "hopper.forward"):
        name = f"entropy_attn.kernels.{module}"
        monkeypatch.setattr(import_module(name), "architecture", lambda device: case["arch"])
    shape = (2, 16, case["length"], case["head_dim"])
    query = torch.empty(shape, dtype=case["dtype"], device="meta")
    found, reason = ops.forward_kernel(
        query, query, query, (case["block"],) * 2, True, case.get("window", 0), 0.1,
        entropy=case.get("entropy", False),
    )  # fmt: skip
    assert found == kernel
    assert why in reason
