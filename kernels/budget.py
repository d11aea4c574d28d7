"""From the predicted mass of tiles to block lists: how many blocks, which ones, in order.

One program takes a few query tiles. It finds how many blocks n the budget asks for, the n-th
largest mass by bisection on the bits of fp32 (non-negative floats are ordered as their bits are,
so 31 steps are exact), and writes the indices of what lies above in ascending order. Among equal
masses the lowest indices are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import ceil_div, next_power_of_2
from entropy_attn.kernels.plans import Launch, planned
from entropy_attn.kernels.primitives import valid_length

# Arguments that vary from call to call: a new length must not compile the kernel again. kv_blocks
# may: where 16 divides it, a thread holds adjacent masses and the prefix sums cost a third less.
LENGTHS = ("q_len", "kv_len", "first_tile", "tiles", "rows_total", "width", "window")
RULES = ("count", "fraction", "mass", "perplexity")
# A longer row of masses does not stay in registers: it is read again in every step.
LONGEST_RESIDENT = 4096
# Rows that fit one warp are one warp's, so that no step of the bisection waits for another.
MASSES_A_WARP = 512


@triton.jit
def _load_mass(row_pointers, columns, low, high):
    """(R, C) masses: -1 outside the visible blocks [low, high), +inf instead of NaN."""
    visible = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
    mass = tl.load(row_pointers[:, None] + columns[None, :], mask=visible, other=0.0)
    mass = tl.where(mass == mass, tl.maximum(mass, 0.0), float("inf"))
    return tl.where(visible, mass, -1.0)


@triton.jit
def _reaching(
    threshold, resident, row_pointers, low, high, kv_blocks,
    CHUNK: tl.constexpr, RESIDENT: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """(R,) how many blocks have a mass >= threshold (>= 0), or how much mass they have."""
    if RESIDENT:
        reached = resident >= threshold[:, None]
        if BY_MASS:
            result = tl.sum(tl.where(reached, resident, 0.0), 1)
        else:
            result = tl.sum(reached.to(tl.int32), 1)
    else:
        result = tl.zeros_like(threshold) if BY_MASS else tl.zeros_like(low)
        for start in range(0, kv_blocks, CHUNK):
            mass = _load_mass(row_pointers, start + tl.arange(0, CHUNK), low, high)
            reached = mass >= threshold[:, None]
            if BY_MASS:
                result += tl.sum(tl.where(reached, mass, 0.0), 1)
            else:
                result += tl.sum(reached.to(tl.int32), 1)
    return result


@triton.jit
def _largest_threshold(
    needed, resident, row_pointers, low, high, kv_blocks,
    CHUNK: tl.constexpr, RESIDENT: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    """(R,) bits of the largest threshold that ``needed`` blocks, or that much mass, reach."""
    bits = tl.zeros_like(low)
    for step in range(31):
        candidate = bits | (1 << (30 - step))
        reached = _reaching(
            candidate.to(tl.float32, bitcast=True), resident, row_pointers, low, high, kv_blocks,
            CHUNK, RESIDENT, BY_MASS,
        )  # fmt: skip
        bits = tl.where(reached >= needed, candidate, bits)
    return bits


@triton.jit
def _totals(row_pointers, low, high, kv_blocks, CHUNK: tl.constexpr):
    """(R,) mass of the visible blocks, and the perplexity of its distribution."""
    total = tl.zeros_like(low).to(tl.float32)
    for start in range(0, kv_blocks, CHUNK):
        mass = _load_mass(row_pointers, start + tl.arange(0, CHUNK), low, high)
        total += tl.sum(tl.maximum(mass, 0.0), 1)
    entropy = tl.zeros_like(total)
    for start in range(0, kv_blocks, CHUNK):
        mass = _load_mass(row_pointers, start + tl.arange(0, CHUNK), low, high)
        p = tl.maximum(mass, 0.0) / tl.where(total > 0.0, total, 1.0)[:, None]
        entropy -= tl.sum(tl.where(p > 0.0, p * tl.log2(tl.where(p > 0.0, p, 1.0)), 0.0), 1)
    return total, tl.exp2(entropy)


@triton.jit(do_not_specialize=LENGTHS)
def _keep_kernel(
    mass_ptr, counts_ptr, indices_ptr, q_lens_ptr, kv_lens_ptr,
    heads, q_len, kv_len, kv_blocks, first_tile, tiles, rows_total, width, window, sink, local,
    amount, min_blocks, max_density,
    RULE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, RESIDENT: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_Q_LENS: tl.constexpr, HAS_KV_LENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    stored = row < rows_total
    row = tl.minimum(row, rows_total - 1)
    batch = row // (heads * tiles)
    tile = first_tile + (row % tiles).to(tl.int32)
    q_end = valid_length(q_lens_ptr, batch, q_len, HAS_Q_LENS)
    kv_end = valid_length(kv_lens_ptr, batch, kv_len, HAS_KV_LENS)

    # The visible blocks of a tile are a run [low, high).
    first_query = tile * BLOCK_Q
    first_position = tl.maximum(first_query + (kv_end - q_end), 0)
    last_position = tl.minimum(first_query + BLOCK_Q, q_end) - 1 + (kv_end - q_end)
    key_end = tl.zeros_like(tile) + kv_end
    low = tl.zeros_like(tile)
    if IS_CAUSAL:
        key_end = tl.minimum(key_end, last_position + 1)
    if HAS_WINDOW:
        low = tl.maximum(first_position - window + 1, 0) // BLOCK_K
    high = (tl.maximum(key_end, 0) + BLOCK_K - 1) // BLOCK_K
    high = tl.where(first_query < q_end, high, low)
    visible = tl.maximum(high - low, 0)

    row_pointers = mass_ptr + row * kv_blocks
    resident = _load_mass(row_pointers, tl.arange(0, CHUNK), low, high)
    total, perplexity = _totals(row_pointers, low, high, kv_blocks, CHUNK)

    # How many blocks the budget asks for, as a float until it is known to be small.
    if RULE == 0:
        asked = tl.zeros_like(total) + amount
    elif RULE == 1:
        asked = tl.ceil(visible.to(tl.float32) * amount)
    elif RULE == 2:
        needed = total * amount
        bits = _largest_threshold(
            needed, resident, row_pointers, low, high, kv_blocks, CHUNK, RESIDENT, True
        )
        least = bits.to(tl.float32, bitcast=True)
        above = (bits + 1).to(tl.float32, bitcast=True)
        above_mass = _reaching(
            above, resident, row_pointers, low, high, kv_blocks, CHUNK, RESIDENT, True
        )
        above_count = _reaching(
            above, resident, row_pointers, low, high, kv_blocks, CHUNK, RESIDENT, False
        )
        usable = (least > 0.0) & (least < float("inf"))
        ties = tl.ceil((needed - above_mass) / tl.where(usable, least, 1.0))
        # Where all mass is 0, every threshold reaches it: one block will do.
        asked = tl.where(total > 0.0, above_count.to(tl.float32) + tl.maximum(ties, 1.0), 1.0)
    else:
        asked = tl.ceil(perplexity * amount)
    # The prediction is not finite: all that the budget allows, so that nothing is lost.
    if RULE >= 2:
        asked = tl.where(total < float("inf"), asked, visible.to(tl.float32))
    most = (visible.to(tl.float32) * max_density).to(tl.int32)
    asked = tl.minimum(asked, visible.to(tl.float32)).to(tl.int32)
    asked = tl.minimum(tl.maximum(tl.minimum(asked, most), min_blocks), visible)

    bits = _largest_threshold(
        asked, resident, row_pointers, low, high, kv_blocks, CHUNK, RESIDENT, False
    )
    # A tile that sees nothing asks for nothing, which every threshold satisfies; its masses are
    # all -1, so that it keeps nothing whatever the bits are.
    least = bits.to(tl.float32, bitcast=True)
    above = (bits + 1).to(tl.float32, bitcast=True)
    ties_left = asked - _reaching(
        above, resident, row_pointers, low, high, kv_blocks, CHUNK, RESIDENT, False
    )

    diagonal_low = first_position // BLOCK_K
    diagonal_high = tl.maximum(last_position, 0) // BLOCK_K
    if not IS_CAUSAL:
        diagonal_high += local - 1
    count = tl.zeros_like(low)
    out_rows = indices_ptr + row * width
    for start in range(0, kv_blocks, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        mass = _load_mass(row_pointers, columns, low, high)
        tie = (mass == least[:, None]).to(tl.int32)
        rank = tl.cumsum(tie, 1)
        keep = (mass > least[:, None]) | ((tie > 0) & (rank <= ties_left[:, None]))
        near = (columns[None, :] > (diagonal_low - local)[:, None]) & (
            columns[None, :] <= diagonal_high[:, None]
        )
        always = (columns < sink)[None, :] | (near & (local > 0))
        keep = (keep | always) & (mass >= 0.0)
        kept = keep.to(tl.int32)
        slot = count[:, None] + tl.cumsum(kept, 1) - 1
        where = keep & stored[:, None] & (slot < width)
        entries = tl.broadcast_to(columns[None, :], (ROWS, CHUNK)).to(tl.int32)
        tl.store(out_rows[:, None] + slot, entries, mask=where)
        count += tl.sum(kept, 1)
        ties_left -= tl.sum(tie, 1)
    tl.store(counts_ptr + row, count, mask=stored)
    for start in range(0, width, CHUNK):
        slot = (start + tl.arange(0, CHUNK))[None, :]
        unused = (slot >= count[:, None]) & (slot < width) & stored[:, None]
        tl.store(out_rows[:, None] + slot, tl.zeros([ROWS, CHUNK], tl.int32), mask=unused)


def keep_tiles(
    mass: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    q_len: int,
    kv_len: int,
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    sink: int,
    local: int,
    rule: str,
    amount: float,
    min_blocks: int,
    max_density: float,
    width: int,
    first_tile: int,
) -> tuple[Tensor, Tensor]:
    """Block lists of the tiles whose masses are given; see `reference.selection.keep_tiles`.

    Args:
        mass: (B, H, tiles, Mk) fp32.
        width: entries a list, at least as many as the budget and the always-kept blocks can need.

    Returns:
        counts (B, H, tiles) int32, indices (B, H, tiles, width) int32.
    """
    rows, kv_blocks = mass.shape[:3], mass.shape[3]
    counts = torch.empty(rows, dtype=torch.int32, device=mass.device)
    indices = torch.empty((*rows, width), dtype=torch.int32, device=mass.device)
    if counts.numel() == 0:
        return counts, indices
    if kv_blocks == 0:
        return counts.zero_(), indices
    mass = mass.contiguous()
    launch = plan_lists(
        mass, q_lens, kv_lens, q_len, kv_len, block_size, is_causal, window, sink, local, rule,
        amount, min_blocks, max_density, width, first_tile,
    )  # fmt: skip
    launch(mass, counts, indices, q_lens, kv_lens)
    return counts, indices


@planned
def plan_lists(
    mass: Tensor,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    q_len: int,
    kv_len: int,
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    sink: int,
    local: int,
    rule: str,
    amount: float,
    min_blocks: int,
    max_density: float,
    width: int,
    first_tile: int,
) -> Launch:
    batch, heads, tiles, kv_blocks = mass.shape
    resident = kv_blocks <= LONGEST_RESIDENT
    chunk = next_power_of_2(kv_blocks) if resident else LONGEST_RESIDENT
    rows = max(1, min(16, MASSES_A_WARP // chunk))  # each row has counts of its own in registers
    total = batch * heads * tiles
    return Launch(
        _keep_kernel, (ceil_div(total, rows),),
        (
            heads, q_len, kv_len, kv_blocks, first_tile, tiles, total, width, window, sink, local,
            amount, min_blocks, max_density,
        ),
        RULE=RULES.index(rule), BLOCK_Q=block_size[0], BLOCK_K=block_size[1], ROWS=rows,
        CHUNK=chunk, RESIDENT=resident, IS_CAUSAL=is_causal, HAS_WINDOW=window > 0,
        HAS_Q_LENS=q_lens is not None, HAS_KV_LENS=kv_lens is not None,
        num_warps=max(1, chunk // MASSES_A_WARP),
    )  # fmt: skip
