"""Models whose tokens are sorted: the same logits with every block kept, and clear errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from integration_models import (
    KEEP_ALL,
    KEEP_FEW,
    all_sparse,
    build,
    dense_logits,
    inputs_of,
    padding_mask,
    tokens,
    transformers,
)

import entropy_attn as ea
from entropy_attn.integrations.call import AttentionCall
from entropy_attn.integrations.layer import SparseLayer
from entropy_attn.integrations.padding import codes_from_validity

SORT = ea.Reorder(cells=8, prefix=1)
SORT_ALL = replace(KEEP_ALL, reorder=SORT)
SORT_FEW = replace(KEEP_FEW, reorder=SORT)


@pytest.mark.parametrize("family", ["vit", "bert"])
@torch.no_grad()
def test_equals_sdpa(family):
    model, inputs = build(family), inputs_of(family)
    expected = dense_logits(model, **inputs)
    with ea.apply(model, SORT_ALL) as handle:
        expected.check(model(**inputs).logits)
        assert all_sparse(handle)
        assert handle.stats().density == 1


@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padding(side):
    model, mask = build("bert"), padding_mask(side)
    inputs = {"input_ids": tokens(3, 200), "attention_mask": mask}
    expected = dense_logits(model, **inputs)
    with ea.apply(model, SORT_ALL) as handle:
        expected.check(model(**inputs).logits, where=mask)
        assert all_sparse(handle)


@torch.no_grad()
def test_padding_does_not_reach_the_valid_tokens():
    model, mask = build("bert"), padding_mask("both")
    first, second = tokens(3, 200), tokens(3, 200, seed=2)
    second = torch.where(mask.bool(), first, second)
    with ea.apply(model, SORT_FEW):
        valid = mask.bool()
        found = [model(input_ids=ids, attention_mask=mask).logits[valid] for ids in (first, second)]
    assert torch.equal(*found)


@torch.no_grad()
def test_small_budget_changes_the_output():
    model, inputs = build("vit"), inputs_of("vit")
    plain = model(**inputs).logits
    with ea.apply(model, SORT_FEW) as handle:
        assert not torch.allclose(model(**inputs).logits, plain, rtol=1e-3)
        assert handle.stats().density < 0.5


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_compiles_into_one_graph(padded):
    model, inputs = build("bert"), {"input_ids": tokens(3, 200)}
    if padded:
        inputs["attention_mask"] = padding_mask("both")
    with ea.apply(model, SORT_FEW):
        eager = model(**inputs).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, eager)


def test_training_with_gradient_checkpointing():
    model, inputs = build("bert").train(), {"input_ids": tokens(2, 100)}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with ea.apply(model, SORT_FEW):
            model(**inputs).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_sorted_with_the_move_of_padding_in_one_gather(monkeypatch):
    """Padding anywhere, more queries than keys, lengths of a packed batch: against SDPA."""
    from entropy_attn.reference import permutation

    moves = []
    take = permutation._take
    monkeypatch.setattr(permutation, "_take", lambda *a: moves.append(a) or take(*a))
    layer = SparseLayer("layer", replace(SORT_ALL, reorder=ea.Reorder(4)), dense=False)
    query = torch.randn(2, 4, 60, 16, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 60, 16, dtype=torch.float64).unbind()
    valid = torch.rand(2, 60) < 0.6
    call = AttentionCall(query, key, value, False, codes=codes_from_validity(valid, 60))
    out = layer.attend(call)
    assert len(moves) == 4, "queries, keys, values and the output"
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=valid[:, None, None], enable_gqa=True
    )
    where = valid[:, None, :, None]
    torch.testing.assert_close(out * where, expected * where, rtol=1e-12, atol=1e-12)
    assert (out * ~where == 0).all(), "rows of padding give 0"

    cross = replace(call, query=torch.cat([query, query[:, :, :5]], 2))
    found = layer.attend(cross)[:, :, 60:]
    torch.testing.assert_close(found, expected[:, :, :5], rtol=1e-12, atol=1e-12)

    lens = torch.tensor([60, 17], dtype=torch.int32)
    found = layer.attend(replace(call, codes=None, kv_lens=lens, q_lens=lens))
    short = torch.nn.functional.scaled_dot_product_attention(
        query[1:, :, :17], key[1:, :, :17], value[1:, :, :17], enable_gqa=True
    )
    torch.testing.assert_close(found[1:, :, :17], short, rtol=1e-12, atol=1e-12)
    assert (found[1, :, 17:] == 0).all()


def test_only_the_prefix_is_always_kept():
    query, key = torch.randn(2, 1, 1, 160, 16).unbind()
    kept = {}
    for prefix in (0, 1, 17):
        config = ea.SparsityConfig(
            block_size=16, budget=ea.TopK(count=1), min_length=0, min_queries=1, sink=3, local=2,
            reorder=ea.Reorder(prefix=prefix),
        )  # fmt: skip
        assert config.always_kept == (-(-prefix // 16), 0)
        layer = SparseLayer("layer", config, dense=False)
        layer.attend(AttentionCall(query, key, key, False))
        kept[prefix] = layer.recorder.read("layer").density
    assert kept[0] == pytest.approx(0.1), "one block of ten"
    assert kept[0] < kept[1] <= 0.2 + 1e-6
    assert kept[1] < kept[17] <= 0.3 + 1e-6


# --- causal layers ------------------------------------------------------------------------------


def test_causal_layers_are_known_when_the_config_is_applied():
    model = build("llama")
    message = r"model.layers.0.self_attn: is_causal=True cannot be combined with reorder"
    with pytest.raises(ValueError, match=message):
        ea.apply(model, SORT_ALL)
    assert model.config._attn_implementation == "sdpa"
    first = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn: .*'reorder': None"):
        ea.apply(model, replace(SORT_ALL, layers={0: {"reorder": None}}))
    # Layers that run dense sort nothing.
    with ea.apply(model, replace(SORT_ALL, layers={0: {"reorder": None}}, dense_layers=(1,))):
        model(tokens(1, 40))
    assert first.is_causal


def test_a_saved_reorder_comes_back(tmp_path):
    model = build("vit")
    with ea.apply(model, SORT_FEW):
        model.save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    with ea.apply(loaded) as handle:
        assert handle.config.reorder == SORT


@pytest.mark.parametrize("options", [{"is_causal": True}, {"is_causal": True, "window": 8}])
def test_causal_calls_raise_however_short(options):
    layer = SparseLayer("encoder.0", replace(SORT_ALL, min_length=4096), dense=False)
    query = torch.randn(1, 1, 32, 16)
    with pytest.raises(ValueError, match=r"encoder.0: is_causal=True cannot be combined"):
        layer.attend(AttentionCall(query, query, query, **options))
    dense = SparseLayer("encoder.0", SORT_ALL, dense=True)
    assert dense.attend(AttentionCall(query, query, query, **options)).shape == query.shape
