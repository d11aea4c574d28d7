"""A run of batch rows of queries and keys, whose gradients cost what the run does.

The backward of a slice makes a zero tensor as large as the whole, and autograd then adds it to the
gradient that attention gives: for a share of the rows that is most of what measuring them costs.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _Run(torch.autograd.Function):
    """Query and key as they are, for attention, and beside them the run of their rows.

    In the backward both gradients arrive together. What attention gives for the whole belongs to
    nobody else, as nobody but attention has seen these tensors: the run is added in place.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.first, ctx.batch = first, query.shape[0]
        found = (
            query.view_as(query), key.view_as(key),
            query.narrow(0, first, count), key.narrow(0, first, count),
        )  # fmt: skip
        needed = 2 * ctx.needs_input_grad[:2]
        ctx.mark_non_differentiable(
            *[x for x, is_needed in zip(found, needed, strict=True) if not is_needed]
        )
        return found

    @staticmethod
    def backward(ctx, grad_query, grad_key, query_rows, key_rows):
        pairs = ((grad_query, query_rows), (grad_key, key_rows))
        return *(_with_rows(whole, rows, ctx.first, ctx.batch) for whole, rows in pairs), None, None


def with_run(query: Tensor, key: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
    """Query and key, which only attention may use, and rows first .. first + count - 1 of both."""
    return _Run.apply(query, key, first, count)


def _with_rows(whole: Tensor | None, rows: Tensor | None, first: int, batch: int) -> Tensor | None:
    """The sum of a gradient of all rows and one of a run of them; None stands for 0."""
    if rows is None:
        return whole
    if whole is None:
        whole = rows.new_zeros(batch, *rows.shape[1:])
    elif torch.is_grad_enabled():  # a graph of the gradients may need it as it was
        whole = whole.clone()
    whole.narrow(0, first, rows.shape[0]).add_(rows)
    return whole
