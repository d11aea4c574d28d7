"""How many blocks of a list stand before a limit, against a count of them all."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from entropy_attn.kernels.primitives import count_below  # noqa: E402


@triton.jit
def _count_kernel(list_ptr, found_ptr, count, total, LISTED: tl.constexpr):
    limit = tl.program_id(0) - 2
    tl.store(found_ptr + limit + 2, count_below(list_ptr, count, limit, total, LISTED))


def below(blocks: torch.Tensor, total: int, device: str, *, listed: bool = True) -> list[int]:
    """Found for the limits from -2 to total + 2."""
    found = torch.full((total + 5,), -7, dtype=torch.int32, device=device)
    _count_kernel[(len(found),)](blocks.int().to(device), found, len(blocks), total, listed)
    return found.tolist()


@pytest.mark.parametrize("total", [1, 7, 150, 400])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
def test_any_limit(total: int, density: float, device: str):
    kept = torch.rand(total, generator=torch.Generator().manual_seed(total)) < density
    blocks = kept.nonzero().flatten()
    expected = [int((blocks < limit).sum()) for limit in range(-2, total + 3)]
    assert below(blocks, total, device) == expected


def test_all_blocks_need_no_list(device: str):
    rubbish = torch.full((9,), -1)
    assert below(rubbish, 9, device, listed=False)[:12] == [0, 0, *range(10)]


def test_long_lists_are_read_near_their_end_only(device: str):
    """Of 300 of 310 blocks at most 10 can stand at or after a limit of 300."""
    blocks = torch.arange(310)[torch.arange(310) % 31 != 0][:300]
    expected = int((blocks < 300).sum())
    blocks[:290] = 1000  # if they were read they would not be counted
    assert below(blocks, 310, device)[302] == expected
