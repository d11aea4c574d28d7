"""The Triton kernels of selection against the PyTorch reference.

Without a GPU they run in Triton's interpreter, on small inputs; the tests marked gpu take sizes
that people use.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import assert_lists_are_well_formed

import entropy_attn as ea
from entropy_attn.selection import keep_blocks, ops, select_blocks
from entropy_attn.testing import assert_close_to_reference

pytest.importorskip("triton")

from entropy_attn.kernels import budget as budget_kernel
from entropy_attn.kernels import scoring

SCORERS = [ea.Pooled(8), ea.Pooled(4, "max"), ea.Pooled(16), ea.Envelope(8), ea.Antidiagonal(8)]
BUDGETS = [
    ea.TopK(0.3),
    ea.TopK(count=3),
    ea.TopP(0.6),
    ea.Perplexity(0.7),
    ea.Perplexity(2.0, min_blocks=2, max_density=0.5),
]


def options(name: str, q_len: int, kv_len: int, batch: int, device: str) -> dict:
    """A combination of masks, with lengths that end inside a block."""

    def lens(*shares: float, length: int) -> torch.Tensor:
        values = [int(shares[b % len(shares)] * length) for b in range(batch)]
        return torch.tensor(values, dtype=torch.int32, device=device)

    padded = {"kv_lens": lens(0.83, 0.0, length=kv_len), "q_lens": lens(0.71, 0.3, length=q_len)}
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "window": {"is_causal": True, "window": kv_len // 3},
        "padded": padded,
        "causal padded": {"is_causal": True, **padded},
        "all": {"is_causal": True, "window": kv_len // 3, **padded},
    }[name]


MASKS = ("plain", "causal", "window", "padded", "causal padded", "all")


def inputs(device, q_len, kv_len, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, batch=2):

    def draw(heads, length):
        # Near neighbours are alike, so that means of groups carry something.
        common = torch.randn(batch, heads, -(-length // 16), head_dim, device=device)
        common = common.repeat_interleave(16, 2)[:, :, :length]
        return (common + torch.randn(common.shape, device=device)).to(dtype)

    return draw(heads, q_len), draw(kv_heads, kv_len)


def assert_mass_is_right(scorer, query, key, **kwargs):
    mass = scorer(query, key, backend="triton", **kwargs)
    plain = scorer(query, key, backend="reference", **kwargs)
    exact = scorer(query.double(), key.double(), backend="reference", **kwargs)
    assert mass.dtype == torch.float32
    # Rounding a score of size s to fp32 changes its exponential by a relative eps * s.
    scale = abs(kwargs.get("scale", query.shape[-1] ** -0.5))
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    size = scale * (query.float() @ keys.float().transpose(-1, -2)).abs().max().item()
    assert_close_to_reference(mass, plain, exact, "mass", magnitude=size)
    assert torch.equal(mass.sum(-1) == 0, exact.sum(-1) == 0)


def assert_same_lists(mass, budget, backends=("triton", "reference"), **kwargs):
    masks = [keep_blocks(mass, budget, backend=backend, **kwargs) for backend in backends]
    for mask in masks:
        assert_lists_are_well_formed(mask)
    assert torch.equal(masks[0].kv_num_blocks, masks[1].kv_num_blocks)
    assert torch.equal(masks[0].to_dense(), masks[1].to_dense())


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("scorer", SCORERS, ids=str)
def test_scores(scorer, name, device):
    query, key = inputs(device, 75, 93)
    masks = options(name, 75, 93, 2, device)
    assert_mass_is_right(scorer, query, key, block_size=(32, 16), **masks)


@pytest.mark.parametrize("head_dim", [16, 80, 96])
def test_half_precision_and_odd_head_dims(head_dim, device):
    """fp16 here: Triton's interpreter multiplies the bits of bf16; see test_scores_at_size."""
    query, key = inputs(device, 50, 50, head_dim=head_dim, dtype=torch.float16)
    for scorer in (ea.Pooled(8), ea.Envelope(8), ea.Antidiagonal(4)):
        assert_mass_is_right(scorer, query, key, block_size=16, is_causal=True)


@pytest.mark.parametrize("scorer", [ea.Pooled(8), ea.Envelope(8), ea.Antidiagonal(8)], ids=str)
def test_slices_of_a_fused_projection(scorer, device):
    fused = torch.randn(2, 70, 3, 2, 32, device=device)
    query, key, _ = (fused[:, :, i].transpose(1, 2) for i in range(3))
    kwargs = {"block_size": 16, "is_causal": True, "backend": "triton"}
    expected = scorer(query.contiguous(), key.contiguous(), **kwargs)
    assert torch.equal(scorer(query, key, **kwargs), expected)


