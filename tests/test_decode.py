"""Few queries against many keys: keys split over programs, lists of key heads, pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, Problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import entropy_attn as ea
from entropy_attn import ops
from entropy_attn.benchmarks.registry import Context
from entropy_attn.benchmarks.suites import decode as suite
from entropy_attn.kernels.decode import (
    FEW_QUERIES,
    DecodeConfig,
    adjacent_steps,
    decode_config,
    heads_a_tile,
    split_forward,
)
from entropy_attn.reference.attention import compute_dtype
from entropy_attn.testing import assert_close_to_reference
from entropy_attn.validation import MOST_PAGED_QUERIES

LONG = Case(q_len=1, kv_len=900, is_causal=True, block_size=(16, 64), heads=4, kv_heads=2)
CASES = [
    LONG,
    replace(LONG, q_len=3, heads=6, lens=True),  # 9 rows, sequences that end in a block
    replace(LONG, q_len=16, heads=2, window=70),
    replace(LONG, is_causal=False, head_dim=80, density=0.1),
    replace(LONG, density=None, kv_len=513, block_size=(64, 64)),
    replace(LONG, heads=12, kv_heads=1, q_len=4, head_dim=96, block_size=(32, 16)),
    replace(LONG, q_len=2, block_size=(16, 256), dtype=torch.float16),
    replace(LONG, q_len=8, kv_len=5, density=None, is_causal=True),  # queries before every key
    replace(LONG, q_len=12, heads=24, kv_heads=2, head_dim=16),  # more rows than one tile takes
]
LARGE = [
    Case(head_dim=head_dim, dtype=dtype, q_len=q_len, kv_len=20_000, heads=16, kv_heads=kv_heads,
         is_causal=True, block_size=(16, block), batch=3, lens=q_len > 1, density=0.2)
    for head_dim, dtype, q_len, kv_heads, block in (
        (128, torch.bfloat16, 1, 4, 64), (128, torch.bfloat16, 8, 2, 128),
        (64, torch.float16, 1, 16, 64), (80, torch.bfloat16, 4, 4, 32),
        (256, torch.bfloat16, 1, 4, 64), (128, torch.float32, 2, 8, 64),
        (64, torch.bfloat16, 16, 1, 16),
    )
]  # fmt: skip


def with_blocks(problem: Problem, heads: int) -> tuple[Problem, ea.BlockMask | None]:
    """The problem with random lists of so many heads, the last of them empty, and their mask.

    The problem's own lists leave the first block of queries nothing, and here there is no other.
    """
    if problem.blocks is None:
        return problem, None
    case = problem.case
    blocks = torch.rand_like(problem.blocks[:, :heads], dtype=torch.float32) < case.density
    blocks[0, :, :, 0] = True
    blocks[-1, -1] = False
    mask = ea.BlockMask.from_dense(blocks, case.block_size, case.q_len, case.kv_len)
    return replace(problem, blocks=blocks.repeat_interleave(case.heads // heads, 1)), mask


def shared_lists(problem: Problem) -> tuple[Problem, ea.BlockMask | None]:
    """The problem with one list a key head, and that mask."""
    return with_blocks(problem, problem.case.kv_heads)


def paged(problem: Problem, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """(key pages, value pages, table) with pages in disorder and rubbish where nothing is."""
    case = problem.case
    per_row = -(-case.kv_len // page)
    device = problem.key.device
    order = torch.randperm(case.batch * per_row + 3, generator=torch.Generator().manual_seed(1))
    table = order[: case.batch * per_row].view(case.batch, per_row).to(device)
    pages = []
    for tensor in (problem.key, problem.value):
        whole = tensor.new_full((*tensor.shape[:2], per_row * page, case.head_dim), float("nan"))
        whole[:, :, : case.kv_len] = tensor
        found = tensor.new_full((len(order), case.kv_heads, page, case.head_dim), float("nan"))
        found[table] = whole.unflatten(2, (per_row, page)).transpose(1, 2)
        pages.append(found)
    return *pages, table.to(torch.int32)


def compare(problem: Problem, found, plain, exact) -> None:
    """out and lse; where thousands of values cancel, what remains is rounding of their size."""
    sizes = (problem.value.abs().max().item(), 0.0)
    for name, size, *results in zip(("out", "lse"), sizes, found, plain, exact, strict=True):
        assert_close_to_reference(*results, name, magnitude=size)


def check(case: Case, device: str, backend: str) -> None:
    problem, mask = shared_lists(case.build(device))
    with torch.no_grad():
        exact, plain = (problem.dense(dtype)[:2] for dtype in (torch.float64, case.dtype))
    everything = ea.BlockMask.full(1, 1, case.q_len, case.kv_len, case.block_size, device=device)
    found = ea.block_sparse_attention(
        *problem.inputs, mask or everything, return_lse=True, backend=backend, **problem.options
    )
    compare(problem, found, plain, exact)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_matches_dense(case: Case):
    check(case, "cpu", "reference")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_matches_dense(case: Case, device: str):
    check(case, device, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_gpu_kernel_matches_dense(case: Case):
    check(case, "cuda", "triton")


def check_pages(case: Case, page: int, device: str, backend: str) -> None:
    problem = case.build(device)
    problem = replace(problem, q_lens=None)
    lens = problem.kv_lens
    if lens is None:
        lens = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=device)
    problem = replace(problem, kv_lens=lens)
    problem, mask = shared_lists(problem)
    with torch.no_grad():
        exact, plain = (problem.dense(dtype)[:2] for dtype in (torch.float64, case.dtype))
    key_pages, value_pages, table = paged(problem, page)
    if mask is not None:  # for as many keys as the pages hold
        blocks = mask.to_dense()
        columns = -(-table.shape[1] * page // case.block_size[1])
        blocks = torch.nn.functional.pad(blocks, (0, columns - blocks.shape[3]), value=True)
        mask = ea.BlockMask.from_dense(blocks, case.block_size, case.q_len, table.shape[1] * page)
    found = ea.paged_attention(
        problem.query, key_pages, value_pages, table, lens, mask, is_causal=case.is_causal,
        window=case.window, return_lse=True, backend=backend,
    )  # fmt: skip
    compare(problem, found, plain, exact)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("page", [16, 40, 256])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4], CASES[5]], ids=str)
def test_pages_hold_the_same_keys(case: Case, page: int, backend: str, device: str):
    check_pages(case, page, device if backend == "triton" else "cpu", backend)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_pages_hold_the_same_keys_on_a_gpu(case: Case, page: int):
    check_pages(case, page, "cuda", "triton")


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 16), st.integers(1, 700), st.sampled_from([(1, 1), (4, 1), (6, 3), (3, 3)]),
    st.booleans(), st.booleans(), st.integers(0, 10_000),
)  # fmt: skip
def test_any_shape(q_len: int, kv_len: int, heads: tuple[int, int], causal: bool, lens: bool,
                   seed: int):  # fmt: skip
    torch.manual_seed(seed)
    case = Case(q_len=q_len, kv_len=kv_len, heads=heads[0], kv_heads=heads[1], is_causal=causal,
                lens=lens, block_size=(16, 32), head_dim=16, density=0.4)  # fmt: skip
    check(case, "cuda" if torch.cuda.is_available() else "cpu", "triton")


def test_lists_of_key_heads_work_for_many_queries_and_gradients(device: str):
    case = Case(q_len=40, kv_len=56, heads=4, kv_heads=2)
    problem, mask = shared_lists(case.build(device))
    own = problem.block_mask
    grad = torch.randn_like(problem.query)
    for backend in ("triton", "reference"):
        results = []
        for each in (mask, own):
            leaves = [x.detach().requires_grad_() for x in problem.inputs]
            out = ea.block_sparse_attention(*leaves, each, backend=backend)
            results.append((out, *torch.autograd.grad(out, leaves, grad)))
        for shared, single in zip(*results, strict=True):
            assert torch.equal(shared, single)


def test_gradients_of_few_queries(device: str):
    case = Case(q_len=5, kv_len=300, heads=4, kv_heads=2, is_causal=True, block_size=(16, 32))
    problem, mask = shared_lists(case.build(device))
    grad = torch.randn_like(problem.query)
    out, _, _, leaves = problem.dense(torch.float64)
    expected = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    out, _, _, leaves = problem.dense(case.dtype)
    plain = torch.autograd.grad(out, leaves, grad)
    leaves = [x.detach().requires_grad_() for x in problem.inputs]
    out = ea.block_sparse_attention(*leaves, mask, is_causal=True, backend="triton")
    for results in zip(torch.autograd.grad(out, leaves, grad), plain, expected, strict=True):
        assert_close_to_reference(*results)


def test_every_head_may_have_a_list_of_its_own(device: str):
    case = Case(q_len=2, kv_len=400, heads=4, kv_heads=2, is_causal=True, block_size=(16, 32))
    problem, mask = with_blocks(case.build(device), case.heads)
    with torch.no_grad():
        exact, plain = (problem.dense(dtype)[0] for dtype in (torch.float64, case.dtype))
    out = ea.block_sparse_attention(*problem.inputs, mask, is_causal=True, backend="triton")
    assert_close_to_reference(out, plain, exact)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_any_table_that_says_the_same(backend: str, device: str):
    device = device if backend == "triton" else "cpu"
    problem = Case(q_len=1, kv_len=200, heads=4, kv_heads=2).build(device)
    key_pages, value_pages, table = paged(problem, 16)
    lens = torch.tensor([200, 77], dtype=torch.int32, device=device)

    def run(table):
        return ea.paged_attention(
            problem.query, key_pages, value_pages, table, lens, backend=backend
        )

    expected = run(table)
    doubled = table.repeat_interleave(2, 1)
    for same in (table.t().contiguous().t(), doubled[:, ::2]):
        assert torch.equal(run(same), expected)
    # Rubbish past the end is never followed; the keys are split over other programs.
    torch.testing.assert_close(run(torch.cat([table, table - 999], 1)), expected)


@pytest.mark.parametrize("q_len", [1, 40])
def test_what_is_not_a_number_stays_so(q_len: int, device: str):
    query, key, value = torch.randn(3, 1, 2, 64, 16, device=device)
    query = query[:, :, :q_len].clone()
    query[0, 0, 0, 3] = float("nan")
    mask = ea.BlockMask.full(1, 1, q_len, 64, 16, device=device)
    for backend in ("triton", "reference"):
        out, lse = ea.block_sparse_attention(
            query, key, value, mask, return_lse=True, backend=backend
        )
        assert out[0, 0, 0].isnan().all()
        assert lse[0, 0, 0].isnan()
        assert not out[0, 1].isnan().any()


def test_a_tile_takes_as_many_heads_as_fit():
    assert [heads_a_tile(group, 1) for group in (1, 4, 8, 71, 128)] == [1, 4, 8, 1, 64]
    assert [heads_a_tile(32, q_len) for q_len in (2, 8, 16)] == [32, 8, 4]
    assert heads_a_tile(3, 16) == 3


def test_few_queries_have_one_limit():
    assert FEW_QUERIES == MOST_PAGED_QUERIES
    assert FEW_QUERIES <= 16  # the smallest block, so that a tile has one list


def test_the_op_of_pages_is_a_good_citizen(device: str):
    problem = Case(q_len=2, kv_len=64, heads=4, kv_heads=2).build(device)
    key_pages, value_pages, table = paged(problem, 16)
    lens = torch.tensor([64, 30], dtype=torch.int32, device=device)
    torch.library.opcheck(
        torch.ops.entropy_attn.paged_forward.default,
        (problem.query, key_pages, value_pages, table, None, None, lens, 64, 64, True, 0, 0.2,
         "triton"),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


PAGES = torch.randn(5, 2, 16, 32)
GOOD_QUERY = torch.randn(2, 4, 1, 32)
GOOD = {
    "query": GOOD_QUERY, "key_pages": PAGES, "value_pages": PAGES,
    "block_table": torch.zeros(2, 3, dtype=torch.int32),
    "kv_lens": torch.tensor([40, 48], dtype=torch.int32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.randn(2, 4, 17, 32)}, ValueError, "17 tokens.*1 to 16.*Gather"),
        ({"query": torch.randn(2, 3, 1, 32)}, ValueError, "3 heads, which is not a multiple"),
        ({"value_pages": PAGES[:4]}, ValueError, r"value_pages has shape \(4,"),
        ({"key_pages": PAGES[..., 0]}, ValueError, "key_pages must have 4 dimensions"),
        ({"block_table": torch.zeros(2, 3)}, TypeError, "block_table must be an int32"),
        ({"block_table": torch.zeros(3, 3).int()}, ValueError, r"block_table.*\(2, pages\)"),
        ({"query": GOOD_QUERY.clone().requires_grad_()}, ValueError, "no_grad"),
        ({"key_pages": PAGES[:0], "value_pages": PAGES[:0]}, ValueError, "must be a page"),
        ({"kv_lens": None}, TypeError, "kv_lens must be an int32"),
        ({"kv_lens": torch.ones(3).int()}, ValueError, r"kv_lens must have shape \(2,\)"),
        ({"block_mask": ea.BlockMask.full(1, 1, 1, 64, 16)}, ValueError, "kv_len=64.*48"),
        ({"backend": "sdpa"}, ea.BackendUnavailable, "kv_lens or q_lens are given"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    assert ea.paged_attention(**GOOD).shape == (2, 4, 1, 32)
    with pytest.raises(error, match=message):
        ea.paged_attention(**{**GOOD, **changes})


def test_no_sequence_is_an_empty_result():
    empty = {name: GOOD[name][:0] for name in ("query", "block_table", "kv_lens")}
    assert ea.paged_attention(**{**GOOD, **empty}).shape == (0, 4, 1, 32)


def test_the_cpu_dtype_of_lse(device: str):
    _, lse = ea.paged_attention(**GOOD, return_lse=True)
    assert lse.dtype == compute_dtype(torch.float32)


def test_the_suite_runs_and_checks(tmp_path, monkeypatch):
    context = Context(torch.device("cpu"), quick=False, out=tmp_path)
    rows = {row.config["contestant"]: row.result for row in suite.run(context)}
    assert {name: result["status"] for name, result in rows.items()} == {
        suite.OURS: "ok", suite.PAGED: "ok", suite.COPY: "ok", suite.SUM: "ok",
    }  # fmt: skip
    ours, limit = rows[suite.OURS], rows[suite.SUM]
    assert ours["bandwidth"] > 0
    assert ours["of_sum"] == limit["median_ms"] / ours["median_ms"]
    wrong = lambda *args, **options: torch.zeros_like(args[0])  # noqa: E731
    monkeypatch.setattr(ea, "paged_attention", wrong, raising=False)
    rows = {row.config["contestant"]: row.result for row in suite.run(context)}
    assert rows[suite.PAGED]["status"] == "wrong"
    assert "median_ms" not in rows[suite.PAGED]


def test_bytes_are_those_of_the_listed_blocks():
    case = suite.cases("small")[0]
    inputs = suite.Inputs.of(case, torch.device("cpu"))
    listed = inputs.mask.kv_num_blocks.sum().item()
    assert inputs.read_bytes() == 2 * listed * case.block * case.head_dim * 4


def test_lists_of_key_heads_are_read_as_they_are(device: str, monkeypatch):
    """Lists for each query head would be two more launches, and more to read."""
    inputs = suite.Inputs.of(suite.cases("small")[0], torch.device(device))
    tensors = inputs.query, inputs.key, inputs.value
    wanted = ea.block_sparse_attention(*tensors, inputs.mask, backend="reference")
    monkeypatch.setattr(ops, "_a_list_each", None)
    found = ea.block_sparse_attention(*tensors, inputs.mask, backend="triton")
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("form", ["one query", "all blocks", "window", "padding"])
def test_how_keys_are_fetched_changes_nothing(block: int, paged: bool, form: str, device: str):
    """The same bits; steps of a part of a block, of one block and of several."""
    case = suite.Case(
        3, 1024, 1.0 if form == "all blocks" else 0.3, 4, 2, block=block, dtype="float16",
        queries=5 if form == "window" else 1, head_dim=48 if form == "window" else 64,
    )  # fmt: skip
    inputs = suite.Inputs.of(case, torch.device(device))
    for tensor in (inputs.key, inputs.value):
        tensor[1, :, 333:] = float("nan")
        tensor[2] = float("nan")
    key, value, table = inputs.pages() if paged else (inputs.key, inputs.value, None)
    mask = inputs.mask
    lens = torch.tensor([1024, 333, 0], dtype=torch.int32, device=device)
    window = 300 if form == "window" else 0
    valid = None
    if form == "padding":
        valid = (torch.rand(3, 1024, device=device) < 0.7).to(torch.int8)

    def run(**changes):
        config = replace(DecodeConfig(32, 4, 3), **changes)
        return split_forward(
            inputs.query, key, value, mask.kv_num_blocks, mask.kv_indices, lens, None,
            mask.block_size, True, window, 0.2, table, valid, config,
        )  # fmt: skip

    expected = run()
    assert all(x[:2].any() and not x.isnan().any() for x in expected)
    ways = [{"ahead": True}]
    if adjacent_steps(32, block, suite.PAGE if paged else 0):
        ways += [{"descriptors": True}, {"descriptors": True, "ahead": True}]
    assert len(ways) == (1 if block == 16 else 3)
    if len(ways) == 1:  # the copy engine would fetch keys of one block, where there are two
        with pytest.raises(AssertionError, match="block_n=32"):
            run(descriptors=True)
    for way in ways:
        for found, wanted in zip(run(**way), expected, strict=True):
            assert torch.equal(found, wanted), way


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx942"])
@pytest.mark.parametrize("page", [0, 16, 24, 64, 256])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_the_copy_engine_takes_adjacent_keys_only(arch, page, block, head_dim):
    for itemsize in (2, 4):
        config = decode_config(arch, head_dim, itemsize, block, page, arch == "sm90")
        assert config.block_n >= 16
        if config.descriptors:
            assert (arch, itemsize) == ("sm90", 2)
            assert adjacent_steps(config.block_n, block, page)
    common = decode_config("sm90", 128, 2, 64, page, True)
    assert common.descriptors == (page in (0, 64, 256))
