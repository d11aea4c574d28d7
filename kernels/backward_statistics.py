"""What the backward needs to know of each row: one pass over out, its gradient and the entropies.

With P = exp(S - lse), dP = dO V^T, and gradients gR, gB of row and block entropy H and HB, and of
the tile entropies (`kernels/tile_mass.py`) as g_AB for a block of queries A and of keys B:
    dS_ij = P_ij * (dP_ij - gR_i S_ij - gB_i log P_i,B(j) + g_A,B(j) - delta_i),
    delta_i = dO_i . O_i - dlse_i + gR_i (H_i - lse_i) + gB_i HB_i + sum_B P_iB g_AB.
The first two terms of delta are FlashAttention-2's (Dao, arXiv 2307.08691); the others follow from
dH_i/dS_ij = -P_ij (log P_ij + H_i), dHB_i/dS_ij = -P_ij (log P_i,B(j) + HB_i). The sum over j of
dS_ij is 0 but for dlse, as the softmax does not change when a row of S moves by a constant.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import LENGTHS, ceil_div, overlapping, padded_head_dim
from entropy_attn.kernels.plans import Launch, planned
from entropy_attn.kernels.primitives import (
    LN_2,
    LOG2_E,
    head_base,
    load_tile,
    may_start_next,
    program_tile,
    tile_offsets,
    wait_for_last,
)

# Entries of a program's tile of the output. What it takes is the latency of reading it, so there
# are to be many programs at a time.
TILE = 8192


# clear_count is specialised, and so written 16 bytes at a time where it is a multiple of 16.
@triton.jit(do_not_specialize=LENGTHS)
def _statistics_kernel(
    out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, row_ptr, grad_row_ptr, block_ptr,
    grad_block_ptr, cross_ptr, statistics_ptr, cleared_ptr,
    out_strides, grad_out_strides, heads, q_len, q_tiles, scale, clear_count,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr, ROW_ENTROPY: tl.constexpr, BLOCK_ENTROPY: tl.constexpr,
    TILE_ENTROPY: tl.constexpr, HAS_OUT: tl.constexpr, NEGATIVE: tl.constexpr,
    CLEARS: tl.constexpr, AFTER_LISTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Statistics of every row, padded to whole tiles: (B, Hq, 2 to 4, q_tiles * BLOCK_M).

    lse in base 2; delta; the factors of the raw scores (gR * scale) and of log2 P_iB (gB * ln 2)
    where those entropies have gradients. Rows that see no key, and those past the last one, get
    +inf and 0: their P is 0, so that the other kernels need no masks for them.

    NEGATIVE: -delta instead. CLEARS: programs also fill clear_count numbers with 0, each its share.
    AFTER_LISTS: what is read and written here is nothing to the launches that may still run, those
    of the transposed lists and of the order; all before them have ended, as that of the lists let
    others begin when it had waited itself. So this one need not wait for them, but for whoever is
    next, who waits for this launch alone.
    """
    if not AFTER_LISTS:
        wait_for_last(OVERLAP)
    may_start_next(OVERLAP)
    batch, head, tile = program_tile(q_tiles, heads, False)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    if HAS_OUT:
        out_base = head_base(out_ptr, batch, head, out_strides[0], out_strides[1])
        out_pointers = out_base + tile_offsets(rows, out_strides[2], BLOCK_D, out_strides[3])
        grad_base = head_base(grad_out_ptr, batch, head, grad_out_strides[0], grad_out_strides[1])
        grad_pointers = grad_base + tile_offsets(
            rows, grad_out_strides[2], BLOCK_D, grad_out_strides[3]
        )
        out = load_tile(out_pointers, rows, q_len, HEAD_DIM, BLOCK_D, True)  # (M, D)
        grad = load_tile(grad_pointers, rows, q_len, HEAD_DIM, BLOCK_D, True)  # (M, D)
    if CLEARS:  # while the rows are on their way
        CHUNK: tl.constexpr = 1024
        share = tl.cdiv(tl.cdiv(clear_count, tl.num_programs(0)), CHUNK) * CHUNK
        first = tl.program_id(0).to(tl.int64) * share
        for start in range(0, share, CHUNK):
            place = first + start + tl.arange(0, CHUNK)
            tl.store(cleared_ptr + place, tl.zeros([CHUNK], tl.float32), mask=place < clear_count)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if HAS_OUT:
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    batch_head = (batch * heads + head).to(tl.int64)
    at = batch_head * q_len + rows
    inside = rows < q_len
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + at, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + at, mask=inside, other=float("-inf"))
    empty = lse == float("-inf")
    PER_HEAD: tl.constexpr = 2 + ROW_ENTROPY + BLOCK_ENTROPY
    padded_len = q_tiles * BLOCK_M
    target = statistics_ptr + batch_head * PER_HEAD * padded_len + rows
    if ROW_ENTROPY:
        grad_row = tl.load(grad_row_ptr + at, mask=inside, other=0.0)
        delta += grad_row * (tl.load(row_ptr + at, mask=inside, other=0.0) - lse)
    if BLOCK_ENTROPY:
        grad_block = tl.load(grad_block_ptr + at, mask=inside, other=0.0)
        delta += grad_block * tl.load(block_ptr + at, mask=inside, other=0.0)
    if TILE_ENTROPY:
        delta += tl.load(cross_ptr + at, mask=inside, other=0.0)
    if NEGATIVE:
        delta = -delta

    tl.store(target, tl.where(empty, float("inf"), lse * LOG2_E))
    tl.store(target + padded_len, tl.where(empty, 0.0, delta))
    if ROW_ENTROPY:
        tl.store(target + 2 * padded_len, tl.where(empty, 0.0, grad_row * scale))
    if BLOCK_ENTROPY:
        grad_block = tl.where(empty, 0.0, grad_block * LN_2)
        tl.store(target + (2 + ROW_ENTROPY) * padded_len, grad_block)
    if AFTER_LISTS:
        wait_for_last(OVERLAP)


