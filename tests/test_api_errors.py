"""Bad arguments: the message names the argument, its value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import entropy_attn as ea


def arguments(**changes: Any) -> dict[str, Any]:
    tensors = {name: torch.randn(2, 4, 64, 32) for name in ("query", "key", "value")}
    mask = ea.BlockMask.full(1, 1, 64, 64, 16)
    return {**tensors, "block_mask": mask, **changes}


LENS = torch.tensor([64, 32], dtype=torch.int32)
BAD = {
    "not a tensor": (dict(query=[1]), TypeError, "query must be a torch.Tensor, got list"),
    "3 dimensions": (dict(key=torch.randn(4, 64, 32)), ValueError, r"key must have 4 dim.*unsqueeze"),
    "integer": (dict(query=torch.ones(2, 4, 64, 32, dtype=torch.int32)), TypeError, "query.*int32.*allowed"),
    "mixed dtypes": (dict(value=torch.randn(2, 4, 64, 32).half()), TypeError, "value.*float16.*query"),
    "other device": (dict(key=torch.randn(2, 4, 64, 32, device="meta")), ValueError, "key is on meta"),
    "batch": (dict(key=torch.randn(3, 4, 64, 32)), ValueError, "key has batch size 3 but query has 2"),
    "head_dim": (dict(key=torch.randn(2, 4, 64, 16)), ValueError, "key has head_dim 16 but query has 32"),
    "heads": (dict(key=torch.randn(2, 3, 64, 32)), ValueError, "4 heads.*not a multiple.*3"),
    "value shape": (dict(value=torch.randn(2, 4, 63, 32)), ValueError, "value has shape.*63"),
    "small head_dim": ({n: torch.randn(1, 1, 64, 8) for n in ("query", "key", "value")}, ValueError, "head_dim is 8; allowed are 16 to 256"),
    "nan scale": (dict(scale=math.nan), ValueError, "scale must be a finite number, got nan"),
    "infinite scale": (dict(scale=math.inf), ValueError, "scale.*inf"),
    "text scale": (dict(scale="auto"), ValueError, "scale.*'auto'"),
    "window not causal": (dict(window=5), ValueError, "window=5 needs is_causal=True"),
    "window 0": (dict(window=0, is_causal=True), ValueError, "window must be a positive int.*0"),
    "lens dtype": (dict(kv_lens=LENS.long()), TypeError, "kv_lens must be an int32.*int64"),
    "lens shape": (dict(q_lens=LENS[:1]), ValueError, r"q_lens must have shape \(2,\).*\(1,\)"),
    "lens device": (dict(kv_lens=LENS.to("meta")), ValueError, "kv_lens is on meta"),
    "no mask": (dict(block_mask=None), TypeError, r"block_mask must be an entropy_attn.BlockMask, got NoneType.*BlockMask.full\(\.\.\.\)"),
    "bool mask": (dict(block_mask=torch.ones(64, 64).bool()), TypeError, "block_mask.*from_dense"),
    "mask for other lengths": (dict(block_mask=ea.BlockMask.full(1, 1, 64, 65, 16)), ValueError, "kv_len=65 but.*64 tokens"),
    "mask batch": (dict(block_mask=ea.BlockMask.full(3, 1, 64, 64, 16)), ValueError, "block_mask has batch size 3; allowed are 1 and 2"),
    "mask heads": (dict(block_mask=ea.BlockMask.full(1, 3, 64, 64, 16)), ValueError, "block_mask has 3 heads; allowed are 1, "),
    "mask device": (dict(block_mask=ea.BlockMask.full(1, 1, 64, 64, 16, device="meta")), ValueError, "block_mask is on meta"),
    "backend": (dict(backend="cuda"), ValueError, "backend must be 'auto' or one of.*got 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_block_sparse_attention_says_what_is_wrong(name: str) -> None:
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        ea.block_sparse_attention(**arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kinds=()), r"kinds must be a non-empty tuple.*\(\)"),
        (dict(kinds=("row", "column")), "kinds.*column"),
        (dict(kinds="row"), "kinds.*'row'"),
        (dict(block_size=48), "block_size must be a power of two from 16 to 256.*48"),
        (dict(block_size=(16, 8)), r"block_size.*\(16, 8\)"),
        (dict(block_size=True), "block_size.*True"),
        (dict(block_mask=ea.BlockMask.full(1, 1, 64, 64, 16), block_size=32), "differs from block_mask"),
    ],
)  # fmt: skip
def test_attention_with_entropy_says_what_is_wrong(changes: dict, message: str) -> None:
    given = arguments()
    del given["block_mask"]
    with pytest.raises(ValueError, match=message):
        ea.attention_with_entropy(**given, **changes)


def test_unknown_arguments_are_not_ignored() -> None:
    for name in ("attn_mask", "dropout_p", "softcap", "sinks"):
        with pytest.raises(TypeError, match=name):
            ea.block_sparse_attention(**arguments(), **{name: None})


def test_merge_says_what_is_wrong() -> None:
    out, lse = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8)
    with pytest.raises(ValueError, match=r"lse_b must have shape \(1, 2, 8\)"):
        ea.merge_attention(out, lse, out, lse[:, :1])
    with pytest.raises(ValueError, match="one shape and dtype"):
        ea.merge_attention(out, lse, out.half(), lse)


def test_effective_blocks_needs_tile_entropy() -> None:
    given = arguments()
    del given["block_mask"]
    _, entropy = ea.attention_with_entropy(**given, kinds=("row",))
    assert entropy.block is None
    with pytest.raises(ValueError, match="ask for it"):
        _ = entropy.effective_blocks
