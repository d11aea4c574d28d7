"""The public functions on attention: they validate, choose a backend and call one custom op.

All tensors are (batch, heads, seq, head_dim) with any strides, as in
`torch.nn.functional.scaled_dot_product_attention`. Grouped-query attention follows from the
numbers of heads: query head h reads key head h // (Hq // Hkv).

Query i of batch row b stands at key position ``i + kv_lens[b] - q_lens[b]`` (the lengths default
to the full ones), so causal attention is aligned to the last valid key.

Under torch.autocast the inputs are cast to its dtype, as for `scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_attn import backend as backend_table
from entropy_attn import ops
from entropy_attn import validation as check
from entropy_attn.autocast import follow_autocast
from entropy_attn.entropy import AttentionEntropy
from entropy_attn.masks import BlockMask

# Without a mask the kernels still walk over keys in blocks; this is their size.
DEFAULT_BLOCK_SIZE = 64


@dataclass(frozen=True, eq=False)
class _Arguments:
    """Validated arguments, in the form that the custom ops take."""

    query: Tensor
    key: Tensor
    block_mask: BlockMask | None
    kv_lens: Tensor | None
    q_lens: Tensor | None
    block_size: tuple[int, int]
    is_causal: bool
    window: int
    scale: float

    @property
    def keeps_all(self) -> bool:
        return self.block_mask is None or self.block_mask.is_full

    @property
    def lists(self) -> tuple[Tensor | None, ...]:
        if self.keeps_all:
            return None, None, self.kv_lens, self.q_lens
        mask = self.block_mask
        return mask.kv_num_blocks, mask.kv_indices, self.kv_lens, self.q_lens

    @property
    def geometry(self) -> tuple[int, int, bool, int, float]:
        return (*self.block_size, self.is_causal, self.window, self.scale)

    def choose(self, backend: str, wants_statistics: bool) -> backend_table.Choice:
        call = backend_table.Call(
            device=self.query.device.type,
            dtype=self.query.dtype,
            head_dim=self.query.shape[3],
            q_len=self.query.shape[2],
            kv_len=self.key.shape[2],
            keeps_all=self.keeps_all,
            is_causal=self.is_causal,
            has_lens=self.kv_lens is not None or self.q_lens is not None,
            has_window=self.window > 0,
            wants_statistics=wants_statistics,
        )
        return backend_table.choose(call, backend)


def with_positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Query and scale of the same scores; the kernels fold the scale into a running maximum."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale < 0 else (query * 0, 1.0)


def _validated(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    block_mask: BlockMask | None,
    is_causal: bool,
    scale: float | None,
    kv_lens: Tensor | None,
    q_lens: Tensor | None,
    window: int | None,
    block_size: int | tuple[int, int] | None = None,
    needs_mask: bool = False,
) -> _Arguments:
    check.check_qkv(query, key, value)
    scale = check.check_scale(scale, query.shape[3])
    kv_lens = check.check_lens("kv_lens", kv_lens, query)
    q_lens = check.check_lens("q_lens", q_lens, query)
    if block_mask is not None or needs_mask:
        check.check_block_mask(block_mask, query, key)
        if block_size is not None and check.check_block_size(block_size) != block_mask.block_size:
            raise ValueError(
                f"block_size={block_size} differs from block_mask's {block_mask.block_size}; "
                "leave block_size out"
            )
        block_size = block_mask.block_size
    query, scale = with_positive_scale(query, scale)
    return _Arguments(
        query=query,
        key=key,
        block_mask=block_mask,
        kv_lens=kv_lens,
        q_lens=q_lens,
        block_size=check.check_block_size(block_size or DEFAULT_BLOCK_SIZE),
        is_causal=bool(is_causal),
        window=check.check_window(window, is_causal),
        scale=scale,
    )


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the blocks of keys that ``block_mask`` keeps.

    Args:
        query: (B, Hq, Nq, D), fp16, bf16, fp32 (fp64 on the reference backend), D 16 to 256.
        key, value: (B, Hkv, Nk, D), Hq a multiple of Hkv.
        block_mask: built for Nq and Nk, with 1 or B batch rows and 1, Hkv or Hq heads.
        is_causal: mask keys after the query, aligned to the last valid key.
        scale: factor of the scores, head_dim ** -0.5 by default.
        kv_lens: (B,) int32, valid keys of each row; later keys are padding. Nobody sees it, but its
            keys and values have to be finite numbers, as 0 * NaN is NaN: a cache that was never
            written may hold others. `paged_attention` takes anything there.
        q_lens: (B,) int32, valid queries of each row; a right-padded batch passes the same
            lengths for both. Rows past the length give 0.
        window: with is_causal, see only the last ``window`` keys up to the query's position.
        return_lse: also return the log-sum-exp; it is differentiable.
        backend: "auto", or a name of `ea.backends()`, which then runs or raises.

    Returns:
        out (B, Hq, Nq, D); with return_lse also lse (B, Hq, Nq) in nats, fp32. A query that sees
        no key gives 0, lse -inf and gradients of 0.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
        BackendUnavailable: a named backend cannot run this call.
    """
    query, key, value = follow_autocast(query, key, value)
    args = _validated(
        query, key, value, block_mask, is_causal, scale, kv_lens, q_lens, window, needs_mask=True
    )
    choice = args.choose(backend, wants_statistics=return_lse)
    if not backend_table.BACKENDS[choice.backend].sparse:
        from entropy_attn.backend.dense import dense_attention

        return dense_attention(
            choice.backend, args.query, key, value, is_causal=args.is_causal, scale=args.scale
        )
    out, lse, *_ = ops.attention_forward(
        args.query, key, value, *args.lists, *args.geometry,
        False, False, False, False, choice.backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attention_with_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_mask: BlockMask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    window: int | None = None,
    block_size: int | tuple[int, int] | None = None,
    kinds: Sequence[str] = ("row", "block", "tile"),
    backend: str = "auto",
) -> tuple[Tensor, AttentionEntropy]:
    """Attention and its entropies, without ever storing the scores.

    Row and block entropy come from the same pass as the output, each with one more running sum
    beside the softmax's; tile entropy takes a second pass over the scores. Output and entropies
    are differentiable, once: gradients of gradients raise.

    Args:
        block_mask: as in `block_sparse_attention`; None for dense attention.
        block_size: of the blocks and tiles that entropy is measured on, 64 by default; the
            mask's if there is one.
        kinds: which entropies to compute, out of "row", "block" and "tile".
        The other arguments are those of `block_sparse_attention`.

    Returns:
        out (B, Hq, Nq, D) and the entropies in nats.
    """
    kinds = check.check_entropy_kinds(kinds)
    query, key, value = follow_autocast(query, key, value)
    args = _validated(
        query, key, value, block_mask, is_causal, scale, kv_lens, q_lens, window, block_size
    )
    choice = args.choose(backend, wants_statistics=True)
    wants_gradient = torch.is_grad_enabled() and (args.query.requires_grad or key.requires_grad)
    out, _, row, block, tile, _ = ops.attention_forward(
        args.query, key, value, *args.lists, *args.geometry,
        "row" in kinds, "block" in kinds, "tile" in kinds, wants_gradient, choice.backend,
    )  # fmt: skip
    found = {"row": row, "block": block, "tile": tile}
    entropies = {kind: found[kind] if kind in kinds else None for kind in check.ENTROPY_KINDS}
    return out, AttentionEntropy(**entropies, block_size=args.block_size)


