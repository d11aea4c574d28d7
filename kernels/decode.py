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

import math
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
    next_power_of_2,
    overlapping,
    padded_head_dim,
    tile_descriptor,
)
from entropy_attn.kernels.plans import Launch, dot_precision, planned
from entropy_attn.kernels.primitives import (
    LN_2,
    NO_SCORE,
    head_base,
    load_box,
    load_tile,
    may_start_next,
    online_softmax,
    tile_blocks,
    tile_offsets,
    valid_keys,
    valid_length,
    visible_scores,
    wait_for_last,
)

# Queries up to which keys are split over programs; every block of queries is at least as large.
FEW_QUERIES = 16
# The fewest keys that are worth a program.
LEAST_KEYS = 256
MOST_SPLITS = 128
# Rows of a tile; more would spill.
MOST_ROWS = 64
# Bytes of keys a step: where the copy engine fetches them, or nothing else was measured, and where
# threads gather them.
WIDE_STEP, NARROW_STEP = 16384, 8192
MOST_KEYS = 64
# Entries of partial outputs that are added up at a time.
COMBINED = 8192
COUNTS = ("pack", "sharing", "splits", "stride_valid")


@triton.jit
def _listed_keys(
    pointer, begin, end, places, kv_len, kv_end, table, batch, stride_table,
    LISTED: tl.constexpr, BLOCK_K: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The keys at some places of the blocks in slots [begin, end), counted from the first.

    Returns:
        keys, kv_len past the end; pages that they lie in, nothing of use without pages.
    """
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


@triton.jit
def _rows_of_keys(
    source, strides, keys, pages, batch, kv_head, kv_end,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """(N, D) rows of keys or values; MASKED: keys from ``kv_end`` on are not read.

    DESCRIPTORS: ``source`` is one of the whole tensor, the keys are adjacent and ``keys`` and
    ``pages`` are the first one's. What is read from kv_end on may be anything.
    """
    owner = batch
    if DESCRIPTORS:
        row = keys
        if PAGE > 0:
            owner = pages
            row = keys % PAGE
        tile = load_box(source, owner, kv_head, row, BLOCK_N, BLOCK_D)
    else:
        if PAGE > 0:
            owner = batch * 0  # pages lie in the first dimension, where batch rows would
        places = _row_places(keys, pages, strides[0], strides[2], PAGE)
        dims = tl.arange(0, BLOCK_D).to(tl.int64)
        base = head_base(source, owner, kv_head, strides[0], strides[1])
        pointers = base + places[:, None] + dims[None, :] * strides[3]
        tile = load_tile(pointers, keys, kv_end, HEAD_DIM, BLOCK_D, MASKED)
    return tile


@triton.jit
def _visit_keys(
    acc, mass, maximum, query, positions, batch, kv_head, key_source, value_source,
    key_strides, value_strides, list_pointer, begin, end, kv_len, kv_end, window, scale_log2,
    table_ptr, stride_table, valid_ptr, stride_valid,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr,
    HAS_VALID: tl.constexpr, MASKED: tl.constexpr, AHEAD: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the blocks in slots [begin, end) of the list into the running softmax.

    Not MASKED: they make whole steps, and all queries see all of their keys.
    """
    lane = tl.arange(0, BLOCK_N)
    places = lane
    if DESCRIPTORS:
        places = 0  # the first of adjacent ones says it all
    if AHEAD:
        keys, pages = _listed_keys(
            list_pointer, begin, end, places, kv_len, kv_end, table_ptr, batch, stride_table,
            LISTED, BLOCK_K, PAGE,
        )  # fmt: skip
    for start in range(0, (end - begin) * BLOCK_K, BLOCK_N):
        next_keys, next_pages = _listed_keys(
            list_pointer, begin, end, places + (start + AHEAD * BLOCK_N), kv_len, kv_end,
            table_ptr, batch, stride_table, LISTED, BLOCK_K, PAGE,
        )  # fmt: skip
        if not AHEAD:
            keys, pages = next_keys, next_pages
        key = _rows_of_keys(
            key_source, key_strides, keys, pages, batch, kv_head, kv_end,
            HEAD_DIM, BLOCK_D, BLOCK_N, PAGE, MASKED, DESCRIPTORS,
        )  # fmt: skip
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (M, N)
        if MASKED:
            seen = keys
            if DESCRIPTORS:
                seen = keys + lane
            scores = visible_scores(scores, positions, seen, kv_end, window, IS_CAUSAL, HAS_WINDOW)
            if HAS_VALID:
                valid = valid_keys(valid_ptr, batch, stride_valid, seen, kv_end)
                scores = tl.where(valid[None, :], scores, float("-inf"))
        exponents, maximum, shift = online_softmax(scores, scale_log2, maximum)
        p = tl.exp2(exponents)  # (M, N)
        alpha = tl.exp2(shift)  # (M,)
        mass = mass * alpha + tl.sum(p, 1)
        value = _rows_of_keys(
            value_source, value_strides, keys, pages, batch, kv_head, kv_end,
            HEAD_DIM, BLOCK_D, BLOCK_N, PAGE, MASKED, DESCRIPTORS,
        )  # fmt: skip
        if MASKED and DESCRIPTORS:
            value = tl.where((seen < kv_end)[:, None], value, 0.0)  # 0 * NaN is no 0
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)  # (M, D)
        if AHEAD:
            keys, pages = next_keys, next_pages
    return acc, mass, maximum


