"""Boxes around blocks of cached keys, the blocks chosen by them, and attention to those."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import entropy_attn as ea
from entropy_attn import validation
from entropy_attn.decoding import ops
from entropy_attn.decoding.boxes import KeyBoxes, attend_listed
from entropy_attn.kernels import key_boxes as kernel
from entropy_attn.reference.dense import dense_attention
from entropy_attn.testing import assert_close_to_reference

SETTINGS = ea.SparseDecoding(0.3, block_size=16)


@dataclass(frozen=True)
class Case:
    """A cache that is appended to, ``steps`` tokens a call; ``room`` > 0 is a static one."""

    steps: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    padded: bool = False
    room: int = 0
    settings: ea.SparseDecoding = SETTINGS

    def calls(self, device: str):
        """Query, key, value, valid, kv_lens of each call."""
        total = self.room or sum(self.steps)
        generator = torch.Generator().manual_seed(3)

        def normal(heads: int, length: int) -> Tensor:
            x = torch.randn(2, length, heads, self.head_dim, generator=generator)
            return x.to(device, self.dtype).transpose(1, 2)

        key, value = normal(self.kv_heads, total), normal(self.kv_heads, total)
        end = 0
        for step in self.steps:
            end += step
            length = self.room or end
            valid = lens = None
            if self.padded or self.room:
                column = torch.arange(length)
                valid = (column < end).expand(2, -1).clone()
                if self.padded:
                    valid[1, :21] = False
                    valid[1, 40:43] = False  # a gap
                valid = valid.to(device, torch.int8)
                lens = torch.full((2,), end, dtype=torch.int32, device=device)
            # Of a prefill the last queries stand for all.
            yield (
                normal(self.heads, min(step, 16)),
                key[:, :, :length],
                value[:, :, :length],
                valid,
                lens,
            )


PLAIN = Case((50, 1, 1, 14, 1))
CASES = [
    PLAIN,
    replace(PLAIN, padded=True, heads=6, kv_heads=1),
    replace(PLAIN, room=96, steps=(5, 1, 40, 3)),
    replace(PLAIN, room=96, padded=True, head_dim=24, dtype=torch.float16, steps=(60, 2)),
    replace(PLAIN, settings=ea.SparseDecoding(33, block_size=16, sink=0, local=1)),
    replace(PLAIN, steps=(16, 16, 16), settings=ea.SparseDecoding(0.01, block_size=32, sink=2)),
]
# The interpreter is slow.
FEW_CASES = [
    replace(PLAIN, steps=(50, 1)),
    replace(CASES[1], steps=(50, 6)),  # more rows than are taken at a time
    replace(CASES[3], steps=(60, 2), kv_heads=1),
]


def kept_by_the_book(case: Case, query, key, valid, lens) -> Tensor:
    """(B, Hkv, Mk) bool, one head and block at a time."""
    settings, scale = case.settings, case.head_dim**-0.5
    block, q_len = settings.block_size, query.shape[2]
    blocks, group = -(-key.shape[2] // block), case.heads // case.kv_heads
    kept = torch.zeros(2, case.kv_heads, blocks, dtype=torch.bool)
    for b in range(2):
        end = key.shape[2] if lens is None else int(lens[b])
        seen = [
            n for n in range(blocks)
            if n * block < end
            and (valid is None or bool(valid[b, n * block : min(end, n * block + block)].any()))
        ]  # fmt: skip
        for h in range(case.kv_heads):
            mass = dict.fromkeys(seen, 0.0)
            for q in query[b, h * group : (h + 1) * group].flatten(0, 1).double():
                bound = {}
                for n in seen:
                    keys = key[b, h, n * block : min(end, n * block + block)].double()
                    low, high = keys.amin(0), keys.amax(0)
                    bound[n] = scale * torch.maximum(q * low, q * high).sum().item()
                total = sum(math.exp(x) for x in bound.values())
                for n in seen:
                    mass[n] += math.exp(bound[n]) / total
            asked = -(-settings.keep // block)
            if isinstance(settings.keep, float):
                asked = math.ceil(len(seen) * settings.keep)
            chosen = set(sorted(seen, key=lambda n: -mass[n])[:asked]) | set(seen[: settings.sink])
            chosen |= {n for n in seen if n > (end - q_len) // block - settings.local}
            kept[b, h, sorted(chosen)] = True
    return kept


def choose(case: Case, backend: str, device: str):
    """Of each call the mask, after the boxes were compared with those made from scratch."""
    boxes, totals = None, torch.zeros(2, dtype=torch.int64, device=device)
    for query, key, value, valid, lens in case.calls(device):
        if boxes is None:
            boxes = KeyBoxes(key, case.settings)
        options = {"valid": valid, "kv_lens": lens, "backend": backend}
        mask = boxes.choose(query, key, totals, **options)
        scratch, options["backend"] = KeyBoxes(key, case.settings), "reference"
        again = scratch.choose(query, key, totals.clone(), **options)
        assert again.same_blocks(mask)
        end = key.shape[2] if lens is None else int(lens[0])
        rows = -(-end // case.settings.block_size)
        assert torch.equal(boxes.boxes[:, :, :rows], scratch.boxes[:, :, :rows])
        assert boxes.fresh.tolist() == [end, end]
        yield mask, (query, key, value, valid, lens), totals


def check(case: Case, backend: str, device: str) -> None:
    kept = 0
    for mask, (query, key, value, valid, lens), totals in choose(case, backend, device):
        cpu = [x if x is None else x.cpu() for x in (query, key, valid, lens)]
        expected = kept_by_the_book(case, *cpu)
        assert torch.equal(mask.to_dense()[:, :, 0].cpu(), expected)
        kept += int(expected.sum())
        assert int(totals[0]) == kept

        scale = case.head_dim**-0.5
        position = torch.arange(query.shape[2]) + (key.shape[2] if lens is None else lens[0].cpu())
        position = (position - query.shape[2])[:, None]
        visible = torch.arange(key.shape[2]) <= position
        if valid is not None:
            visible = visible & valid.cpu().bool()[:, None, None]
        listed = expected.repeat_interleave(case.settings.block_size, 2)[..., : key.shape[2]]
        listed = listed.repeat_interleave(case.heads // case.kv_heads, 1)[:, :, None]
        tensors = [x.cpu() for x in (query, key, value)]
        exact, plain = (
            dense_attention(*(x.to(dtype) for x in tensors), visible & listed, scale)[0]
            for dtype in (torch.float64, case.dtype)
        )
        out = attend_listed(
            query, key, value, mask, valid=valid, kv_lens=lens, scale=None, backend=backend
        )
        size = value.abs().max().item()
        assert_close_to_reference(out.cpu(), plain, exact, magnitude=size)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_lists_are_those_of_the_formulas(case: Case):
    check(case, "reference", "cpu")


@pytest.mark.parametrize("case", FEW_CASES, ids=range(len(FEW_CASES)))
def test_the_kernels_make_the_same_lists(case: Case, device: str):
    check(case, "triton", device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
def test_gpu_lists_and_attention(padded: bool, dtype: torch.dtype, forbid_waiting):
    """Long caches; the lists of half precision may differ where masses are equal up to rounding."""
    settings = ea.SparseDecoding(0.25, block_size=32)
    case = Case((8000, 1, 3), 32, 8, 128, dtype, padded, room=16384, settings=settings)
    boxes, totals = None, torch.zeros(2, dtype=torch.int64, device="cuda")
    for query, key, value, valid, lens in case.calls("cuda"):
        options = {"valid": valid, "kv_lens": lens}
        boxes = boxes or KeyBoxes(key, settings)
        boxes.choose(query, key, totals, backend="triton", **options)
        with forbid_waiting():
            mask = boxes.choose(query, key, totals, backend="triton", **options)
            attend_listed(query, key, value, mask, scale=None, backend="triton", **options)
        scratch = KeyBoxes(key, settings)
        other = scratch.choose(query, key, totals, backend="reference", **options)
        blocks = -(-int(lens[0]) // 32)
        assert torch.equal(boxes.boxes[:, :, :blocks], scratch.boxes[:, :, :blocks])
        assert (mask.to_dense() ^ other.to_dense()).sum() <= 0.01 * mask.num_blocks()
        found, plain = (
            attend_listed(query, key, value, mask, scale=None, backend=name, **options)
            for name in ("triton", "reference")
        )
        torch.testing.assert_close(found, plain, atol=2e-3, rtol=2**-7)


def test_a_query_that_is_not_a_number_keeps_the_first_blocks(device: str):
    query, key, *_ = next(PLAIN.calls(device))
    query = query[:, :, -1:].clone()
    query[0, 0] = float("nan")
    for backend in ("triton", "reference"):
        totals = torch.zeros(2, dtype=torch.int64, device=device)
        boxes = KeyBoxes(key, PLAIN.settings)
        mask = boxes.choose(query, key, totals, backend=backend)
        assert mask.kv_indices[0, 0, 0].tolist()[:2] == [0, 1]


def test_boxes_move_to_more_room(monkeypatch):
    monkeypatch.setattr("entropy_attn.decoding.boxes.SPARE", 0)
    for _ in choose(Case((20, *[1] * 60)), "reference", "cpu"):
        pass


def test_limits():
    assert validation.MOST_DECODING_BLOCKS == kernel.MOST_BLOCKS
    key = torch.zeros(1, 1, 1, 16).expand(-1, -1, 16 * kernel.MOST_BLOCKS + 1, -1)
    boxes = KeyBoxes(key[:, :, :16], ea.SparseDecoding(block_size=16))
    with pytest.raises(ValueError, match=r"block_size=16 makes 16385 blocks.*larger block_size"):
        boxes.choose(key[:, :, :1], key, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0}, r"keep must be a float in \(0, 1\], a share, or an int >= 1, got 0"),
        ({"keep": 1.5}, r"keep must be a number in \(0, 1\], got 1.5"),
        ({"keep": "all"}, "keep must be a float"),
        ({"block_size": 8}, "block_size must be a power of two from 16"),
        ({"block_size": (16, 32)}, "block_size must be an int"),
        ({"sink": -1}, "sink must be an int >= 0, got -1"),
        ({"local": 0}, "local must be an int >= 1, got 0"),
        ({"min_length": "auto"}, "min_length must be an int >= 0, got 'auto'"),
    ],
)
def test_errors_of_settings(values, message):
    with pytest.raises(ValueError, match=message):
        ea.SparseDecoding(**values)


def test_the_ops_are_good_citizens(device: str):
    query, key, value, valid, lens = next(replace(PLAIN, padded=True).calls(device))
    query = query[:, :, -2:].contiguous()
    boxes = KeyBoxes(key, PLAIN.settings)
    totals = torch.zeros(2, dtype=torch.int64, device=device)
    utilities = ("test_schema", "test_faketensor")
    arguments = (16, 1, 2, 0.3, 1, 3, 0.25, "reference")
    torch.library.opcheck(
        torch.ops.entropy_attn.choose_blocks.default,
        (query, key, boxes.boxes, boxes.fresh, totals, valid, lens, *arguments),
        test_utils=utilities,
    )
    lists = ops.choose_blocks(query, key, boxes.boxes, boxes.fresh, totals, valid, lens, *arguments)
    as_models_have_it = query.transpose(1, 2).contiguous().transpose(1, 2)
    for backend in ("reference", "triton"):
        for laid_out in (query, as_models_have_it):
            torch.library.opcheck(
                torch.ops.entropy_attn.decode_forward.default,
                (laid_out, key, value, *lists, valid, lens, 16, 0.25, backend),
                test_utils=utilities,
            )