def tile_entropy(
    query: Tensor,
    key: Tensor,
    *,
    block_mask: BlockMask | None = None,
    block_size: int | tuple[int, int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The tile entropy of `attention_with_entropy` alone, which takes no values and no output.

    Returns:
        (B, Hq, Mq) fp32 in nats, 0 where a block of queries sees no key. Differentiable, once.
    """
    query, key = follow_autocast(query, key)
    args = _validated(
        query, key, None, block_mask, is_causal, scale, kv_lens, q_lens, window, block_size
    )
    choice = args.choose(backend, wants_statistics=True)
    wants_gradient = torch.is_grad_enabled() and (args.query.requires_grad or key.requires_grad)
    *_, tile, _ = ops.attention_forward(
        args.query, key, None, *args.lists, *args.geometry,
        False, False, True, wants_gradient, choice.backend,
    )  # fmt: skip
    return tile


def tile_mass(
    query: Tensor,
    key: Tensor,
    *,
    block_mask: BlockMask | None = None,
    block_size: int | tuple[int, int] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The attention mass of each tile: what a perfect block predictor would know.

    Costs two passes over the scores of dense attention, and is not differentiable.

    Returns:
        (B, Hq, Mq, Mk) fp32: the mean, over the tile's queries that see a key, of their attention
        to the tile's keys. Each row of tiles sums to 1, or to 0 where no query sees a key.
    """
    query, key = follow_autocast(query, key)
    args = _validated(
        query, key, None, block_mask, is_causal, scale, kv_lens, q_lens, window, block_size
    )
    choice = args.choose(backend, wants_statistics=True)
    mass, _ = ops.tile_mass(
        args.query.detach(), key.detach(), None, *args.lists, *args.geometry, True, choice.backend
    )
    return mass


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys into attention over both.

    Args:
        out_a, out_b: (..., D) partial outputs of the same queries.
        lse_a, lse_b: (...) their log-sum-exp in nats.

    Returns:
        out (..., D) in the dtype of ``out_a``, lse (...). Differentiable in all four arguments.
    """
    check.check_merge(out_a, lse_a, out_b, lse_b)
    # exp(lse - max) without NaN where both sides saw no key, in value and in gradient.
    top = torch.maximum(lse_a, lse_b).detach()
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    weight_a, weight_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = weight_a + weight_b
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    out = (
        out_a.to(total.dtype) * (weight_a / safe)[..., None]
        + out_b.to(total.dtype) * (weight_b / safe)[..., None]
    )
    lse = torch.where(empty, torch.full_like(total, -math.inf), top + safe.log())
    return out.to(out_a.dtype), lse


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> backend_table.Choice:
    """Which backend `block_sparse_attention` would run for these arguments, and why.

    A mask that drops blocks stays sparse, whatever is faster: dense attention gives another result.
    For the kernels the reason then names the one that runs, and says how the two compare at these
    lengths, by what was measured; the density of the mask is not read.
    """
    query, key, value = follow_autocast(query, key, value)
    args = _validated(query, key, value, block_mask, is_causal, scale, kv_lens, q_lens, window)
    choice = args.choose(backend, wants_statistics=return_lse)
    if choice.backend == "triton":
        kernel, why = ops.forward_kernel(
            args.query, key, value, args.block_size, args.is_causal, args.window, args.scale
        )
        choice = replace(choice, reason=f"{choice.reason}; kernels/{kernel}.py: {why}")
    if backend != "auto" or choice.backend != "triton" or args.keeps_all:
        return choice
    batch, heads, q_len, head_dim = query.shape
    seen = min(args.window or key.shape[2], key.shape[2])
    found = backend_table.compare_with_dense(
        query.device, head_dim, args.is_causal, batch * heads, q_len, seen
    )
    return choice if found is None else replace(choice, reason=f"{choice.reason}; {found}")
