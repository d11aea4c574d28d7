"""Selection on the reference backend: against its definition, its errors, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import (
    assert_lists_are_well_formed,
    kept_blocks,
    predicted_mass,
)

import entropy_attn as ea
from entropy_attn import selection
from entropy_attn.api import tile_mass
from entropy_attn.reference.dense import visible_pairs
from entropy_attn.selection import keep_blocks, ops, select_blocks
from entropy_attn.testing import assert_close_to_reference

SCORERS = [
    ea.Pooled(8),
    ea.Pooled(8, "max"),
    ea.Pooled(16),
    ea.Pooled(1),
    ea.Envelope(8),
    ea.Envelope(4, "mean", spread=1.0),
    ea.Antidiagonal(4),
]
BUDGETS = [
    ea.TopK(0.4),
    ea.TopK(count=2),
    ea.TopP(0.6),
    ea.Perplexity(0.7),
    ea.Perplexity(2.0, min_blocks=2, max_density=0.5),
]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


MASKS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 19},
    "padded": {"kv_lens": int32(37, 0), "q_lens": int32(30, 0)},
    "causal padded": {"is_causal": True, "kv_lens": int32(37, 61), "q_lens": int32(37, 9)},
    "more queries than keys": {"is_causal": True, "kv_lens": int32(9, 30), "q_lens": int32(41, 50)},
}


def inputs(q_len=53, kv_len=61, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, batch=2):
    query = torch.randn(batch, heads, q_len, head_dim, dtype=dtype)
    return query, torch.randn(batch, kv_heads, kv_len, head_dim, dtype=dtype)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scorer", SCORERS, ids=str)
def test_scorers_follow_their_definition(scorer, masks):
    query, key = inputs()
    exact = predicted_mass(scorer, query.double(), key.double(), (16, 32), 0.3, **masks)
    plain = predicted_mass(scorer, query, key, (16, 32), 0.3, **masks)
    mass = scorer(query, key, block_size=(16, 32), scale=0.3, **masks)
    assert_close_to_reference(mass, plain, exact, "mass")
    # The definition gives exactly 0 where a tile sees nothing of a block, and so must the scorer.
    assert torch.equal(mass == 0, exact == 0)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_groups_of_one_token_give_the_true_mass(masks):
    query, key = inputs()
    mass = ea.Pooled(1)(query.double(), key.double(), block_size=16, **masks)
    true = tile_mass(query.double(), key.double(), block_size=16, **masks)
    torch.testing.assert_close(mass, true, rtol=0, atol=8 * torch.finfo(torch.float64).eps)
    assert torch.equal(ea.TrueMass()(query, key, block_size=16, **masks),
                       tile_mass(query, key, block_size=16, **masks))  # fmt: skip


@pytest.mark.parametrize("scorer", [ea.Pooled(8), ea.Envelope(8)], ids=str)
def test_a_negative_scale_flips_the_prediction(scorer):
    query, key = inputs()
    assert torch.equal(
        scorer(query, key, block_size=16, scale=-0.5),
        scorer(-query, key, block_size=16, scale=0.5),
    )


def test_an_envelope_of_one_token_has_no_size():
    query, key = inputs()
    for masks in MASKS.values():
        one = ea.Envelope(1, spread=1.0)(query, key, block_size=16, **masks)
        assert torch.equal(one, ea.Pooled(1, "max")(query, key, block_size=16, **masks))


def test_a_full_spread_bounds_every_score():
    query, key = inputs(64, 64, heads=2, kv_heads=1, batch=1, dtype=torch.float64)
    queries, keys, spreads = ops.envelope_tokens(query, key, None, None, 8, 1.0, "reference")
    bound = queries @ keys.mT + queries.norm(dim=-1, keepdim=True) * spreads[:, :, None]
    highest = (queries @ key.mT).unflatten(-1, (-1, 8)).amax(-1)
    assert (bound >= highest).all()


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_budgets_follow_their_definition(budget, masks):
    # Sixteenths: sums are exact, and ties are common.
    mass = torch.randint(0, 5, (2, 3, 4, 4)) / 16
    for sink, local in ((0, 0), (1, 2)):
        mask = keep_blocks(
            mass, budget, block_size=16, q_len=53, kv_len=61, sink=sink, local=local, **masks
        )
        assert_lists_are_well_formed(mask)
        expected = kept_blocks(mass, budget, (16, 16), 53, 61, sink, local, **masks)
        assert torch.equal(mask.to_dense(), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    q_len=st.integers(1, 90),
    kv_len=st.integers(1, 90),
    block_q=st.sampled_from([16, 32]),
    block_k=st.sampled_from([16, 32, 64]),
    window=st.sampled_from([None, 1, 16, 33]),
    causal=st.booleans(),
    sink=st.integers(0, 2),
    local=st.integers(0, 3),
    budget=st.sampled_from(BUDGETS),
)
def test_any_shape(q_len, kv_len, block_q, block_k, window, causal, sink, local, budget):
    causal = causal or window is not None
    query, key = inputs(q_len, kv_len, batch=1, heads=2, kv_heads=1)
    options = {"is_causal": causal, "window": window}
    mask = select_blocks(
        query, key, block_size=(block_q, block_k), budget=budget, sink=sink, local=local, **options
    )
    assert_lists_are_well_formed(mask)
    mass = ea.Envelope(8)(query, key, block_size=(block_q, block_k), **options)
    expected = kept_blocks(mass, budget, (block_q, block_k), q_len, kv_len, sink, local, **options)
    assert torch.equal(mask.to_dense(), expected)


def test_equal_blocks_count_as_many_as_they_are():
    """16 equal blocks have perplexity 16, whatever fp32 makes of the entropy."""
    for blocks in (1, 3, 16, 100, 1000):
        mass = torch.full((1, 1, 1, blocks), 1 / blocks)
        for budget, expected in (
            (ea.Perplexity(1.0), blocks),
            (ea.Perplexity(0.5), -(-blocks // 2)),
            (ea.TopK(1.0), blocks),
            (ea.TopP(0.5), -(-blocks // 2)),
        ):
            mask = keep_blocks(
                mass, budget, block_size=16, q_len=16, kv_len=16 * blocks, sink=0, local=0
            )
            assert mask.kv_num_blocks.item() == expected, (blocks, budget)


def test_fractions_are_not_pushed_over_by_rounding():
    mass = torch.rand(1, 1, 1, 1000)
    for blocks in range(1, 1001, 37):
        for tenths in range(1, 11):
            mask = keep_blocks(
                mass[..., :blocks], ea.TopK(tenths / 10),
                block_size=16, q_len=16, kv_len=16 * blocks, sink=0, local=0,
            )  # fmt: skip
            assert mask.kv_num_blocks.item() == -(-blocks * tenths // 10)


def test_no_prediction_keeps_one_block_and_a_broken_one_keeps_all():
    query, key = inputs(64, 64, batch=1)
    options = {"block_size": 16, "sink": 0, "local": 0}
    zero = keep_blocks(torch.zeros(1, 1, 4, 4), q_len=64, kv_len=64, **options)
    assert (zero.kv_num_blocks == 1).all()
    assert (zero.kv_indices[..., 0] == 0).all()
    query[0, 0, 20] = torch.nan
    mask = select_blocks(query, key, budget=ea.TopP(0.3), **options)
    assert mask.kv_num_blocks[0, 0, 1] == 4, "NaN must reach the output as in dense attention"
    assert (mask.kv_num_blocks[0, 1:] < 4).all()


def test_lists_are_narrow_where_the_budget_is():
    query, key = inputs(1024, 1024, batch=1, heads=1, kv_heads=1)
    options = {"block_size": 16, "is_causal": True, "sink": 1, "local": 2}
    widths = {
        ea.TopK(0.25): 16 + 4,
        ea.TopK(count=3): 3 + 4,
        ea.Perplexity(1.0, max_density=0.125): 8 + 4,
        ea.Perplexity(1.0): 64,
    }
    for budget, width in widths.items():
        mask = select_blocks(query, key, budget=budget, **options)
        assert mask.kv_indices.shape[-1] == width, budget
    window = select_blocks(query, key, window=100, budget=ea.TopP(1.0), **options)
    assert window.kv_indices.shape[-1] == 9
    assert window.kv_num_blocks.max() == 8, "a window of 100 tokens ends inside its first block"


def test_long_inputs_are_worked_through_in_chunks(monkeypatch):
    query, key = inputs(2000, 1990, batch=1, heads=2, kv_heads=1)
    whole = select_blocks(query, key, block_size=16, is_causal=True)
    calls = []
    score = ops.score_tiles
    monkeypatch.setattr(selection, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(ops, "score_tiles", lambda *a: calls.append(a) or score(*a))
    chunked = select_blocks(query, key, block_size=16, is_causal=True)
    assert len(calls) > 1
    assert torch.equal(whole.kv_num_blocks, chunked.kv_num_blocks)
    assert torch.equal(whole.kv_indices, chunked.kv_indices)


@pytest.mark.parametrize("shape", [(0, 2, 32, 32), (1, 2, 0, 32), (1, 2, 32, 0)], ids=str)
def test_tensors_of_size_zero(shape):
    batch, heads, q_len, kv_len = shape
    query, key = inputs(q_len, kv_len, heads, 1, batch=batch)
    for scorer in (ea.Pooled(8), ea.Envelope(8), ea.Antidiagonal(8)):
        mask = select_blocks(query, key, block_size=16, scorer=scorer)
        assert mask.kv_num_blocks.shape == (batch, heads, q_len // 16)
        assert (mask.kv_num_blocks == 0).all() or kv_len > 0
        assert mask.to_dense().shape == (batch, heads, q_len // 16, kv_len // 16)


def test_a_callable_is_asked_and_its_answer_checked():
    query, key = inputs(64, 64, batch=1)
    asked = {}

    def scorer(query, key, **kwargs):
        asked.update(kwargs)
        return torch.rand(1, 4, 4, 4)

    mask = select_blocks(query, key, block_size=16, scorer=scorer, is_causal=True)
    assert_lists_are_well_formed(mask)
    assert asked == {
        "block_size": (16, 16), "is_causal": True, "scale": 0.25, "kv_lens": None,
        "q_lens": None, "window": None, "backend": "auto",
    }  # fmt: skip
    wrong = {
        "shape": (lambda *a, **k: torch.rand(1, 4, 4, 5), ValueError, r"must have shape \(1, 4, 4"),
        "dtype": (lambda *a, **k: torch.ones(1, 4, 4, 4, dtype=torch.long), TypeError, "int64"),
        "type": (lambda *a, **k: None, TypeError, "NoneType"),
        "NaN": (lambda *a, **k: torch.full((1, 4, 4, 4), torch.nan), RuntimeError, "NaN"),
        "negative": (lambda *a, **k: -torch.ones(1, 4, 4, 4), RuntimeError, "negative"),
    }
    for function, error, message in wrong.values():
        with pytest.raises(error, match=message):
            select_blocks(query, key, block_size=16, scorer=function)
    with pytest.raises(TypeError, match="scorer must be"):
        select_blocks(query, key, scorer="pooled")


def bad_calls():
    query, key = inputs(64, 64, batch=1)
    mass = torch.rand(1, 4, 4, 4)
    lengths = {"block_size": 16, "q_len": 64, "kv_len": 64}
    select = select_blocks
    yield ValueError, "pool must be an int >= 1, got 0", lambda: ea.Pooled(0)
    yield ValueError, "pool must be a power of two, got 6", lambda: ea.Pooled(6)
    yield ValueError, r"spread must be a number in \[0, 1\], got 2", lambda: ea.Envelope(spread=2)
    yield ValueError, "reduce must be 'mean' or 'max', got 'sum'", lambda: ea.Pooled(8, "sum")
    yield ValueError, "stride must be a power of two", lambda: ea.Antidiagonal(12)
    yield ValueError, "either fraction or count", lambda: ea.TopK()
    yield ValueError, "either fraction or count", lambda: ea.TopK(0.5, count=3)
    yield ValueError, r"write TopK\(count=16\)", lambda: ea.TopK(16)
    yield ValueError, r"fraction must be a number in \(0, 1\]", lambda: ea.TopK(1.5)
    yield ValueError, "count must be an int >= 1, got 0", lambda: ea.TopK(count=0)
    yield ValueError, r"p must be a number in \(0, 1\], got nan", lambda: ea.TopP(float("nan"))
    yield ValueError, "c must be a finite number > 0, got -1", lambda: ea.Perplexity(-1)
    yield ValueError, "c must be a finite number > 0", lambda: ea.Perplexity(float("inf"))
    yield ValueError, "min_blocks must be an int >= 1", lambda: ea.TopP(0.9, min_blocks=0)
    yield ValueError, "max_density must be a number", lambda: ea.TopP(0.9, max_density=2)
    yield ValueError, "pool=32 does not fit", lambda: select(
        query, key, scorer=ea.Pooled(32), block_size=16)  # fmt: skip
    yield ValueError, "pool=1 does not fit.*from 4 to 256", lambda: select(
        query, key, scorer=ea.Pooled(1), block_size=256)  # fmt: skip
    yield ValueError, "stride=32 does not fit", lambda: select(
        query, key, scorer=ea.Antidiagonal(32), block_size=(64, 16))  # fmt: skip
    yield ValueError, "sink must be an int >= 0, got -1", lambda: select(query, key, sink=-1)
    yield ValueError, "local must be an int >= 0, got 1.5", lambda: select(query, key, local=1.5)
    yield TypeError, "budget must be TopK, TopP or Perplexity", lambda: select(
        query, key, budget=0.25)  # fmt: skip
    yield ValueError, "block_size must be a power of two", lambda: select(
        query, key, block_size=48)  # fmt: skip
    yield ValueError, "window=8 needs is_causal=True", lambda: select(query, key, window=8)
    yield ValueError, "scale must be a finite number", lambda: select(
        query, key, scale=float("nan"))  # fmt: skip
    yield TypeError, "kv_lens must be an int32", lambda: select(
        query, key, kv_lens=torch.tensor([3]))  # fmt: skip
    yield ValueError, "key has head_dim 8", lambda: select(query, key[..., :8])
    yield ValueError, "must have 4 dimensions", lambda: select(query[0], key)
    yield ValueError, "backend must be", lambda: select(query, key, backend="cuda")
    yield ea.BackendUnavailable, "fp64", lambda: select(
        query.double(), key.double(), backend="triton")  # fmt: skip
    yield ValueError, "mass must have shape", lambda: keep_blocks(mass[:, :, 1:], **lengths)
    yield TypeError, "mass must be a float32", lambda: keep_blocks(mass.half(), **lengths)
    yield ValueError, "q_len must be an int", lambda: keep_blocks(
        mass, block_size=16, q_len=-1, kv_len=64)  # fmt: skip
    yield ValueError, "q_lens must have shape", lambda: keep_blocks(
        mass, q_lens=int32(3, 4), **lengths)  # fmt: skip
    yield RuntimeError, "NaN", lambda: keep_blocks(mass / 0 * 0, **lengths)


@pytest.mark.parametrize("index", range(sum(1 for _ in bad_calls())))
def test_errors_name_the_argument(index):
    error, message, call = list(bad_calls())[index]
    with pytest.raises(error, match=message):
        call()


def test_nothing_invisible_is_listed_and_padding_rows_are_empty():
    query, key = inputs(96, 96, batch=2)
    lens = int32(50, 96)
    masks = {"is_causal": True, "kv_lens": lens, "q_lens": lens}
    mask = select_blocks(query, key, block_size=16, budget=ea.TopP(1.0), sink=6, local=6, **masks)
    visible = visible_pairs(2, 96, 96, **masks)
    tiles = visible.unflatten(3, (6, 16)).unflatten(2, (6, 16)).any(-1).any(3)
    assert torch.equal(mask.to_dense(), tiles.expand(2, 4, 6, 6))
    assert (mask.kv_num_blocks[0, :, 4:] == 0).all()


def uniform(query, key, **options):
    return query.new_ones(2, 4, 4, 4)


@pytest.mark.parametrize(
    "scorer",
    [*SCORERS[:2], ea.Antidiagonal(4), ea.TrueMass(), uniform],
    ids=lambda scorer: getattr(scorer, "__name__", str(scorer)),
)
def test_compiles_without_graph_breaks(scorer):
    query, key = inputs(64, 64)
    lens = int32(64, 40)

    def lists(query, key, lens):
        mask = select_blocks(
            query, key, block_size=16, scorer=scorer, is_causal=True, kv_lens=lens, q_lens=lens
        )
        return mask.kv_num_blocks, mask.kv_indices

    compiled = torch.compile(lists, backend="aot_eager", fullgraph=True)
    for eager, traced in zip(lists(query, key, lens), compiled(query, key, lens), strict=True):
        assert torch.equal(eager, traced)


def test_a_new_length_does_not_mean_a_new_graph():
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    @torch.compile(backend=backend, fullgraph=True)
    def counts(query, key):
        return select_blocks(query, key, block_size=16, is_causal=True).kv_num_blocks

    for length in (100, 200, 300, 400):
        counts(*inputs(length, length))
    assert len(graphs) == 2, "one for the first length, one for any length"


@pytest.mark.parametrize("lens", [None, int32(20, 40)], ids=["full", "padded"])
def test_opcheck(lens):
    query, key = inputs(40, 40)
    torch.library.opcheck(ops.pool_tokens.overload, (query, key, lens, lens, 8, "reference"))
    for antidiagonal in (False, True):
        scored = (query, key) if antidiagonal else (query[:, :, :5], key[:, :, :5])
        arguments = (lens, lens, 40, 40, 16, 16, True, 0, 8, antidiagonal, False, 0.3, 1, 2)
        torch.library.opcheck(ops.score_tiles.overload, (*scored, None, *arguments, "reference"))
    torch.library.opcheck(
        ops.envelope_tokens.overload, (query, key, lens, lens, 8, 0.5, "reference")
    )
    arguments = (lens, lens, 40, 40, 16, 16, True, 0, 1, 2, "mass", 0.9, 1, 1.0, 3, 1)
    torch.library.opcheck(
        ops.keep_tiles.overload, (torch.rand(2, 4, 2, 3), *arguments, "reference")
    )


def test_selection_needs_no_gradient():
    query, key = inputs(64, 64)
    query.requires_grad_()
    mask = select_blocks(query, key, block_size=16)
    assert not mask.kv_indices.requires_grad
    assert not ea.Pooled(8)(query, key, block_size=16).requires_grad
