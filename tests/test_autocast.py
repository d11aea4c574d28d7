"""torch.autocast: inputs are cast as for scaled_dot_product_attention, references keep theirs."""

from __future__ import annotations

import pytest
import torch
from integration_models import KEEP_ALL, build, tokens
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import entropy_attn as ea

# Triton's interpreter has no bf16.
BACKENDS = [("reference", torch.bfloat16), ("reference", torch.float16), ("triton", torch.float16)]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(1, 2, 48, 16) for _ in range(3))
    return query, key, value.half()  # rotary embeddings leave queries and keys in fp32


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_is_a_cast_of_the_inputs_and_nothing_else(backend, dtype, device):
    given = [t.to(device).requires_grad_() for t in inputs()]
    cast = [t.detach().to(dtype).requires_grad_() for t in given]

    def everything(tensors):
        mask = ea.select_blocks(*tensors[:2], block_size=16, budget=ea.TopK(0.4), backend=backend)
        out, lse = ea.block_sparse_attention(*tensors, mask, return_lse=True, backend=backend)
        _, entropy = ea.attention_with_entropy(*tensors, block_size=16, backend=backend)
        loss = out.float().sum() + lse.sum() + entropy.row.sum() + entropy.tile.sum()
        gradients = torch.autograd.grad(loss, tensors)
        return [mask.kv_indices, out, lse, entropy.row, entropy.block, entropy.tile, *gradients]

    with torch.autocast(device, dtype):
        found = everything(given)
        assert scaled_dot_product_attention(*given).dtype == found[1].dtype == dtype
    for name, (got, expected) in enumerate(zip(found, everything(cast), strict=True)):
        torch.testing.assert_close(got.to(expected.dtype), expected, rtol=0, atol=0,
                                   msg=lambda m, n=name: f"result {n}: {m}")  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_soft_entropy_keeps_its_precision(backend, device):
    points, anchors = torch.randn(100, 5, device=device), torch.randn(7, 5, device=device)
    plain = ea.range_entropy(points, anchors, 0.7, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(ea.range_entropy(points, anchors, 0.7, backend=backend), plain)


@torch.no_grad()
def test_a_model_under_autocast():
    model, ids = build("llama"), tokens(2, 100)
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        dense = model(ids).logits
        with ea.apply(model, KEEP_ALL):
            sparse = model(ids).logits
    assert sparse.dtype == dense.dtype
    rounding = (dense.float() - exact).abs().max()
    assert 0 < (sparse.float() - exact).abs().max() <= 2 * rounding
