"""The attention mass of tiles, and its entropy, without storing the scores.

For a block of queries A and a block of keys B, P_AB = mean over i in A of sum over j in B of p_ij
(the mean over the queries that see a key), and H_A = -sum_B P_AB log P_AB. One program walks a
tile's blocks once for the log-sum-exp, unless the forward pass has left it, and once more for the
masses. exp(H_A) is the number of key blocks that the tile effectively needs.

For the backward, with |A| queries that see a key and w_A the gradient of H_A:
    dL/dS_ij = p_ij (g_A,B(j) - sum_B P_iB g_AB),  g_AB = -(w_A / |A|) log P_AB
(a constant added to g_AB for all B cancels). A second kernel makes g_AB from the masses that were
stored, and the sums over B, which depend on the query, in one pass over the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    padded_head_dim,
)
from entropy_attn.kernels.plans import device_of, dot_precision
from entropy_attn.kernels.primitives import (
    LN_2,
    LOG2_E,
    NO_SCORE,
    block_start,
    head_base,
    load_tile,
    online_softmax,
    program_tile,
    tile_blocks,
    tile_offsets,
    valid_length,
    visible_scores,
)


@triton.jit
def _tile_of_program(
    query_ptr, key_ptr, counts_ptr, indices_ptr, kv_lens_ptr, q_lens_ptr,
    query_strides, key_strides, count_strides, index_strides, heads, group, q_len, kv_len, q_tiles,
    window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr,
    MAY_CUT: tl.constexpr, HAS_KV_LENS: tl.constexpr, HAS_Q_LENS: tl.constexpr,
):  # fmt: skip
    """Which tile the program takes, its queries, its keys and `tile_blocks`."""
    batch, head, tile = program_tile(q_tiles, heads, IS_CAUSAL)
    kv_end = valid_length(kv_lens_ptr, batch, kv_len, HAS_KV_LENS)
    q_end = valid_length(q_lens_ptr, batch, q_len, HAS_Q_LENS)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)  # (M,)
    positions = rows + (kv_end - q_end)
    blocks = tile_blocks(
        counts_ptr, indices_ptr, batch, head, tile, count_strides, index_strides,
        q_end, kv_end, kv_len, window, BLOCK_Q, BLOCK_Q, BLOCK_K,
        IS_CAUSAL, HAS_WINDOW, LISTED, MAY_CUT, HAS_Q_LENS,
    )  # fmt: skip
    batch_head = (batch * heads + head).to(tl.int64)
    query_base = head_base(query_ptr, batch, head, query_strides[0], query_strides[1])
    query_pointers = query_base + tile_offsets(rows, query_strides[2], BLOCK_D, query_strides[3])
    query = load_tile(query_pointers, rows, q_len, HEAD_DIM, BLOCK_D, True)  # (M, D)
    key_base = head_base(key_ptr, batch, head // group, key_strides[0], key_strides[1])
    return batch_head, tile, rows, positions, query, key_base, kv_end, q_end, blocks


@triton.jit
def _scores(
    query, positions, key_base, stride_kn, stride_kd, keys, kv_end, kv_len, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(M, N) raw scores, -inf where not visible."""
    pointers = key_base + tile_offsets(keys, stride_kn, BLOCK_D, stride_kd)
    key = load_tile(pointers, keys, kv_len, HEAD_DIM, BLOCK_D, MASKED)  # (N, D)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if MASKED:
        scores = visible_scores(scores, positions, keys, kv_end, window, IS_CAUSAL, HAS_WINDOW)
    return scores


