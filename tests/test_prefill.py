"""attend_selected: the short way gives the bits of the long one, and is taken where it can be."""

from __future__ import annotations

import pytest
import torch

from entropy_attn import ops, prefill
from entropy_attn.prefill import attend_selected
from entropy_attn.selection import Antidiagonal, Envelope, Pooled, TopK, TopP

DEFAULTS = {
    "block_size": 32, "scorer": Envelope(8), "budget": TopK(0.4), "sink": 1, "local": 1,
    "backend": "triton", "is_causal": False, "scale": None, "kv_lens": None, "q_lens": None,
    "window": None,
}  # fmt: skip

# query heads, key heads, queries, keys, and what differs from the defaults
CASES = [
    (2, 2, 128, 128, {}),
    (4, 2, 70, 101, {"is_causal": True}),
    (2, 1, 97, 97, {"is_causal": True, "window": 40, "budget": TopP(0.8)}),
    (2, 2, 90, 120, {"lens": True, "is_causal": True}),
    (2, 2, 64, 96, {"scorer": Pooled(4), "block_size": (64, 32), "sink": 0, "local": 0}),
    (2, 2, 64, 96, {"scorer": Pooled(8, reduce="max"), "scale": 0.3}),
]


def draw(heads, kv_heads, q_len, kv_len, lens, device, dtype, head_dim=32):
    shapes = [(heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len)]
    tensors = [
        torch.randn(2 if lens else 1, n, h, head_dim, device=device, dtype=dtype).transpose(1, 2)
        for h, n in shapes
    ]
    found = {}
    if lens:
        found["kv_lens"] = torch.tensor([kv_len, kv_len // 2], dtype=torch.int32, device=device)
        found["q_lens"] = torch.tensor([q_len, q_len // 3], dtype=torch.int32, device=device)
    return tensors, found


def check(case, device, dtype, monkeypatch, head_dim=32) -> None:
    *sizes, changes = case
    options = {**DEFAULTS, **changes}
    lens = options.pop("lens", False)
    draws = [draw(*sizes, lens, device, dtype, head_dim) for _ in range(2)]
    with torch.no_grad():
        short = [attend_selected(*x, **{**options, **lens}) for x, lens in draws]
        monkeypatch.setattr(prefill, "is_unwatched", lambda tensors: False)
        long = [attend_selected(*x, **{**options, **lens}) for x, lens in draws]
    for (out, counts), (expected, expected_counts) in zip(short, long, strict=True):
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
        assert torch.equal(counts, expected_counts)
    assert not torch.equal(short[0][0], short[1][0])


@pytest.fixture
def no_long_way(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the long way was taken")

    monkeypatch.setattr(prefill, "select_blocks", refuse)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits(case, device, monkeypatch):
    check(case, device, torch.float16, monkeypatch)


LARGE = [
    (4, 2, 1000, 1111, {"is_causal": True, "block_size": 64}),
    (8, 2, 4096, 4096, {"is_causal": True, "block_size": 64, "lens": True}),
    (8, 8, 4096, 4096, {"block_size": 128, "budget": TopP(0.9)}),
    (8, 8, 3000, 4096, {"block_size": (128, 64), "lens": True}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("small", [0, 2**62])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_gpu_the_same_bits(case, small, head_dim, monkeypatch):
    monkeypatch.setattr(ops, "SMALL", small)
    check(case, "cuda", torch.bfloat16, monkeypatch, head_dim)


def test_the_short_way_is_taken(device, no_long_way):
    tensors, _ = draw(2, 2, 128, 128, False, device, torch.float16)
    with torch.no_grad():
        out, counts = attend_selected(*tensors, **DEFAULTS)
    assert out.shape == tensors[0].shape
    assert counts.shape == (1, 2, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"scorer": Antidiagonal(8)},
        {"scale": -0.2},
        {"backend": "reference"},
        {"budget": TopK(0.4), "grad": True},
        {"autocast": True},
    ],
    ids=str,
)
def test_what_takes_the_long_way(change, device, no_long_way):
    tensors, _ = draw(2, 2, 64, 64, False, device, torch.float16)
    options = {**DEFAULTS, **change}
    grad, autocast = options.pop("grad", False), options.pop("autocast", False)
    tensors[0].requires_grad_(grad)
    with (
        torch.autocast(device, torch.float16, enabled=autocast),
        pytest.raises(AssertionError, match="long way"),
    ):
        attend_selected(*tensors, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 48}, "block_size must be a power of two"),
        ({"window": 8}, "needs is_causal=True"),
        ({"scorer": Envelope(128)}, "pool"),
        ({"budget": 0.5}, "budget must be TopK, TopP or Perplexity"),
        ({"backend": "nonsense"}, "backend must be"),
    ],
    ids=str,
)
def test_errors_are_raised_every_time(change, message, device):
    tensors, _ = draw(2, 2, 64, 64, False, device, torch.float16)
    for _ in range(2):
        with torch.no_grad(), pytest.raises((ValueError, TypeError), match=message):
            attend_selected(*tensors, **{**DEFAULTS, **change})


def test_a_negated_view_is_read_as_it_is(device):
    tensors, _ = draw(2, 2, 64, 64, False, device, torch.float32)
    negated = torch.complex(tensors[0], -tensors[0]).conj().imag
    assert negated.is_neg()
    with torch.no_grad():
        found, expected = (
            attend_selected(query, *tensors[1:], **DEFAULTS)[0] for query in (negated, negated + 0)
        )
    assert torch.equal(found, expected)


def test_gradients_flow(device):
    tensors, _ = draw(2, 2, 64, 64, False, device, torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    out, _ = attend_selected(*leaves, **{**DEFAULTS, "backend": "auto"})
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(out.square().sum(), leaves))
