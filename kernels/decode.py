"""Attention of few queries to many keys: decoding against a cache, listed blocks, pages.

The formulas are those of `block_sparse_forward`. One token a sequence gives a query tile no rows
and a GPU no programs, so here the query heads of a key head share a tile, and the blocks of a list
are split over programs (flash-decoding). Each leaves a normalised output o_s and lse_s; a second
kernel adds them up:

    lse = log sum_s exp lse_s,    o = sum_s exp(lse_s - lse) o_s.

Keys are read once, so the bandwidth of memory is the limit and products cost nothing. A page table
only changes addresses: keys are named by where they stand in the sequence until they are loaded.
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
    list_strides,
    next_power_of_2,
    padded_head_dim,
)
from entropy_attn.kernels.plans import device_of, dot_precision
from entropy_attn.kernels.primitives import (
    LN_2,
    NO_SCORE,
    head_base,
    load_tile,
    online_softmax,
    tile_blocks,
    tile_offsets,
    valid_keys,
    valid_length,
    visible_scores,
)

# Queries up to which keys are split over programs; every block of queries is at least as large.
FEW_QUERIES = 16
# Programs to aim at, a few a multiprocessor, and the fewest keys that are worth one.
PROGRAMS = 512
LEAST_KEYS = 256
MOST_SPLITS = 128
# Rows of a tile; more would spill.
MOST_ROWS = 64
COUNTS = ("pack", "sharing", "splits", "stride_valid")


@triton.jit
def _listed_keys(
    pointer, begin, end, start, kv_len, kv_end, table, batch, stride_table,
    LISTED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The keys from the ``start``-th of slots [begin, end) on.

    Returns:
        keys (BLOCK_N,), kv_len past the end; pages that they lie in, nothing of use without pages.
    """
    places = start + tl.arange(0, BLOCK_N)
    slots = begin + places // BLOCK_K
    if LISTED:
        blocks = tl.load(pointer + slots, mask=slots < end, other=0)
    else:
        blocks = slots
    keys = tl.where(slots < end, blocks * BLOCK_K + places % BLOCK_K, kv_len)
    pages = keys
    if PAGE > 0:
        pages = tl.load(table + batch.to(tl.int64) * stride_table + keys // PAGE,
                        mask=keys < kv_end, other=0)  # fmt: skip
    return keys, pages


@triton.jit
def _row_places(keys, pages, stride_page, stride_row, PAGE: tl.constexpr):
    """(N,) offsets of the keys' rows within one head, int64."""
    if PAGE > 0:
        places = pages.to(tl.int64) * stride_page + (keys % PAGE).to(tl.int64) * stride_row
    else:
        places = keys.to(tl.int64) * stride_row
    return places


