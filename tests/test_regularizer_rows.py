"""Runs of rows of queries and keys: their gradients are those of slices."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_attn.regularizer.rows import with_run


def test_a_run_of_rows_has_the_gradients_of_slices():
    leaves = [torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def gradients_of(run, parts: set[str], create_graph: bool) -> tuple[Tensor, ...]:
        query, key, *rows = run(*leaves)
        losses = {"whole": (query @ key.mT).softmax(-1) @ key, "rows": rows[0].exp() @ rows[1].mT}
        loss = sum(losses[part].square().sum() for part in parts)
        return torch.autograd.grad(loss, leaves, create_graph=create_graph)

    for parts in ({"whole"}, {"rows"}, {"whole", "rows"}):
        runs = (lambda q, k: with_run(q, k, 1, 2)), (lambda q, k: (q, k, q[1:], k[1:]))
        got, expected = (gradients_of(run, parts, create_graph=False) for run in runs)
        torch.testing.assert_close(got, expected)
        got, expected = (
            torch.autograd.grad(sum(g.sin().sum() for g in gradients_of(run, parts, True)), leaves)
            for run in runs
        )
        torch.testing.assert_close(got, expected)
