"""Reordering: orders are permutations with cells side by side, attention over them is exact."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from attention_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

import entropy_attn as ea
from entropy_attn.api import tile_mass
from entropy_attn.reference import cells as cells_module
from entropy_attn.reference.cells import anchor_ranks, fit_anchors, nearest
from entropy_attn.reference.permutation import inverse, permute
from entropy_attn.selection import keep_blocks
from entropy_attn.testing import assert_close_to_reference


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def clustered(clusters: int, length: int, noise: float, head_dim: int = 32, heads: int = 2):
    """x (1, H, N, D) around ``clusters`` centres in random order, and the labels (N,)."""
    centres = torch.nn.functional.normalize(torch.randn(clusters, head_dim), dim=-1)
    labels = torch.arange(length)[torch.randperm(length)] % clusters
    points = centres[labels] * head_dim**0.5 + noise * torch.randn(1, heads, length, head_dim)
    return points, labels


def runs(labels: torch.Tensor) -> int:
    """How many runs of equal labels there are."""
    return 1 + int((labels[1:] != labels[:-1]).sum())


# --- orders -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 130),
    cells=st.sampled_from([None, 1, 2, 7, 64]),
    sample=st.sampled_from([1, 16, 2048]),
    prefix=st.integers(0, 5),
    padded=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_any_shape_gives_a_permutation(batch, heads, length, cells, sample, prefix, padded, dtype):
    x = torch.randn(batch, heads, length, 16).to(dtype)
    lens = torch.randint(0, length + 1, (batch,), dtype=torch.int32) if padded else None
    reorder = ea.Reorder(cells, sample=sample, prefix=prefix)
    order = ea.token_order(x, reorder, lens=lens)
    everything = torch.arange(length).expand(batch, heads, -1)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort(-1).values, everything)
    for b, valid in enumerate([length] * batch if lens is None else lens.tolist()):
        pinned = min(prefix, valid)
        assert torch.equal(order[b, :, :pinned], everything[b, :, :pinned])
        assert torch.equal(order[b, :, valid:], everything[b, :, valid:])


def test_cells_lie_side_by_side_and_are_stable_inside():
    x, labels = clustered(8, 512, noise=0.2)
    order = ea.token_order(x, ea.Reorder(cells=32))
    for head in order[0]:
        # A single cell out of 32 may be left out where its cluster is wide.
        assert runs(labels[head]) <= 9, "the cells that one cluster is cut into lie together"
    # By the definition: each cell is one run, and inside it tokens keep their order.
    anchors = fit_anchors(x, 32, ea.Reorder().iterations)
    cell = nearest(x, anchors).gather(2, order)
    for head, cell_of in zip(order[0], cell[0], strict=True):
        assert runs(cell_of) == cell_of.unique().numel()
        for number in cell_of.unique():
            assert (head[cell_of == number].diff() > 0).all()


def test_nearest_is_by_distance_also_far_from_the_origin():
    x = torch.randn(1, 2, 100, 16) + 1000
    anchors = torch.randn(1, 2, 9, 16) + 1000
    distances = torch.cdist(x.double(), anchors.double())
    near = nearest(x, anchors)
    error = distances.gather(3, near[..., None])[..., 0] - distances.amin(-1)
    assert error.max() < 0.02, "1000 in fp32 has steps of 6e-5, its products of 16 times that"


def test_k_means_lowers_the_distances():
    x, _ = clustered(8, 512, noise=0.5)
    costs = [
        torch.cdist(x, fit_anchors(x, 12, steps)).amin(-1).square().mean() for steps in range(4)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[3] < 0.8 * costs[0]


def test_near_anchors_are_neighbours():
    """Points on a line in a plane of noise come back in the order of the line, or its reverse."""
    line = torch.linspace(-10, 10, 24)[torch.randperm(24)]
    direction = torch.nn.functional.normalize(torch.randn(16), dim=0)
    anchors = (line[:, None] * direction + 0.02 * torch.randn(24, 16))[None, None]
    rank = anchor_ranks(anchors)[0, 0]
    expected = line.argsort().argsort()
    assert torch.equal(rank, expected) or torch.equal(rank, 23 - expected)


def test_long_inputs_are_worked_through_in_runs(monkeypatch):
    x = torch.randn(1, 2, 300, 16)
    whole = ea.token_order(x)
    monkeypatch.setattr(cells_module, "WORKSPACE_BYTES", 4096)
    assert torch.equal(ea.token_order(x), whole)


def test_the_order_is_deterministic_and_padding_does_not_reach_it():
    x = torch.randn(2, 3, 100, 16)
    lens = int32(60, 100)
    order = ea.token_order(x, lens=lens)
    poisoned = x.clone()
    poisoned[0, :, 60:] = torch.nan
    assert torch.equal(order, ea.token_order(poisoned, lens=lens))
    for _ in range(3):
        assert torch.equal(order, ea.token_order(x, lens=lens))


@pytest.mark.parametrize("shape", [(0, 2, 8, 16), (2, 0, 8, 16), (2, 2, 0, 16)], ids=str)
def test_tensors_of_size_zero(shape):
    assert ea.token_order(torch.randn(shape)).shape == shape[:3]


def test_equal_tokens_and_nan_still_give_permutations():
    for x in (torch.zeros(1, 1, 50, 16), torch.full((1, 1, 50, 16), torch.nan)):
        order = ea.token_order(x, ea.Reorder(cells=8))
        assert torch.equal(order.sort(-1).values[0, 0], torch.arange(50))


def test_autocast_does_not_change_the_order():
    x = torch.randn(1, 2, 200, 16)
    with torch.autocast("cpu", torch.bfloat16):
        order = ea.token_order(x)
    assert torch.equal(order, ea.token_order(x))


# --- attention ----------------------------------------------------------------------------------

CASES = [
    Case(density=None, q_len=100, kv_len=83, heads=4, kv_heads=2),
    Case(density=None, q_len=83, kv_len=83, heads=2, kv_heads=2, fused=True),
    Case(density=None, q_len=9, kv_len=5, heads=2, kv_heads=1),
    Case(density=None, q_len=100, kv_len=100, heads=4, kv_heads=1, lens=True),
    Case(density=None, q_len=60, kv_len=90, dtype=torch.bfloat16, head_dim=64),
]


def attend(query, key, value, reorder=None, **options):
    """Attention over sorted tokens with every block kept."""
    lens = {name: options.get(name) for name in ("kv_lens", "q_lens")}
    *tokens, restore = ea.reorder_tokens(query, key, value, reorder, **lens)
    full = ea.BlockMask.full(1, 1, query.shape[2], key.shape[2], 16)
    out, lse = ea.block_sparse_attention(*tokens, full, return_lse=True, **options)
    return restore(out), restore(lse)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("prefix", [0, 1])
def test_equals_dense_attention_with_every_block_kept(case, prefix):
    problem = case.build("cpu")
    plain, plain_lse, *_ = problem.dense(case.dtype)
    exact, exact_lse, *_ = problem.dense(torch.float64)
    reorder = ea.Reorder(cells=4, prefix=prefix)
    out, lse = attend(*problem.inputs, reorder, **problem.options)
    assert_close_to_reference(out, plain, exact, "out")
    assert_close_to_reference(lse, plain_lse.to(lse.dtype), exact_lse, "lse")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    q_len=st.integers(1, 70),
    kv_len=st.integers(1, 70),
    kv_heads=st.sampled_from([1, 2, 4]),
    cells=st.sampled_from([None, 3, 16]),
    lens=st.booleans(),
)
def test_any_shape_equals_dense_attention(q_len, kv_len, kv_heads, cells, lens):
    case = Case(
        density=None, q_len=q_len, kv_len=kv_len, heads=4, kv_heads=kv_heads, lens=lens,
        head_dim=16, dtype=torch.float64,
    )  # fmt: skip
    problem = case.build("cpu")
    exact, *_ = problem.dense(torch.float64)
    out, _ = attend(*problem.inputs, ea.Reorder(cells), **problem.options)
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=str)
def test_gradients_equal_those_of_dense_attention(case):
    problem = case.build("cpu")
    exact, _, _, leaves = problem.dense(torch.float64)
    ours = tuple(t.detach().double().requires_grad_() for t in problem.inputs)
    out, _ = attend(*ours, **problem.options)
    grad = torch.randn_like(exact)
    expected = torch.autograd.grad(exact, leaves, grad)
    for found, wanted in zip(torch.autograd.grad(out, ours, grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_entropies_of_rows_come_back_in_order():
    query, key, value = torch.randn(3, 1, 2, 90, 16, dtype=torch.float64)
    plain, entropy = ea.attention_with_entropy(query, key, value, block_size=16)
    tokens = ea.reorder_tokens(query, key, value)
    out, found = ea.attention_with_entropy(*tokens[:3], block_size=16)
    torch.testing.assert_close(tokens.restore(out), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tokens.restore(found.row), entropy.row, rtol=1e-12, atol=1e-12)
    # The blocks are others, and so is the entropy over them.
    assert not torch.allclose(tokens.restore(found.block), entropy.block)


def test_permutations_and_their_gradients():
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True)
    order = torch.rand(2, 3, 7).argsort(-1)
    place = inverse(order)
    assert torch.equal(permute(permute(x, order, place), place, order), x)
    assert torch.autograd.gradcheck(lambda x: permute(x, order, place), x)
    assert torch.autograd.gradgradcheck(lambda x: permute(x, order, place), x)


def test_compiles_without_graph_breaks():
    query = torch.randn(2, 4, 96, 16, requires_grad=True)
    key, value = torch.randn(2, 2, 2, 80, 16, requires_grad=True).unbind()
    lens = int32(80, 33)

    def run(query, key, value):
        tokens = ea.reorder_tokens(query, key, value, kv_lens=lens)
        mask = ea.select_blocks(
            tokens.query, tokens.key, block_size=16, sink=0, local=0, kv_lens=lens
        )
        return tokens.restore(ea.block_sparse_attention(*tokens[:3], mask, kv_lens=lens))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    out, traced = run(query, key, value), compiled(query, key, value)
    assert torch.equal(out, traced)
    (eager,) = torch.autograd.grad(out.sum(), query)
    (graph,) = torch.autograd.grad(traced.sum(), query)
    assert torch.equal(eager, graph)


@pytest.mark.gpu
def test_nothing_waits_for_the_device_and_a_graph_replays(forbid_waiting):
    query, key, value = torch.randn(3, 1, 4, 500, 64, device="cuda", dtype=torch.bfloat16)

    def run():
        tokens = ea.reorder_tokens(query, key, value)
        mask = ea.select_blocks(tokens.query, tokens.key, sink=0, local=0)
        return tokens.restore(ea.block_sparse_attention(*tokens[:3], mask))

    expected = run()
    torch.cuda.synchronize()
    with forbid_waiting():
        again = run()
    assert torch.equal(again, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("shift", [0, 3])
def test_clustered_tokens_need_half_the_blocks_at_equal_mass(shift):
    """TopP of the true mass keeps the same mass of every tile, in whatever order.

    With a shift the queries of a cluster attend to the keys of another one.
    """
    centres = torch.randn(8, 32)
    labels = torch.arange(1024)[torch.randperm(1024)] % 8
    query, key = (
        centres[cluster] + 0.5 * torch.randn(1, 2, 1024, 32)
        for cluster in ((labels + shift) % 8, labels)
    )

    def density(query, key):
        mass = tile_mass(query, key, block_size=32)
        lengths = {"block_size": 32, "q_len": 1024, "kv_len": 1024}
        return float(keep_blocks(mass, ea.TopP(0.95), sink=0, local=0, **lengths).density())

    before = density(query, key)
    sorted_query, sorted_key, *_ = ea.reorder_tokens(query, key, key)
    assert density(sorted_query, sorted_key) <= before / 2


def test_the_lines_of_the_documentation_run():
    page = Path(__file__).resolve().parent.parent / "docs" / "reordering.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    (by_hand,) = [block for block in blocks if "reorder_tokens" in block]
    names: dict[str, object] = {}
    exec(by_hand, names)
    assert names["out"].shape == names["query"].shape
    assert names["lse"].shape == names["query"].shape[:3]


# --- errors -------------------------------------------------------------------------------------


def bad_calls():
    x = torch.randn(1, 2, 20, 16)
    yield ValueError, "cells must be None or an int >= 1, got 0", lambda: ea.Reorder(0)
    yield ValueError, "cells must be at most 1024, got 2000", lambda: ea.Reorder(2000)
    yield ValueError, "iterations must be an int >= 0", lambda: ea.Reorder(iterations=-1)
    yield ValueError, "sample must be an int >= 1, got 0", lambda: ea.Reorder(sample=0)
    yield ValueError, "prefix must be an int >= 0, got 1.5", lambda: ea.Reorder(prefix=1.5)
    yield TypeError, "reorder must be an entropy_attn.Reorder", lambda: ea.token_order(x, 8)
    yield TypeError, "x must be a torch.Tensor, got list", lambda: ea.token_order([1])
    yield ValueError, "x must have 4 dimensions", lambda: ea.token_order(x[0])
    yield TypeError, "x has dtype torch.int64", lambda: ea.token_order(x.long())
    yield TypeError, "lens must be an int32", lambda: ea.token_order(x, lens=torch.tensor([3]))
    yield ValueError, "lens must have shape", lambda: ea.token_order(x, lens=int32(3, 4))
    yield ValueError, "is_causal=True cannot be.*leave reorder out", lambda: ea.reorder_tokens(
        x, x, x, is_causal=True)  # fmt: skip
    yield ValueError, "window=8 cannot be combined", lambda: ea.reorder_tokens(x, x, x, window=8)
    yield TypeError, "reorder must be an", lambda: ea.reorder_tokens(x, x, x, {"cells": 8})
    yield ValueError, "value has shape", lambda: ea.reorder_tokens(x, x, x[:, :, 1:])
    yield TypeError, "kv_lens must be an int32", lambda: ea.reorder_tokens(x, x, x, kv_lens=[20])


@pytest.mark.parametrize("index", range(sum(1 for _ in bad_calls())))
def test_errors_name_the_argument(index):
    error, message, call = list(bad_calls())[index]
    with pytest.raises(error, match=message):
        call()
