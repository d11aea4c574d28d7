"""The torch custom ops: one boundary between autograd, torch.compile and an implementation.

Each op takes plain tensors and numbers, picks the Triton launcher or the PyTorch reference by
name, and has a fake for tracing. Arguments are valid when they arrive here: `entropy_attn.api`
checks them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_attn.custom_ops import custom_op, laid_out_like
from entropy_attn.reference import attention as reference

# The forward kernels of the Triton backend.
PORTABLE, DECODE, HOPPER = "block_sparse_forward", "decode", "hopper/forward"
# The backward kernels of the Triton backend.
PORTABLE_BACKWARD, HOPPER_BACKWARD = "block_sparse_backward", "hopper/backward"
# From which size on the kernels for sm_90 are faster, the order of the work included; measured.
# Pairs of queries and keys of all heads, seen or not, times head_dim; with a causal mask four times
# as many.
SMALL = 2**32
SMALL_BACKWARD = 2**25  # pairs


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of lse, entropies and masses: fp32, and fp64 for fp64 inputs."""
    return reference.compute_dtype(dtype)


def _a_list_each(lists: Tensor | None, heads: int) -> Tensor | None:
    """Lists that the query heads of a key head share, once for each of them."""
    if lists is None or lists.shape[1] in (1, heads):
        return lists
    return lists.repeat_interleave(heads // lists.shape[1], dim=1)


def _is_transposed(kv_indices: Tensor | None, num_columns: int) -> bool:
    """Whether a kernel transposes the lists, instead of a sort."""
    from entropy_attn.kernels.transposed_lists import is_faster_than_sort

    # In Triton's interpreter nothing is fast.
    if kv_indices is None or not kv_indices.is_cuda:
        return False
    return is_faster_than_sort(kv_indices, num_columns)


def _sorted_columns(
    kv_num_blocks: Tensor, kv_indices: Tensor, num_columns: int, with_order: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """offsets and rows of `block_lists.column_lists`; order of `column_order`, where asked for."""
    from entropy_attn.block_lists import column_order, column_rows

    offsets, order = column_order(kv_num_blocks, kv_indices, num_columns)
    return offsets, column_rows(order, kv_indices), order if with_order else None


def forward_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: tuple[int, int],
    is_causal: bool,
    window: int,
    scale: float,
    *,
    entropy: bool = False,
) -> tuple[str, str]:
    """Which of the Triton backend's forward kernels runs a call, and why. Waits for nothing."""
    from entropy_attn.kernels.decode import FEW_QUERIES
    from entropy_attn.kernels.launch import architecture, other_gluon

    if query.shape[2] <= FEW_QUERIES and not entropy:
        return DECODE, f"at most {FEW_QUERIES} queries: keys are split over programs"
    if architecture(query.device) != "sm90":
        return PORTABLE, "it runs on every GPU"
    problem = other_gluon()
    if problem is None:
        from entropy_attn.kernels.hopper.forward import unsupported

        problem = unsupported(query, key, value, block_size, scale, window=window)
    if problem is not None:
        return PORTABLE, f"the kernel for sm_90 cannot take the call: {problem}"
    # Captured or not: a graph gives the numbers of the call that it replays.
    if _pairs(query, key) * query.shape[3] < (4 * SMALL if is_causal else SMALL):
        return PORTABLE, "the call is so small that launching the kernel for sm_90 takes longer"
    return HOPPER, "tensor memory accelerator, warp specialisation"


def _pairs(query: Tensor, key: Tensor) -> int:
    return query.shape[:3].numel() * key.shape[2]


def backward_kernel(
    grad_out: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    block_size: tuple[int, int],
    window: int,
    scale: float,
    *,
    entropy: bool = False,
) -> tuple[str, str]:
    """Which of the Triton backend's backward kernels runs a call, and why. Waits for nothing."""
    from entropy_attn.kernels.launch import architecture, other_gluon

    if architecture(query.device) != "sm90":
        return PORTABLE_BACKWARD, "it runs on every GPU"
    if torch.are_deterministic_algorithms_enabled():
        return PORTABLE_BACKWARD, "torch.use_deterministic_algorithms is set"
    problem = other_gluon()
    if problem is None:
        from entropy_attn.kernels.hopper.backward import unsupported

        problem = unsupported(
            grad_out, query, key, value, block_size, scale, window=window, entropy=entropy
        )
    if problem is not None:
        return PORTABLE_BACKWARD, f"the kernel for sm_90 cannot take the call: {problem}"
    if _pairs(query, key) < SMALL_BACKWARD:
        return PORTABLE_BACKWARD, "the call is so small that it is not faster, but deterministic"
    return HOPPER_BACKWARD, "scores once; adds up dQ in an order that is not fixed"


@custom_op("attention_forward")
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    block_q: int,
    block_k: int,
    is_causal: bool,
    window: int,
    scale: float,
    row_entropy: bool,
    block_entropy: bool,
    tile_entropy: bool,
    keep_mass: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, row, block and tile entropy, mass; what is not asked for is empty.

    mass (B, Hq, Mq, W or Mk) is what the kernels' gradient of the tile entropy reads. It takes
    memory, so keep_mass asks for it; without it the tile entropy is not differentiable. Without
    values there is no output, and no row and block entropy.
    """
    heads = query.shape[1]
    geometry = ((block_q, block_k), is_causal, window, scale)
    kernel = None
    if backend != "reference" and value is not None:
        entropies = row_entropy or block_entropy
        kernel, _ = forward_kernel(query, key, value, *geometry, entropy=entropies)
    shared = (kv_num_blocks, kv_indices, kv_lens, q_lens)
    if kernel == DECODE and not tile_entropy:
        lists = shared  # that kernel takes lists that heads share as they are
    else:
        counts, indices = (_a_list_each(x, heads) for x in shared[:2])
        lists = (counts, indices, kv_lens, q_lens)
    mass = tile = query.new_empty(0, dtype=statistics_dtype(query.dtype))
    if backend == "reference":
        problem = reference.Problem(*lists, *geometry)
        rows = reference.attention_forward(query, key, value, problem, row_entropy, block_entropy)
        if tile_entropy:
            tile = reference.tile_entropy(query, key, problem)
        return *rows, tile, mass.clone()
    nothing = [query.new_empty(0, dtype=torch.float32) for _ in range(2)]
    if value is None:
        from entropy_attn.kernels.tile_mass import tile_mass

        mass, tile, lse = tile_mass(
            query, key, None, *lists, *geometry, keep_mass, by_slot=True, return_lse=True
        )
        return query.new_empty(0), lse, *nothing, tile, mass
    if kernel == DECODE:
        from entropy_attn.kernels.decode import split_forward

        rows = (*split_forward(query, key, value, *shared, *geometry), *nothing)
    elif kernel == HOPPER:
        from entropy_attn.kernels.hopper.forward import hopper_forward

        rows = hopper_forward(
            query, key, value, *lists[:2], geometry[0], is_causal, scale,
            kv_lens=kv_lens, q_lens=q_lens, row_entropy=row_entropy, block_entropy=block_entropy,
        )  # fmt: skip
    else:
        from entropy_attn.kernels.block_sparse_forward import block_sparse_forward

        rows = block_sparse_forward(
            query, key, value, *lists, *geometry, row_entropy, block_entropy
        )
    if tile_entropy:
        from entropy_attn.kernels.tile_mass import tile_mass

        mass, tile, _ = tile_mass(query, key, rows[1], *lists, *geometry, keep_mass, by_slot=True)
        return *rows, tile, mass
    return *rows, tile, mass.clone()


@attention_forward.register_fake
def _(
    query, key, value, kv_num_blocks, kv_indices, kv_lens, q_lens, block_q, block_k, is_causal,
    window, scale, row_entropy, block_entropy, tile_entropy, keep_mass, backend,
):  # fmt: skip
    dtype = statistics_dtype(query.dtype)
    rows = query.shape[:3]
    tiles = (*query.shape[:2], -(-query.shape[2] // block_q))
    width = -(-key.shape[2] // block_k) if kv_indices is None else kv_indices.shape[3]
    has_mass = tile_entropy and keep_mass and backend != "reference"
    out = query.new_empty(0) if value is None else laid_out_like(query, backend)
    lse = query.new_empty(rows, dtype=dtype)
    row = query.new_empty(rows if row_entropy else (0,), dtype=dtype)
    block = query.new_empty(rows if block_entropy else (0,), dtype=dtype)
    tile = query.new_empty(tiles if tile_entropy else (0,), dtype=dtype)
    mass = query.new_empty((*tiles, width) if has_mass else (0,), dtype=dtype)
    return out, lse, row, block, tile, mass


@custom_op("attention_backward")
def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_row: Tensor | None,
    grad_block: Tensor | None,
    grad_tile: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    row: Tensor | None,
    block: Tensor | None,
    mass: Tensor | None,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    block_q: int,
    block_k: int,
    is_causal: bool,
    window: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous; that of value is empty if there is none.

    row, block and mass are what the forward returned; each is read with its gradient only.
    """
    kv_num_blocks = _a_list_each(kv_num_blocks, query.shape[1])
    kv_indices = _a_list_each(kv_indices, query.shape[1])
    lists = (kv_num_blocks, kv_indices, kv_lens, q_lens)
    geometry = ((block_q, block_k), is_causal, window, scale)
    if backend == "reference":
        grads = (grad_out, grad_lse, grad_row, grad_block, grad_tile)
        problem = reference.Problem(*lists, *geometry)
        return reference.attention_backward(*grads, query, key, value, out, lse, problem)
    from entropy_attn.kernels.backward_statistics import row_statistics
    from entropy_attn.kernels.block_sparse_backward import block_sparse_backward
    from entropy_attn.kernels.launch import adjacent_lists, is_describable
    from entropy_attn.kernels.transposed_lists import transpose_lists

    if grad_out is not None and not is_describable(grad_out):
        grad_out = grad_out.contiguous()  # that of a sum is expanded: the copy engine wants strides
    terms = cross = statistics = None
    if grad_tile is not None:
        from entropy_attn.kernels.tile_mass import tile_gradient

        alone = all(grad is None for grad in (grad_out, grad_lse, grad_row, grad_block))
        terms, cross = tile_gradient(query, key, lse, mass, grad_tile, *lists, *geometry, alone)
        statistics = cross if alone else None
        terms = (terms, terms)
    of_entropies = not (grad_row is None and grad_block is None and grad_tile is None)
    kernel, _ = backward_kernel(
        grad_out, query, key, value, (block_q, block_k), window, scale, entropy=of_entropies
    )
    columns = None
    num_columns = math.ceil(key.shape[2] / block_k)
    is_transposed = _is_transposed(kv_indices, num_columns)
    if kv_indices is not None:
        with_order = terms is not None
        if is_transposed:
            # Kept until the statistics are launched: those may get the memory of what is freed.
            counts, indices = adjacent_lists(kv_num_blocks, kv_indices)
            fill = kernel == PORTABLE_BACKWARD
            offsets, rows, order = transpose_lists(counts, indices, num_columns, with_order, fill)
        else:
            offsets, rows, order = _sorted_columns(
                kv_num_blocks, kv_indices, num_columns, with_order
            )
        columns = offsets, rows
        if order is not None:
            by_row = terms[0].flatten(2)
            terms = terms[0], by_row.gather(2, order.expand(by_row.shape))
    after_lists = terms is None and is_transposed
    if kernel == HOPPER_BACKWARD:
        from entropy_attn.kernels.hopper.backward import hopper_backward

        return hopper_backward(
            grad_out, query, key, value, out, lse, grad_lse, columns, (block_q, block_k), is_causal,
            scale, kv_lens=kv_lens, q_lens=q_lens, after_lists=after_lists,
        )  # fmt: skip
    if statistics is None:
        statistics = row_statistics(
            out, grad_out, lse, grad_lse, row, grad_row, block, grad_block, cross, block_q, scale,
            after_lists=after_lists,
        )  # fmt: skip
    return block_sparse_backward(
        grad_out, query, key, value, statistics, terms, *lists, columns, *geometry,
        row_entropy=grad_row is not None, block_entropy=grad_block is not None,
    )  # fmt: skip


@attention_backward.register_fake
def _(
    grad_out, grad_lse, grad_row, grad_block, grad_tile, query, key, value, out, lse, row, block,
    mass, kv_num_blocks, kv_indices, kv_lens, q_lens, block_q, block_k, is_causal, window, scale,
    backend,
):  # fmt: skip
    value_shape = (0,) if value is None else value.shape
    return query.new_empty(query.shape), key.new_empty(key.shape), key.new_empty(value_shape)


attention_backward.refuse_gradients()


def _save_for_backward(ctx, inputs, output):
    query, key, value, *lists = inputs[:7]
    out, lse, row, block, tile, mass = output
    row_entropy, block_entropy, tile_entropy, keep_mass = inputs[12:16]
    kept = (value is not None, row_entropy, block_entropy, tile_entropy and keep_mass, False)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(
        *[t for t, keep in zip((out, row, block, tile, mass), kept, strict=True) if not keep]
    )
    ctx.save_for_backward(query, key, value, out, lse, row, block, mass, *lists)
    ctx.geometry = inputs[7:12]
    ctx.backend = inputs[16]


def _backward(ctx, grad_out, *grads):
    query, key, value, *saved = ctx.saved_tensors
    found: tuple[Tensor | None, ...] = (None, None, None)
    grads = grads[:4]  # of lse and of row, block and tile entropy
    if grad_out is not None or any(grad is not None for grad in grads):
        found = attention_backward(
            grad_out, *grads, query, key, value, *saved, *ctx.geometry, ctx.backend
        )
        if value is None:
            found = (*found[:2], None)
    return (*found, *[None] * 14)


attention_forward.register_autograd(_backward, setup_context=_save_for_backward)


@custom_op("tile_mass")
def tile_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    block_q: int,
    block_k: int,
    is_causal: bool,
    window: int,
    scale: float,
    return_mass: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """mass (B, Hq, Mq, Mk) or empty, tile entropy (B, Hq, Mq) in nats."""
    heads = query.shape[1]
    lists = (_a_list_each(kv_num_blocks, heads), _a_list_each(kv_indices, heads), kv_lens, q_lens)
    geometry = ((block_q, block_k), is_causal, window, scale)
    if backend == "reference":
        mass = reference.tile_mass(query, key, reference.Problem(*lists, *geometry))
        return mass if return_mass else mass.new_zeros(0), reference.entropy(mass).clamp(min=0)
    from entropy_attn.kernels.tile_mass import tile_mass as launch

    return launch(query, key, lse, *lists, *geometry, return_mass)[:2]


@tile_mass.register_fake
def _(
    query, key, lse, kv_num_blocks, kv_indices, kv_lens, q_lens, block_q, block_k, is_causal,
    window, scale, return_mass, backend,
):  # fmt: skip
    dtype = statistics_dtype(query.dtype)
    rows = (*query.shape[:2], -(-query.shape[2] // block_q))
    mass = (*rows, -(-key.shape[2] // block_k)) if return_mass else (0,)
    return query.new_empty(mass, dtype=dtype), query.new_empty(rows, dtype=dtype)


@custom_op("paged_forward")
def paged_forward(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    kv_lens: Tensor,
    block_q: int,
    block_k: int,
    is_causal: bool,
    window: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Nq, D) and lse (B, Hq, Nq) of attention to pages (P, Hkv, page, D)."""
    geometry = ((block_q, block_k), is_causal, window, scale)
    if backend == "reference":
        # What lies past a sequence's end may be anything, NaN too.
        places = torch.arange(block_table.shape[1], device=query.device) * key_pages.shape[2]
        table = torch.where(places < kv_lens[:, None], block_table, 0).long()
        key, value = (
            pages[table].transpose(1, 2).flatten(2, 3) for pages in (key_pages, value_pages)
        )  # (B, M, Hkv, page, D) -> (B, Hkv, M * page, D)
        past = torch.arange(key.shape[2], device=query.device) >= kv_lens[:, None]
        key, value = (x.masked_fill(past[:, None, :, None], 0.0) for x in (key, value))
        counts, indices = (_a_list_each(x, query.shape[1]) for x in (kv_num_blocks, kv_indices))
        problem = reference.Problem(counts, indices, kv_lens, None, *geometry)
        return reference.attention_forward(query, key, value, problem, False, False)[:2]
    from entropy_attn.kernels.decode import split_forward

    return split_forward(
        query, key_pages, value_pages, kv_num_blocks, kv_indices, kv_lens, None, *geometry,
        block_table,
    )  # fmt: skip


@paged_forward.register_fake
def _(
    query, key_pages, value_pages, block_table, kv_num_blocks, kv_indices, kv_lens, block_q,
    block_k, is_causal, window, scale, backend,
):  # fmt: skip
    lse = query.new_empty(query.shape[:3], dtype=statistics_dtype(query.dtype))
    return laid_out_like(query, backend), lse
