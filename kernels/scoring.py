"""Predicted attention mass of tiles, from groups of tokens instead of tokens.

Keys and queries are taken in groups of GROUP consecutive tokens. With c(g, n) the score of query
group g and key group n, w_n the number of valid tokens in n and V(g) the key groups that some
query of g sees, the predicted attention of g is p(g, n) = w_n exp c(g, n) / sum over m in V(g) of
w_m exp c(g, m). A tile's mass sums it over the tile's key groups, then takes the mean or the
maximum over the tile's query groups.

    mean pooling   c(g, n) = scale * mean of the queries . mean of the keys; the means come from
                   `pooling.pool_tokens`, so there is one row a group (TAPS = 1).
    envelopes      c(g, n) = scale * (mean of the queries . c_n + |mean of the queries| * s_n), with
                   c_n the middle of the box around the keys of n and s_n a share of the length
                   of its half diagonal; both come from `pooling.envelope_tokens` (TAPS = 1).
    antidiagonals  c(g, n) = scale / GROUP * sum over t of q_(GROUP-1-t) . k_t, the score of
                   XAttention (Xu et al., arXiv 2503.16428); the sum over t runs inside the
                   kernel (TAPS = GROUP).

The scores of a tile are never stored. One program takes ROWS query groups of one head through
all key groups once, leaving the log-sum-exp of each (query group, key block) in a workspace; it
then knows each row's total, and turns what it wrote (still in the L2 cache) into mass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import (
    architecture,
    ceil_div,
    exponent_scale,
    next_power_of_2,
    padded_head_dim,
)
from entropy_attn.kernels.plans import Launch, dot_precision, planned
from entropy_attn.kernels.primitives import (
    NO_SCORE,
    head_base,
    load_tile,
    tile_offsets,
    valid_length,
)

# Arguments that vary from call to call: a new length must not compile the kernel again.
LENGTHS = ("q_len", "kv_len", "kv_blocks", "first_tile", "tiles", "chunks", "window")
# Loads of a loop that are issued together.
UNROLL = 8
# Masses that a warp of the second phase sums at a time.
MASSES_A_WARP = 256


@triton.jit
def _visible_groups(
    scores, groups, key_groups, q_end, kv_end, window, cut_share,
    GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """(M, N) scores in base 2 plus log2 of the key group's share of valid tokens; -inf where no
    query of the one group sees a key of the other.

    Args:
        cut_share: log2 of that share for the one group that kv_end cuts, if it cuts one.
    """
    scores += tl.where(key_groups == kv_end // GROUP, cut_share, 0.0)[None, :]
    offset = kv_end - q_end
    if IS_CAUSAL:  # which implies that the keys are valid
        last_position = tl.minimum(groups * GROUP + GROUP, q_end) - 1 + offset
        # Floor division of a negative number rounds to zero in Triton, hence the maximum.
        last_group = tl.maximum(last_position + GROUP, 0) // GROUP - 1
        visible = key_groups[None, :] <= last_group[:, None]
    else:
        visible = (key_groups < tl.cdiv(kv_end, GROUP))[None, :]
    if HAS_WINDOW:
        first_key = groups * GROUP + offset - window + 1
        last_key = tl.minimum(key_groups * GROUP + GROUP, kv_end) - 1
        visible = visible & (last_key[None, :] >= first_key[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _log2(x, APPROXIMATE: tl.constexpr):
    """log2 of numbers >= 0. On NVIDIA tl.log2 is twenty instructions, the approximation is one;
    its error, 2^-22, is that of a score of 2."""
    if APPROXIMATE:
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.where(x > 0.0, tl.log2(tl.where(x > 0.0, x, 1.0)), float("-inf"))
    return result


@triton.jit
def _column_groups(COLS: tl.constexpr, PER_BLOCK: tl.constexpr, LANES: tl.constexpr):
    """(N,) which key group of a step stands in which column of the product; see `_by_block`."""
    column = tl.arange(0, COLS)
    if LANES == 4:
        half = PER_BLOCK // 2
        eighth = column // 8
        block = eighth // half * 4 + column % 8 // 2
        column = block * PER_BLOCK + eighth % half * 2 + column % 2
    return column


@triton.jit
def _by_block(
    scores, ROWS: tl.constexpr, COLS: tl.constexpr, PER_BLOCK: tl.constexpr, LANES: tl.constexpr
):
    """(M, N) in the order of `_column_groups` to (M, BLOCKS / LANES, LANES, PER_BLOCK) in order.

    Four threads share a row of what NVIDIA's tensor cores give: of every 8 columns each has two
    that are adjacent. With LANES = 4 each has whole blocks, every fourth one, so that neither
    their sums nor the running maxima cross threads.
    """
    if LANES == 4:
        half: tl.constexpr = PER_BLOCK // 2
        scores = tl.reshape(scores, (ROWS, COLS // (8 * half), half, 4, 2))
        scores = tl.permute(scores, (0, 1, 3, 2, 4))
    return tl.reshape(scores, (ROWS, COLS // (LANES * PER_BLOCK), LANES, PER_BLOCK))


@triton.jit
def _partial_sums(
    maximum, total, query, query_norm, query_base, key_base, spreads_base, partial_base,
    query_strides, key_strides, partial_stride, groups, first, last, q_end, kv_end, window,
    scale_log2, GROUP: tl.constexpr, TAPS: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    LANES: tl.constexpr, NEGATIVE: tl.constexpr, HAS_SPREADS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Take the query groups through steps [first, last) of COLS key groups each.

    Args:
        maximum, total: (M, LANES) running maximum (base 2) and sum of every LANES-th block of a
            row, as in online softmax.
        query: (M, D) if TAPS is 1, else unused: the loop over taps loads its own.
        query_norm: (M,) its lengths, with the sign of the scale; used if HAS_SPREADS.
        partial_base: where the program's (ROWS, partial_stride) log-sum-exps go.
    """
    PER_BLOCK: tl.constexpr = BLOCK_K // GROUP
    BLOCKS: tl.constexpr = COLS // PER_BLOCK
    column = _column_groups(COLS, PER_BLOCK, LANES)  # (N,)
    out_offsets = tl.arange(0, ROWS)[:, None] * partial_stride + tl.arange(0, BLOCKS)[None, :]
    cut_share = _log2((kv_end % GROUP).to(tl.float32) / GROUP, APPROXIMATE)
    # Rows of the tensors that hold valid tokens.
    key_end = tl.cdiv(kv_end * TAPS, GROUP)
    query_end = tl.cdiv(q_end * TAPS, GROUP)
    key_offsets = tile_offsets(column * TAPS, key_strides[2], BLOCK_D, key_strides[3])
    for step in range(first, last):
        start = step * COLS * TAPS
        key_pointers = key_base + start.to(tl.int64) * key_strides[2] + key_offsets
        if TAPS == 1:
            key = load_tile(key_pointers, start + column, key_end, HEAD_DIM, BLOCK_D, MASKED)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (M, N)
            if HAS_SPREADS:
                place = start + column
                spreads = tl.load(spreads_base + place, mask=place < key_end, other=0.0)
                scores += query_norm[:, None] * spreads[None, :]
        else:
            scores = tl.zeros([ROWS, COLS], tl.float32)
            for tap in range(TAPS):
                rows = groups * TAPS + (TAPS - 1 - tap)
                offsets = tile_offsets(rows, query_strides[2], BLOCK_D, query_strides[3])
                taken = load_tile(query_base + offsets, rows, query_end, HEAD_DIM, BLOCK_D, True)
                key = load_tile(
                    key_pointers + tap * key_strides[2], start + column * TAPS + tap, key_end,
                    HEAD_DIM, BLOCK_D, MASKED,
                )  # fmt: skip
                scores = tl.dot(taken, tl.trans(key), scores, input_precision=PRECISION)
        factor = scale_log2
        if MASKED or NEGATIVE:  # else the scale is part of the exponent's multiply-add
            scores = scores * scale_log2
            factor = 1.0
        if MASKED:
            scores = _visible_groups(
                scores, groups, step * COLS + column, q_end, kv_end, window, cut_share,
                GROUP, IS_CAUSAL, HAS_WINDOW,
            )  # fmt: skip
        scores = _by_block(scores, ROWS, COLS, PER_BLOCK, LANES)
        highest = tl.max(tl.max(scores, 3), 1)  # (M, LANES)
        new_maximum = tl.maximum(maximum, highest * factor)
        p = tl.exp2(scores * factor - new_maximum[:, None, :, None])
        blocks = tl.sum(p, 3)  # (M, BLOCKS / LANES, LANES)
        logs = tl.reshape(new_maximum[:, None, :] + _log2(blocks, APPROXIMATE), (ROWS, BLOCKS))
        tl.store(partial_base + step * BLOCKS + out_offsets, logs)
        total = total * tl.exp2(maximum - new_maximum) + tl.sum(blocks, 1)
        maximum = new_maximum
    return maximum, total


