"""The Hopper backward: which calls it takes anywhere, its results on a Hopper GPU."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hopper_calls import row_by_row
from test_hopper import hopper, irregular_blocks

import entropy_attn as ea
from entropy_attn import ops
from entropy_attn.block_lists import column_lists

# batch, query heads, key heads, queries, keys, rows of a block, causal, every block, lengths
PROBLEMS = [
    (2, 4, 2, 1000, 911, 128, False, False, False),
    (1, 4, 1, 900, 1100, 256, True, False, False),
    (1, 2, 1, 700, 300, 128, True, False, False),
    (1, 2, 2, 1024, 1024, 128, True, True, False),
    (1, 3, 3, 300, 515, 128, False, True, False),
    (1, 2, 1, 512, 640, 128, False, False, False),
    (1, 2, 2, 384, 512, 128, False, True, False),
    (2, 4, 2, 1000, 911, 128, True, False, True),
    (4, 2, 2, 600, 700, 256, False, True, True),
    (2, 3, 3, 1000, 911, 256, False, False, False),
    (2, 3, 3, 1000, 911, 128, False, False, True),
    (1, 4, 2, 441, 911, 128, False, False, False),
    (2, 2, 2, 441, 640, 256, True, False, True),
]
# The types alternate, so that both meet all problems and all sizes. So do the multiprocessors that
# work is divided for: with 2 of them the problems of several heads are in more units than one.
CALLS = [
    (problem, head_dim, (torch.float16, torch.bfloat16)[(i + j) % 2], (2, 132)[(i + j // 2) % 2])
    for i, problem in enumerate(PROBLEMS)
    for j, head_dim in enumerate((32, 64, 80, 128))
]


def assert_same_but_for_order(found, wanted):
    """dK and dV bit by bit; dQ is added up in an order that is not fixed."""
    torch.testing.assert_close(found[0], wanted[0], atol=1e-2, rtol=1e-2)
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[2], wanted[2])


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(("problem", "head_dim", "dtype", "multiprocessors"), CALLS)
def test_backward(problem, head_dim, dtype, multiprocessors, monkeypatch):
    """As far from the truth as the reference in the same dtype, and 0 where nothing is seen."""
    batch, heads, kv_heads, q_len, kv_len, block_q, is_causal, is_full, padded = problem
    dense = irregular_blocks(batch, heads, q_len, kv_len, (block_q, 128), "cuda")
    dense[..., 1] = False  # keys that nobody sees
    mask = ea.BlockMask.from_dense(dense, (block_q, 128), q_len, kv_len)
    if is_full:  # without lists
        mask = ea.BlockMask.full(batch, heads, q_len, kv_len, (block_q, 128), device="cuda")
    query, grad = torch.randn(2, batch, heads, q_len, head_dim, device="cuda", dtype=dtype)
    key, value = torch.randn(2, batch, kv_heads, kv_len, head_dim, device="cuda", dtype=dtype)
    grad_lse = torch.randn(batch, heads, q_len, device="cuda")
    lens = {}
    if padded:
        for name, most in (("q_lens", q_len), ("kv_lens", kv_len)):
            shares = torch.tensor([0.55, 1.0, 0.0, 0.21], device="cuda")[:batch]
            lens[name] = (most * shares).to(torch.int32)

    def gradients(backend, convert=lambda x: x):
        leaves = [convert(x).requires_grad_() for x in (query, key, value)]
        out, lse = ea.block_sparse_attention(
            *leaves, mask, is_causal=is_causal, return_lse=True, backend=backend, **lens
        )
        seen = lse.detach().isfinite()
        loss = torch.where(seen, lse, 0.0) * grad_lse
        return torch.autograd.grad((out * convert(grad)).sum() + loss.sum(), leaves)

    backward = import_module("entropy_attn.kernels.hopper.backward")
    monkeypatch.setattr(backward, "device_limits", lambda index: (multiprocessors, 50 << 20))
    monkeypatch.setattr(ops, "SMALL_BACKWARD", 0)
    choice, why = ops.backward_kernel(
        grad, query, key, value, (block_q, 128), 0, head_dim**-0.5
    )  # fmt: skip
    assert choice == ops.HOPPER_BACKWARD, why
    own = gradients("triton")
    truth = gradients("reference", lambda x: x.double())
    rounded = gradients("reference", lambda x: x.clone())
    for name, found, true, reference in zip("qkv", own, truth, rounded, strict=True):
        scale = true.abs().max()
        allowed = 2 * (reference - true).abs().max() + torch.finfo(dtype).eps * scale
        assert (found - true).abs().max() <= allowed, f"gradient of {name}"
        assert ((found == 0) | (true != 0)).all(), f"gradient of {name}"


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "kv_heads", "group"), [(2, 16, 1), (2, 16, 4), (1, 29, 2)])
@pytest.mark.parametrize(("is_listed", "head_dim"), [(True, 64), (False, 64), (True, 128)])
def test_many_units(batch, kv_heads, group, is_listed, head_dim, monkeypatch):
    """Sums that programs of other heads clear and round: what one unit gives, dQ but for its order.

    New memory is full of NaN, which a sum that was not cleared keeps.
    """
    backward = import_module("entropy_attn.kernels.hopper.backward")
    length, heads = 1100, group * kv_heads
    shape = (2, batch, heads, length, head_dim)
    query, grad = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    shape = (2, batch, kv_heads, length, head_dim)
    key, value = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    mask = ea.BlockMask.full(batch, heads, length, length, 128, device="cuda")
    if is_listed:
        blocks = irregular_blocks(batch, heads, length, length, (128, 128), "cuda")
        mask = ea.BlockMask.from_dense(blocks, 128, length, length)
    monkeypatch.setattr(ops, "SMALL_BACKWARD", 0)
    kernel, why = ops.backward_kernel(grad, query, key, value, (128, 128), 0, 0.125)
    assert kernel == ops.HOPPER_BACKWARD, why
    divided, divide = [], backward.divide

    def watched(*args):
        divided.append(divide(*args))
        return divided[-1]

    monkeypatch.setattr(backward, "divide", watched)

    def gradients(multiprocessors):
        limits = multiprocessors, 50 << 20
        monkeypatch.setattr(backward, "device_limits", lambda index: limits)
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = ea.block_sparse_attention(*leaves, mask, is_causal=True, backend="triton")
        return torch.autograd.grad(out, leaves, grad)

    single = gradients(10**6)
    for multiprocessors in (48 if head_dim == 64 else 72, 2):  # by the default units
        several = gradients(multiprocessors)
        assert_same_but_for_order(several, single)
    expected = {32: [(32, 1), (8, 4), (1, 32)], 29: [(29, 1), (10, 3), (1, 29)]}
    found = [(units.heads, units.count) for units in divided]
    assert found == expected[batch * kv_heads]


@hopper
@pytest.mark.gpu
def test_replays_clear_their_sums(monkeypatch):
    """A captured backward in many units, as its sums and counters start from 0 each time."""
    backward = import_module("entropy_attn.kernels.hopper.backward")
    monkeypatch.setattr(backward, "device_limits", lambda index: (8, 50 << 20))
    monkeypatch.setattr(ops, "SMALL_BACKWARD", 0)
    query, key, value, grad = torch.randn(
        4, 1, 8, 1024, 64, device="cuda", dtype=torch.bfloat16
    )  # fmt: skip
    mask = ea.BlockMask.random(1, 8, 1024, 1024, 0.5, 128, device="cuda")
    leaves = [x.requires_grad_() for x in (query, key, value)]

    def gradients():
        out = ea.block_sparse_attention(*leaves, mask, backend="triton")
        return torch.autograd.grad(out, leaves, grad)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        wanted = gradients()
        gradients()  # what a second call finds
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = gradients()
    for _ in range(3):
        for x in found:
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_but_for_order(found, wanted)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_configurations_agree(head_dim):
    """With turns or without: the same dK and dV, dQ but for its order."""
    from entropy_attn.kernels.hopper.backward import hopper_backward, hopper_backward_config

    tensors = torch.randn(4, 1, 4, 1024, head_dim, device="cuda", dtype=torch.bfloat16)
    query, key, value, grad = tensors
    mask = ea.BlockMask.random(1, 1, 1024, 1024, 0.5, 128, device="cuda")  # a list for all heads
    out, lse = ea.block_sparse_attention(query, key, value, mask, return_lse=True)
    columns = column_lists(mask.kv_num_blocks, mask.kv_indices, 8)
    default = hopper_backward_config(head_dim)
    wanted, found = (
        hopper_backward(
            grad, query, key, value, out, lse, None, columns, (128, 128), False, 0.125,
            replace(default, **change),
        )
        for change in ({}, {"turns": not default.turns})
    )  # fmt: skip
    assert_same_but_for_order(found, wanted)


@hopper
@pytest.mark.gpu
def test_gradient_of_lse_of_no_strides(monkeypatch):
    """As a sum has it: its copy stands between the transposed lists and the statistics."""
    monkeypatch.setattr(ops, "SMALL_BACKWARD", 0)
    query, key, value = torch.randn(3, 2, 4, 2048, 64, device="cuda", dtype=torch.bfloat16)
    mask = ea.BlockMask.random(2, 4, 2048, 2048, 0.5, 128, device="cuda")

    def gradients(weights):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out, lse = ea.block_sparse_attention(*leaves, mask, return_lse=True, backend="triton")
        lse = lse if weights is None else lse * weights
        return torch.autograd.grad(out.sum() + lse.sum(), leaves)

    wanted = gradients(torch.ones(2, 4, 2048, device="cuda"))
    for _ in range(5):
        found = gradients(None)
        assert_same_but_for_order(found, wanted)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_that_nobody_lists_may_be_anything(head_dim, monkeypatch):
    """They meet no query, and leave neither their own gradients nor others' without a number."""
    monkeypatch.setattr(ops, "SMALL_BACKWARD", 0)
    tensors = torch.randn(4, 2, 4, 441, head_dim, device="cuda", dtype=torch.bfloat16)
    blocks = irregular_blocks(2, 4, 441, 441, (128, 128), "cuda")
    blocks[..., 1] = False
    mask = ea.BlockMask.from_dense(blocks, 128, 441, 441)

    def gradients(unseen):
        query, key, value, grad = tensors.clone()
        key[:, :, 128:256] = value[:, :, 128:256] = unseen
        leaves = [x.requires_grad_() for x in (query, key, value)]
        out = ea.block_sparse_attention(*leaves, mask, backend="triton")
        return torch.autograd.grad(out, leaves, grad)

    assert_same_but_for_order(gradients(float("nan")), gradients(0.0))


