"""min_length="auto": a layer runs sparse where the measured data say that it is faster."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from integration_models import KEEP_FEW, build, dense_logits, padding_mask, tokens

import entropy_attn as ea
from entropy_attn import min_length as rule
from entropy_attn.backend import crossover

AUTO = replace(KEEP_FEW, min_length="auto")
LEAST_WORK = rule.LEAST_WORK  # without what the tests make of it
# The models have 4 heads of 16. A mask of AUTO has an expected density of 0.68 at 192 tokens.
PAYS = (
    "sparse attention pays from 192 keys on, with as many queries and 8 heads over the batch, at "
    "density 0.68 (measured on sm90, head_dim 16, causal)"
)


def measured_on_sm90(kv_len, break_even, **changes):
    shape = {"arch": "sm90", "block": 16, "head_dim": 16, "is_causal": True, "batch": 2, "heads": 4}
    return {**shape, "kv_len": kv_len, "break_even_density": break_even, **changes}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """CPU tensors count as on a GPU on which sparse attention pays from 192 tokens on."""
    points = (measured_on_sm90(128, 0.0), measured_on_sm90(192, 0.7))
    monkeypatch.setattr(crossover, "measured", lambda: points)
    monkeypatch.setattr(crossover, "architecture", lambda device: "sm90")
    monkeypatch.setattr(rule, "LEAST_WORK", 0.0)
    crossover._find_crossover.cache_clear()
    yield
    crossover._find_crossover.cache_clear()


def half(family):
    """A model in bf16, as it was measured."""
    return build(family).bfloat16()


@torch.no_grad()
def runs(model, config, batch, length, **options) -> dict[str, int]:
    """Calls by reason, over both layers."""
    with ea.apply(model, config) as handle:
        model(tokens(batch, length), **options)
        found = handle.stats()
        return found.dense | ({"sparse": found.sparse} if found.sparse else {})


@pytest.mark.parametrize(
    ("batch", "length", "sparse"),
    [
        (2, 191, False),
        (2, 192, True),
        (9, 191, False),  # more rows earn nothing
        (1, 271, False),  # half the rows need a longer call
        (1, 272, True),
    ],
)
def test_lengths(batch, length, sparse):
    assert runs(half("llama"), AUTO, batch, length) == ({"sparse": 2} if sparse else {PAYS: 2})


@pytest.mark.parametrize(
    ("q_len", "kv_len", "window"), [(7, 7, 9), (3, 9, 9), (9, 9, 4), (5, 9, 4), (5, 9, 7)]
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_work_of_a_dense_layer(q_len, kv_len, window, is_causal):
    query, key = torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)
    pairs = q_len * min(window, kv_len)
    if is_causal:
        pairs = int(((key <= query) & (key > query - window)).sum())
    found = rule.dense_work(torch.Size((2, 3, q_len, 5)), kv_len, is_causal, min(window, kv_len))
    assert found == 2 * (4 * pairs * 15 + 24 * q_len * 15**2)


def test_the_least_work_is_between_what_was_slower_and_what_was_faster():
    """SmolLM2 with 8192 tokens, and ViT-B with 32 images of 512 px (docs/benchmarks.md)."""
    slower = rule.dense_work(torch.Size((1, 9, 8192, 64)), 8192, True, 8192)
    faster = rule.dense_work(torch.Size((32, 12, 1025, 64)), 1025, False, 1025)
    assert 2 * slower < LEAST_WORK < faster / 1.8


@torch.no_grad()
def test_small_layers_run_dense_while_they_run_eager(monkeypatch):
    model, ids = half("llama"), tokens(2, 192)
    work = rule.dense_work(torch.Size((2, 4, 192, 16)), 192, True, 192)
    monkeypatch.setattr(rule, "LEAST_WORK", work)
    assert runs(model, AUTO, 2, 192) == {"sparse": 2}
    monkeypatch.setattr(rule, "LEAST_WORK", work + 1)
    assert runs(model, AUTO, 2, 192) == {rule.WAITS: 2}
    assert runs(model, replace(AUTO, min_length=192), 2, 192) == {"sparse": 2}
    with ea.apply(model, AUTO) as handle:  # a graph may have no such wait
        torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False)
        assert [layer.compiled for layer in handle.stats().layers] == [{"sparse": 1}] * 2


@pytest.mark.parametrize("min_length", [0, 100])
def test_a_number_wins_over_measurements(min_length):
    model, config = half("llama"), replace(AUTO, min_length=min_length)
    assert runs(model, config, 1, 100) == {"sparse": 2}


def test_a_number_may_differ_by_layer():
    config = replace(AUTO, layers={0: {"min_length": 0}, 1: {"min_length": 250}})
    expected = {"sparse": 1, "fewer than min_length=250 keys": 1}
    assert runs(half("llama"), config, 2, 200) == expected


def test_what_was_not_measured_runs_dense(monkeypatch):
    reason = "sparse attention was not measured in {}: give min_length a number"
    assert runs(build("llama"), AUTO, 2, 400) == {reason.format("fp32"): 2}
    assert runs(build("llama"), replace(AUTO, min_length=100), 2, 400) == {"sparse": 2}
    points = [point | {"block": 32} for point in crossover.measured()]
    monkeypatch.setattr(crossover, "measured", lambda: points)
    assert runs(half("llama"), AUTO, 2, 400) == {reason.format("blocks of 16"): 2}


def test_the_budget_decides():
    model = half("llama")
    dense = replace(AUTO, budget=ea.TopK(0.9))
    never = "sparse attention is not known to pay at density 1.00 "
    (reason,) = runs(model, dense, 2, 200)
    assert reason.startswith(never)
    for budget in (ea.TopP(0.95), ea.Perplexity(1.0)):
        config = replace(AUTO, budget=budget, expected_density=0.2)
        assert runs(model, config, 2, 200) == {"sparse": 2}
        (reason,) = runs(model, replace(config, expected_density=0.9), 2, 200)
        assert reason.startswith(never)
        bounded = replace(config, budget=replace(budget, max_density=0.2), expected_density=0.9)
        assert runs(model, bounded, 2, 200) == {"sparse": 2}


def test_bidirectional_layers_have_their_own_data(monkeypatch):
    short = f"fewer than {4096} keys (min_length='auto', not measured on cpu)"
    assert runs(half("bert"), AUTO, 2, 200) == {short: 2}
    points = (measured_on_sm90(192, 0.7, is_causal=False),)
    monkeypatch.setattr(crossover, "measured", lambda: points)
    crossover._find_crossover.cache_clear()
    assert runs(half("bert"), AUTO, 2, 200) == {"sparse": 2}


def test_a_window_bounds_what_can_be_saved():
    model = half("mistral")  # a window of 48 tokens
    assert runs(model, AUTO, 2, 400) == {PAYS: 2}


@torch.no_grad()
def test_chunks_of_queries_count_with_their_work():
    model, ids = half("llama"), tokens(2, 400)
    with ea.apply(model, AUTO) as handle:
        past = model(ids[:, :300]).past_key_values  # enough
        past = model(ids[:, 300:310], past_key_values=past).past_key_values  # 10 x 310 pairs
        model(ids[:, 310:], past_key_values=past)  # 90 x 400 pairs, just short of 192 x 192
        assert handle.stats().sparse == 2
        assert handle.stats().dense == {PAYS: 4}


@torch.no_grad()
def test_dense_calls_are_those_of_sdpa():
    model, mask = half("llama"), padding_mask("both", 150)
    inputs = {"input_ids": tokens(*mask.shape), "attention_mask": mask}
    expected = dense_logits(model, **inputs)
    with ea.apply(model, AUTO) as handle:
        expected.check(model(**inputs).logits, mask)
        assert handle.stats().dense == {PAYS: 2}
        assert PAYS in str(handle.stats())


@pytest.mark.parametrize("min_length", ["auto", 192])
@torch.no_grad()
def test_save_and_load(min_length, tmp_path):
    model, config = half("llama"), replace(AUTO, min_length=min_length, expected_density=0.5)
    with ea.apply(model, config):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with ea.apply(loaded) as handle:
        assert handle.config == config
        loaded(tokens(2, 200))
        assert handle.stats().sparse == 2


@pytest.fixture
def fresh_compiler():
    """A function is compiled only so often in a process: leave other tests their turns."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@torch.no_grad()
def test_compiles_into_one_graph(dynamic):
    model = half("llama")
    with ea.apply(model, AUTO) as handle:
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for length, reason in ((200, "sparse"), (150, PAYS)):
            ids = tokens(2, length)
            expected = model(ids, use_cache=False).logits
            handle.reset_stats()
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
            assert [set(layer.compiled) for layer in handle.stats().layers] == [{reason}] * 2


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_dynamic_sizes_share_a_graph_on_either_side():
    model = half("llama")
    with ea.apply(model, AUTO) as handle:
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for sizes, reason in (
            (((2, 200), (2, 230), (3, 260)), "sparse"),
            (((2, 150), (2, 170), (3, 180)), PAYS),
        ):
            compiled(tokens(*sizes[0]), use_cache=False)
            traced = [dict(layer.compiled) for layer in handle.stats().layers]
            assert all(reason in layer for layer in traced)
            with torch.compiler.set_stance("fail_on_recompile"):
                for batch, length in sizes[1:]:
                    compiled(tokens(batch, length), use_cache=False)
