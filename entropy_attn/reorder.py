"""Reordering: tokens sorted by the cell they fall into, so that whole blocks are alike.

Block-sparse attention keeps or drops whole tiles. In a bidirectional model neighbours in a block
may have little to do with each other, and a tile then needs many blocks of keys. Attention does
not depend on the order of its keys and treats each query by itself, so both may be sorted, each
head in its own way: exact, and undone on the output. What a sorted block attends to has a lower
range-partition entropy (Eppstein, Goodrich, Illickan and To, arXiv 2508.20489), which is what
block-sparse attention pays for.

Queries and keys are sorted apart, each by cells of its own space: queries that are near each other
have near rows of scores, whatever the keys are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_attn import validation as check
from entropy_attn.autocast import follow_autocast
from entropy_attn.reference.cells import cell_order
from entropy_attn.reference.permutation import inverse, permute

MOST_CELLS = 64
TOKENS_A_CELL = 32


@dataclass(frozen=True)
class Reorder:
    """How tokens are sorted.

    Attributes:
        cells: of each head, up to 1024; None for one in 32 tokens, at most 64.
        iterations: steps of k-means that place the cells.
        sample: tokens of each head that the cells are placed by, at evenly spaced positions.
        prefix: so many tokens at the start stay there (class token, registers), so that the first
            blocks of keys hold them. Padding before the start does not count.
    """

    cells: int | None = None
    iterations: int = 2
    sample: int = 1024
    prefix: int = 0

    def __post_init__(self) -> None:
        if self.cells is not None:
            check.check_cells(self.cells)
        check.check_integer("iterations", self.iterations, minimum=0)
        check.check_integer("sample", self.sample, minimum=1)
        check.check_integer("prefix", self.prefix, minimum=0)

    def order(self, x: Tensor, valid: Tensor) -> Tensor:
        """`token_order` of arguments that were checked; valid (B, N) bool may lie anywhere."""
        cells = self.cells or min(MOST_CELLS, max(1, x.shape[2] // TOKENS_A_CELL))
        return cell_order(x.detach(), valid, cells, self.iterations, self.sample, self.prefix)


def token_order(x: Tensor, reorder: Reorder | None = None, *, lens: Tensor | None = None) -> Tensor:
    """An order of tokens in which those of a cell lie side by side, and near cells too.

    The cells are those of nearest anchors, which k-means places; within a cell tokens keep their
    order. The same input gives the same order, and nothing waits for the device. The work is N x
    cells distances a head, computed for a run of tokens at a time.

    Args:
        x: (B, H, N, D) queries or keys, fp16, bf16, fp32 or fp64; distances are computed in fp32
            at least.
        reorder: `Reorder()` by default.
        lens: (B,) int32, valid tokens of each row; the padding after them comes last.

    Returns:
        (B, H, N) int64, for each head a permutation: row i of the new order is row order[i] of x.
        Not differentiable.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
    """
    reorder = _checked(reorder)
    check.check_tokens("x", x)
    check.check_lens("lens", lens, x)
    return reorder.order(x, leading_tokens(x, lens))


class Reordered(NamedTuple):
    """What `reorder_tokens` returns.

    Attributes:
        query: (B, Hq, Nq, D), key, value: (B, Hkv, Nk, D), sorted and contiguous.
        restore: puts rows (B, Hq, Nq) or (B, Hq, Nq, D) back to where the queries stood: of the
            output, the log-sum-exp, row and block entropies.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    restore: Callable[[Tensor], Tensor]


def reorder_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reorder: Reorder | None = None,
    *,
    is_causal: bool = False,
    window: int | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
) -> Reordered:
    """Sort queries, and keys with their values, for attention that is not causal.

    ::

        tokens = ea.reorder_tokens(query, key, value)
        mask = ea.select_blocks(tokens.query, tokens.key, sink=0, local=0)
        out = tokens.restore(ea.block_sparse_attention(*tokens[:3], mask))

    A block mask, a tile entropy and a tile mass belong to the sorted tokens. So do ``sink`` and
    ``local`` of `ea.select_blocks`: the first blocks hold the ``prefix`` of ``reorder``, the
    diagonal means nothing.

    Args:
        query: (B, Hq, Nq, D), key, value: (B, Hkv, Nk, D), Hq a multiple of Hkv, any strides.
        reorder: `Reorder()` by default.
        is_causal, window: for the error that they are; False and None are allowed.
        kv_lens, q_lens: (B,) int32, valid keys and queries. They hold for the sorted tokens too.

    Returns:
        The sorted tensors and the function that undoes the order. Differentiable: the order itself
        counts as constant.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
    """
    reorder = _checked(reorder)
    check.check_reorderable(is_causal, window)
    query, key, value = follow_autocast(query, key, value)
    check.check_qkv(query, key, value)
    check.check_lens("kv_lens", kv_lens, query)
    check.check_lens("q_lens", q_lens, query)
    return sort_tokens(
        query, key, value, reorder, leading_tokens(query, q_lens), leading_tokens(key, kv_lens)
    )


def sort_tokens(
    query: Tensor, key: Tensor, value: Tensor, reorder: Reorder, q_valid: Tensor, kv_valid: Tensor
) -> Reordered:
    """`reorder_tokens` of arguments that were checked; valid tokens (B, N) may lie anywhere."""
    kv_order = reorder.order(key, kv_valid)
    kv_place = inverse(kv_order)
    q_order = reorder.order(query, q_valid)
    q_place = inverse(q_order)
    return Reordered(
        permute(query, q_order, q_place),
        permute(key, kv_order, kv_place),
        permute(value, kv_order, kv_place),
        lambda rows: permute(rows, q_place, q_order),
    )


def leading_tokens(x: Tensor, lens: Tensor | None) -> Tensor:
    """(B, N) bool: the valid tokens of x (B, H, N, D), of which ``lens`` (B,) stand first."""
    position = torch.arange(x.shape[2], device=x.device)
    if lens is None:
        return torch.ones_like(position, dtype=torch.bool).expand(x.shape[0], -1)
    return position < lens[:, None]


def _checked(reorder: Reorder | None) -> Reorder:
    reorder = Reorder() if reorder is None else reorder
    if not isinstance(reorder, Reorder):
        raise TypeError(f"reorder must be an entropy_attn.Reorder or None, got {reorder!r}")
    return reorder
