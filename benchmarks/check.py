"""No timing of wrong results: every contestant is compared with the reference first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_attn.benchmarks.cases import Inputs
from entropy_attn.reference.dense import dense_attention, visible_pairs
from entropy_attn.testing import assert_close_to_reference

# Queries whose scores are stored at a time.
ROWS = 8192


@dataclass(frozen=True, eq=False)
class Expected:
    """Reference results of a few (batch, head) pairs of a case.

    Attributes:
        names: "output", or the gradients for a backward case.
        pairs: the (batch, head) pairs that are compared.
        exact, plain: for each pair the results in high precision, and in the inputs' dtype.
    """

    names: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    exact: tuple[tuple[Tensor, ...], ...]
    plain: tuple[tuple[Tensor, ...], ...]

    def verdict(self, actual: Sequence[Tensor]) -> str | None:
        """What is wrong with a contestant's results, or None."""
        for (batch, head), exact, plain in zip(self.pairs, self.exact, self.plain, strict=True):
            for name, a, p, e in zip(self.names, actual, plain, exact, strict=True):
                try:
                    assert_close_to_reference(a[batch, head], p, e, f"{name} of head {head}")
                except AssertionError as error:
                    return str(error)
        return None


def expected(inputs: Inputs, *, sparse: bool) -> Expected:
    """Reference results, with the block mask (``sparse``) or without it.

    Whole sequences of the first and the last head are computed, one head at a time: the scores
    are stored, of the forward those of `ROWS` queries at a time.
    """
    case = inputs.case
    pairs = tuple(dict.fromkeys([(0, 0), (case.batch - 1, case.heads - 1)]))
    high = torch.float64 if inputs.query.dtype == torch.float32 else torch.float32
    exact, plain = (
        tuple(_results(inputs, batch, head, sparse, dtype) for batch, head in pairs)
        for dtype in (high, inputs.query.dtype)
    )
    names = ("output",) if case.direction == "forward" else ("grad_q", "grad_k", "grad_v")
    return Expected(names, pairs, exact, plain)


def _visible(inputs: Inputs, batch: int, head: int, sparse: bool, rows: range) -> Tensor:
    """(1, 1, rows, N) bool: what some queries of one head see."""
    case = inputs.case
    # Causal attention is aligned to the last valid key: that of the last of these queries.
    end = torch.tensor([rows.stop], device=inputs.device) if case.is_causal else None
    visible = visible_pairs(
        1, len(rows), case.length, is_causal=case.is_causal, kv_lens=end, device=inputs.device
    )
    if sparse:
        row = torch.arange(rows.start, rows.stop, device=inputs.device) // case.block
        kept = inputs.kept[batch, head][row].repeat_interleave(case.block_size[1], 1)
        visible = visible & kept[:, : case.length]
    return visible


def _results(
    inputs: Inputs, batch: int, head: int, sparse: bool, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    case, scale = inputs.case, inputs.case.head_dim**-0.5
    tensors = [
        t.detach()[batch, head][None, None].to(dtype).requires_grad_(case.direction == "backward")
        for t in (inputs.query, inputs.key, inputs.value)
    ]
    if case.direction == "forward":
        query, key, value = tensors
        out = []
        for start in range(0, case.length, ROWS):
            rows = range(start, min(start + ROWS, case.length))
            visible = _visible(inputs, batch, head, sparse, rows)
            out.append(
                dense_attention(query[:, :, start : rows.stop], key, value, visible, scale)[0]
            )
        return (torch.cat(out, 2)[0, 0],)
    visible = _visible(inputs, batch, head, sparse, range(case.length))
    out, _, _ = dense_attention(*tensors, visible, scale)
    grad_out = inputs.grad_out[batch, head][None, None].to(dtype)
    return tuple(g[0, 0] for g in torch.autograd.grad(out, tensors, grad_out))
