"""The transformers drop-in computes what SDPA computes when every block is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from integration_models import (
    DECODERS,
    GROUPED,
    KEEP_ALL,
    KEEP_FEW,
    MODELS,
    SIZES,
    all_sparse,
    build,
    dense_logits,
    inputs_of,
    padding_mask,
    tokens,
    transformers,
)
from torch._dynamo.backends.registry import lookup_backend

import entropy_attn as ea
from entropy_attn.benchmarks.model import LocalWindow
from entropy_attn.integrations.statistics import SPARSE
from entropy_attn.testing import assert_close_to_reference

PADDED = [
    *((family, "left") for family in DECODERS),
    *((family, "right") for family in ("llama", "mistral", "bert")),
    *((family, "both") for family in ("llama", "mistral", "bert")),
]


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_equals_sdpa(family):
    model, inputs = build(family), inputs_of(family)
    dense = dense_logits(model, **inputs)
    with ea.apply(model, KEEP_ALL) as handle:
        dense.check(model(**inputs).logits)
        assert all_sparse(handle)
        assert handle.stats().density == 1.0


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_small_budget_changes_the_output(family):
    model, inputs = build(family), inputs_of(family)
    dense = dense_logits(model, **inputs)
    with ea.apply(model, KEEP_FEW) as handle:
        sparse = model(**inputs).logits
        assert all_sparse(handle)
        # A fifth of the blocks, and always the sink, the diagonal and its neighbour.
        assert 0.2 < handle.stats().density < 0.85
    rounding = (dense.single.double() - dense.double).abs().max()
    assert torch.isfinite(sparse).all()
    assert (sparse.double() - dense.double).abs().max() > 100 * rounding


@pytest.mark.parametrize(("family", "side"), PADDED)
@torch.no_grad()
def test_padding(family, side):
    model, mask = build(family), padding_mask(side)
    inputs = {"input_ids": tokens(*mask.shape), "attention_mask": mask}
    dense = dense_logits(model, **inputs)
    with ea.apply(model, KEEP_ALL) as handle:
        dense.check(model(**inputs).logits, mask)
        assert all_sparse(handle)


@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
@torch.no_grad()
def test_padding_does_not_reach_the_valid_tokens(family):
    """Selection included: other tokens under the padding, and more of it, change nothing."""
    model, mask = build(family), padding_mask("right")
    ids = tokens(*mask.shape)
    other = torch.where(mask.bool(), ids, (ids + 5) % 97)
    with ea.apply(model, KEEP_FEW):
        first = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        second = model(input_ids=other, attention_mask=mask).logits[mask.bool()]
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
@torch.no_grad()
def test_dense_path_with_padding(family):
    """Calls that are too short for sparse run through SDPA, with the right mask."""
    model, mask = build(family), padding_mask("both")
    inputs = {"input_ids": tokens(*mask.shape), "attention_mask": mask}
    dense = dense_logits(model, **inputs)
    with ea.apply(model, ea.SparsityConfig(min_length=201)) as handle:
        dense.check(model(**inputs).logits, mask)
        assert handle.stats().dense == {"fewer than min_length=201 keys": 2}
        assert handle.stats().sparse == 0


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_dense_path_of_long_calls_stores_no_mask(family, monkeypatch):
    from entropy_attn.integrations import dense as dense_path

    model, mask = build(family), padding_mask("both")
    inputs = {"input_ids": tokens(*mask.shape), "attention_mask": mask}
    expected = dense_logits(model, **inputs)
    monkeypatch.setattr(dense_path, "LARGEST_MASK", 0)
    monkeypatch.setattr(dense_path, "scaled_dot_product_attention", None)
    with ea.apply(model, ea.SparsityConfig(dense_layers=(0, 1))):
        expected.check(model(**inputs).logits, mask)


# --- packed sequences ---------------------------------------------------------------------------

# 3 and 2 sequences in two rows: of similar and of very different lengths.
POSITIONS = torch.stack([
    torch.cat([torch.arange(n) for n in (70, 99, 31)]),
    torch.cat([torch.arange(n) for n in (3, 197)]),
])  # fmt: skip


@pytest.mark.parametrize("config", [KEEP_ALL, ea.SparsityConfig()], ids=["sparse", "dense"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_packed_position_ids(family, rows, config):
    model = build(family)
    inputs = {"input_ids": tokens(rows, 200), "position_ids": POSITIONS[:rows], "use_cache": False}
    dense = dense_logits(model, **inputs)
    with ea.apply(model, config) as handle:
        dense.check(model(**inputs).logits)
        # Sequences are attended to in groups of similar length.
        calls = [layer.calls for layer in handle.stats().layers]
        assert calls == [{1: 2, 2: 4}[rows]] * 2
        assert all_sparse(handle) == (config is KEEP_ALL)


@torch.no_grad()
def test_packed_cumulative_lengths():
    model = build("llama")
    inputs = {"input_ids": tokens(1, 200), "position_ids": POSITIONS[:1], "use_cache": False}
    dense = dense_logits(model, **inputs)
    lengths = torch.tensor([0, 70, 169, 200], dtype=torch.int32)
    packed = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 99}
    with ea.apply(model, KEEP_ALL) as handle:
        dense.check(model(**inputs, **packed).logits)
        assert all_sparse(handle)
        with pytest.raises(ValueError, match="cu_seq_lens_q must increase from 0 to the 200"):
            model(**inputs, cu_seq_lens_q=lengths[:-1])
        with pytest.raises(ValueError, match="cu_seq_lens_k differs"):
            model(**inputs, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths + 1)


@torch.no_grad()
def test_lengths_that_were_written_to_are_read_again():
    model, ids = build("llama"), tokens(1, 200)
    lengths = torch.tensor([0, 120, 200], dtype=torch.int32)
    with ea.apply(model, KEEP_ALL):
        for split in (120, 33):
            lengths[1] = split
            position_ids = torch.cat([torch.arange(split), torch.arange(200 - split)])[None]
            packed = model(
                ids, position_ids=position_ids, cu_seq_lens_q=lengths, use_cache=False
            ).logits
            alone = model(ids[:, split:], use_cache=False).logits
            torch.testing.assert_close(packed[:, split:], alone)


# --- caches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_generate(family, padded, cache):
    model = build(family)
    model.generation_config.pad_token_id = 0
    mask = padding_mask("left", 180) if padded else torch.ones(2, 90, dtype=torch.int64)
    inputs = {"input_ids": tokens(*mask.shape) * mask, "attention_mask": mask}
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    options["disable_compile"] = True
    expected = model.generate(**inputs, **options)
    config = ea.SparsityConfig(block_size=16, budget=ea.TopK(1.0), min_length=0, min_queries=2)
    with ea.apply(model, config) as handle:
        assert torch.equal(model.generate(**inputs, **options), expected)
        for layer in handle.stats().layers:
            assert layer.sparse == 1  # the prompt
            assert layer.dense == {"fewer than min_queries=2 queries": 11}


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_prefill_in_chunks(family, cache, padded):
    model = build(family)
    mask = padding_mask("left") if padded else torch.ones(3, 200, dtype=torch.int64)
    ids = tokens(*mask.shape)
    dense = dense_logits(model, input_ids=ids, attention_mask=mask)
    if cache == "dynamic":
        past = transformers.DynamicCache(config=model.config)
    else:
        past = transformers.StaticCache(config=model.config, max_cache_len=256)
    with ea.apply(model, KEEP_ALL) as handle:
        logits = []
        for begin, end in ((0, 90), (90, 91), (91, 160), (160, 200)):
            seen = mask[:, :end] if padded else None
            out = model(ids[:, begin:end], attention_mask=seen, past_key_values=past)
            logits.append(out.logits)
        dense.check(torch.cat(logits, 1), mask)
        assert all_sparse(handle)
        assert [layer.sparse for layer in handle.stats().layers] == [4, 4]


# --- models of several parts --------------------------------------------------------------------


@torch.no_grad()
def test_cross_attention():
    config = transformers.BartConfig(
        vocab_size=97, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    mask = padding_mask("both", 180)
    inputs = {"input_ids": tokens(*mask.shape), "attention_mask": mask}
    beams = inputs | {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    expected = model.generate(**beams)
    inputs["decoder_input_ids"] = tokens(3, 70, seed=2)
    dense = dense_logits(model, **inputs)
    with ea.apply(model, KEEP_ALL) as handle:
        dense.check(model(**inputs).logits)
        assert torch.equal(model.generate(**beams), expected)
        assert all_sparse(handle)
        assert len(handle.layers) == 3  # encoder, decoder, and from one to the other


@torch.no_grad()
def test_vision_and_text(tmp_path):
    """Each part has a config of its own; layers are counted over both."""
    vision = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **vision, num_hidden_layers=2, image_size=48, patch_size=8
        ),
        text_config=transformers.LlamaConfig(**GROUPED),
        image_token_index=96,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = tokens(1, 100) % 96
    ids[:, 5:41] = 96
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 48, 48)}
    dense = dense_logits(model, **inputs)
    config = replace(KEEP_ALL, dense_layers=("*vision*layers.1.*",))
    with ea.apply(model, config) as handle:
        dense.check(model(**inputs).logits)
        assert sorted(layer.sparse for layer in handle.stats().layers) == [0, 1, 1, 1]
        model.save_pretrained(tmp_path)
    parts = (model.config, model.config.text_config, model.config.vision_config)
    assert {part._attn_implementation for part in parts} == {"sdpa"}
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="entropy_attn")
    dense.check(loaded(**inputs).logits)
    calls = [m._entropy_attn_layer.recorder.calls["sparse"] for m in attention_of(loaded)]
    assert sorted(calls) == [0, 1, 1, 1]


def attention_of(model):
    return [m for m in model.modules() if hasattr(m, "_entropy_attn_layer")]


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@torch.no_grad()
def test_compiles_into_one_graph(padded):
    model, mask = build("llama"), padding_mask("left")
    inputs = {"input_ids": tokens(*mask.shape)} | ({"attention_mask": mask} if padded else {})
    dense = dense_logits(model, **inputs)
    moves = 0

    def backend(graph, example_inputs):
        nonlocal moves
        moves = sum(node.target == "gather" for node in graph.graph.nodes)
        return lookup_backend("aot_eager")(graph, example_inputs)

    with ea.apply(model, KEEP_ALL) as handle:
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        dense.check(compiled(**inputs).logits, mask if padded else None)
        for layer in handle.stats().layers:
            assert layer.compiled == {"sparse": 1}
    assert bool(moves) == padded  # only padding moves tokens


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_compiles_on_a_gpu(mode, padded):
    """By Inductor, with CUDA graphs in the second mode; the sizes pay, so that "auto" is sparse.

    Inductor rounds queries and keys elsewhere. Of random weights that decides which blocks are
    chosen, so the values are compared where blocks are chosen by distance.
    """
    sizes = transformers.LlamaConfig(
        hidden_size=1152, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=18,
        num_key_value_heads=6, vocab_size=1000, max_position_embeddings=32768,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(sizes).to("cuda", torch.bfloat16).eval()
    for length, is_sparse in ((16384, True), (512, False)):
        inputs = {"input_ids": torch.randint(1000, (1, length), device="cuda")}
        if padded:
            inputs["attention_mask"] = (torch.arange(length, device="cuda") >= 100).long()[None]
        for scorer in (LocalWindow(), ea.Envelope(8)) if is_sparse else (ea.Envelope(8),):
            config = ea.SparsityConfig(scorer=scorer, budget=ea.TopK(0.2))
            with ea.apply(model, config) as handle:
                eager = model(**inputs, use_cache=False, logits_to_keep=64).logits.float()
                compiled = torch.compile(model, fullgraph=True, mode=mode)
                for _ in range(3):
                    logits = compiled(**inputs, use_cache=False, logits_to_keep=64).logits.float()
                for layer in handle.stats().layers:
                    assert [key == SPARSE for key in layer.compiled] == [is_sparse]
            torch.compiler.reset()
            off = (logits - eager).abs() / eager.abs().max()
            same_blocks = not is_sparse or scorer == LocalWindow()
            assert (off.max() if same_blocks else off.mean()) <= 2**-5


@torch.no_grad()
def test_loaded_model_compiles_before_it_ever_ran(tmp_path):
    model, ids = build("llama"), tokens(1, 200)
    with ea.apply(model, KEEP_FEW):
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="entropy_attn")
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(ids).logits, expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_decoding_from_a_static_cache_compiles(family):
    model, ids = build(family), tokens(2, 90)
    dense = dense_logits(model, input_ids=ids)
    past = transformers.StaticCache(config=model.config, max_cache_len=128)
    with ea.apply(model, KEEP_ALL):
        model(ids[:, :80], past_key_values=past)
        step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        logits = [step(ids[:, i : i + 1], past_key_values=past).logits for i in range(80, 83)]
    decoded = torch.nn.functional.pad(torch.cat(logits, 1), (0, 0, 80, 7))
    where = torch.zeros_like(ids)
    where[:, 80:83] = 1
    dense.check(decoded, where)


@torch.no_grad()
def test_packing_in_a_graph_is_an_error():
    model = build("llama")
    ids, positions = tokens(1, 200), torch.arange(200)[None]
    with ea.apply(model, KEEP_ALL):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(ids, position_ids=positions, use_cache=False)
        with pytest.raises(RuntimeError, match="packed sequences"):
            compiled(ids, position_ids=POSITIONS[:1], use_cache=False)


@torch.no_grad()
def test_packing_while_a_graph_is_captured_is_an_error(monkeypatch):
    from entropy_attn.integrations import transformers as integration
    from entropy_attn.integrations import transformers_masks

    model = build("llama")
    ids = tokens(1, 200)
    lengths = torch.tensor([0, 70, 200], dtype=torch.int32)
    with ea.apply(model, KEEP_ALL):
        expected = model(ids, use_cache=False).logits
        for module in (integration, transformers_masks):
            monkeypatch.setattr(module, "is_capturing", lambda device: True)
        # Then transformers passes position_ids on as if they were of packed sequences.
        monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda *args: True)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
        with pytest.raises(RuntimeError, match="packed sequences"):
            model(ids, position_ids=POSITIONS[:1], use_cache=False)
        with pytest.raises(ValueError, match="cu_seq_lens_q"):
            model(ids, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, use_cache=False)


@pytest.mark.gpu
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_cuda_graph_of_a_whole_model(use_cache):
    model = build("llama").to("cuda", torch.bfloat16)
    first, second = (tokens(1, 200, seed).to("cuda") for seed in (1, 2))
    ids = first.clone()
    with ea.apply(model, KEEP_FEW):
        expected = [model(each, use_cache=use_cache).logits for each in (first, second)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(ids, use_cache=use_cache).logits
        for each, wanted in zip((first, second), expected, strict=True):
            ids.copy_(each)
            graph.replay()
            torch.testing.assert_close(logits, wanted, rtol=0, atol=0)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_training_step_with_gradient_checkpointing(padded):
    model = build("llama").train()
    mask = padding_mask("left") if padded else torch.ones(3, 200, dtype=torch.int64)
    ids = tokens(*mask.shape)
    labels = ids.masked_fill(mask == 0, -100)

    def gradients(dtype=torch.float32):
        model.to(dtype).zero_grad()
        model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    exact, plain = gradients(torch.float64), gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with ea.apply(model, KEEP_ALL) as handle:
        sparse = gradients()
        # Each layer runs again in the backward.
        assert [layer.sparse for layer in handle.stats().layers] == [2, 2]
        assert all_sparse(handle)
    for name, gradient in sparse.items():
        assert_close_to_reference(gradient, plain[name], exact[name], name)
