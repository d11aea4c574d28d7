"""The Hopper kernel: its order of work anywhere, its results on a Hopper GPU."""

from __future__ import annotations

import math
from importlib import import_module
from itertools import groupby, product

import pytest
import torch
from attention_cases import Case

import entropy_attn as ea
from entropy_attn import ops
from entropy_attn.block_lists import column_lists
from entropy_attn.kernels.hopper import order as orders
from entropy_attn.kernels.hopper.order import (
    backward_order,
    heads_together,
    last_group,
    work_order,
)
from entropy_attn.kernels.plans import forget_plans
from entropy_attn.reference import attention as reference
from entropy_attn.reference import dense
from entropy_attn.testing import assert_close_to_reference

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


def some_lengths(batch, q_len, kv_len, device) -> dict[str, torch.Tensor]:
    """Valid lengths of batch rows, the first row with fewer queries than keys."""
    lens = {"kv_lens": [kv_len - kv_len // 8, kv_len // 3], "q_lens": [q_len // 3 + 1, q_len]}
    return {k: torch.tensor(n[:batch], dtype=torch.int32, device=device) for k, n in lens.items()}


@pytest.fixture(params=["few items", "many items"])
def counted_as(request, monkeypatch):
    """An order is counted in one step, or by fewer programs in several, as of many items."""
    forget_plans()
    if request.param == "many items":
        monkeypatch.setattr(orders, "FEW_ITEMS", 0)
        monkeypatch.setattr(orders, "CHUNK", 16)
    yield
    forget_plans()


@pytest.mark.usefixtures("counted_as")
@pytest.mark.parametrize("given", [(), ("kv_lens",), ("q_lens",), ("kv_lens", "q_lens")])
@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_work_order(problem, is_listed, given, device):
    batch, heads, kv_heads, q_len, kv_len, block_size, is_causal = problem
    blocks = irregular_blocks(batch, heads, q_len, kv_len, block_size, device)
    mask = ea.BlockMask.from_dense(blocks, block_size, q_len, kv_len)
    query = torch.zeros(batch, heads, q_len, 64, dtype=torch.bfloat16, device=device)
    key = torch.zeros(batch, kv_heads, kv_len, 64, dtype=torch.bfloat16, device=device)
    lists = (mask.kv_num_blocks, mask.kv_indices) if is_listed else (None, None)
    block_m, l2_bytes, programs = min(block_size[0], 128), 1 << 20, 8
    lens = some_lengths(batch, q_len, kv_len, device)
    lens = {name: lens[name] for name in given}
    items = work_order(
        query, key, *lists, block_size, block_m, is_causal, l2_bytes, programs, **lens
    ).tolist()

    tiles = -(-q_len // block_m)
    assert items.pop()[0] == 0
    assert sorted(item[0] for item in items) == list(range(batch * heads * tiles))
    together = heads_together(batch * heads, heads // kv_heads, tiles, kv_len, 64, 2, l2_bytes)
    last_head = last_group(batch * heads, together, tiles, programs)

    def group_of(item: list[int]) -> int:
        return min(item[0] // tiles // together * together, last_head)

    groups = [group_of(item) for item in items]
    assert groups == sorted(groups)
    is_bound = is_listed and (is_causal or "kv_lens" in given)
    if not is_bound:  # else the lengths that order them are bounds
        for _, group in groupby(items, group_of):
            lengths = [item[1] for item in group]
            assert lengths == sorted(lengths, reverse=True)

    if not is_listed:
        blocks = torch.ones_like(blocks)
    visible = dense.visible_pairs(
        batch, q_len, kv_len, is_causal=is_causal, device=device, **lens
    ).expand(batch, 1, q_len, kv_len)
    for number, last, full, _ in items:
        head, tile = divmod(number, tiles)
        row = head // heads
        q_end = int(lens["q_lens"][row]) if "q_lens" in given else q_len
        rows = visible[row, 0, tile * block_m : min((tile + 1) * block_m, q_end)]
        listed = blocks[row, head % heads, tile * block_m // block_size[0]]
        seen = []
        for column in listed.nonzero().flatten().tolist():
            keys = rows[:, column * block_size[1] : (column + 1) * block_size[1]]
            is_whole = (column + 1) * block_size[1] <= kv_len
            seen.append((bool(keys.any()), len(keys) > 0 and bool(keys.all()) and is_whole))
        assert last == sum(some for some, _ in seen)
        assert full == sum(every for _, every in seen)


# Batch rows, heads of keys, query heads of each, heads that are open together.
BACKWARD_ORDERS = [(2, 3, 1, 2), (1, 2, 3, 5), (2, 3, 1, 4), (2, 3, 2, 4)]


@pytest.mark.usefixtures("counted_as")
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("has_lens", [False, True])
@pytest.mark.parametrize(("batch", "kv_heads", "group", "together"), BACKWARD_ORDERS)
def test_backward_order(batch, kv_heads, group, together, has_lens, is_causal, is_shared, device):
    """Heads in turn, the longest columns of some heads first, whoever lists them in the group."""
    q_len, kv_len, heads = 1700, 911, kv_heads * group
    lists = (1, 1) if is_shared else (batch, heads)
    blocks = irregular_blocks(*lists, q_len, kv_len, (128, 128), device)
    mask = ea.BlockMask.from_dense(blocks, 128, q_len, kv_len)
    query = torch.zeros(batch, heads, q_len, 64, dtype=torch.bfloat16, device=device)
    key = torch.zeros(batch, kv_heads, kv_len, 64, dtype=torch.bfloat16, device=device)
    offsets, rows = column_lists(mask.kv_num_blocks, mask.kv_indices, blocks.shape[-1])
    lens = some_lengths(batch, q_len, kv_len, device) if has_lens else {}
    table = backward_order(query, key, offsets, rows, together, 128, is_causal, **lens)[:-1]
    items = table[:, 0].tolist()

    # Of a column as many blocks count as there are that see its first key.
    visible = dense.visible_pairs(batch, q_len, kv_len, is_causal=is_causal, device=device, **lens)
    sees = torch.zeros(batch, 1, blocks.shape[2] * 128, blocks.shape[3], device=device)
    sees[:, :, :q_len] = visible.expand(batch, 1, q_len, kv_len)[..., ::128].float()
    most = sees.unflatten(2, (-1, 128)).amax(3).sum(2)  # (B, 1, Mk)
    columns = torch.minimum(blocks.expand(batch, heads, -1, -1).sum(2), most)
    lengths = columns.unflatten(1, (kv_heads, group)).sum(2).flatten().tolist()
    assert sorted(items) == list(range(len(lengths)))
    all_offsets = offsets.expand(batch, heads, -1)[:, ::group].flatten(0, 1)
    all_rows = rows.expand(batch, heads, -1)[:, ::group].flatten(0, 1)
    for item, *column in table.tolist():
        head, tile = divmod(item, blocks.shape[-1])
        begin, end = all_offsets[head, tile : tile + 2].tolist()
        assert column[:2] == [begin, end - begin]
        assert begin == end or column[2] == all_rows[head, begin]
    groups = [item // blocks.shape[-1] // together for item in items]
    assert groups == sorted(groups)
    for _, members in groupby(items, lambda item: item // blocks.shape[-1] // together):
        found = [lengths[item] for item in members]
        assert found == sorted(found, reverse=True)


def check_forward(problem, dtype, head_dim, kinds=(), has_lens=False) -> None:
    from entropy_attn.kernels.hopper.forward import hopper_forward, unsupported

    batch, heads, kv_heads, q_len, kv_len, block_size, is_causal = problem
    blocks = irregular_blocks(batch, heads, q_len, kv_len, block_size, "cuda")
    mask = ea.BlockMask.from_dense(blocks, block_size, q_len, kv_len)
    lens = some_lengths(batch, q_len, kv_len, "cuda") if has_lens else {}
    # Sharp scores raise the running maximum by more than its lag.
    query = 8 * torch.randn(batch, heads, q_len, head_dim, device="cuda", dtype=dtype)
    key, value = torch.randn(2, batch, kv_heads, kv_len, head_dim, device="cuda", dtype=dtype)
    scale = head_dim**-0.5
    assert unsupported(query, key, value, block_size, scale) is None
    lists = mask.kv_num_blocks, mask.kv_indices
    wanted = {f"{kind}_entropy": kind in kinds for kind in ("row", "block")}
    out, lse, *entropies = hopper_forward(
        query, key, value, *lists, block_size, is_causal, scale, **lens, **wanted
    )

    ends = lens.get("kv_lens"), lens.get("q_lens")
    same = reference.Problem(*lists, *ends, block_size, is_causal, 0, scale)
    truth, true_lse, *true_entropies = reference.attention_forward(
        query.double(), key.double(), value.double(), same, **wanted
    )
    own, _, *own_entropies = reference.attention_forward(query, key, value, same, **wanted)
    assert_close_to_reference(out, own, truth, "out")
    assert torch.equal(lse.isinf(), true_lse.isinf())
    torch.testing.assert_close(lse, true_lse.float(), atol=1e-4, rtol=1e-5)
    assert (out[lse.isinf()] == 0).all()
    # An error of the scores moves an entropy by at most the spread of log p, about log N, times it.
    size = query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max() * scale
    size = size.item() * math.log(kv_len)
    for kind, *found in zip(
        ("row", "block"), entropies, own_entropies, true_entropies, strict=True
    ):
        if kind not in kinds:
            assert found[0].numel() == 0
            continue
        assert (found[0] >= 0).all()
        assert (found[0][lse.isinf()] == 0).all()
        # An entropy is a difference of logarithms: its rounding is that of log N.
        found = [entropy + math.log(kv_len) + 1.0 for entropy in found]
        assert_close_to_reference(*found, f"{kind} entropy", magnitude=size)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_forward(problem, dtype, head_dim):
    check_forward(problem, dtype, head_dim)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("growth", [8.0, 30.0, 300.0])
def test_scores_that_grow(growth, dtype, head_dim):
    """The maximum of the first step is too small for the later ones, by powers of two."""
    length, scale = 1024, head_dim**-0.5
    query, key, value = torch.randn(3, 1, 2, length, head_dim, device="cuda", dtype=dtype)
    query[..., 0] = 4.0
    # Lists are walked from their end: the first blocks of keys come last. Some rows see no growth.
    steps = torch.arange(length, device="cuda") // 128
    key[..., 0] = ((7 - steps) * growth / 4.0 / 7 / scale / 1.4427).to(dtype)
    query[:, :, ::3, 0] = 0.0
    forward = import_module("entropy_attn.kernels.hopper.forward").hopper_forward
    out, lse, *_ = forward(query, key, value, None, None, (128, 128), False, scale)
    scores = query.double() @ key.double().mT * scale
    weights = scores.softmax(-1)
    assert_close_to_reference(out, weights.to(dtype) @ value, weights @ value.double(), "out")
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), atol=1e-4, rtol=1e-5)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float16, 64), (torch.bfloat16, 80), (torch.bfloat16, 128)]
)
@pytest.mark.parametrize(
    ("kinds", "has_lens"),
    [((), True), (("row",), False), (("block",), True), (("row", "block"), False)],
)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_entropies_and_lengths(problem, kinds, has_lens, dtype, head_dim):
    check_forward(problem, dtype, head_dim, kinds, has_lens)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(64, (64, 64), 300, 400, heads=4, kv_heads=2, dtype=torch.bfloat16, lens=True),
        Case(128, (128, 64), 300, 300, heads=4, dtype=torch.float16, is_causal=True),
        Case(128, (128, 128), 512, 700, dtype=torch.bfloat16, is_causal=True, lens=True),
        Case(64, (128, 128), 512, 512, dtype=torch.bfloat16, density=None),
    ],
    ids=str,
)
def test_as_a_part_of_the_package(case, monkeypatch):
    """Called through the API, differentiated by the portable backward."""
    from test_attention import check_entropies, check_entropy_gradients

    monkeypatch.setattr(ops, "SMALL", 0)
    query, key, value = case.build("cuda").inputs
    scale = case.head_dim**-0.5
    found, _ = ops.forward_kernel(
        query, key, value, case.block_size, case.is_causal, 0, scale, entropy=True
    )
    assert found == ops.HOPPER
    check_entropies(case, "cuda", "triton")
    check_entropy_gradients(case, "cuda", "triton")


@hopper
@pytest.mark.gpu
def test_kept_order_and_many_launches():
    """The counter in a kept order is 0 again after each launch."""
    from entropy_attn.kernels.hopper.forward import hopper_forward

    query, key, value = torch.randn(3, 1, 8, 4096, 64, device="cuda", dtype=torch.bfloat16)
    mask = ea.BlockMask.random(1, 8, 4096, 4096, 0.3, 128, irregular=True, device="cuda")
    lists = mask.kv_num_blocks, mask.kv_indices
    order = work_order(query, key, *lists, (128, 128), 128, False, 50 << 20, 132)
    expected = hopper_forward(query, key, value, *lists, (128, 128), False, 0.125)
    for _ in range(20):
        again = hopper_forward(query, key, value, *lists, (128, 128), False, 0.125, order=order)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert order[-1, 0] == 0


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pin", [False, True])
def test_every_item_is_claimed_by_rings_of_any_depth(head_dim, block, pin):
    """Items of one block each, as many programs as fit: the producers are far ahead.

    The compiler once gave the memory of an unused barrier to the value that a producer had claimed.
    """
    from entropy_attn.kernels.hopper.config import HopperConfig
    from entropy_attn.kernels.hopper.forward import hopper_forward

    shape, scale = (64, 12, 576, head_dim), head_dim**-0.5
    query, key, value = torch.randn(3, *shape, device="cuda", dtype=torch.bfloat16)
    mask = ea.select_blocks(query, key, block_size=block, budget=ea.TopK(count=1), sink=0, local=0)
    lists = mask.kv_num_blocks, mask.kv_indices
    expected = ea.block_sparse_attention(query, key, value, mask)
    stages = (2, 2), (3, 3), (4, 4), (3, 2), (1, 3)
    for (keys, values), programs, in_registers in product(stages, (1, 2, 3), (False, True)):
        # Rings of keys and values, queries, one block of results.
        blocks = keys + values + (1 if in_registers else 2) + 1
        fits = programs * blocks * block * head_dim * 2 <= 226 * 1024
        if not fits or (programs > 1 and block > 64) or (in_registers and block + head_dim > 192):
            continue  # not in shared memory, or not in registers
        config = HopperConfig(
            block, block // 64, keys, values, programs, query_registers=in_registers, pin=pin
        )
        for _ in range(5):
            order = work_order(
                query, key, *lists, (block, block), block, False, 50 << 20, 132 * programs
            )
            out, *_ = hopper_forward(
                query, key, value, *lists, (block, block), False, scale, config, order
            )
            assert order[-1, 0] == 0
            assert (out - expected).abs().max() < 0.05  # the same sums, rounded


def test_so_many_tiles_are_not_all_compared():
    assert heads_together(64, 1, 8192, 512, 64, 2, 50 << 20) == 2
    assert heads_together(64, 1, 100_000, 512, 64, 2, 50 << 20) == 1
    assert last_group(64, 1, 8192, 8192) == 62
    assert last_group(64, 1, 100_000, 132) == 63


def test_last_group_has_items_for_all_programs():
    assert last_group(32, 1, 256, 264) == 27  # 1280 items, of which 264 programs take 4 and more
    assert last_group(32, 8, 256, 264) == 24  # a group as the others
    assert last_group(32, 3, 256, 264) == 27  # five heads, as the two that are left are few
    assert last_group(4, 1, 16, 132) == 0  # all there is


@pytest.mark.parametrize(
    ("change", "kernel", "why"),
    [
        ({}, ops.HOPPER, "memory accelerator"),
        ({"length": 1448}, ops.PORTABLE, "so small"),
        ({"length": 1449}, ops.HOPPER, ""),
        ({"length": 1024, "head_dim": 128}, ops.HOPPER, ""),
        ({"length": 1023, "head_dim": 128}, ops.PORTABLE, "so small"),
        ({"length": 2048, "head_dim": 128, "is_causal": True}, ops.HOPPER, ""),
        ({"length": 2047, "head_dim": 128, "is_causal": True}, ops.PORTABLE, "so small"),
        ({"length": 16}, ops.DECODE, "at most 16 queries"),
        ({"entropy": True}, ops.HOPPER, ""),
        ({"entropy": True, "length": 16}, ops.PORTABLE, "so small"),
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
        query, query, query, (case["block"],) * 2, case.get("is_causal", False),
        case.get("window", 0), 0.1, entropy=case.get("entropy", False),
    )  # fmt: skip
    assert found == kernel
    assert why in reason
