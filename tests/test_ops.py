"""The custom ops under torch's own machinery: opcheck, compile, checkpointing, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case
from torch.autograd import forward_ad

import entropy_attn as ea
from entropy_attn import custom_ops, ops
from entropy_attn.testing import assert_close_to_reference

# Small: each is run some sixty times, and the interpreter is slow.
SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "q_len": 24, "kv_len": 40}
CASES = [
    Case(is_causal=True, lens=True, **SMALL),
    Case(density=None, **SMALL),
    Case(dtype=torch.float16, **SMALL),
]
BACKENDS = ["reference", "triton"]


def op_arguments(case: Case, device: str):
    problem = case.build(device)
    mask = problem.block_mask
    lists = (None, None) if mask is None else (mask.kv_num_blocks, mask.kv_indices)
    lists = (*lists, problem.kv_lens, problem.q_lens)
    geometry = (*case.block_size, case.is_causal, case.window or 0, problem.scale)
    return problem, lists, geometry


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, backend: str, device: str) -> None:
    problem, lists, geometry = op_arguments(case, device)
    leaves = problem.leaves()
    for entropies in ([False] * 4, [True, False, False, False], [True] * 4):
        arguments = (*leaves, *lists, *geometry, *entropies, backend)
        torch.library.opcheck(ops.attention_forward.overload, arguments)
    with torch.no_grad():
        torch.library.opcheck(ops.attention_forward.overload, (*problem.inputs, *arguments[3:]))
        out, lse, row, block, tile, mass = ops.attention_forward(*arguments)
        for grads in ((None,) * 4, [torch.randn_like(t) for t in (lse, row, block, tile)]):
            saved = (*problem.inputs, out, lse, row, block, mass)
            backward = (out, *grads, *saved, *lists, *geometry, backend)
            torch.library.opcheck(ops.attention_backward.overload, backward)
        for return_mass, given in ((True, None), (False, lse)):
            pair = (problem.query, problem.key, given)
            torch.library.opcheck(
                ops.tile_mass.overload, (*pair, *lists, *geometry, return_mass, backend)
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_without_values(backend: str, device: str) -> None:
    case = Case(batch=1, heads=1, kv_heads=1, q_len=16, kv_len=20, density=None)
    problem, lists, geometry = op_arguments(case, device)
    pair = (*problem.leaves()[:2], None)
    arguments = (*pair, *lists, *geometry, False, False, True, True, backend)
    torch.library.opcheck(ops.attention_forward.overload, arguments)
    with torch.no_grad():
        out, lse, _, _, tile, mass = ops.attention_forward(*arguments)
        grads, saved = (*[None] * 4, torch.randn_like(tile)), (out, lse, None, None, mass)
        backward = (*grads, *pair, *saved, *lists, *geometry, backend)
        torch.library.opcheck(ops.attention_backward.overload, backward)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    problem = Case(is_causal=True, q_len=48, kv_len=48).build(device)
    mask = problem.block_mask

    def loss(query, key, value):
        out, lse = ea.block_sparse_attention(
            query, key, value, mask, is_causal=True, return_lse=True, backend=backend
        )
        _, entropy = ea.attention_with_entropy(query, key, value, block_size=16, backend=backend)
        entropies = entropy.row.sum() + entropy.block.sum() + entropy.tile.sum()
        return out.square().sum() + lse.clamp(min=-10).sum() + entropies, entropy.tile.detach()

    eager_leaves, compiled_leaves = problem.leaves(), problem.leaves()
    value, tile = loss(*eager_leaves)
    mode = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, backend=mode)
    compiled_value, compiled_tile = compiled(*compiled_leaves)
    torch.testing.assert_close(compiled_value, value)
    torch.testing.assert_close(compiled_tile, tile)
    for got, expected in zip(
        torch.autograd.grad(compiled_value, compiled_leaves),
        torch.autograd.grad(value, eager_leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_recomputes_the_same(use_reentrant: bool, device: str) -> None:
    problem = Case(q_len=48, kv_len=48).build(device)

    def attend(query, key, value):
        out, entropy = ea.attention_with_entropy(
            query, key, value, block_mask=problem.block_mask, backend="triton"
        )
        return out, entropy.row, entropy.tile

    def loss(out, row, tile):
        return out.square().sum() + row.sum() + tile.square().sum()

    plain, checkpointed = problem.leaves(), problem.leaves()
    expected = torch.autograd.grad(loss(*attend(*plain)), plain)
    results = torch.utils.checkpoint.checkpoint(attend, *checkpointed, use_reentrant=use_reentrant)
    loss(*results).backward()
    for leaf, gradient in zip(checkpointed, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_reference_gradients_in_double_precision() -> None:
    case = Case(q_len=20, kv_len=24, head_dim=16, dtype=torch.float64, is_causal=True)
    problem = case.build("cpu")

    def results(*leaves):
        out, lse = ea.block_sparse_attention(
            *leaves, problem.block_mask, is_causal=True, return_lse=True
        )
        _, entropy = ea.attention_with_entropy(
            *leaves, block_mask=problem.block_mask, is_causal=True
        )
        finite = torch.where(torch.isfinite(lse), lse, 0.0)
        return out, finite, entropy.row, entropy.block, entropy.tile

    assert torch.autograd.gradcheck(results, problem.leaves())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_sees_no_key_passes_no_gradient_on(backend: str, device: str) -> None:
    """The loss has infinite gradients there; none of them may leave."""
    leaves = Case(head_dim=16, is_causal=True, density=None).build(device).leaves()
    lens = [torch.tensor(n, dtype=torch.int32, device=device) for n in ([56, 0], [20, 7])]
    _, entropy = ea.attention_with_entropy(
        *leaves, block_size=16, is_causal=True, kv_lens=lens[0], q_lens=lens[1], backend=backend
    )
    loss = entropy.row.log().sum() + entropy.block.sqrt().sum() + entropy.tile.log().sum()
    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.isfinite(grad).all()
        assert not grad[1].any()
        assert grad[0].any() or leaf is leaves[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_that_the_dispatcher_records(
    backend: str, device: str, monkeypatch
) -> None:
    problem = Case(q_len=20, kv_len=24, head_dim=16, lens=True).build(device)
    leaves = problem.leaves()
    found = []
    for is_watched in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(custom_ops, "_is_watched", lambda tensors, known=is_watched: known)
            for op in (ops.attention_forward, ops.attention_backward):
                if not is_watched:
                    patch.setattr(op, "overload", None)
            out, entropy = ea.attention_with_entropy(*leaves, block_size=16, backend=backend)
            loss = out.square().sum() + entropy.row.sum() + entropy.tile.square().sum()
            found.append((out, *torch.autograd.grad(loss, leaves)))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tangents_are_refused_and_not_lost(backend: str, device: str) -> None:
    query, key, value = Case(q_len=20, kv_len=24, head_dim=16).build(device).inputs
    with forward_ad.dual_level():
        ea.attention_with_entropy(query, key, value, block_size=16, backend=backend)
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ea.attention_with_entropy(dual, key, value, block_size=16, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_gradients_raise(backend: str, device: str) -> None:
    leaves = Case(q_len=20, kv_len=24, head_dim=16).build(device).leaves()
    _, entropy = ea.attention_with_entropy(*leaves, block_size=16, backend=backend)
    (grad,) = torch.autograd.grad(entropy.row.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        grad.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
def test_cuda_graph_replays_with_new_inputs_and_lists(is_causal: bool) -> None:
    case = Case(
        head_dim=64, block_size=(64, 64), q_len=512, kv_len=512, dtype=torch.bfloat16,
        is_causal=is_causal, kv_heads=2,
    )  # fmt: skip
    problem = case.build("cuda")
    leaves, mask = problem.leaves(), problem.block_mask
    static = [t.contiguous() for t in (mask.kv_num_blocks, mask.kv_indices)]
    mask = ea.BlockMask(*static, (64, 64), 512, 512, validate=False)

    def step():
        out = ea.block_sparse_attention(*leaves, mask, is_causal=is_causal)
        return out, torch.autograd.grad(out, leaves, torch.ones_like(out))

    def entropy_step():
        _, found = ea.attention_with_entropy(*leaves, block_mask=mask, is_causal=is_causal)
        loss = found.row.mean() + found.block.mean() + found.tile.mean()
        return torch.autograd.grad(loss, leaves[:2])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(), entropy_step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = step()
        entropy_grads = entropy_step()

    torch.manual_seed(7)
    other = case.build("cuda")
    with torch.no_grad():
        for leaf, new in zip(leaves, other.inputs, strict=True):
            leaf.copy_(new)
        static[0].copy_(other.block_mask.kv_num_blocks)
        static[1].copy_(other.block_mask.kv_indices)
    graph.replay()
    exact, plain = other.dense(torch.float64), other.dense(case.dtype)
    assert_close_to_reference(out, plain[0], exact[0], "out")
    expected, allowed = (
        torch.autograd.grad(d[0], d[3], torch.ones_like(d[0])) for d in (exact, plain)
    )
    for got, *references in zip(grads, allowed, expected, strict=True):
        assert_close_to_reference(got, *references, "gradient")
    for replayed, launched in zip(entropy_grads, entropy_step(), strict=True):
        assert torch.equal(replayed, launched)


@pytest.mark.gpu
def test_no_wait_for_the_device(forbid_waiting) -> None:
    problem = Case(
        head_dim=64, block_size=(64, 64), q_len=512, kv_len=512, dtype=torch.float16, is_causal=True
    ).build("cuda")
    leaves = problem.leaves()
    mask = problem.block_mask

    def step():
        out = ea.block_sparse_attention(*leaves, mask, is_causal=True)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        out, entropy = ea.attention_with_entropy(*leaves, block_mask=mask, is_causal=True)
        loss = out.sum() + entropy.row.sum() + entropy.block.sum() + entropy.tile.sum()
        torch.autograd.grad(loss, leaves)
        chosen = ea.select_blocks(problem.query, problem.key, is_causal=True)
        ea.block_sparse_attention(*problem.inputs, chosen, is_causal=True)

    step()
    with forbid_waiting():
        step()
