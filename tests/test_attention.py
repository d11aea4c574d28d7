"""Attention, its gradients and its entropies against dense PyTorch, for every implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, Problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import entropy_attn as ea
from entropy_attn.reference import dense
from entropy_attn.testing import assert_close_to_reference

KINDS = ("row", "block", "tile")
SMALL = [
    Case(),
    Case(is_causal=True),
    Case(is_causal=True, lens=True),
    Case(lens=True),
    Case(is_causal=True, window=20, heads=4, kv_heads=2),
    Case(is_causal=True, window=9, lens=True),
    Case(q_len=60, kv_len=40, is_causal=True),  # the first queries stand before every key
    Case(q_len=7, kv_len=5),  # shorter than a block
    Case(q_len=1, kv_len=64, is_causal=True),
    Case(block_size=(32, 64), q_len=100, kv_len=130, is_causal=True),
    Case(block_size=(64, 16), q_len=65, kv_len=64),
    Case(block_size=(32, 128), q_len=40, kv_len=300, is_causal=True),
    Case(head_dim=80, block_size=(32, 32), is_causal=True),
    Case(head_dim=96, block_size=(32, 32), q_len=64, kv_len=64),
    Case(head_dim=16, heads=3, kv_heads=3, mask_heads=1),
    Case(head_dim=17, heads=3, kv_heads=1, mask_batch=1),
    Case(density=None, is_causal=True),
    Case(density=1.0, q_len=64, kv_len=64),
    Case(q_len=48, kv_len=48, kv_heads=2, fused=True, is_causal=True),
    Case(scale=-0.3),
    Case(scale=0.0, is_causal=True),
    Case(scale=4.0),
]
HALF = [
    Case(dtype=torch.float16, is_causal=True),
    Case(dtype=torch.float16, head_dim=64, block_size=(32, 32), lens=True, is_causal=True),
]
LARGE_SHAPES = [
    (head_dim, block_size, torch.bfloat16)
    for head_dim in (16, 64, 80, 96, 128, 256)
    for block_size in ((64, 64), (128, 128))
]
LARGE_SHAPES += [
    (head_dim, block_size, torch.float16)
    for head_dim in (64, 128)
    for block_size in ((32, 32), (128, 64), (64, 128), (16, 256), (256, 32))
]
LARGE_SHAPES += [(64, (64, 64), torch.float32), (80, (32, 32), torch.float32)]
LARGE_SHAPES += [(128, (128, 128), torch.float32), (192, (64, 64), torch.float16)]
LARGE = [
    Case(head_dim=head_dim, block_size=block_size, dtype=dtype, is_causal=is_causal,
         q_len=577, kv_len=705, heads=4, kv_heads=2, lens=is_causal)
    for head_dim, block_size, dtype in LARGE_SHAPES
    for is_causal in (False, True)
]  # fmt: skip
LARGE += [
    Case(head_dim=64, block_size=(64, 64), q_len=2048, kv_len=8191, is_causal=True,
         dtype=torch.bfloat16, window=500),
    Case(head_dim=128, block_size=(128, 128), q_len=4096, kv_len=4096, dtype=torch.bfloat16,
         heads=8, kv_heads=8, fused=True),
    Case(head_dim=128, block_size=(128, 128), q_len=4096, kv_len=4096, dtype=torch.bfloat16,
         density=None, is_causal=True),
    Case(head_dim=64, block_size=(64, 64), q_len=197, kv_len=197, dtype=torch.float16,
         density=1.0),
    Case(head_dim=64, block_size=(64, 64), q_len=500, kv_len=500, is_causal=True,
         dtype=torch.bfloat16, odd_strides=True),
    Case(head_dim=128, block_size=(128, 128), q_len=500, kv_len=500, dtype=torch.bfloat16,
         odd_strides=True),
]  # fmt: skip

on_gpu = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.gpu, id=str(case)) for case in LARGE]
)


def check_forward_and_backward(case: Case, device: str, backend: str) -> None:
    problem = case.build(device)
    query, key, value = problem.leaves()
    mask = problem.block_mask
    if mask is None:
        mask = ea.BlockMask.full(1, 1, case.q_len, case.kv_len, case.block_size, device=device)
    out, lse = ea.block_sparse_attention(
        query, key, value, mask, return_lse=True, backend=backend, **problem.options
    )
    exact = problem.dense(torch.float64)
    plain = problem.dense(case.dtype)
    grad_out = torch.randn_like(out)
    grad_lse = torch.randn_like(lse)
    sizes = term_sizes(problem, exact[2].detach(), grad_out)
    assert_close_to_reference(out, plain[0], exact[0], "out", magnitude=sizes["value"])
    assert_close_to_reference(lse, plain[1], exact[1], "lse", magnitude=sizes["score"])

    def gradients(out, lse, leaves):
        # Rows without a key have lse -inf; no loss can use them.
        finite = torch.where(torch.isfinite(lse), lse, 0.0)
        loss = (out * grad_out.to(out.dtype)).sum() + (finite * grad_lse.to(lse.dtype)).sum()
        return torch.autograd.grad(loss, leaves)

    got = gradients(out, lse, (query, key, value))
    expected = gradients(*exact[:2], exact[3])
    allowed = gradients(*plain[:2], plain[3])
    for name, *grads in zip(("query", "key", "value"), got, allowed, expected, strict=True):
        size = sizes[f"gradient of {name}"]
        assert_close_to_reference(*grads, f"gradient of {name}", magnitude=size)


def term_sizes(problem: Problem, probabilities: Tensor, grad_out: Tensor) -> dict[str, float]:
    """How large the terms are that each result is a sum of."""
    query, key, value = (t.detach().double().abs() for t in problem.inputs)
    group = query.shape[1] // key.shape[1]
    grad = grad_out.double().abs()
    scale = abs(problem.scale)
    score = (query @ key.repeat_interleave(group, 1).mT).max().item() * scale
    grad_p = (grad @ value.repeat_interleave(group, 1).mT).max().item()
    column = probabilities.sum(-2).max().item() * group  # how often a key is used at most
    # An error of the scores is one of the logarithm of every probability.
    amplified = 1.0 + score
    # delta is a product with the output as it was rounded: one error for all keys of a row. Of one
    # rounding the RMS is about a quarter of eps; what is returned here is taken times fp32's.
    out = probabilities @ problem.inputs[2].detach().double().repeat_interleave(group, 1)
    eps = torch.finfo(problem.inputs[0].dtype).eps / torch.finfo(torch.float32).eps
    delta = scale * eps / 4 * (grad * out).square().sum(-1).sqrt().max().item()
    used = probabilities.square().sum(-2).sqrt().max().item() * group
    return {
        "score": score,
        "value": value.max().item() * amplified,
        "gradient of query": (scale * grad_p * amplified + delta) * key.max().item(),
        "gradient of key": (scale * grad_p * column * amplified + delta * used)
        * query.max().item(),
        "gradient of value": grad.max().item() * column * amplified,
    }


def entropy_options(problem: Problem) -> dict[str, Any]:
    if problem.block_mask is None:
        return dict(problem.options, block_size=problem.case.block_size)
    return dict(problem.options, block_mask=problem.block_mask)


def entropy_measures(case: Case) -> dict[str, Callable[[Tensor], Tensor]]:
    """The entropies, as functions of dense probabilities."""
    return {
        "row": dense.entropy,
        "block": lambda p: dense.entropy(dense.sum_blocks(p, case.block_size[1], -1)),
        "tile": lambda p: dense.entropy(dense.dense_tile_mass(p, case.block_size)),
    }


def check_entropies(case: Case, device: str, backend: str) -> None:
    problem = case.build(device)
    options = entropy_options(problem)
    out, got = ea.attention_with_entropy(*problem.inputs, backend=backend, **options)
    with torch.no_grad():
        exact = problem.dense(torch.float64)
        # The entropies are fp32 whatever the inputs: so is what they are held to.
        plain = problem.dense(torch.float32)
        assert_close_to_reference(out, problem.dense(case.dtype)[0], exact[0], "out")
    # An error of the scores moves an entropy by at most the spread of log p, about log N, times it.
    score = term_sizes(problem, exact[2].detach(), out)["score"]
    size = score * torch.tensor(float(case.kv_len)).log().item()
    for kind, measure in entropy_measures(case).items():
        expected = measure(exact[2].detach())
        # An entropy is a difference of logarithms: its rounding is that of log N.
        scale = torch.full_like(expected, torch.tensor(float(case.kv_len)).log().item() + 1.0)
        actual = getattr(got, kind) + scale
        allowed = measure(plain[2].detach()) + scale
        assert_close_to_reference(
            actual.float(), allowed, expected + scale, f"{kind} entropy", magnitude=size
        )
        assert (getattr(got, kind) >= 0).all()


def check_entropy_gradients(
    case: Case, device: str, backend: str, kinds: tuple[str, ...] = KINDS, with_out: bool = True
) -> None:
    """Gradients of a loss of entropies, and of out if asked, against autograd through dense."""
    problem = case.build(device)
    leaves = problem.leaves()
    out, entropy = ea.attention_with_entropy(
        *leaves, kinds=kinds, backend=backend, **entropy_options(problem)
    )
    measures = entropy_measures(case)
    weights = {kind: torch.randn_like(getattr(entropy, kind)) for kind in kinds}
    grad_out = torch.randn_like(out) * with_out

    def gradients(out, entropies, leaves):
        loss = (out * grad_out.to(out.dtype)).sum() if with_out else 0.0
        for kind, found in entropies.items():
            loss = loss + (found * weights[kind].to(found.dtype)).sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    def dense_gradients(dtype):
        out, _, probabilities, leaves = problem.dense(dtype)
        entropies = {kind: measures[kind](probabilities) for kind in kinds}
        return gradients(out, entropies, leaves), probabilities.detach()

    got = gradients(out, {kind: getattr(entropy, kind) for kind in kinds}, leaves)
    allowed, _ = dense_gradients(case.dtype)
    expected, probabilities = dense_gradients(torch.float64)
    sizes = entropy_term_sizes(problem, probabilities, grad_out, weights)
    for name, *grads in zip(("query", "key", "value"), got, allowed, expected, strict=True):
        size = sizes[f"gradient of {name}"]
        assert_close_to_reference(*grads, f"gradient of {name}", magnitude=size)


def entropy_term_sizes(
    problem: Problem, probabilities: Tensor, grad_out: Tensor, weights: dict[str, Tensor]
) -> dict[str, float]:
    """`term_sizes` where dP is joined by gradients of entropies times logarithms."""
    sizes = term_sizes(problem, probabilities, grad_out)
    query, key, _ = (t.detach().double().abs().max().item() for t in problem.inputs)
    column = probabilities.sum(-2).max().item() * (problem.query.shape[1] // problem.key.shape[1])
    # -log p is at most the spread of the scores and log N.
    log = 2 * sizes["score"] + math.log(problem.case.kv_len)
    term = abs(problem.scale) * log * sum(weight.abs().max().item() for weight in weights.values())
    amplified = 1.0 + sizes["score"]
    sizes["gradient of query"] += term * key * amplified
    sizes["gradient of key"] += term * query * column * amplified
    return sizes


@pytest.mark.parametrize("case", SMALL + HALF, ids=str)
def test_reference_matches_dense(case: Case) -> None:
    check_forward_and_backward(case, "cpu", "reference")
    check_entropies(case, "cpu", "reference")
    for kinds in [KINDS, *zip(KINDS, strict=True)]:
        check_entropy_gradients(case, "cpu", "reference", kinds, with_out=len(kinds) > 1)


@pytest.mark.parametrize("case", SMALL + HALF, ids=str)
def test_kernel_matches_dense(case: Case, device: str) -> None:
    check_forward_and_backward(case, device, "triton")


@pytest.mark.parametrize("case", SMALL + HALF, ids=str)
def test_kernel_entropies_match_dense(case: Case, device: str) -> None:
    check_entropies(case, device, "triton")


@pytest.mark.parametrize("case", SMALL + HALF, ids=str)
def test_kernel_entropy_gradients_match_dense(case: Case, device: str) -> None:
    check_entropy_gradients(case, device, "triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [
        Case(is_causal=True, lens=True),
        Case(is_causal=True, density=None, dtype=torch.float16),
        Case(block_size=(16, 256), q_len=40, kv_len=600, is_causal=True, window=300),
    ],
    ids=str,
)
def test_kernel_gradient_of_one_entropy(case: Case, kind: str, device: str) -> None:
    """A loss of nothing but one entropy."""
    check_entropy_gradients(case, device, "triton", (kind,), with_out=False)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    "case",
    [
        Case(is_causal=True, lens=True),
        Case(batch=1, q_len=40, kv_len=50, density=None, kv_heads=1),
        Case(batch=1, q_len=40, kv_len=50, is_causal=True, window=20, scale=-0.3),
    ],
    ids=str,
)
def test_tile_entropy_takes_no_values(case: Case, backend: str, device: str) -> None:
    problem = case.build(device)
    options = dict(entropy_options(problem), backend=backend)
    query, key, value = problem.leaves()
    _, entropy = ea.attention_with_entropy(query, key, value, kinds=("tile",), **options)
    alone = ea.api.tile_entropy(query, key, **options)
    torch.testing.assert_close(alone, entropy.tile, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(ea.api.tile_entropy(query, key, **options), alone)
    weight = torch.randn_like(alone)
    expected = torch.autograd.grad((entropy.tile * weight).sum(), (query, key))
    for got, wanted in zip(
        torch.autograd.grad((alone * weight).sum(), (query, key)), expected, strict=True
    ):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@on_gpu
def test_kernel_entropy_gradients_match_dense_at_real_sizes(case: Case) -> None:
    check_entropy_gradients(case, "cuda", "triton")


@on_gpu
def test_kernel_matches_dense_at_real_sizes(case: Case) -> None:
    check_forward_and_backward(case, "cuda", "triton")


@on_gpu
def test_kernel_entropies_match_dense_at_real_sizes(case: Case) -> None:
    check_entropies(case, "cuda", "triton")


@st.composite
def cases(draw, dtypes=(torch.float32, torch.float16)) -> Case:
    kv_heads = draw(st.integers(1, 2))
    is_causal = draw(st.booleans())
    return Case(
        head_dim=draw(st.integers(16, 40)),
        block_size=draw(st.tuples(*[st.sampled_from((16, 32, 64))] * 2)),
        q_len=draw(st.integers(1, 80)),
        kv_len=draw(st.integers(1, 100)),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        batch=draw(st.integers(1, 2)),
        dtype=draw(st.sampled_from(dtypes)),
        is_causal=is_causal,
        lens=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 60)) if is_causal else None,
        density=draw(st.none() | st.sampled_from((0.1, 0.6, 1.0))),
    )


@settings(max_examples=8, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**20))
def test_kernel_matches_dense_for_any_shape(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_forward_and_backward(case, device, "triton")
    check_entropy_gradients(case, device, "triton")


@settings(max_examples=60, deadline=None)
@given(case=cases((torch.float32, torch.float16, torch.bfloat16)), seed=st.integers(0, 2**20))
def test_reference_matches_dense_for_any_shape(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    check_forward_and_backward(case, "cpu", "reference")
    check_entropy_gradients(case, "cpu", "reference")


@pytest.mark.parametrize(
    "case",
    [
        Case(block_size=(32, 32), q_len=70, kv_len=90, is_causal=True, lens=True),
        Case(head_dim=24, block_size=(32, 16), q_len=77, kv_len=77, kv_heads=2, fused=True),
        Case(head_dim=40, block_size=(32, 64), q_len=33, kv_len=65, density=1.0),
    ],
    ids=str,
)
def test_tiles_by_the_copy_engine(case: Case, device: str, monkeypatch) -> None:
    """The other way to fetch tiles, which an architecture or odd strides may rule out."""
    from entropy_attn.kernels import block_sparse_backward as backward
    from entropy_attn.kernels import block_sparse_forward as forward

    case = replace(case, dtype=torch.float16)
    steps = (16, 16, 4, 1)
    forward_config = forward.ForwardConfig(*steps, descriptors=True)
    backward_config = backward.BackwardConfig(*steps, *steps, descriptors=True)
    monkeypatch.setattr(forward, "forward_config", lambda *args, **kwargs: forward_config)
    monkeypatch.setattr(backward, "backward_config", lambda *args, **kwargs: backward_config)
    check_forward_and_backward(case, device, "triton")
    check_entropy_gradients(case, device, "triton")
    check_entropy_gradients(case, device, "triton", ("tile",), with_out=False)


@st.composite
def gpu_cases(draw) -> Case:
    """Any lengths and densities; what makes a new kernel takes few values, as compiling is slow.

    So does head_dim: rows of a multiple of 16 entries keep the alignment whatever the length is.
    """
    return Case(
        head_dim=48,
        block_size=draw(st.sampled_from(((32, 64), (64, 64)))),
        q_len=draw(st.integers(1, 700)),
        kv_len=draw(st.integers(1, 700)),
        heads=4,
        kv_heads=2,
        dtype=torch.bfloat16,
        is_causal=draw(st.booleans()),
        lens=True,
        density=draw(st.sampled_from((0.05, 0.3, 0.6, 1.0))),
    )


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(case=gpu_cases(), seed=st.integers(0, 2**20))
def test_gpu_kernel_matches_dense_for_any_length(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    check_forward_and_backward(case, "cuda", "triton")
    check_entropy_gradients(case, "cuda", "triton")


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_tile_mass_matches_dense(backend: str, device: str) -> None:
    case = Case(is_causal=True, lens=True, density=None, block_size=(16, 32))
    problem = case.build(device)
    mass = ea.api.tile_mass(
        problem.query, problem.key, block_size=(16, 32), backend=backend, **problem.options
    )
    exact, plain = (
        dense.dense_tile_mass(problem.dense(dtype)[2].detach(), (16, 32))
        for dtype in (torch.float64, torch.float32)
    )
    assert_close_to_reference(mass, plain, exact, "tile mass")


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_lengths_may_be_a_view(backend: str, device: str) -> None:
    """Kernels read them as adjacent numbers."""
    query = torch.randn(3, 1, 40, 16, device=device)
    mask = ea.BlockMask.full(3, 1, 40, 40, 16, device=device)
    views = (
        torch.tensor([25], dtype=torch.int32, device=device).expand(3),
        torch.tensor([9, 0, 33, 0, 40, 0], dtype=torch.int32, device=device)[::2],
    )
    for lens in views:
        found, expected = (
            ea.block_sparse_attention(query, query, query, mask, kv_lens=x, backend=backend)
            for x in (lens, lens.contiguous())
        )
        assert torch.equal(found, expected)
        kept, wanted = (
            ea.select_blocks(query, query, block_size=16, kv_lens=x, backend=backend).to_dense()
            for x in (lens, lens.contiguous())
        )
        assert torch.equal(kept, wanted)


@pytest.mark.gpu
def test_results_are_deterministic() -> None:
    case = Case(head_dim=64, block_size=(64, 64), q_len=2048, kv_len=2048, dtype=torch.bfloat16)
    problem = case.build("cuda")
    runs = []
    for _ in range(3):
        leaves = problem.leaves()
        out, found = ea.attention_with_entropy(*leaves, block_mask=problem.block_mask)
        loss = out.float().sum() + found.row.sum() + found.block.sum() + found.tile.sum()
        runs.append([out, *torch.autograd.grad(loss, leaves)])
    for run in runs[1:]:
        for first, later in zip(runs[0], run, strict=True):
            assert torch.equal(first, later)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    """A fused QKV of 5.4 GB: the last head's rows lie more than 2^31 elements in."""
    from entropy_attn.kernels.block_sparse_forward import block_sparse_forward

    length, heads, head_dim, block = 110_000, 64, 128, 128
    fused = torch.randn(1, length, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    query, key, value = (t.transpose(1, 2) for t in fused.unbind(2))
    assert query.stride(2) * length > 2**31
    tiles = -(-length // block)
    # Every tile sees the last block of keys only.
    counts = torch.ones(1, 1, tiles, dtype=torch.int32, device="cuda")
    last = torch.full((1, 1, tiles, 1), tiles - 1, dtype=torch.int32, device="cuda")
    mask = ea.BlockMask(counts, last, (block, block), length, length)
    tail = slice((tiles - 1) * block, None)
    rows = slice(length - 200, None)
    query, key, value = (t.detach().requires_grad_() for t in (query, key, value))
    out = ea.block_sparse_attention(query, key, value, mask, backend="triton")
    grads = torch.autograd.grad(out[:, :, rows].float().square().sum(), (query, key, value))

    def expected(dtype):
        leaves = [
            t.detach().to(dtype).requires_grad_()
            for t in (query[:, :, rows], key[:, :, tail], value[:, :, tail])
        ]
        visible = torch.ones(1, 1, 200, length - tail.start, dtype=torch.bool, device="cuda")
        result = dense.dense_attention(*leaves, visible, head_dim**-0.5)[0]
        return result, torch.autograd.grad(result.float().square().sum(), leaves)

    exact, plain = expected(torch.float32), expected(torch.bfloat16)
    assert_close_to_reference(out[:, :, rows], plain[0], exact[0], "out")
    # So large a call may have run in a kernel of this GPU's own.
    portable, *_ = block_sparse_forward(
        *(t.detach() for t in (query, key, value)), counts, last, None, None, (block, block), False,
        0, head_dim**-0.5, False, False,
    )  # fmt: skip
    assert_close_to_reference(
        portable[:, :, rows], plain[0], exact[0], "out of the portable kernel"
    )
    del portable
    for grad, part, *references in zip(grads, (rows, tail, tail), plain[1], exact[1], strict=True):
        assert_close_to_reference(grad[:, :, part], *references, "gradient")