@triton.jit(do_not_specialize=(*LENGTHS, *COUNTS))
def _split_kernel(
    query_ptr, key_ptr, value_ptr, partial_ptr, partial_lse_ptr,
    counts_ptr, indices_ptr, kv_lens_ptr, q_lens_ptr, table_ptr, valid_ptr,
    query_strides, key_strides, value_strides, stride_table, stride_valid,
    count_stride_b, count_stride_h, count_stride_t, index_stride_b, index_stride_h, index_stride_t,
    heads, group, pack, sharing, splits, q_len, kv_len, window, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr,
    MAY_CUT: tl.constexpr, HAS_KV_LENS: tl.constexpr, HAS_Q_LENS: tl.constexpr,
    HAS_VALID: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``pack`` query heads that share a key head and a list, and a part of the listed blocks.

    ``group`` heads share a key head, ``sharing`` a list.
    """
    packs = heads // pack
    batch = tl.program_id(0) // packs
    packed = tl.program_id(0) % packs
    split = tl.program_id(1)
    kv_head = packed * pack // group
    kv_end = valid_length(kv_lens_ptr, batch, kv_len, HAS_KV_LENS)
    q_end = valid_length(q_lens_ptr, batch, q_len, HAS_Q_LENS)

    lane = tl.arange(0, BLOCK_M)  # (M,) all queries of one head, then of the next
    head = packed * pack + lane // q_len
    row = lane % q_len
    positions = row + (kv_end - q_end)
    list_pointer, _, first, _, last = tile_blocks(
        counts_ptr, indices_ptr, batch, packed * pack // sharing, 0,
        (count_stride_b, count_stride_h, count_stride_t),
        (index_stride_b, index_stride_h, index_stride_t),
        q_end, kv_end, kv_len, window, BLOCK_Q, BLOCK_Q, BLOCK_K,
        IS_CAUSAL, HAS_WINDOW, LISTED, MAY_CUT, HAS_Q_LENS,
    )  # fmt: skip
    share = tl.cdiv(last - first, splits)
    begin = first + split * share
    end = tl.minimum(begin + share, last)

    here = lane < pack * q_len
    dims = tl.arange(0, BLOCK_D)
    query_base = query_ptr + batch.to(tl.int64) * query_strides[0]
    query_rows = head.to(tl.int64) * query_strides[1] + row.to(tl.int64) * query_strides[2]
    wide = dims.to(tl.int64)[None, :]
    query_pointers = query_base + query_rows[:, None] + wide * query_strides[3]
    query = load_tile(query_pointers, lane, pack * q_len, HEAD_DIM, BLOCK_D, True)  # (M, D)

    # Pages lie in the first dimension, where batch rows would.
    owner = batch
    if PAGE > 0:
        owner = batch * 0
    key_base = head_base(key_ptr, owner, kv_head, key_strides[0], key_strides[1])
    value_base = head_base(value_ptr, owner, kv_head, value_strides[0], value_strides[1])
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    if AHEAD:
        keys, pages = _listed_keys(
            list_pointer, begin, end, 0, kv_len, kv_end, table_ptr, batch, stride_table,
            LISTED, BLOCK_K, BLOCK_N, PAGE,
        )  # fmt: skip
    for start in range(0, (end - begin) * BLOCK_K, BLOCK_N):
        next_keys, next_pages = _listed_keys(
            list_pointer, begin, end, start + AHEAD * BLOCK_N, kv_len, kv_end, table_ptr, batch,
            stride_table, LISTED, BLOCK_K, BLOCK_N, PAGE,
        )  # fmt: skip
        if not AHEAD:
            keys, pages = next_keys, next_pages
        places = _row_places(keys, pages, key_strides[0], key_strides[2], PAGE)
        pointers = key_base + places[:, None] + wide * key_strides[3]
        key = load_tile(pointers, keys, kv_end, HEAD_DIM, BLOCK_D, True)  # (N, D)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (M, N)
        scores = visible_scores(scores, positions, keys, kv_end, window, IS_CAUSAL, HAS_WINDOW)
        if HAS_VALID:
            valid = valid_keys(valid_ptr, batch, stride_valid, keys, kv_end)
            scores = tl.where(valid[None, :], scores, float("-inf"))
        exponents, maximum, shift = online_softmax(scores, scale_log2, maximum)
        p = tl.exp2(exponents)  # (M, N)
        alpha = tl.exp2(shift)  # (M,)
        mass = mass * alpha + tl.sum(p, 1)
        places = _row_places(keys, pages, value_strides[0], value_strides[2], PAGE)
        pointers = value_base + places[:, None] + wide * value_strides[3]
        value = load_tile(pointers, keys, kv_end, HEAD_DIM, BLOCK_D, True)  # (N, D)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)  # (M, D)
        if AHEAD:
            keys, pages = next_keys, next_pages

    alive = (mass != 0.0) & (row < q_end)  # what is NaN stays NaN
    safe_mass = tl.where(alive, mass, 1.0)
    acc = tl.where(alive[:, None], acc / safe_mass[:, None], 0.0)
    lse = tl.where(alive, maximum + tl.log2(safe_mass), float("-inf"))
    # Partial results are (B, Hq, Nq, splits) of lse in base 2, and of (D,) outputs.
    flat = ((batch * heads + head).to(tl.int64) * q_len + row) * splits + split
    tl.store(partial_lse_ptr + flat, lse, mask=here)
    kept = here[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(partial_ptr + flat[:, None] * HEAD_DIM + dims[None, :], acc, mask=kept)


@triton.jit(do_not_specialize=(*LENGTHS, *COUNTS))
def _combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, out_strides, heads, q_len, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One query: the parts weighted by their share of the mass."""
    flat = tl.program_id(0)
    row = flat % q_len
    head = flat // q_len % heads
    batch = flat // q_len // heads
    parts = tl.arange(0, SPLITS)
    base = flat.to(tl.int64) * splits
    lses = tl.load(partial_lse_ptr + base + parts, mask=parts < splits, other=float("-inf"))
    maximum = tl.maximum(tl.max(lses, 0), NO_SCORE)
    mass = tl.sum(tl.exp2(lses - maximum), 0)
    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, CHUNK):
        some = start + tl.arange(0, CHUNK)
        lse = tl.load(partial_lse_ptr + base + some, mask=some < splits, other=float("-inf"))
        pointers = partial_ptr + tile_offsets(base + some, HEAD_DIM, BLOCK_D, 1)
        partial = load_tile(pointers, some, splits, HEAD_DIM, BLOCK_D, True)  # (CHUNK, D)
        acc += tl.sum(tl.exp2(lse - maximum)[:, None] * partial, 0)
    alive = mass != 0.0
    safe_mass = tl.where(alive, mass, 1.0)
    out_base = head_base(out_ptr, batch, head, out_strides[0], out_strides[1])
    pointers = out_base + row.to(tl.int64) * out_strides[2]
    pointers += dims.to(tl.int64) * out_strides[3]
    tl.store(pointers, (acc / safe_mass).to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
    total = tl.where(alive, (maximum + tl.log2(safe_mass)) * LN_2, float("-inf"))
    tl.store(lse_ptr + flat, total)


@dataclass(frozen=True)
class DecodeConfig:
    """Keys a step, and how the loop is compiled.

    Attributes:
        ahead: what a list and a page table say is read a step before the keys that need it.
    """

    block_n: int
    num_warps: int
    num_stages: int
    ahead: bool = False


def decode_config(arch: str, head_dim: int, itemsize: int) -> DecodeConfig:
    """Steps of some 16 KiB of keys and as many values, three of them on their way on NVIDIA."""
    row_bytes = padded_head_dim(head_dim) * itemsize
    block_n = max(16, 64 * 256 // max(256, row_bytes))
    return DecodeConfig(block_n, num_warps=4, num_stages=3 if arch.startswith("sm") else 2)


def split_count(programs: int, keys: int) -> int:
    """Over how many programs the keys are split, the same on every GPU."""
    wanted = ceil_div(PROGRAMS, max(1, programs))
    return max(1, min(wanted, ceil_div(keys, LEAST_KEYS), MOST_SPLITS))


def heads_a_tile(group: int, q_len: int) -> int:
    """Of ``group`` heads with the same keys, how many are one tile: a divisor of their number."""
    return max(
        n for n in range(1, group + 1) if group % n == 0 and n * q_len <= max(MOST_ROWS, q_len)
    )


def split_forward(
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
    block_table: Tensor | None = None,
    valid: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch both kernels; shapes as in `entropy_attn.block_sparse_attention`, few queries.

    Args:
        key, value: (B, Hkv, Nk, D), or with ``block_table`` pages (P, Hkv, page, D).
        kv_num_blocks, kv_indices: of 1, Hkv or Hq heads. Query heads that share a list read their
            keys once.
        block_table: (B, pages of a sequence) int32, where each page lies.
        valid: (B, Nk) int8, odd where a key may be attended to; None where all may.

    Returns:
        out (B, Hq, Nq, D), lse (B, Hq, Nq) fp32.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads, page = key.shape[1], 0
    kv_len = key.shape[2]
    if block_table is not None:
        block_table = block_table.contiguous()
        page, kv_len = kv_len, kv_len * block_table.shape[1]
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    if kv_len == 0:
        return out.zero_(), lse.fill_(float("-inf"))

    counts, indices = adjacent_lists(kv_num_blocks, kv_indices)
    group = heads // kv_heads
    # Heads a list is shared by; a list for all is of stride 0.
    sharing = 1 if indices is None else heads // indices.shape[1]
    pack = heads_a_tile(group if indices is None else min(group, sharing), q_len)
    blocks = ceil_div(kv_len, block_size[1]) if indices is None else indices.shape[3]
    splits = split_count(batch * heads // pack, blocks * block_size[1])
    partial = query.new_empty((*query.shape[:3], splits, head_dim), dtype=torch.float32)
    partial_lse = lse.new_empty((*query.shape[:3], splits))
    arch = architecture(query.device)
    config = config or decode_config(arch, head_dim, query.element_size())
    block_d = padded_head_dim(head_dim)
    with device_of(query):
        _split_kernel[(batch * heads // pack, splits)](
            query, key, value, partial, partial_lse, counts, indices, kv_lens, q_lens,
            block_table, valid,
            query.stride(), key.stride(), value.stride(),
            0 if block_table is None else block_table.shape[1],
            0 if valid is None else valid.stride(0),
            *list_strides(counts, indices),
            heads, group, pack, sharing, splits, q_len, kv_len, window, exponent_scale(scale),
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_Q=block_size[0], BLOCK_K=block_size[1],
            BLOCK_M=max(16, next_power_of_2(pack * q_len)), BLOCK_N=config.block_n,
            PAGE=page, IS_CAUSAL=is_causal, HAS_WINDOW=window > 0, LISTED=indices is not None,
            MAY_CUT=kv_lens is not None or kv_len % block_size[1] != 0,
            HAS_KV_LENS=kv_lens is not None, HAS_Q_LENS=q_lens is not None,
            HAS_VALID=valid is not None, AHEAD=config.ahead, PRECISION=dot_precision(query.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        _combine_kernel[(batch * heads * q_len,)](
            partial, partial_lse, out, lse, out.stride(), heads, q_len, splits,
            HEAD_DIM=head_dim, BLOCK_D=block_d, SPLITS=next_power_of_2(splits), CHUNK=16,
            num_warps=4,
        )  # fmt: skip
    return out, lse