@hopper
@pytest.mark.gpu
def test_rounding_waits_for_what_is_added():
    """On a stream of its own, while another one adds and counts."""
    from entropy_attn.kernels.hopper.sums import allocate, divide, round_last

    query = torch.zeros(1, 4, 512, 64, device="cuda", dtype=torch.bfloat16)
    units = divide(4, 1, 4, 4, 4, 2)
    sums, counters, _ = allocate(units, query.device)
    values = torch.randn_like(sums)
    out = torch.full_like(query, float("nan"))
    counters.fill_(units.items)
    round_last(sums, counters, out, units)  # compiled now: that may wait for all streams
    for memory in (sums, counters, out):
        memory.zero_()
    adding, rounding = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(adding):  # first, as a kernel that is loaded waits for one that polls
        torch.cuda._sleep(200_000_000)  # some 100 ms
        sums.copy_(values)
        counters.fill_(units.items)
        added = adding.record_event()
    with torch.cuda.stream(rounding):
        round_last(sums, counters, out, units)
    assert not added.query()
    torch.cuda.synchronize()
    first = (units.count - units.lead) * units.heads
    assert torch.equal(out[0, first:], row_by_row(values, query)[0, first:])


@hopper
@pytest.mark.gpu
def test_deterministic_algorithms(monkeypatch):
    """The same bits in every run where the user asks for it."""
    monkeypatch.setattr(ops, "SMALL_BACKWARD", 0)
    query, key, value = torch.randn(3, 1, 4, 2048, 64, device="cuda", dtype=torch.bfloat16)
    mask = ea.BlockMask.random(1, 4, 2048, 2048, 0.5, 128, device="cuda")

    def gradients():
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = ea.block_sparse_attention(*leaves, mask, backend="triton")
        return torch.autograd.grad(out.square().sum(), leaves)

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients()
        for _ in range(5):
            again = gradients()
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("change", "kernel", "why"),
    [
        ({}, ops.HOPPER_BACKWARD, "not fixed"),
        ({"block": (256, 128)}, ops.HOPPER_BACKWARD, ""),
        ({"block": (64, 64)}, ops.PORTABLE_BACKWARD, "blocks of 128 keys"),
        ({"length": 1024}, ops.HOPPER_BACKWARD, ""),
        ({"length": 1023}, ops.PORTABLE_BACKWARD, "so small"),
        ({"length": 1024, "head_dim": 128}, ops.HOPPER_BACKWARD, ""),
        ({"window": 100}, ops.PORTABLE_BACKWARD, "no window"),
        ({"entropy": True}, ops.PORTABLE_BACKWARD, "no gradients of entropies"),
        ({"dtype": torch.float32}, ops.PORTABLE_BACKWARD, "fp16 and bf16"),
        ({"head_dim": 256}, ops.PORTABLE_BACKWARD, "at most 128"),
        ({"expanded": True}, ops.PORTABLE_BACKWARD, "16 bytes"),
        ({"arch": "sm80"}, ops.PORTABLE_BACKWARD, "every GPU"),
        ({"deterministic": True}, ops.PORTABLE_BACKWARD, "use_deterministic_algorithms"),
    ],
)
def test_which_kernel_runs(change, kernel, why, monkeypatch):
    case = {"length": 8192, "head_dim": 64, "dtype": torch.bfloat16, "block": (128, 128)}
    case |= {"window": 0, "arch": "sm90", **change}
    for module in ("launch", "hopper.forward"):
        name = f"entropy_attn.kernels.{module}"
        monkeypatch.setattr(import_module(name), "architecture", lambda device: case["arch"])
    deterministic = case.get("deterministic", False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    shape = (2, 16, case["length"], case["head_dim"])
    query = torch.empty(shape, dtype=case["dtype"], device="meta")
    grad = query[..., :1].expand(shape) if case.get("expanded") else query
    found, reason = ops.backward_kernel(
        grad, query, query, query, case["block"], case["window"], 0.1,
        entropy=case.get("entropy", False),
    )  # fmt: skip
    assert found == kernel
    assert why in reason
