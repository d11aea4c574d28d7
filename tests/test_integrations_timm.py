"""timm models: the same logits as their own attention when every block is kept."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from integration_models import KEEP_ALL, KEEP_FEW, all_sparse
from timm_or_stub import timm

import entropy_attn as ea
from entropy_attn.testing import assert_close_to_reference

IMAGE = 96  # 8 x 8 pixel patches: 144 tokens and the class token
SMALL = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
SMALL["num_classes"] = 10


def vit(**options):
    return timm.models.vision_transformer.VisionTransformer(**SMALL, **options)


def eva(**options):
    from timm.models.eva import Eva

    return Eva(**SMALL, use_rot_pos_emb=True, **options)


VARIANTS = {
    "vit": vit,
    "vit-qk-norm": lambda: vit(qk_norm=True),
    "vit-map-pool": lambda: vit(class_token=False, global_pool="map"),
    "eva-rope": eva,
    "eva-rope-split-qkv": lambda: eva(qkv_fused=False),
}


def build(variant):
    torch.manual_seed(0)
    model = VARIANTS[variant]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name and "weight" in name and parameter.ndim == 2:
                parameter.mul_(8)
    return model


@pytest.fixture
def image():
    return torch.randn(2, 3, IMAGE, IMAGE)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equals_own_attention(variant, image):
    model = build(variant)
    plain, exact = model(image), copy.deepcopy(model).double()(image.double())
    with ea.apply(model, KEEP_ALL) as handle:
        assert_close_to_reference(model(image), plain, exact, variant)
        assert all_sparse(handle)
    assert torch.equal(model(image), plain)


@pytest.mark.parametrize("variant", ["vit", "vit-map-pool", "eva-rope"])
@torch.no_grad()
def test_sorted_tokens_equal_own_attention(variant, image):
    model = build(variant)
    plain, exact = model(image), copy.deepcopy(model).double()(image.double())
    config = replace(KEEP_ALL, reorder=ea.Reorder(cells=8, prefix=1))
    with ea.apply(model, config) as handle:
        assert_close_to_reference(model(image), plain, exact, variant)
        assert all_sparse(handle)


@torch.no_grad()
def test_small_budget_changes_the_output(image):
    model = build("vit")
    plain = model(image)
    with ea.apply(model, KEEP_FEW) as handle:
        assert not torch.allclose(model(image), plain, rtol=1e-3)
        assert handle.stats().density < 0.7


@torch.no_grad()
def test_qkv_slices_are_not_copied(image, monkeypatch):
    from entropy_attn import prefill

    seen = []
    own = prefill.block_sparse_attention

    def spy(query, key, value, *args, **kwargs):
        seen.append((query, key, value))
        return own(query, key, value, *args, **kwargs)

    monkeypatch.setattr(prefill, "block_sparse_attention", spy)
    model = build("vit")
    with ea.apply(model, KEEP_ALL):
        model(image)
    for tensors in seen:
        storages = {t.untyped_storage().data_ptr() for t in tensors}
        assert len(storages) == 1  # three slices of one projection


@torch.no_grad()
def test_short_and_pooling_calls_run_dense(image):
    model = build("vit-map-pool")
    plain = model(image)
    with ea.apply(model, ea.SparsityConfig()) as handle:
        assert torch.equal(model(image), plain)
        assert handle.stats().dense == {
            "fewer than 4096 keys (min_length='auto', not measured on cpu)": 2,
            "fewer than min_queries=64 queries": 1,
        }


@pytest.mark.parametrize("switch", [True, False])
def test_remove_restores_the_module(switch):
    model = build("vit")
    for block in model.blocks:
        block.attn.fused_attn = switch
    before = [dict(block.attn.__dict__) for block in model.blocks]
    handle = ea.apply(model, KEEP_ALL)
    assert model.blocks[0].attn.fused_attn is True
    handle.remove()
    handle.remove()
    assert [dict(block.attn.__dict__) for block in model.blocks] == before
    assert model.blocks[0].attn.forward.__func__ is type(model.blocks[0].attn).forward


def test_training_with_checkpointing_stays_sparse(image):
    """The recomputation in the backward runs outside any mode that was active in the forward."""
    model = build("vit").train()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        with ea.apply(model, KEEP_FEW) as handle:
            model(image).sum().backward()
            assert all_sparse(handle)
            assert [layer.sparse for layer in handle.stats().layers] == [1 + checkpointing] * 2
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_compiles_into_one_graph(image):
    model = build("vit")
    with ea.apply(model, KEEP_FEW):
        eager = model(image)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image), eager)


@torch.no_grad()
def test_float_masks_raise(image):
    from timm.models.beit import Beit

    model = Beit(**SMALL, use_rel_pos_bias=True).eval()
    plain = model(image)
    with ea.apply(model, KEEP_ALL), pytest.raises(ValueError, match=r"attn_mask .*explicit_mask"):
        model(image)
    with ea.apply(model, ea.SparsityConfig(explicit_mask="dense")) as handle:
        assert torch.equal(model(image), plain)
        reason = "an explicit mask is given and explicit_mask='dense'"
        assert handle.stats().dense == {reason: 2}


@torch.no_grad()
def test_swin_raises(image):
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=IMAGE, patch_size=4, embed_dim=32, depths=(2,), num_heads=(2,), window_size=6
    ).eval()
    with ea.apply(model, KEEP_ALL), pytest.raises(ValueError, match="attn_mask"):
        model(image)


def test_dropout_raises(image):
    model = vit(attn_drop_rate=0.1).train()
    with ea.apply(model, KEEP_ALL), pytest.raises(ValueError, match=r"attention dropout 0\.1"):
        model(image)


def test_attention_without_sdpa_is_named():
    from timm.models.cait import Cait

    model = Cait(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="TalkingHeadAttn"):
        ea.apply(model)
    from timm.models.resnet import resnet10t

    with pytest.raises(ValueError, match="no attention of ResNet can be replaced"):
        ea.apply(resnet10t())