@pytest.mark.parametrize("scorer", [ea.Pooled(8), ea.Envelope(8), ea.Antidiagonal(8)], ids=str)
def test_padding_is_never_read(scorer, device):
    query, key = inputs(device, 64, 64)
    lens = torch.tensor([40, 13], dtype=torch.int32, device=device)
    kwargs = {"block_size": 16, "q_lens": lens, "kv_lens": lens, "backend": "triton"}
    clean = scorer(query, key, **kwargs)
    for batch, length in enumerate((40, 13)):
        query[batch, :, length:] = torch.nan
        key[batch, :, length:] = torch.nan
    assert torch.equal(scorer(query, key, **kwargs), clean)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 30.0])
def test_any_scale(scale, device):
    query, key = inputs(device, 40, 40)
    for scorer in (ea.Pooled(8), ea.Envelope(8)):
        assert_mass_is_right(scorer, query, key, block_size=16, scale=scale, is_causal=True)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    q_len=st.integers(1, 80),
    kv_len=st.integers(1, 80),
    block_size=st.sampled_from([(16, 16), (16, 64), (64, 16), (32, 32)]),
    pool=st.sampled_from([1, 2, 8, 16]),
    reduce=st.sampled_from(["mean", "max"]),
    causal=st.booleans(),
)
def test_any_shape(q_len, kv_len, block_size, pool, reduce, causal):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, key = inputs(device, q_len, kv_len, batch=1)
    scorer = ea.Pooled(pool, reduce)
    assert_mass_is_right(scorer, query, key, block_size=block_size, is_causal=causal)


@pytest.mark.parametrize("config", [(16, 32, 4, 1), (32, 16, 4, 1), (64, 64, 4, 1)], ids=str)
def test_the_launch_shape_changes_nothing(config, device, monkeypatch):
    query, key = inputs(device, 130, 150)
    kwargs = {"block_size": (32, 16), "is_causal": True}
    chosen = scoring.ScoreConfig(*config)
    monkeypatch.setattr(scoring, "default_config", lambda *a: chosen)
    assert_mass_is_right(ea.Pooled(4), query, key, **kwargs)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("per_tile", [1, 8, 64])
