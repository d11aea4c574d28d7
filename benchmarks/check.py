"""No timing of wrong results: every contestant is compared with the reference first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_attn.benchmarks.cases import Inputs
from entropy_attn.reference.dense import dense_attention, visible_pairs
from entropy_attn.testing import assert_close_to_reference


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
    are stored, N x N in fp32.
    """
    case = inputs.case
    pairs = tuple(dict.fromkeys([(0, 0), (case.batch - 1, case.heads - 1)]))
    visible = visible_pairs(
        1, case.length, case.length, is_causal=case.is_causal, device=inputs.device
    )
    exact, plain = [], []
    for batch, head in pairs:
        seen = visible
        if sparse:
            kept = inputs.kept[batch, head].repeat_interleave(case.block, 0)
            kept = kept.repeat_interleave(case.block, 1)
            seen = visible & kept[: case.length, : case.length]
        high = torch.float64 if inputs.query.dtype == torch.float32 else torch.float32
        exact.append(_results(inputs, batch, head, seen, high))
        plain.append(_results(inputs, batch, head, seen, inputs.query.dtype))
    names = ("output",) if case.direction == "forward" else ("grad_q", "grad_k", "grad_v")
    return Expected(names, pairs, tuple(exact), tuple(plain))


def _results(
    inputs: Inputs, batch: int, head: int, visible: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    case = inputs.case
    tensors = [
        t.detach()[batch, head][None, None].to(dtype).requires_grad_(case.direction == "backward")
        for t in (inputs.query, inputs.key, inputs.value)
    ]
    out, _, _ = dense_attention(*tensors, visible, case.head_dim**-0.5)
    if case.direction == "forward":
        return (out[0, 0],)
    grad_out = inputs.grad_out[batch, head][None, None].to(dtype)
    return tuple(g[0, 0] for g in torch.autograd.grad(out, tensors, grad_out))
