"""observe: the entropies of a model's attention, against softmax written out."""

from __future__ import annotations

import copy

import pytest
import torch
from integration_models import build, inputs_of, padding_mask, tokens, transformers

import entropy_attn as ea
from entropy_attn.reference.dense import entropy, sum_blocks
from entropy_attn.testing import assert_close_to_reference

BLOCK = 16


def attention_weights(model, dtype=torch.float32, **inputs):
    """Softmax of each layer, (B, H, N, N), computed in ``dtype`` as it is written in books."""
    weights = []

    def attention(module, query, key, value, mask, scaling, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
        scores = query @ key.transpose(-1, -2) * scaling
        if mask is None and module.is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights.append(scores.softmax(-1).nan_to_num(0.0))  # rows of padding see nothing
        return (weights[-1] @ value).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("as_in_books", attention)
    masking = transformers.masking_utils
    masking.AttentionMaskInterface.register("as_in_books", masking.sdpa_mask)
    twin = copy.deepcopy(model).to(dtype)
    twin.set_attn_implementation("as_in_books")
    twin(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    return weights


def expected_entropies(weights, mask):
    """Mean over the valid rows and tiles of row, block and tile entropy, exp(tile entropy)."""
    row, block, tile, effective = [], [], [], []
    for b, keep in enumerate(mask.bool()):
        p = weights[b][:, keep][:, :, keep]
        row.append(entropy(p))
        in_blocks = sum_blocks(p, BLOCK, -1)
        block.append(entropy(in_blocks))
        count = sum_blocks(torch.ones(p.shape[1], dtype=p.dtype), BLOCK, 0)
        tile.append(entropy(sum_blocks(in_blocks, BLOCK, 1) / count[:, None]))
        effective.append(tile[-1].exp())
    return [torch.cat(x, 1).mean(1) for x in (row, block, tile, effective)]


@pytest.mark.parametrize(
    ("family", "side"),
    [("llama", "none"), ("llama", "both"), ("mistral", "left"), ("bert", "right"), ("vit", "none")],
)
@torch.no_grad()
def test_entropies(family, side):
    model = build(family)
    if family == "vit":
        inputs, mask = inputs_of("vit", 2), torch.ones(2, 145)
    else:
        mask = padding_mask(side)
        inputs = {"input_ids": tokens(*mask.shape), "attention_mask": mask}
    plain = model(**inputs).logits
    names = ("row_entropy", "block_entropy", "tile_entropy", "effective_blocks")
    single, double = (
        [expected_entropies(w, mask) for w in attention_weights(model, dtype, **inputs)]
        for dtype in (torch.float32, torch.float64)
    )
    with ea.observe(model, block_size=BLOCK) as seen:
        observed = model(**inputs).logits
    keep = mask.bool() if family != "vit" else slice(None)
    torch.testing.assert_close(observed[keep], plain[keep])
    for layer, plain_values, values in zip(seen.layers, single, double, strict=True):
        for name, plain_value, value in zip(names, plain_values, values, strict=True):
            actual = getattr(layer, name).float()
            assert_close_to_reference(actual, plain_value, value, f"{layer.name} {name}")
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_implied_density_is_what_the_budget_keeps():
    """density of exp(H) blocks a tile = what TrueMass with Perplexity(1.0) really visits."""
    model, ids = build("llama"), tokens(2, 200)
    with ea.observe(model, block_size=BLOCK) as seen:
        model(ids)
    config = ea.SparsityConfig(
        block_size=BLOCK, scorer=ea.TrueMass(), budget=ea.Perplexity(1.0), sink=0, local=0,
        min_length=0,
    )  # fmt: skip
    with ea.apply(model, config) as handle:
        model(ids)
    first = handle.stats().layers[0].density
    assert seen.layers[0].density.mean().item() == pytest.approx(first, abs=1e-3)


@torch.no_grad()
def test_rows_and_accumulation():
    model, mask = build("llama"), padding_mask("left")
    ids = tokens(*mask.shape)
    with ea.observe(model, block_size=BLOCK, keep_rows=True) as seen:
        assert str(seen) == "Observation(LlamaForCausalLM, nothing ran yet)"
        model(ids, attention_mask=mask)
        once = seen.layers[0]
        model(ids, attention_mask=mask)
    layer = seen.layers[0]
    assert layer.calls == 2
    torch.testing.assert_close(layer.row_entropy, once.row_entropy)
    rows = layer.rows[0]
    assert rows.shape == (3, 4, 200)
    assert torch.equal(rows.isnan(), (mask == 0)[:, None].expand_as(rows))
    torch.testing.assert_close(rows.nanmean((0, 2)).double(), layer.row_entropy)
    weights = attention_weights(model, input_ids=ids, attention_mask=mask)[0]
    torch.testing.assert_close(rows[1, :, 37:], entropy(weights[1])[:, 37:])
    seen.reset()
    with pytest.raises(RuntimeError, match="no attention ran yet"):
        _ = seen.layers


@torch.no_grad()
def test_packed_sequences_are_observed_apart():
    model, ids = build("llama"), tokens(1, 200)
    positions = torch.cat([torch.arange(70), torch.arange(130)])[None]
    with ea.observe(model, block_size=BLOCK) as packed:
        model(ids, position_ids=positions, use_cache=False)
    with ea.observe(model, block_size=BLOCK) as apart:
        model(ids[:, :70], use_cache=False)
        model(ids[:, 70:], use_cache=False)
    for a, b in zip(packed.layers, apart.layers, strict=True):
        torch.testing.assert_close(a.tile_entropy, b.tile_entropy)
        torch.testing.assert_close(a.density, b.density)


@torch.no_grad()
def test_table_and_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    model = build("llama")
    with ea.observe(model, block_size=BLOCK) as seen:
        model(tokens(1, 100))
    text = str(seen)
    assert "model.layers.1.self_attn" in text
    assert "eff. blocks" in text
    assert f"{seen.density:.3f}" in text
    axes = seen.plot("density")
    assert axes.images[0].get_array().shape == (2, 4)
    matplotlib.pyplot.close(axes.figure)
    with pytest.raises(ValueError, match="measure must be one of"):
        seen.plot("entropy")


def test_table_without_rich(monkeypatch):
    import sys

    from entropy_attn.integrations.table import render

    monkeypatch.setitem(sys.modules, "rich", None)
    text = render("title", ("name", "n"), [("a", "1"), ("long", "22")], ["note"])
    assert text == "title\nname   n\na      1\nlong  22\nnote"


@torch.no_grad()
def test_what_cannot_be_observed_raises():
    model, ids = build("llama"), tokens(1, 40)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        ea.observe("llama")
    with pytest.raises(ValueError, match="block_size must be a power of two"):
        ea.observe(model, block_size=50)
    bias = torch.zeros(1, 1, 40, 40)
    with ea.observe(model), pytest.raises(ValueError, match=r"ea\.observe cannot express"):
        model(ids, attention_mask=bias)
    deberta = transformers.DebertaV2Model(
        transformers.DebertaV2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="DisentangledSelfAttention"):
        ea.observe(deberta)