@triton.jit
def _add_lse(
    mass, maximum, query, positions, key_base, stride_kn, stride_kd,
    list_pointer, first, last, count, kv_end, kv_len, window, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Running sum and maximum of the softmax over the blocks in slots [first, last)."""
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    next_start = block_start(list_pointer, first, count, LISTED, BLOCK_K)
    for step in range(first * STEPS, last * STEPS):
        keys = next_start + (step % STEPS) * BLOCK_N + tl.arange(0, BLOCK_N)
        next_start = block_start(list_pointer, (step + 1) // STEPS, count, LISTED, BLOCK_K)
        scores = _scores(
            query, positions, key_base, stride_kn, stride_kd, keys, kv_end, kv_len, window,
            HEAD_DIM, BLOCK_D, IS_CAUSAL, HAS_WINDOW, MASKED, PRECISION,
        )  # fmt: skip
        exponents, maximum, shift = online_softmax(scores, scale_log2, maximum)
        mass = mass * tl.exp2(shift) + tl.sum(tl.exp2(exponents), 1)
    return mass, maximum


@triton.jit
def _add_masses(
    entropy, query, positions, lse, inverse_rows, mass_pointer, key_base, stride_kn, stride_kd,
    list_pointer, first, last, count, kv_end, kv_len, window, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr,
    STORE_MASS: tl.constexpr, BY_SLOT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the masses of the blocks in slots [first, last); add -P log2 P to the entropy."""
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    block_mass = 0.0
    next_start = block_start(list_pointer, first, count, LISTED, BLOCK_K)
    for step in range(first * STEPS, last * STEPS):
        start = next_start + (step % STEPS) * BLOCK_N
        keys = start + tl.arange(0, BLOCK_N)
        next_start = block_start(list_pointer, (step + 1) // STEPS, count, LISTED, BLOCK_K)
        scores = _scores(
            query, positions, key_base, stride_kn, stride_kd, keys, kv_end, kv_len, window,
            HEAD_DIM, BLOCK_D, IS_CAUSAL, HAS_WINDOW, MASKED, PRECISION,
        )  # fmt: skip
        p = tl.exp2(scores * scale_log2 - lse[:, None])  # (M, N)
        if step % STEPS == 0:
            block_mass = 0.0
        # In one step: rows first, then their sums, crashes Triton 3.6 on sm_100.
        block_mass += tl.sum(p) * inverse_rows
        if step % STEPS == STEPS - 1:
            entropy -= block_mass * tl.log2(tl.where(block_mass > 0.0, block_mass, 1.0))
            if BY_SLOT:
                tl.store(mass_pointer + step // STEPS, block_mass)
            elif STORE_MASS:
                tl.store(mass_pointer + start // BLOCK_K, block_mass)
    return entropy


@triton.jit
def _add_terms(
    cross, query, positions, lse, weight, mass_pointer, term_pointer, key_base, stride_kn,
    stride_kd, list_pointer, first, last, count, kv_end, kv_len, window, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, LISTED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store g_AB of the blocks in slots [first, last); add P_iB g_AB of each query to cross."""
    STEPS: tl.constexpr = BLOCK_K // BLOCK_N
    next_start = block_start(list_pointer, first, count, LISTED, BLOCK_K)
    for step in range(first * STEPS, last * STEPS):
        keys = next_start + (step % STEPS) * BLOCK_N + tl.arange(0, BLOCK_N)
        next_start = block_start(list_pointer, (step + 1) // STEPS, count, LISTED, BLOCK_K)
        scores = _scores(
            query, positions, key_base, stride_kn, stride_kd, keys, kv_end, kv_len, window,
            HEAD_DIM, BLOCK_D, IS_CAUSAL, HAS_WINDOW, MASKED, PRECISION,
        )  # fmt: skip
        p = tl.exp2(scores * scale_log2 - lse[:, None])  # (M, N)
        mass = tl.load(mass_pointer + step // STEPS)
        term = weight * tl.log2(tl.where(mass > 0.0, mass, 1.0))
        tl.store(term_pointer + step // STEPS, term)
        cross += tl.sum(p, 1) * term
    return cross


@triton.jit(do_not_specialize=LENGTHS)
def _tile_mass_kernel(
    query_ptr, key_ptr, lse_ptr, mass_ptr, entropy_ptr,
    counts_ptr, indices_ptr, kv_lens_ptr, q_lens_ptr,
    query_strides, key_strides,
    count_stride_b, count_stride_h, count_stride_t, index_stride_b, index_stride_h, index_stride_t,
    heads, group, q_len, kv_len, q_tiles, masses_a_tile, window, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    LISTED: tl.constexpr, MAY_CUT: tl.constexpr, HAS_KV_LENS: tl.constexpr,
    HAS_Q_LENS: tl.constexpr, HAS_LSE: tl.constexpr, STORE_LSE: tl.constexpr,
    STORE_MASS: tl.constexpr, BY_SLOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch_head, tile, rows, positions, query, key_base, kv_end, q_end, blocks = _tile_of_program(
        query_ptr, key_ptr, counts_ptr, indices_ptr, kv_lens_ptr, q_lens_ptr,
        query_strides, key_strides, (count_stride_b, count_stride_h, count_stride_t),
        (index_stride_b, index_stride_h, index_stride_t), heads, group, q_len, kv_len, q_tiles,
        window, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K, IS_CAUSAL, HAS_WINDOW, LISTED, MAY_CUT,
        HAS_KV_LENS, HAS_Q_LENS,
    )  # fmt: skip
    list_pointer, count, first, full, last = blocks
    statistics = batch_head * q_len + rows
    if HAS_LSE:
        lse = tl.load(lse_ptr + statistics, mask=rows < q_len, other=float("-inf")) * LOG2_E
    else:
        mass = tl.zeros([BLOCK_Q], tl.float32)
        maximum = tl.full([BLOCK_Q], NO_SCORE, tl.float32)
        mass, maximum = _add_lse(
            mass, maximum, query, positions, key_base, key_strides[2], key_strides[3],
            list_pointer, first, full, count, kv_end, kv_len, window, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, IS_CAUSAL, HAS_WINDOW, LISTED, False, PRECISION,
        )  # fmt: skip
        mass, maximum = _add_lse(
            mass, maximum, query, positions, key_base, key_strides[2], key_strides[3],
            list_pointer, full, last, count, kv_end, kv_len, window, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, IS_CAUSAL, HAS_WINDOW, LISTED, True, PRECISION,
        )  # fmt: skip
        lse = tl.where(mass != 0.0, maximum + tl.log2(mass), float("-inf"))  # NaN stays NaN
        if STORE_LSE:
            # Padding queries count as those that see no key, as in the forward pass.
            stored = tl.where(rows < q_end, lse * LN_2, float("-inf"))
            tl.store(lse_ptr + statistics, stored, mask=rows < q_len)
    alive = (lse != float("-inf")) & (rows < q_end)
    # +inf makes every probability of a row without a key 0.
    lse = tl.where(alive, lse, float("inf"))
    alive_rows = tl.sum(alive.to(tl.float32), 0)
    inverse_rows = 1.0 / tl.maximum(alive_rows, 1.0)

    mass_pointer = mass_ptr
    if STORE_MASS:
        mass_pointer += (batch_head * q_tiles + tile) * masses_a_tile
    entropy = 0.0
    entropy = _add_masses(
        entropy, query, positions, lse, inverse_rows, mass_pointer, key_base, key_strides[2],
        key_strides[3], list_pointer, first, full, count, kv_end, kv_len, window, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, IS_CAUSAL, HAS_WINDOW, LISTED, STORE_MASS, BY_SLOT,
        False, PRECISION,
    )  # fmt: skip
    entropy = _add_masses(
        entropy, query, positions, lse, inverse_rows, mass_pointer, key_base, key_strides[2],
        key_strides[3], list_pointer, full, last, count, kv_end, kv_len, window, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, IS_CAUSAL, HAS_WINDOW, LISTED, STORE_MASS, BY_SLOT,
        True, PRECISION,
    )  # fmt: skip
    entropy = tl.maximum(entropy, 0.0) * LN_2
    tl.store(entropy_ptr + batch_head * q_tiles + tile, entropy)


@triton.jit(do_not_specialize=LENGTHS)
def _tile_gradient_kernel(
    query_ptr, key_ptr, lse_ptr, mass_ptr, grad_ptr, terms_ptr, cross_ptr,
    counts_ptr, indices_ptr, kv_lens_ptr, q_lens_ptr,
    query_strides, key_strides,
    count_stride_b, count_stride_h, count_stride_t, index_stride_b, index_stride_h, index_stride_t,
    heads, group, q_len, kv_len, q_tiles, masses_a_tile, window, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    LISTED: tl.constexpr, MAY_CUT: tl.constexpr, HAS_KV_LENS: tl.constexpr,
    HAS_Q_LENS: tl.constexpr, STATISTICS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch_head, tile, rows, positions, query, key_base, kv_end, q_end, blocks = _tile_of_program(
        query_ptr, key_ptr, counts_ptr, indices_ptr, kv_lens_ptr, q_lens_ptr,
        query_strides, key_strides, (count_stride_b, count_stride_h, count_stride_t),
        (index_stride_b, index_stride_h, index_stride_t), heads, group, q_len, kv_len, q_tiles,
        window, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K, IS_CAUSAL, HAS_WINDOW, LISTED, MAY_CUT,
        HAS_KV_LENS, HAS_Q_LENS,
    )  # fmt: skip
    list_pointer, count, first, full, last = blocks
    at = batch_head * q_len + rows
    lse = tl.load(lse_ptr + at, mask=rows < q_len, other=float("-inf"))
    alive = (lse > float("-inf")) & (rows < q_end)
    lse = tl.where(alive, lse * LOG2_E, float("inf"))
    weight = -tl.load(grad_ptr + batch_head * q_tiles + tile) * LN_2
    alive_rows = tl.sum(alive.to(tl.float32), 0)
    weight = tl.where(alive_rows > 0.0, weight / tl.maximum(alive_rows, 1.0), 0.0)
    if weight == 0.0:  # a tile that is not in the loss, or that sees nothing
        last = first
        full = first

    mass_offset = (batch_head * q_tiles + tile) * masses_a_tile
    cross = tl.zeros([BLOCK_Q], tl.float32)
    cross = _add_terms(
        cross, query, positions, lse, weight, mass_ptr + mass_offset, terms_ptr + mass_offset,
        key_base, key_strides[2], key_strides[3], list_pointer, first, full, count, kv_end, kv_len,
        window, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, IS_CAUSAL, HAS_WINDOW, LISTED,
        False, PRECISION,
    )  # fmt: skip
    cross = _add_terms(
        cross, query, positions, lse, weight, mass_ptr + mass_offset, terms_ptr + mass_offset,
        key_base, key_strides[2], key_strides[3], list_pointer, full, last, count, kv_end, kv_len,
        window, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_K, BLOCK_N, IS_CAUSAL, HAS_WINDOW, LISTED,
        True, PRECISION,
    )  # fmt: skip
    if STATISTICS:
        padded_len = q_tiles * BLOCK_Q
        target = cross_ptr + 2 * batch_head * padded_len + rows
        tl.store(target, lse)
        tl.store(target + padded_len, cross)
    else:
        tl.store(cross_ptr + at, cross, mask=rows < q_len)


@dataclass(frozen=True)
class TileMassConfig:
    """block_n: keys a step; divides block_k."""

    block_n: int
    num_warps: int
    num_stages: int


def tile_mass_config(
    arch: str, head_dim: int, itemsize: int, block_size: tuple[int, int]
) -> TileMassConfig:
    """The default: as the forward kernel's, without its output accumulator."""
    block_n = min(block_size[1], 128 if itemsize == 2 and padded_head_dim(head_dim) <= 128 else 32)
    return TileMassConfig(
        block_n=block_n,
        num_warps=8 if block_size[0] >= 128 else 4,
        num_stages=3 if arch == "sm90" and head_dim <= 128 else 2,
    )


def tile_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    scale: float,
    return_mass: bool,
    by_slot: bool = False,
    return_lse: bool = False,
    config: TileMassConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the kernel.

    Args:
        lse: (B, Hq, Nq) fp32 from the forward pass over the same lists, or None to compute it.
        by_slot: with return_mass and lists, store masses in the order of the lists.
        return_lse: store the lse that is computed.

    Returns:
        mass (B, Hq, Mq, Mk) fp32, by slot (B, Hq, Mq, W), or empty; entropy (B, Hq, Mq) fp32 in
        nats; lse, None if it is neither given nor asked for.
    """
    by_slot = by_slot and return_mass and kv_indices is not None
    kv_tiles = ceil_div(key.shape[2], block_size[1])
    width = kv_indices.shape[3] if by_slot and kv_indices is not None else kv_tiles
    shape = (*query.shape[:2], ceil_div(query.shape[2], block_size[0]))
    # Blocks that are not visited keep their 0.
    mass_shape = (*shape, width) if return_mass else (0,)
    mass = torch.zeros(mass_shape, dtype=torch.float32, device=query.device)
    entropy = torch.empty(shape, dtype=torch.float32, device=query.device)
    has_lse = lse is not None
    if not has_lse and return_lse:
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if entropy.numel() == 0 or key.shape[2] == 0:
        return mass, entropy.zero_(), lse if has_lse or lse is None else lse.fill_(float("-inf"))
    counts, indices = adjacent_lists(kv_num_blocks, kv_indices)
    lists = (counts, indices, kv_lens, q_lens)
    geometry = (block_size, is_causal, window, scale)
    sizes, options = _launch_arguments(query, key, *lists, *geometry, width, config)
    with device_of(query):
        _tile_mass_kernel[(entropy.numel(),)](
            query, key, lse, mass, entropy, *lists,
            query.stride(), key.stride(), *sizes, **options,
            HAS_LSE=has_lse, STORE_LSE=return_lse, STORE_MASS=return_mass, BY_SLOT=by_slot,
        )  # fmt: skip
    return mass, entropy, lse


def tile_gradient(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mass: Tensor,
    grad: Tensor,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    scale: float,
    statistics: bool = False,
    config: TileMassConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel of the backward.

    Args:
        lse: (B, Hq, Nq) fp32 from the forward pass. mass: by slot, from `tile_mass`.
        grad: (B, Hq, Mq) fp32 of the entropies, of any strides.
        statistics: nothing else has a gradient.

    Returns:
        g_AB in the order of ``mass``, and sum_B P_iB g_AB (B, Hq, Nq), both fp32. With
        ``statistics``, in place of the latter all that the backward needs to know of the rows:
        (B, Hq, 2, Mq * block_q), lse in base 2 and delta, as `kernels/backward_statistics.py`.
    """
    terms = torch.zeros_like(mass)  # nothing is stored where no block is visited
    shape = query.shape[:3]
    if statistics:
        shape = (*shape[:2], 2, mass.shape[2] * block_size[0])
    cross = torch.empty(shape, dtype=torch.float32, device=query.device)
    if mass.numel() == 0:
        return terms, cross.zero_()
    counts, indices = adjacent_lists(kv_num_blocks, kv_indices)
    lists = (counts, indices, kv_lens, q_lens)
    geometry = (block_size, is_causal, window, scale)
    sizes, options = _launch_arguments(query, key, *lists, *geometry, mass.shape[3], config)
    with device_of(query):
        _tile_gradient_kernel[(grad.numel(),)](
            query, key, lse, mass, grad.contiguous(), terms, cross, *lists,
            query.stride(), key.stride(), *sizes, **options, STATISTICS=statistics,
        )  # fmt: skip
    return terms, cross


def _launch_arguments(
    query: Tensor,
    key: Tensor,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    scale: float,
    masses_a_tile: int,
    config: TileMassConfig | None,
) -> tuple[tuple[int | float, ...], dict[str, Any]]:
    """What both kernels take: strides of the lists and sizes, then what is fixed at compilation."""
    head_dim, kv_len = query.shape[3], key.shape[2]
    config = config or tile_mass_config(
        architecture(query.device), head_dim, query.element_size(), block_size
    )
    q_tiles = ceil_div(query.shape[2], block_size[0])
    sizes = (
        *list_strides(kv_num_blocks, kv_indices),
        query.shape[1], query.shape[1] // key.shape[1], query.shape[2], kv_len, q_tiles,
        masses_a_tile, window, exponent_scale(scale),
    )  # fmt: skip
    options = dict(
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_Q=block_size[0],
        BLOCK_K=block_size[1],
        BLOCK_N=config.block_n,
        IS_CAUSAL=is_causal,
        HAS_WINDOW=window > 0,
        LISTED=kv_indices is not None,
        MAY_CUT=kv_lens is not None or kv_len % block_size[1] != 0,
        HAS_KV_LENS=kv_lens is not None,
        HAS_Q_LENS=q_lens is not None,
        PRECISION=dot_precision(query.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return sizes, options
