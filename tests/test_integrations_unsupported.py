"""What the drop-in does not implement raises; nothing is ignored, nothing stays dense unseen."""

from __future__ import annotations

import pytest
import torch
from integration_models import GROUPED, KEEP_ALL, SIZES, build, tokens, transformers

import entropy_attn as ea
from entropy_attn.integrations import transformers as adapter

IDS = tokens(1, 40)


def gemma2():
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GROUPED, head_dim=16))


def gpt_oss():
    config = transformers.GptOssConfig(
        **GROUPED, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=8
    )
    return transformers.GptOssForCausalLM(config)


def t5():
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=97
    )
    return transformers.T5EncoderModel(config)


def modern_bert():
    config = transformers.ModernBertConfig(
        **SIZES, local_attention=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    return transformers.ModernBertModel(config)


def llama4():
    config = transformers.Llama4TextConfig(
        **GROUPED, intermediate_size_mlp=96, head_dim=16, num_local_experts=2,
        attention_chunk_size=16, pad_token_id=0,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gemma2, "passes softcap"),
        (gpt_oss, "passes s_aux"),
        (t5, "passes position_bias"),
        (modern_bert, "sliding_window_bidirectional_overlay"),
        (llama4, "chunked_overlay"),
    ],
)
@torch.no_grad()
def test_attention_of_another_kind(make, message):
    model = make().eval()
    model(IDS)
    with ea.apply(model, KEEP_ALL), pytest.raises(ValueError, match=message):
        model(IDS)
    model(IDS)


@pytest.mark.parametrize(
    ("name", "sizes", "attention"),
    [
        ("DebertaV2Model", {}, "DisentangledSelfAttention"),
        ("BloomModel", {}, "BloomAttention"),
        ("GPTJModel", {"n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8}, "GPTJAttention"),
    ],
)
def test_attention_that_bypasses_the_interface(name, sizes, attention):
    cls = getattr(transformers, name)
    small = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
    config = cls.config_class(**(sizes or small))
    model = cls(config)
    with pytest.raises(ValueError, match=rf"no attention of {name} .*{attention}"):
        ea.apply(model, KEEP_ALL)
    with pytest.raises(ValueError, match=rf"{name} cannot run .*{attention}"):
        cls._from_config(config, attn_implementation="entropy_attn")
    with pytest.raises(ValueError, match=rf"{name} cannot run .*{attention}"):
        model.set_attn_implementation("entropy_attn")


def test_partial_reach():
    model = torch.nn.ModuleDict({
        "llama": build("llama"),
        "other": torch.nn.MultiheadAttention(64, 4),
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"MultiheadAttention \(for example 'other'\)"):
        ea.apply(model, KEEP_ALL)
    assert model["llama"].config._attn_implementation == "sdpa"
    with ea.apply(model, KEEP_ALL, partial=True) as handle:
        assert [layer.name for layer in handle.layers] == [
            "llama.model.layers.0.self_attn",
            "llama.model.layers.1.self_attn",
        ]


def test_attention_dropout():
    config = transformers.LlamaConfig(**GROUPED, attention_dropout=0.1)
    model = transformers.LlamaForCausalLM(config)
    with ea.apply(model, KEEP_ALL):
        with pytest.raises(ValueError, match=r"passes dropout=0\.1"):
            model.train()(IDS)
        model.eval()(IDS)


@torch.no_grad()
def test_output_attentions():
    model = build("bert")
    call = (model.bert.encoder.layer[0].attention.self, *torch.zeros(3, 1, 4, 20, 16), None)
    with ea.apply(model, KEEP_ALL), pytest.raises(ValueError, match="output_attentions"):
        adapter.attention_function(*call, scaling=0.25, output_attentions=True)


@torch.no_grad()
def test_explicit_masks():
    """A 4D mask raises, or runs dense under it if the config says so."""
    model = build("llama")
    keep = torch.rand(1, 1, 40, 40) < 0.5
    keep |= torch.eye(40, dtype=torch.bool)
    keep &= torch.ones(40, 40, dtype=torch.bool).tril()
    additive = torch.zeros(keep.shape).masked_fill(~keep, -1e9)
    for mask in (keep, additive):
        expected = model(IDS, attention_mask=mask).logits
        with ea.apply(model, KEEP_ALL), pytest.raises(ValueError, match="explicit_mask='dense'"):
            model(IDS, attention_mask=mask)
        with ea.apply(model, ea.SparsityConfig(explicit_mask="dense")):
            torch.testing.assert_close(model(IDS, attention_mask=mask).logits, expected)


@torch.no_grad()
def test_overlays_of_the_model():
    from transformers.masking_utils import create_causal_mask

    model = build("llama")
    embeds = model.get_input_embeddings()(IDS)
    with ea.apply(model, KEEP_ALL), pytest.raises(ValueError, match="overlay"):
        create_causal_mask(
            model.config, embeds, None, past_key_values=None, or_mask_function=lambda *i: i[2] > 3
        )


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_gaps_in_the_padding_mask(family):
    """Exact without a window; with one, distances over the gap would be wrong."""
    model, ids = build(family), tokens(2, 120)
    mask = torch.ones_like(ids)
    mask[1, 50:60] = 0
    expected = model(ids, attention_mask=mask).logits
    with ea.apply(model, KEEP_ALL):
        if family == "mistral":
            with pytest.raises(ValueError, match="zeros between ones"):
                model(ids, attention_mask=mask)
        else:
            actual = model(ids, attention_mask=mask).logits
            torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_mask_of_another_length():
    module = build("llama").model.layers[0].self_attn
    q, k = torch.zeros(1, 4, 20, 16), torch.zeros(1, 2, 20, 16)
    with pytest.raises(ValueError, match=r"attention_mask \(1, 19\) for 20 keys"):
        adapter.attention_function(module, q, k, k, torch.ones(1, 19))
    with pytest.raises(ValueError, match="attention_mask and cu_seq_lens_q are both given"):
        adapter.attention_function(
            module, q, k, k, torch.ones(1, 20), cu_seq_lens_q=torch.tensor([0, 20])
        )


def test_arguments_of_apply():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        ea.apply(3)
    with pytest.raises(TypeError, match=r"config must be .*SparsityConfig, got dict"):
        ea.apply(build("llama"), {"block_size": 64})
    with pytest.raises(ValueError, match=r"dense_layers names 7, but the model has 2 attention"):
        ea.apply(build("llama"), ea.SparsityConfig(dense_layers=(7,)))
    with pytest.raises(ValueError, match=r"layers names 'decoder\.\*'"):
        ea.apply(build("llama"), ea.SparsityConfig(layers={"decoder.*": {"sink": 2}}))
