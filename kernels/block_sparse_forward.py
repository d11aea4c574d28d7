"""Block-sparse attention, forward, with log-sum-exp and the entropies that come for free.

For each block of queries A with the list L(A) of key blocks:
    S_ij = scale * q_i . k_j,  p = softmax over the visible j in L(A),  O_i = sum_j p_ij v_j,
    lse_i = log sum_j exp S_ij,
    row entropy   H_i  = -sum_j p_ij log p_ij,
    block entropy HB_i = -sum_B P_iB log P_iB with P_iB = sum over j in block B of p_ij.
Online softmax as in FlashAttention (Dao et al., arXiv 2205.14135). With e_j = exp2(s_j - m) and
l = sum e_j, both entropies are log l - T / l for a running sum T: of e_j * (s_j - m) for rows, of
e_B * log2 e_B for blocks, e_B = sum over the block of e_j. When the maximum m rises by d, every
e shrinks by 2^-d and T becomes 2^-d * (T - d * l).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from entropy_attn.kernels.launch import (
    LENGTHS,
    adjacent_lists,
    architecture,
    ceil_div,
    exponent_scale,
    has_copy_engine,
    list_strides,
    padded_head_dim,
    tile_descriptor,
)
from entropy_attn.kernels.plans import Launch, dot_precision, planned
from entropy_attn.kernels.primitives import (
    LN_2,
    NO_SCORE,
    block_start,
    gathered_keys,
    head_base,
    load_box,
    load_tile,
    online_softmax,
    program_tile,
    store_tile,
    tile_blocks,
    tile_offsets,
    valid_length,
    visible_scores,
)


@triton.jit
def _entropy_sums(
    row_sum, block_sum, open_mass, mass, alpha, shift, exponents, p, p_sum, step,
    STEPS: tl.constexpr, ROW_ENTROPY: tl.constexpr, BLOCK_ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Update T of rows and blocks; ``mass`` is l before this step, ``open_mass`` the part of it
    that belongs to a block whose keys are not all seen yet (a block takes STEPS steps)."""
    if ROW_ENTROPY:
        if MASKED:
            term = tl.where(p > 0.0, p * exponents, 0.0)  # not 0 * -inf
        else:
            term = p * exponents
        row_sum = alpha * (row_sum + shift * mass) + tl.sum(term, 1)
    if BLOCK_ENTROPY:
        if STEPS == 1:
            block_sum = alpha * (block_sum + shift * mass)
            closed = p_sum
        else:
            block_sum = alpha * (block_sum + shift * (mass - open_mass))
            open_mass = open_mass * alpha + p_sum
            closes = (step + 1) % STEPS == 0
            closed = tl.where(closes, open_mass, 0.0)
            open_mass = tl.where(closes, 0.0, open_mass)
        block_sum += closed * tl.log2(tl.maximum(closed, 1.0e-37))
    return row_sum, block_sum, open_mass