def test_default_launch_shapes_fit(head_dim, itemsize, per_tile):
    for row_groups in (1, 128, 4096):
        block_d = scoring.padded_head_dim(head_dim)
        config = scoring.default_config(32, row_groups, per_tile, per_tile, block_d, itemsize)
        assert config.rows % per_tile == config.cols % per_tile == 0
        assert min(config.rows, config.cols) >= 16, "tl.dot takes no less"
        shared = (config.rows + config.num_stages * config.cols) * block_d * itemsize
        assert shared <= 200_000, "sm_90 has 227 KB a program"


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_budgets(budget, name, device):
    # Sixteenths: every sum is exact, and ties are common.
    mass = torch.randint(0, 9, (2, 2, 5, 7), device=device) / 16
    kwargs = {"block_size": (16, 16), "q_len": 75, "kv_len": 103}
    masks = options(name, 75, 103, 2, device)
    assert_same_lists(mass, budget, sink=0, local=0, **kwargs, **masks)
    assert_same_lists(mass, budget, sink=2, local=2, **kwargs, **masks)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_rows_that_do_not_stay_in_registers(budget, device, monkeypatch):
    monkeypatch.setattr(budget_kernel, "LONGEST_RESIDENT", 32)
    mass = torch.randint(0, 33, (1, 2, 3, 75), device=device) / 64
    assert_same_lists(mass, budget, block_size=(512 // 4, 16), q_len=300, kv_len=1200)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_masses_of_any_magnitude(budget, device):
    """Ties, zeros, tiny, huge, and one more query tile than a program takes."""
    mass = torch.zeros(1, 1, 5, 64, device=device)
    mass[0, 0, 1] = 1 / 64
    mass[0, 0, 2, 7] = 1.0
    mass[0, 0, 3] = torch.rand(64, device=device) * 1e-30
    mass[0, 0, 4] = torch.rand(64, device=device) * 1e30
    kwargs = {"block_size": 16, "q_len": 80, "kv_len": 1024, "sink": 0, "local": 0}
    assert_same_lists(mass, budget, **kwargs)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_broken_prediction_keeps_all_that_is_allowed(budget, device):
    query, key = inputs(device, 64, 64, batch=1)
    query[0, 0, 20] = torch.nan
    masks = [
        select_blocks(query, key, block_size=16, budget=budget, sink=0, local=0, backend=backend)
        for backend in ("triton", "reference")
    ]
    assert torch.equal(masks[0].to_dense(), masks[1].to_dense())
    assert masks[0].kv_num_blocks[0, 0, 1] == budget.most(4)


@pytest.mark.parametrize("name", MASKS)
def test_select_blocks(name, device):
    query, key = inputs(device, 75, 93)
    kwargs = {"block_size": 16, **options(name, 75, 93, 2, device)}
    masks = [select_blocks(query, key, backend=b, **kwargs) for b in ("triton", "reference")]
    assert_lists_are_well_formed(masks[0])
    # Where two masses are nearly equal either choice is right: compare what is kept, not which.
    mass = ea.Envelope(8)(query, key, backend="reference", **kwargs)
    kept = [(mass * mask.to_dense()).sum(-1) for mask in masks]
    exact = ea.Envelope(8)(query.double(), key.double(), backend="reference", **kwargs)
    assert_close_to_reference(kept[0], kept[1], (exact * masks[1].to_dense()).sum(-1), "kept mass")
    assert torch.equal(masks[0].kv_num_blocks, masks[1].kv_num_blocks)


def test_chunks_of_query_tiles(device):
    query, key = inputs(device, 100, 100)
    means = ops.pool_tokens(query, key, None, None, 8, "triton")
    geometry = (None, None, None, 100, 100, 16, 16, True, 0, 8, False, False, 0.25)
    whole = ops.score_tiles(*means, *geometry, 0, 7, "triton")
    parts = [ops.score_tiles(*means, *geometry, first, 3, "triton") for first in (0, 3)]
    parts.append(ops.score_tiles(*means, *geometry, 6, 1, "triton"))
    # A tile has another row of its program then, and some CPUs' products round by that.
    torch.testing.assert_close(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("lens", [None, (20, 40)], ids=["full", "padded"])
def test_opcheck(lens, device):
    query, key = inputs(device, 40, 40)
    lens = None if lens is None else torch.tensor(lens, dtype=torch.int32, device=device)
    torch.library.opcheck(ops.pool_tokens.overload, (query, key, lens, lens, 8, "triton"))
    for antidiagonal in (False, True):
        scored = (query, key) if antidiagonal else (query[:, :, :5], key[:, :, :5])
        arguments = (lens, lens, 40, 40, 16, 16, True, 0, 8, antidiagonal, False, 0.3, 1, 2)
        torch.library.opcheck(ops.score_tiles.overload, (*scored, None, *arguments, "triton"))
    torch.library.opcheck(ops.envelope_tokens.overload, (query, key, lens, lens, 8, 0.5, "triton"))
    arguments = (lens, lens, 40, 40, 16, 16, True, 0, 1, 2, "mass", 0.9, 1, 1.0, 3, 1)
    mass = torch.rand(2, 4, 2, 3, device=device)
    torch.library.opcheck(ops.keep_tiles.overload, (mass, *arguments, "triton"))


def test_compiles_without_graph_breaks(device):
    query, key = inputs(device, 64, 64)

    def lists(query, key):
        mask = select_blocks(query, key, block_size=16, is_causal=True, backend="triton")
        return mask.kv_num_blocks, mask.kv_indices

    compiled = torch.compile(lists, backend="aot_eager", fullgraph=True)
    for eager, traced in zip(lists(query, key), compiled(query, key), strict=True):
        assert torch.equal(eager, traced)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(BF16, 64), (BF16, 80), (BF16, 128), (BF16, 256), (FP16, 64), (FP32, 64)],
    ids=str,
)
@pytest.mark.parametrize(
    "scorer", [ea.Pooled(8), ea.Pooled(4, "max"), ea.Envelope(8), ea.Antidiagonal(8)], ids=str
)
def test_scores_at_size(scorer, dtype, head_dim):
    query, key = inputs("cuda", 4000, 4111, 8, 2, head_dim, dtype)
    for name in ("plain", "all"):
        masks = options(name, 4000, 4111, 2, "cuda")
        assert_mass_is_right(scorer, query, key, block_size=64, **masks)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [(16, 16), (32, 128), (128, 64), (256, 256)], ids=str)