@triton.jit(do_not_specialize=LENGTHS)
def _score_kernel(
    query_ptr, key_ptr, spreads_ptr, mass_ptr, partial_ptr, lse_ptr, q_lens_ptr, kv_lens_ptr,
    query_strides, key_strides, heads, head_ratio, q_len, kv_len, kv_blocks,
    first_tile, tiles, chunks, window, scale_log2,
    GROUP: tl.constexpr, TAPS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_Q_LENS: tl.constexpr, HAS_KV_LENS: tl.constexpr, TAKE_MAXIMUM: tl.constexpr,
    PRECISION: tl.constexpr, STEP: tl.constexpr, LANES: tl.constexpr, NEGATIVE: tl.constexpr,
    HAS_SPREADS: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    PER_TILE: tl.constexpr = BLOCK_Q // GROUP
    TILES: tl.constexpr = ROWS // PER_TILE
    BLOCKS: tl.constexpr = COLS * GROUP // BLOCK_K
    # A multiple of BLOCKS, so that the stores of a step are wide.
    partial_stride = tl.cdiv(kv_blocks, BLOCKS) * BLOCKS
    program = tl.program_id(0)
    batch_head = program // chunks
    chunk = program % chunks
    if IS_CAUSAL:
        # The last tiles have the most work: those of all heads start first.
        batch_heads = tl.num_programs(0) // chunks
        batch_head = program % batch_heads
        chunk = chunks - 1 - program // batch_heads
    batch = batch_head // heads
    head = batch_head % heads
    q_end = valid_length(q_lens_ptr, batch, q_len, HAS_Q_LENS)
    kv_end = valid_length(kv_lens_ptr, batch, kv_len, HAS_KV_LENS)

    # The keys that some query of the program sees, in steps of COLS groups.
    first_query = (first_tile + chunk * TILES) * BLOCK_Q
    last_query = tl.minimum(first_query + ROWS * GROUP, q_end) - 1
    offset = kv_end - q_end
    step_tokens = COLS * GROUP
    first = 0
    key_end = kv_end
    full = kv_end // step_tokens
    if IS_CAUSAL:
        # Floor division of a negative number rounds to zero in Triton, hence the maxima.
        key_end = tl.minimum(kv_end, tl.maximum(last_query + offset + 1, 0))
        full = tl.minimum(full, tl.maximum(first_query + offset + 1, 0) // step_tokens)
    last = tl.cdiv(key_end, step_tokens)
    if HAS_WINDOW:
        first = tl.maximum(first_query + offset - window + 1, 0) // step_tokens
        full = first
    if first_query >= q_end:
        last = first
        full = first

    groups = first_query // GROUP + tl.arange(0, ROWS)  # (M,)
    query_base = head_base(query_ptr, batch, head, query_strides[0], query_strides[1])
    key_base = head_base(key_ptr, batch, head // head_ratio, key_strides[0], key_strides[1])
    query = tl.zeros([ROWS, BLOCK_D], query_ptr.dtype.element_ty)
    if TAPS == 1:
        query_offsets = tile_offsets(groups, query_strides[2], BLOCK_D, query_strides[3])
        query = load_tile(
            query_base + query_offsets, groups, tl.cdiv(q_end, GROUP), HEAD_DIM, BLOCK_D, True
        )
    query_norm = tl.zeros([ROWS], tl.float32)
    spreads_base = spreads_ptr
    if HAS_SPREADS:
        wide = query.to(tl.float32)
        query_norm = tl.sqrt(tl.sum(wide * wide, 1))
        if NEGATIVE:  # a spread makes every score larger
            query_norm = -query_norm
        kv_head = batch * (heads // head_ratio) + head // head_ratio
        spreads_base += kv_head.to(tl.int64) * tl.cdiv(kv_len, GROUP)
    partial_base = partial_ptr + program.to(tl.int64) * ROWS * partial_stride
    maximum = tl.full([ROWS, LANES], NO_SCORE, tl.float32)
    total = tl.zeros([ROWS, LANES], tl.float32)
    maximum, total = _partial_sums(
        maximum, total, query, query_norm, query_base, key_base, spreads_base, partial_base,
        query_strides, key_strides, partial_stride, groups, first, full, q_end, kv_end, window,
        scale_log2, GROUP, TAPS, BLOCK_K, ROWS, COLS, HEAD_DIM, BLOCK_D, IS_CAUSAL, HAS_WINDOW,
        False, PRECISION, LANES, NEGATIVE, HAS_SPREADS, APPROXIMATE,
    )  # fmt: skip
    maximum, total = _partial_sums(
        maximum, total, query, query_norm, query_base, key_base, spreads_base, partial_base,
        query_strides, key_strides, partial_stride, groups, full, last, q_end, kv_end, window,
        scale_log2, GROUP, TAPS, BLOCK_K, ROWS, COLS, HEAD_DIM, BLOCK_D, IS_CAUSAL, HAS_WINDOW,
        True, PRECISION, LANES, NEGATIVE, HAS_SPREADS, APPROXIMATE,
    )  # fmt: skip
    row_maximum = tl.max(maximum, 1)
    total = tl.sum(total * tl.exp2(maximum - row_maximum[:, None]), 1)
    dead = (total == 0.0) | (groups * GROUP >= q_end)
    lse = tl.where(dead, float("-inf"), row_maximum + tl.log2(tl.where(dead, 1.0, total)))
    lse_base = lse_ptr + program.to(tl.int64) * ROWS
    tl.store(lse_base + tl.arange(0, ROWS), lse)

    # What one thread of the program wrote, another reads below.
    tl.debug_barrier()
    lane = tl.arange(0, TILES)
    mass_base = mass_ptr + (batch_head.to(tl.int64) * tiles + chunk * TILES) * kv_blocks
    mass_rows = mass_base + lane.to(tl.int64)[:, None] * kv_blocks
    for start in range(0, kv_blocks, CHUNK):
        blocks = start + tl.arange(0, CHUNK)
        written = ((blocks >= first * BLOCKS) & (blocks < last * BLOCKS))[None, :]
        mass = tl.zeros([TILES, CHUNK], tl.float32)
        alive = tl.zeros([TILES], tl.float32)
        for begin in range(0, PER_TILE, STEP):
            for g in tl.static_range(STEP):
                rows = lane * PER_TILE + begin + g
                row_lse = tl.load(lse_base + rows)
                seen = row_lse != float("-inf")
                pointers = partial_base + rows[:, None] * partial_stride + blocks[None, :]
                logs = tl.load(pointers, mask=written & seen[:, None], other=float("-inf"))
                p = tl.exp2(logs - tl.where(seen, row_lse, 0.0)[:, None])
                alive += seen.to(tl.float32)
                if TAKE_MAXIMUM:
                    mass = tl.maximum(mass, p, propagate_nan=tl.PropagateNan.ALL)
                else:
                    mass += p
        if not TAKE_MAXIMUM:
            mass = mass / tl.maximum(alive, 1.0)[:, None]
        stored = (chunk * TILES + lane < tiles)[:, None] & (blocks < kv_blocks)[None, :]
        tl.store(mass_rows + blocks[None, :], mass, mask=stored)


@dataclass(frozen=True)
class ScoreConfig:
    """Launch shape of the scoring kernel: query groups and key groups of a step.

    Attributes:
        max_registers: a thread's on sm_90, 0 for what the compiler likes. It takes more than it
            needs; with fewer, more programs share a multiprocessor. Other GPUs spill.
    """

    rows: int
    cols: int
    num_warps: int
    num_stages: int
    max_registers: int = 0


def default_config(
    batch_heads: int, row_groups: int, per_tile: int, per_block: int, block_d: int, itemsize: int,
    taps: int = 1,
) -> ScoreConfig:  # fmt: skip
    """Several programs a multiprocessor on sm_90, so that one's exponentials hide another's
    products (measured, docs/kernels.md).

    With several taps the addresses take more registers. Fp32 products run outside the tensor cores:
    registers are the limit.

    Args:
        row_groups: query groups of a head; per_tile, per_block: groups in a block, at most 64.
        block_d: padded head_dim; itemsize: bytes of one entry of a group's mean.
    """
    row_bytes = block_d * itemsize
    if itemsize == 4:
        config = ScoreConfig(32, 32, 4, 3 if row_bytes <= 256 else 2)
    elif row_bytes > 256:
        config = ScoreConfig(64, 64, 4, 2)
    elif batch_heads * row_groups < 256 * 128:  # too few programs to fill a GPU
        config = ScoreConfig(64, 64, 4, 3)
    elif taps > 1:
        config = ScoreConfig(128, 64, 8, 3)
    elif row_bytes > 128:
        config = ScoreConfig(128, 64, 8, 3)
    else:
        config = ScoreConfig(128, 64, 8, 3, max_registers=80)
    return replace(config, rows=max(config.rows, per_tile), cols=max(config.cols, per_block))


def score_tiles(
    query: Tensor,
    key: Tensor,
    spreads: Tensor | None,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    q_len: int,
    kv_len: int,
    group: int,
    taps: int,
    take_maximum: bool,
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    scale: float,
    first_tile: int,
    tiles: int,
    config: ScoreConfig | None = None,
) -> Tensor:
    """Predicted mass of ``tiles`` query tiles from ``first_tile`` on.

    Args:
        query, key: (B, Hq, ·, D), (B, Hkv, ·, D): group means if ``taps`` is 1, tokens if it is
            ``group``.
        spreads: (B, Hkv, ·) fp32, what a query of length 1 may find above its product with the
            key group, or None.
        q_len, kv_len: in tokens.
        group: tokens a group, a power of two that divides both block sizes, at most 64 groups a
            block.
        window: tokens, 0 for none.

    Returns:
        (B, Hq, tiles, Mk) fp32; with ``take_maximum`` the rows do not sum to 1.
    """
    shape = (*query.shape[:2], tiles, ceil_div(kv_len, block_size[1]))
    mass = torch.empty(shape, dtype=torch.float32, device=query.device)
    if mass.numel() == 0:
        return mass
    launch = plan_scores(
        query, key, spreads, q_lens, kv_lens, q_len, kv_len, group, taps, take_maximum, block_size,
        is_causal, window, scale, first_tile, tiles, config, architecture(query.device),
        dot_precision(query.dtype),
    )  # fmt: skip
    partial, lse = (
        torch.empty(shape, dtype=torch.float32, device=query.device) for shape in launch.workspace
    )
    launch(query, key, spreads, mass, partial, lse, q_lens, kv_lens)
    return mass


@planned
def plan_scores(
    query: Tensor,
    key: Tensor,
    spreads: Tensor | None,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    q_len: int,
    kv_len: int,
    group: int,
    taps: int,
    take_maximum: bool,
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    scale: float,
    first_tile: int,
    tiles: int,
    config: ScoreConfig | None,
    arch: str,
    precision: str,
) -> Launch:
    batch, heads, _, head_dim = query.shape
    block_q, block_k = block_size
    per_tile, per_block = block_q // group, block_k // group
    kv_blocks = ceil_div(kv_len, block_k)
    block_d = padded_head_dim(head_dim)
    config = config or default_config(
        batch * heads, tiles * per_tile, per_tile, per_block, block_d, query.element_size(), taps
    )
    rows, cols = config.rows, config.cols
    chunks = ceil_div(tiles * per_tile, rows)
    programs = batch * heads * chunks
    chunk = MASSES_A_WARP * config.num_warps // (rows // per_tile)
    partial_stride = ceil_div(kv_blocks, cols // per_block) * (cols // per_block)
    capped = {"maxnreg": config.max_registers} if config.max_registers and arch == "sm90" else {}
    return Launch(
        _score_kernel, (programs,),
        (
            query.stride(), key.stride(), heads, heads // key.shape[1],
            q_len, kv_len, kv_blocks, first_tile, tiles, chunks, window,
            exponent_scale(scale / taps),
        ),
        workspace=((programs, rows, partial_stride), (programs, rows)),
        GROUP=group, TAPS=taps, BLOCK_Q=block_q, BLOCK_K=block_k, ROWS=rows, COLS=cols,
        CHUNK=min(chunk, next_power_of_2(kv_blocks)), HEAD_DIM=head_dim, BLOCK_D=block_d,
        IS_CAUSAL=is_causal, HAS_WINDOW=window > 0, HAS_Q_LENS=q_lens is not None,
        HAS_KV_LENS=kv_lens is not None, TAKE_MAXIMUM=take_maximum,
        PRECISION=precision, STEP=min(UNROLL, per_tile),
        LANES=4 if 2 <= per_block <= cols // 4 else 1, NEGATIVE=scale < 0,
        HAS_SPREADS=spreads is not None, APPROXIMATE=arch.startswith("sm"),
        num_warps=config.num_warps, num_stages=config.num_stages, **capped,
    )  # fmt: skip