def row_statistics(
    out: Tensor,
    grad_out: Tensor | None,
    lse: Tensor,
    grad_lse: Tensor | None,
    row: Tensor | None,
    grad_row: Tensor | None,
    block: Tensor | None,
    grad_block: Tensor | None,
    cross: Tensor | None,
    block_q: int,
    scale: float,
    *,
    negative: bool = False,
    cleared: Tensor | None = None,
    after_lists: bool = False,
) -> Tensor:
    """Launch the kernel.

    Args:
        out, grad_out: (B, Hq, Nq, D); without grad_out (None) out is not read.
        lse: (B, Hq, Nq) fp32, contiguous, as are the next ones.
        row, block: entropies; read where they have a gradient.
        grad_lse, grad_row, grad_block: (B, Hq, Nq) fp32 of any strides, or None.
        cross: (B, Hq, Nq), sum_B P_iB g_AB of the tile entropies, or None.
        negative: return -delta.
        cleared: contiguous fp32 at a multiple of 16 bytes, which is filled with 0 by the way, or
            None.
        after_lists: since the launch of `transposed_lists` there was none but `backward_order`, and
            no tensor that either of them uses was freed.

    Returns:
        (B, Hq, R, padded Nq) fp32: lse in base 2, delta or -delta, then what belongs to
        ``grad_row`` and to ``grad_block`` if they are given.
    """
    batch, heads, q_len = lse.shape
    head_dim = 16 if grad_out is None else out.shape[3]
    padding = max(block_q, 128 if head_dim <= 128 else 64)  # whole tiles of those who read it
    padded_len = ceil_div(q_len, padding) * padding
    per_head = 2 + (grad_row is not None) + (grad_block is not None)
    statistics = lse.new_empty((batch, heads, per_head, padded_len))
    if statistics.numel() == 0:
        return statistics
    given = grad_lse, grad_row, grad_block
    # Copies are launches in between, of something that is read.
    after_lists &= all(grad is None or grad.is_contiguous() for grad in given)
    grad_lse, grad_row, grad_block = (x if x is None else x.contiguous() for x in given)
    rows = (out, grad_out, lse, grad_lse, row, grad_row, block, grad_block, cross)
    launch = _plan_statistics(
        *rows, head_dim, padded_len, scale, negative, 0 if cleared is None else cleared.numel(),
        after_lists,
    )  # fmt: skip
    launch(*rows, statistics, cleared)
    return statistics


@planned
def _plan_statistics(
    out: Tensor,
    grad_out: Tensor | None,
    lse: Tensor,
    grad_lse: Tensor | None,
    row: Tensor | None,
    grad_row: Tensor | None,
    block: Tensor | None,
    grad_block: Tensor | None,
    cross: Tensor | None,
    head_dim: int,
    padded_len: int,
    scale: float,
    negative: bool,
    clear_count: int,
    after_lists: bool,
) -> Launch:
    batch, heads, q_len = lse.shape
    strides = [(0,) * 4 if grad_out is None else t.stride() for t in (out, grad_out)]
    block_d = padded_head_dim(head_dim)
    block_m = min(128, TILE // block_d)
    tiles = padded_len // block_m
    overlap = overlapping(lse.device)
    return Launch(
        _statistics_kernel, (tiles * batch * heads,),
        (*strides, heads, q_len, tiles, scale, clear_count),
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m,
        HAS_GRAD_LSE=grad_lse is not None, ROW_ENTROPY=grad_row is not None,
        BLOCK_ENTROPY=grad_block is not None, TILE_ENTROPY=cross is not None,
        HAS_OUT=grad_out is not None, NEGATIVE=negative, CLEARS=clear_count > 0,
        AFTER_LISTS=after_lists and overlap["OVERLAP"], **overlap,
    )  # fmt: skip