@pytest.mark.parametrize("pool", [4, 16])
def test_block_sizes_at_size(block_size, pool):
    query, key = inputs("cuda", 3001, 3001, 4, 4, 128, torch.bfloat16)
    for reduce in ("mean", "max"):
        scorer = ea.Pooled(pool, reduce)
        assert_mass_is_right(scorer, query, key, block_size=block_size, is_causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [256, 4096, 5000, 16384])
def test_fixed_budgets_at_size(blocks):
    mass = torch.rand(1, 2, 64, blocks, device="cuda").square()
    kwargs = {"block_size": 64, "q_len": 64 * 64, "kv_len": 64 * blocks, "is_causal": True}
    for budget in (ea.TopK(0.2), ea.TopK(count=37)):
        assert_same_lists(mass, budget, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [256, 5000])
def test_adaptive_budgets_at_size(blocks):
    """Judged by the words of the budgets in fp64: sums in another order may shift a boundary."""
    mass = torch.rand(1, 4, 128, blocks, device="cuda").pow(8)
    kwargs = {"block_size": 64, "q_len": 64 * 128, "kv_len": 64 * blocks, "sink": 0, "local": 0}
    share = mass.double() / mass.double().sum(-1, keepdim=True)
    held = share.sort(-1, descending=True).values.cumsum(-1)
    slack = 4 * torch.finfo(torch.float32).eps * blocks**0.5

    mask = keep_blocks(mass, ea.TopP(0.9), **kwargs)
    assert_lists_are_well_formed(mask)
    kept = (share * mask.to_dense()).sum(-1)
    last = mask.kv_num_blocks.long()[..., None] - 1
    assert torch.allclose(kept, held.gather(-1, last)[..., 0], rtol=0, atol=1e-12), (
        "not the heaviest"
    )
    assert (kept >= 0.9 * (1 - 1e-6) - slack).all()
    assert (held.gather(-1, (last - 1).clamp(min=0))[..., 0] < 0.9 + slack).all(), "not the fewest"

    mask = keep_blocks(mass, ea.Perplexity(0.5), **kwargs)
    perplexity = 0.5 * torch.special.entr(share).sum(-1).exp()
    asked = mask.kv_num_blocks.double()
    assert (asked >= perplexity * (1 - 2e-4)).all()
    assert (asked < perplexity + 1).all()
    assert torch.allclose(
        (share * mask.to_dense()).sum(-1),
        held.gather(-1, mask.kv_num_blocks.long()[..., None] - 1)[..., 0],
        rtol=0, atol=1e-12,
    )  # fmt: skip


@pytest.mark.gpu
def test_graph_capture_and_no_wait_for_the_device():
    query, key = inputs("cuda", 2048, 2048, 8, 2, 64, torch.bfloat16)
    eager = select_blocks(query, key, is_causal=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_blocks(query, key, is_causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_blocks(query, key, is_causal=True)
    captured.kv_num_blocks.zero_()
    graph.replay()
    assert torch.equal(captured.kv_num_blocks, eager.kv_num_blocks)
    assert torch.equal(captured.kv_indices, eager.kv_indices)


@pytest.mark.gpu
def test_memory_stays_proportional_to_the_query_at_a_million_tokens():
    length = 2**20
    query = torch.randn(1, 1, length, 64, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    budget = ea.Perplexity(1.0, max_density=0.01)
    mask = select_blocks(query, query, budget=budget, is_causal=True)
    peak = torch.cuda.max_memory_allocated() - before
    assert_lists_are_well_formed(mask)
    lists = mask.kv_indices.numel() * 4
    assert peak < 2 * lists + 2 * 256 * 2**20
    # The last tiles alone, by the reference: compare what is kept, as nearly equal masses abound.
    tail = {"block_size": 64, "is_causal": True, "backend": "reference"}
    last = query[:, :, -4096:]
    expected = select_blocks(last, query, budget=budget, **tail).to_dense()
    mass = ea.Envelope(8)(last, query, **tail)
    exact = ea.Envelope(8)(last.double(), query.double(), **tail)
    actual = mask.to_dense()[:, :, -64:]
    assert_close_to_reference(
        (mass * actual).sum(-1), (mass * expected).sum(-1), (exact * expected).sum(-1), "kept mass"
    )
