"""apply and its handle: settings by layer, statistics, saving, and giving the model back."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from integration_models import KEEP_ALL, KEEP_FEW, all_sparse, build, tokens, transformers

import entropy_attn as ea

IDS = tokens(2, 200)
PER_LAYER = ea.SparsityConfig(
    block_size=16,
    budget=ea.TopK(0.2),
    min_length=0,
    layers={-1: {"budget": ea.TopK(1.0), "block_size": (32, 16)}},
)


@torch.no_grad()
def test_remove_restores_the_model():
    model = build("llama")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    config, logits = copy.deepcopy(model.config.to_dict()), model(IDS).logits
    handle = ea.apply(model, KEEP_FEW)
    assert not torch.equal(model(IDS).logits, logits)
    handle.remove()
    handle.remove()
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(IDS).logits, logits)


@torch.no_grad()
def test_handles_nest():
    model = build("llama")
    model.set_attn_implementation("eager")
    first = ea.apply(model, KEEP_ALL)
    expected = model(IDS).logits
    second = ea.apply(model, KEEP_FEW)
    model(IDS)
    assert [layer.sparse for layer in first.stats().layers] == [1, 1]
    with pytest.raises(RuntimeError, match="remove the later handle first"):
        first.remove()
    second.remove()
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_removing_in_the_wrong_order_leaves_the_model_usable():
    model = build("llama")
    plain = model(IDS).logits
    first = ea.apply(model, KEEP_ALL)
    second = ea.apply(model, KEEP_FEW)
    with pytest.raises(RuntimeError, match="remove the later handle first"):
        first.remove()
    second.remove()
    first.remove()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(IDS).logits, plain)


@torch.no_grad()
def test_settings_by_layer():
    model = build("llama")
    with ea.apply(model, PER_LAYER) as handle:
        model(IDS)
        first, last = handle.stats().layers
        assert first.density < 0.85
        assert last.density == 1.0
        assert handle.layers[1].config.block_size == (32, 16)
    dense = ea.SparsityConfig(min_length=0, dense_layers=("*.layers.0.*",))
    with ea.apply(model, dense) as handle:
        model(IDS)
        first, last = handle.stats().layers
        assert first.dense == {"the layer is in dense_layers": 1}
        assert last.sparse == 1


@torch.no_grad()
def test_statistics():
    model = build("llama")
    with ea.apply(model, KEEP_ALL) as handle:
        assert handle.stats().density is None
        model(IDS)
        model(IDS[:, :120])
        stats = handle.stats()
        assert [layer.calls for layer in stats.layers] == [2, 2]
        assert stats.layers[0].kv_len == (120, 200)
        assert stats.sparse == 4
        text = str(stats)
        assert "model.layers.1.self_attn" in text
        assert "120..200" in text
        assert repr(handle) == "Handle(LlamaForCausalLM, 2 attention layers)"
        handle.reset_stats()
        assert handle.stats().sparse == 0


@torch.no_grad()
def test_density_counts_visible_blocks_of_padded_batches():
    """Against counting tiles of the visible pairs."""
    from entropy_attn.integrations.statistics import visible_blocks
    from entropy_attn.reference.dense import visible_pairs

    lens = torch.tensor([90, 17, 0, 64], dtype=torch.int32)
    q_lens = torch.tensor([50, 17, 0, 30], dtype=torch.int32)
    for options in (
        {"is_causal": False},
        {"is_causal": True},
        {"is_causal": True, "window": 20},
        {"is_causal": False, "kv_lens": lens},
        {"is_causal": True, "kv_lens": lens, "q_lens": q_lens},
        {"is_causal": True, "window": 20, "kv_lens": lens, "q_lens": q_lens},
        {"is_causal": True, "q_lens": q_lens},
    ):
        pairs = visible_pairs(4, 50, 90, **options)[:, 0].float()
        padded = torch.nn.functional.pad(pairs, (0, 6, 0, 14))
        tiles = padded.unflatten(1, (-1, 32)).unflatten(3, (-1, 16)).amax((2, 4))
        expected = tiles.sum(-1).long()
        assert torch.equal(
            visible_blocks(50, 90, (32, 16), batch=4, **options).expand(4, -1), expected
        )


@pytest.mark.parametrize("family", ["llama", "vit"])
@torch.no_grad()
def test_save_and_load(family, tmp_path):
    model = build(family)
    inputs = {"pixel_values": torch.randn(1, 3, 48, 48)} if family == "vit" else {"input_ids": IDS}
    with ea.apply(model, PER_LAYER):
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["entropy_attn"]["budget"]["type"] == "TopK"

    cls = type(model)
    loaded = cls.from_pretrained(tmp_path, attn_implementation="entropy_attn")
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    plain = cls.from_pretrained(tmp_path)
    assert not torch.allclose(plain(**inputs).logits, expected, rtol=1e-3, atol=1e-4)
    with ea.apply(plain) as handle:
        assert handle.config == PER_LAYER
        torch.testing.assert_close(plain(**inputs).logits, expected)
        assert all_sparse(handle)


@torch.no_grad()
def test_loaded_without_a_config_takes_the_defaults(tmp_path):
    model = build("llama")
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    cls = transformers.AutoModelForCausalLM
    loaded = cls.from_pretrained(tmp_path, attn_implementation="entropy_attn")
    torch.testing.assert_close(loaded(IDS).logits, expected)  # short, so dense
    with ea.apply(loaded, KEEP_ALL) as handle:
        torch.testing.assert_close(loaded(IDS).logits, expected)
        assert all_sparse(handle)
    torch.testing.assert_close(loaded(IDS).logits, expected)
    assert loaded.config._attn_implementation == "entropy_attn"


@torch.no_grad()
def test_switching_a_built_model():
    model = build("llama")
    plain = model(IDS).logits
    model.config.entropy_attn = KEEP_FEW.to_dict()
    model.set_attn_implementation("entropy_attn")
    few = model(IDS).logits
    assert not torch.allclose(few, plain, rtol=1e-3, atol=1e-4)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(IDS).logits, plain)


@torch.no_grad()
def test_saved_settings_of_another_model_raise(tmp_path):
    model = build("llama")
    model.config.entropy_attn = ea.SparsityConfig(dense_layers=(5,)).to_dict()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="entropy_attn")
    with pytest.raises(ValueError, match="dense_layers names 5, but the model has 2"):
        loaded(IDS)


@torch.no_grad()
def test_copies_keep_their_settings():
    model = build("llama")
    with ea.apply(model, PER_LAYER):
        expected = model(IDS).logits
        twin = copy.deepcopy(model)
        thawed = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin(IDS).logits, expected)
    torch.testing.assert_close(thawed(IDS).logits, expected)


@torch.no_grad()
def test_custom_scorer_is_not_saved():
    def scorer(query, key, *, block_size, **kwargs):
        shape = (-(-query.shape[2] // block_size[0]), -(-key.shape[2] // block_size[1]))
        return torch.ones(*query.shape[:2], *shape)

    model = build("llama")
    config = ea.SparsityConfig(scorer=scorer, min_length=0, block_size=16)
    with pytest.warns(UserWarning, match="cannot be saved"):
        handle = ea.apply(model, config)
    assert not hasattr(model.config, "entropy_attn")
    model(IDS)
    assert all_sparse(handle)


@torch.no_grad()
def test_wrapped_models_are_found():
    inner = build("bert")
    model = torch.nn.Sequential(inner.bert)
    with ea.apply(model, KEEP_ALL) as handle:
        model(IDS)
        assert all_sparse(handle)
        assert handle.layers[0].name == "0.encoder.layer.0.attention.self"
    assert inner.config._attn_implementation == "sdpa"


def test_statistics_of_a_captured_graph(monkeypatch):
    """What ran before the capture counts once, what the graph runs counts each time."""
    from entropy_attn.integrations import statistics

    recorder = statistics.Recorder()
    counts = torch.full((1, 2, 4), 3, dtype=torch.int32)
    assert recorder.read("layer").density is None
    recorder.density(counts, 1, 2, 16)
    with monkeypatch.context() as patched:
        patched.setattr(statistics, "is_capturing", lambda device: True)
        recorder.density(counts // 3, 1, 2, 16)
    # As a replay does: the sums are added to what lies where they went in the capture.
    recorder._replayed += torch.tensor([8.0, 32.0])
    assert recorder.read("layer").density == (24 + 8 + 8) / (32 + 32 + 32)
    totals = recorder._replayed
    recorder.reset()
    assert recorder.read("layer").density is None
    assert recorder._replayed is totals  # to which the graph goes on adding


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_density_of_replays():
    from entropy_attn.integrations.call import AttentionCall
    from entropy_attn.integrations.layer import SparseLayer

    layer = SparseLayer("layer", ea.SparsityConfig(budget=ea.TopK(0.25), min_length=0), False)
    tensors = torch.randn(3, 1, 4, 2048, 64, device="cuda", dtype=torch.bfloat16)
    call = AttentionCall(*tensors, is_causal=True)
    for _ in range(2):
        layer.attend(call)
    torch.cuda.synchronize()
    before = layer.recorder.read("layer").density
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.attend(call)
    for _ in range(3):
        graph.replay()
    assert layer.recorder.read("layer").density == pytest.approx(before)
    assert torch.equal(out, layer.attend(call))