@triton.jit
def _visit_blocks(
    acc, mass, maximum, row_sum, block_sum, query, positions, batch, kv_head,
    key_base, value_base, stride_kn, stride_kd, stride_vn, stride_vd,
    list_pointer, first, last, count, kv_end, kv_len, window, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr,
    ROW_ENTROPY: tl.constexpr, BLOCK_ENTROPY: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the blocks in slots [first, last) of the list into the running softmax.

    DESCRIPTORS: ``key_base`` and ``value_base`` are descriptors of the whole tensors; else they
    point to the head.
    """
    GATHER: tl.constexpr = BLOCK_N > BLOCK_K  # several small blocks make one step
    SLOTS: tl.constexpr = BLOCK_N // BLOCK_K if GATHER else 1
    STEPS: tl.constexpr = 1 if GATHER else BLOCK_K // BLOCK_N  # or one large block makes several
    lane = tl.arange(0, BLOCK_N)
    if not GATHER:
        if not DESCRIPTORS:
            key_offsets = tile_offsets(lane, stride_kn, BLOCK_D, stride_kd)  # (N, D)
            value_offsets = tile_offsets(lane, stride_vn, BLOCK_D, stride_vd)  # (N, D)
        next_start = block_start(list_pointer, first, count, LISTED, BLOCK_K)
    open_mass = tl.zeros_like(mass)
    for step in range(first * STEPS, last * STEPS, SLOTS):
        if GATHER:
            keys = gathered_keys(list_pointer, step, last, kv_len, LISTED, BLOCK_K, BLOCK_N)
            key_pointers = key_base + tile_offsets(keys, stride_kn, BLOCK_D, stride_kd)
            value_pointers = value_base + tile_offsets(keys, stride_vn, BLOCK_D, stride_vd)
        else:
            start = next_start + (step % STEPS) * BLOCK_N
            keys = start + lane
            if not DESCRIPTORS:
                key_pointers = key_base + start.to(tl.int64) * stride_kn + key_offsets
                value_pointers = value_base + start.to(tl.int64) * stride_vn + value_offsets
            # The next block's index is fetched one step ahead of the loads that depend on it.
            next_start = block_start(list_pointer, (step + 1) // STEPS, count, LISTED, BLOCK_K)
        if DESCRIPTORS:
            key = load_box(key_base, batch, kv_head, start, BLOCK_N, BLOCK_D)  # (N, D)
        else:
            key = load_tile(key_pointers, keys, kv_len, HEAD_DIM, BLOCK_D, MASKED)  # (N, D)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (M, N)
        if MASKED:
            scores = visible_scores(scores, positions, keys, kv_end, window, IS_CAUSAL, HAS_WINDOW)
        exponents, maximum, shift = online_softmax(scores, scale_log2, maximum)
        p = tl.exp2(exponents)  # (M, N)
        alpha = tl.exp2(shift)  # (M,)
        p_sum = tl.sum(p, 1)
        row_sum, block_sum, open_mass = _entropy_sums(
            row_sum, block_sum, open_mass, mass, alpha, shift, exponents, p, p_sum, step,
            STEPS, ROW_ENTROPY, BLOCK_ENTROPY, MASKED,
        )  # fmt: skip
        mass = mass * alpha + p_sum
        if DESCRIPTORS:
            value = load_box(value_base, batch, kv_head, start, BLOCK_N, BLOCK_D)  # (N, D)
        else:
            value = load_tile(value_pointers, keys, kv_len, HEAD_DIM, BLOCK_D, MASKED)  # (N, D)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)  # (M, D)
    return acc, mass, maximum, row_sum, block_sum


@triton.jit(do_not_specialize=LENGTHS)
def _forward_kernel(
    query_ptr, key_source, value_source, out_ptr, lse_ptr, row_ptr, block_ptr,
    counts_ptr, indices_ptr, kv_lens_ptr, q_lens_ptr,
    query_strides, key_strides, value_strides, out_strides,
    count_stride_b, count_stride_h, count_stride_t, index_stride_b, index_stride_h, index_stride_t,
    heads, group, q_len, kv_len, q_tiles, window, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr,
    MAY_CUT: tl.constexpr, HAS_KV_LENS: tl.constexpr, HAS_Q_LENS: tl.constexpr,
    ROW_ENTROPY: tl.constexpr, BLOCK_ENTROPY: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, tile = program_tile(q_tiles, heads, IS_CAUSAL)
    kv_end = valid_length(kv_lens_ptr, batch, kv_len, HAS_KV_LENS)
    q_end = valid_length(q_lens_ptr, batch, q_len, HAS_Q_LENS)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    positions = rows + (kv_end - q_end)  # (M,)
    list_pointer, count, first, full, last = tile_blocks(
        counts_ptr, indices_ptr, batch, head, tile,
        (count_stride_b, count_stride_h, count_stride_t),
        (index_stride_b, index_stride_h, index_stride_t),
        q_end, kv_end, kv_len, window, BLOCK_M, BLOCK_Q, BLOCK_K,
        IS_CAUSAL, HAS_WINDOW, LISTED, MAY_CUT, HAS_Q_LENS,
    )  # fmt: skip
    if BLOCK_N > BLOCK_K:
        # A step takes whole groups of blocks; what is left over joins the masked phase.
        full = first + (full - first) // (BLOCK_N // BLOCK_K) * (BLOCK_N // BLOCK_K)

    query_base = head_base(query_ptr, batch, head, query_strides[0], query_strides[1])
    query_pointers = query_base + tile_offsets(rows, query_strides[2], BLOCK_D, query_strides[3])
    query = load_tile(query_pointers, rows, q_len, HEAD_DIM, BLOCK_D, True)  # (M, D)
    kv_head = head // group
    if DESCRIPTORS:
        key_base = key_source
        value_base = value_source
    else:
        key_base = head_base(key_source, batch, kv_head, key_strides[0], key_strides[1])
        value_base = head_base(value_source, batch, kv_head, value_strides[0], value_strides[1])

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    block_sum = tl.zeros([BLOCK_M], tl.float32)
    acc, mass, maximum, row_sum, block_sum = _visit_blocks(
        acc, mass, maximum, row_sum, block_sum, query, positions, batch, kv_head,
        key_base, value_base, key_strides[2], key_strides[3], value_strides[2], value_strides[3],
        list_pointer, first, full, count, kv_end, kv_len, window, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, IS_CAUSAL, HAS_WINDOW, LISTED,
        ROW_ENTROPY, BLOCK_ENTROPY, False, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    if IS_CAUSAL or HAS_WINDOW or MAY_CUT or BLOCK_N > BLOCK_K:
        acc, mass, maximum, row_sum, block_sum = _visit_blocks(
            acc, mass, maximum, row_sum, block_sum, query, positions, batch, kv_head,
            key_base, value_base, key_strides[2], key_strides[3],
            value_strides[2], value_strides[3],
            list_pointer, full, last, count, kv_end, kv_len, window, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, IS_CAUSAL, HAS_WINDOW, LISTED,
            ROW_ENTROPY, BLOCK_ENTROPY, True, DESCRIPTORS, PRECISION,
        )  # fmt: skip

    # A row without a key, or past its batch row's length: 0 and -inf. What is NaN stays NaN.
    alive = (mass != 0.0) & (rows < q_end)
    safe_mass = tl.where(alive, mass, 1.0)
    acc = tl.where(alive[:, None], acc / safe_mass[:, None], 0.0)
    out_base = head_base(out_ptr, batch, head, out_strides[0], out_strides[1])
    out_pointers = out_base + tile_offsets(rows, out_strides[2], BLOCK_D, out_strides[3])
    store_tile(out_pointers, acc, rows, q_len, HEAD_DIM, BLOCK_D)

    log_mass = tl.log2(safe_mass)
    statistics = (batch * heads + head).to(tl.int64) * q_len + rows
    lse = tl.where(alive, (maximum + log_mass) * LN_2, float("-inf"))
    tl.store(lse_ptr + statistics, lse, mask=rows < q_len)
    if ROW_ENTROPY:
        row_entropy = tl.where(alive, (log_mass - row_sum / safe_mass) * LN_2, 0.0)
        tl.store(row_ptr + statistics, tl.maximum(row_entropy, 0.0), mask=rows < q_len)
    if BLOCK_ENTROPY:
        block_entropy = tl.where(alive, (log_mass - block_sum / safe_mass) * LN_2, 0.0)
        tl.store(block_ptr + statistics, tl.maximum(block_entropy, 0.0), mask=rows < q_len)


@dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes of the forward kernel.

    Attributes:
        block_m: queries a program; divides block_q.
        block_n: keys a step; divides block_k or is a multiple of it.
        descriptors: fetch keys and values by the copy engine; steps are then at most block_k keys.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


def forward_config(
    arch: str,
    head_dim: int,
    itemsize: int,
    block_size: tuple[int, int],
    is_causal: bool = False,
    entropy: bool = False,
    copy_engine: bool = False,
) -> ForwardConfig:
    """The measured default (docs/kernels.md); entropy wants whole blocks as steps."""
    block_q, block_k = block_size
    block_d = padded_head_dim(head_dim)
    if copy_engine and block_d <= 128 and min(block_size) >= 64:
        return _copy_engine_config(block_d, block_size, is_causal, entropy)
    if itemsize == 4:  # fp32 products run outside the tensor cores: registers are the limit
        limit_m, limit_n = (64, 32) if block_d <= 128 else (32, 32)
    elif block_d > 128 or arch != "sm90":
        limit_m, limit_n = (128, 64) if block_d <= 128 else (64, 32)
    else:
        limit_m, limit_n = 128, 128
    block_m, block_n = min(block_q, limit_m), limit_n
    if arch == "sm90" and block_m < 128:
        block_n = min(block_n, 64)  # two programs a multiprocessor beat one with longer steps
    if entropy or block_k >= 64:
        block_n = min(block_n, block_k)
    if arch == "sm90" and itemsize == 2:
        if is_causal and block_d == 64:
            block_n = min(block_n, 64)  # the masks leave too few registers for longer steps
        num_warps = 8 if block_m == 128 and (block_d == 128 or block_n == 64) else 4
        num_stages = 2 if (entropy and block_d == block_m == 128) or block_d > 128 else 3
    else:
        # fp32 tiles of 64 queries do not fit the registers of four warps: on sm_100 ptxas spills
        # 19 KB a thread. On sm_90, where four were the default all along, eight were not timed.
        spills = itemsize == 4 and block_m == 64 and arch != "sm90"
        num_warps = 8 if block_m == 128 or spills else 4
        num_stages = 2
    return ForwardConfig(block_m, block_n, num_warps, num_stages)


def _copy_engine_config(
    block_d: int, block_size: tuple[int, int], is_causal: bool, entropy: bool
) -> ForwardConfig:
    """sm_90: programs of 64 rows, so that two or three share a multiprocessor."""
    if block_d == 128:
        if entropy and min(block_size) >= 128:
            return ForwardConfig(128, 128, num_warps=8, num_stages=3, descriptors=True)
        return ForwardConfig(64, 64, num_warps=4, num_stages=3, descriptors=True)
    num_stages = 3 if entropy and is_causal else 2
    block_n = min(block_size[1], 128)
    return ForwardConfig(64, block_n, num_warps=4, num_stages=num_stages, descriptors=True)


def block_sparse_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    scale: float,
    row_entropy: bool,
    block_entropy: bool,
    config: ForwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel; shapes as in `entropy_attn.block_sparse_attention`.

    Returns:
        out (B, Hq, Nq, D), lse (B, Hq, Nq) fp32, row and block entropy, each like lse or empty.
    """
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    row = torch.empty_like(lse) if row_entropy else lse.new_empty(0)
    block = torch.empty_like(lse) if block_entropy else lse.new_empty(0)
    if out.numel() == 0:
        return out, lse, row, block
    if key.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf")), row.zero_(), block.zero_()
    counts, indices = adjacent_lists(kv_num_blocks, kv_indices)
    launch = plan_forward(
        query, key, value, counts, indices, kv_lens, q_lens, out.stride(), block_size, is_causal,
        window, scale, row_entropy, block_entropy, config, architecture(query.device),
        dot_precision(query.dtype),
    )  # fmt: skip
    launch(query, key, value, out, lse, row, block, counts, indices, kv_lens, q_lens)
    return out, lse, row, block


@planned
def plan_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor | None,
    indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    out_strides: tuple[int, ...],
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    scale: float,
    row_entropy: bool,
    block_entropy: bool,
    config: ForwardConfig | None,
    arch: str,
    precision: str,
) -> Launch:
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    config = config or forward_config(
        arch,
        head_dim,
        query.element_size(),
        block_size,
        is_causal,
        entropy=row_entropy or block_entropy,
        copy_engine=has_copy_engine(arch, key, value),
    )
    q_tiles = ceil_div(q_len, config.block_m)
    described = None
    if config.descriptors:
        described = {n: tile_descriptor(x, config.block_n) for n, x in ((1, key), (2, value))}
    return Launch(
        _forward_kernel, (q_tiles * batch * heads,),
        (
            query.stride(), key.stride(), value.stride(), out_strides,
            *list_strides(counts, indices),
            heads, heads // kv_heads, q_len, kv_len, q_tiles, window, exponent_scale(scale),
        ),
        described=described,
        HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim),
        BLOCK_Q=block_size[0], BLOCK_K=block_size[1],
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        IS_CAUSAL=is_causal, HAS_WINDOW=window > 0, LISTED=indices is not None,
        MAY_CUT=kv_lens is not None or kv_len % max(block_size[1], config.block_n) != 0,
        HAS_KV_LENS=kv_lens is not None, HAS_Q_LENS=q_lens is not None,
        ROW_ENTROPY=row_entropy, BLOCK_ENTROPY=block_entropy,
        DESCRIPTORS=config.descriptors, PRECISION=precision,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