@triton.jit(do_not_specialize=(*LENGTHS, *COUNTS))
def _split_kernel(
    query_ptr, key_source, value_source, partial_ptr, partial_lse_ptr,
    counts_ptr, indices_ptr, kv_lens_ptr, q_lens_ptr, table_ptr, valid_ptr,
    query_strides, key_strides, value_strides, stride_table, stride_valid,
    count_stride_b, count_stride_h, count_stride_t, index_stride_b, index_stride_h, index_stride_t,
    heads, group, pack, sharing, splits, q_len, kv_len, window, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr,
    MAY_CUT: tl.constexpr, HAS_KV_LENS: tl.constexpr, HAS_Q_LENS: tl.constexpr,
    HAS_VALID: tl.constexpr, AHEAD: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``pack`` query heads that share a key head and a list, and a part of the listed blocks.

    ``group`` heads share a key head, ``sharing`` a list.
    """
    wait_for_last(OVERLAP)
    may_start_next(OVERLAP)
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
    here = lane < pack * q_len
    dims = tl.arange(0, BLOCK_D)
    query_base = query_ptr + batch.to(tl.int64) * query_strides[0]
    query_rows = head.to(tl.int64) * query_strides[1] + row.to(tl.int64) * query_strides[2]
    query_columns = dims.to(tl.int64) * query_strides[3]
    query_pointers = query_base + query_rows[:, None] + query_columns[None, :]
    query = load_tile(query_pointers, lane, pack * q_len, HEAD_DIM, BLOCK_D, True)  # (M, D)

    list_pointer, _, first, full, last = tile_blocks(
        counts_ptr, indices_ptr, batch, packed * pack // sharing, 0,
        (count_stride_b, count_stride_h, count_stride_t),
        (index_stride_b, index_stride_h, index_stride_t),
        q_end, kv_end, kv_len, window, BLOCK_Q, BLOCK_Q, BLOCK_K,
        IS_CAUSAL, HAS_WINDOW, LISTED, MAY_CUT, HAS_Q_LENS,
    )  # fmt: skip
    share, rest = (last - first) // splits, (last - first) % splits
    begin = first + split * share + tl.minimum(split, rest)
    end = begin + share + (split < rest).to(tl.int32)
    full = tl.maximum(tl.minimum(full, end), begin)
    if HAS_VALID or HAS_WINDOW:
        full = begin
    if BLOCK_N > BLOCK_K:
        # A step takes whole groups of blocks; what is left over joins the masked phase.
        full = begin + (full - begin) // (BLOCK_N // BLOCK_K) * (BLOCK_N // BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    if not (HAS_VALID or HAS_WINDOW):
        acc, mass, maximum = _visit_keys(
            acc, mass, maximum, query, positions, batch, kv_head, key_source, value_source,
            key_strides, value_strides, list_pointer, begin, full, kv_len, kv_end, window,
            scale_log2, table_ptr, stride_table, valid_ptr, stride_valid,
            HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, PAGE, IS_CAUSAL, HAS_WINDOW, LISTED, HAS_VALID,
            False, AHEAD, DESCRIPTORS, PRECISION,
        )  # fmt: skip
    acc, mass, maximum = _visit_keys(
        acc, mass, maximum, query, positions, batch, kv_head, key_source, value_source,
        key_strides, value_strides, list_pointer, full, end, kv_len, kv_end, window, scale_log2,
        table_ptr, stride_table, valid_ptr, stride_valid,
        HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, PAGE, IS_CAUSAL, HAS_WINDOW, LISTED, HAS_VALID,
        True, AHEAD, DESCRIPTORS, PRECISION,
    )  # fmt: skip

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
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query: the parts weighted by their share of the mass."""
    wait_for_last(OVERLAP)
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
        descriptors: fetch keys and values by the copy engine; `adjacent_steps` must be true.
        programs: to aim at when keys are split, a few a multiprocessor.
    """

    block_n: int
    num_warps: int
    num_stages: int
    ahead: bool = False
    descriptors: bool = False
    programs: int = 512


def decode_config(
    arch: str,
    head_dim: int,
    itemsize: int,
    block_k: int,
    page: int = 0,
    copy_engine: bool = False,
) -> DecodeConfig:
    """The default, measured on sm_90 for half precision (docs/kernels.md)."""
    row_bytes = padded_head_dim(head_dim) * itemsize

    def keys(tile_bytes: int) -> int:
        return min(MOST_KEYS, max(16, tile_bytes // row_bytes))

    if not arch.startswith("sm"):
        return DecodeConfig(keys(WIDE_STEP), num_warps=4, num_stages=2)
    if itemsize != 2:
        return DecodeConfig(keys(WIDE_STEP), num_warps=4, num_stages=3)
    block_n = math.gcd(keys(WIDE_STEP), block_k, page)
    if copy_engine and block_n * row_bytes >= NARROW_STEP:
        num_stages = 2 if block_n * row_bytes >= WIDE_STEP else 3
        return DecodeConfig(block_n, 4, num_stages, ahead=True, descriptors=True, programs=384)
    return DecodeConfig(keys(NARROW_STEP), 4, 3, ahead=True, programs=384)


def adjacent_steps(block_n: int, block_k: int, page: int) -> bool:
    """Whether the keys of a step are of one block and of one page."""
    return block_k % block_n == 0 and page % block_n == 0


def split_count(programs: int, keys: int, wanted: int) -> int:
    """Over how many programs the keys of each of some programs are split, to have those wanted."""
    splits = ceil_div(wanted, max(1, programs))
    return max(1, min(splits, ceil_div(keys, LEAST_KEYS), MOST_SPLITS))


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
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    if key.shape[2] == 0 or (block_table is not None and block_table.shape[1] == 0):
        return out.zero_(), lse.fill_(float("-inf"))
    if block_table is not None:
        block_table = block_table.contiguous()
    counts, indices = adjacent_lists(kv_num_blocks, kv_indices)
    read = (query, key, value, counts, indices, kv_lens, q_lens, block_table, valid)
    split, combine = _plan(
        *read, out.stride(), block_size, is_causal, window, scale, config,
        architecture(query.device), dot_precision(query.dtype),
    )  # fmt: skip
    partial, partial_lse = (
        torch.empty(shape, dtype=torch.float32, device=query.device) for shape in split.workspace
    )
    split(*read[:3], partial, partial_lse, *read[3:])
    combine(partial, partial_lse, out, lse)
    return out, lse


@planned
def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor | None,
    indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    block_table: Tensor | None,
    valid: Tensor | None,
    out_strides: tuple[int, ...],
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    scale: float,
    config: DecodeConfig | None,
    arch: str,
    precision: str,
) -> tuple[Launch, Launch]:
    """The launches of both kernels."""
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    page = 0
    if block_table is not None:
        page, kv_len = kv_len, kv_len * block_table.shape[1]
    config = config or decode_config(
        arch, head_dim, query.element_size(), block_size[1], page,
        has_copy_engine(arch, key, value),
    )  # fmt: skip
    group = heads // kv_heads
    # Heads a list is shared by; a list for all is of stride 0.
    sharing = 1 if indices is None else heads // indices.shape[1]
    pack = heads_a_tile(group if indices is None else min(group, sharing), q_len)
    blocks = ceil_div(kv_len, block_size[1]) if indices is None else indices.shape[3]
    tiles = batch * heads // pack
    splits = split_count(tiles, blocks * block_size[1], config.programs)
    block_d = padded_head_dim(head_dim)
    described = None
    if config.descriptors:
        assert adjacent_steps(config.block_n, block_size[1], page), config
        described = {n: tile_descriptor(x, config.block_n) for n, x in ((1, key), (2, value))}
    overlap = overlapping(query.device)
    split = Launch(
        _split_kernel, (tiles, splits),
        (
            query.stride(), key.stride(), value.stride(),
            0 if block_table is None else block_table.shape[1],
            0 if valid is None else valid.stride(0),
            *list_strides(counts, indices),
            heads, group, pack, sharing, splits, q_len, kv_len, window, exponent_scale(scale),
        ),
        described=described,
        workspace=((batch, heads, q_len, splits, head_dim), (batch, heads, q_len, splits)),
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_Q=block_size[0], BLOCK_K=block_size[1],
        BLOCK_M=max(16, next_power_of_2(pack * q_len)), BLOCK_N=config.block_n,
        PAGE=page, IS_CAUSAL=is_causal, HAS_WINDOW=window > 0, LISTED=indices is not None,
        MAY_CUT=kv_lens is not None or kv_len % block_size[1] != 0,
        HAS_KV_LENS=kv_lens is not None, HAS_Q_LENS=q_lens is not None,
        HAS_VALID=valid is not None, AHEAD=config.ahead, DESCRIPTORS=config.descriptors,
        PRECISION=precision, num_warps=config.num_warps, num_stages=config.num_stages, **overlap,
    )  # fmt: skip
    parts = next_power_of_2(splits)
    combine = Launch(
        _combine_kernel, (batch * heads * q_len,), (out_strides, heads, q_len, splits),
        HEAD_DIM=head_dim, BLOCK_D=block_d, SPLITS=parts,
        CHUNK=min(parts, max(1, COMBINED // block_d)), num_warps=4, **overlap,
    )  # fmt: skip
    return split, combine
