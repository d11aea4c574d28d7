"""The one tolerance rule of the project, for tests and for checks before a benchmark.

A kernel may err twice as much as plain PyTorch in the same dtype errs, both against a reference
in higher precision on the same (already rounded) inputs, plus the rounding of its own output.
The rule is FlashAttention's (`check_tensor_vs_ref`), applied to the maximum and to the RMS error.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(reference: Tensor, dtype: torch.dtype) -> float:
    """Largest error that rounding ``reference`` to ``dtype`` makes on its own."""
    finite = reference[torch.isfinite(reference)]
    if finite.numel() == 0:
        return 0.0
    return torch.finfo(dtype).eps * finite.abs().max().item()


def assert_close_to_reference(
    actual: Tensor,
    same_dtype_reference: Tensor,
    high_precision_reference: Tensor,
    name: str = "output",
    factor: float = 2.0,
    magnitude: float = 0.0,
) -> None:
    """Raise AssertionError unless ``actual`` is as good as PyTorch in the same dtype.

    Args:
        actual: what the kernel returned.
        same_dtype_reference: plain PyTorch, computed in the dtype of ``actual``.
        high_precision_reference: plain PyTorch in fp32 or fp64 on the same rounded inputs.
        name: what to call the tensor in the message.
        factor: how many times the error of plain PyTorch is allowed.
        magnitude: of the terms that the value is a sum of. Where they cancel, the rounding of the
            fp32 accumulator is what remains, and plain PyTorch may be exact by luck.
    """
    if actual.shape != high_precision_reference.shape:
        raise AssertionError(
            f"{name}: shape {tuple(actual.shape)}, expected {tuple(high_precision_reference.shape)}"
        )
    exact = high_precision_reference.double()
    special = ~torch.isfinite(exact)
    if not torch.equal(actual.double()[special], exact[special]):
        raise AssertionError(f"{name}: infinities differ from the reference")
    got, plain, exact = (t.double()[~special] for t in (actual, same_dtype_reference, exact))
    if exact.numel() == 0:
        return
    if not torch.isfinite(got).all():
        raise AssertionError(f"{name}: {(~torch.isfinite(got)).sum().item()} values not finite")
    slack = rounding(exact, actual.dtype) + torch.finfo(torch.float32).eps * magnitude
    error, allowed = (got - exact).abs(), (plain - exact).abs()
    for kind, measure in (("max", torch.amax), ("rms", _rms)):
        value, limit = measure(error).item(), factor * measure(allowed).item() + slack
        if value > limit:
            raise AssertionError(f"{name}: {kind} error {value:.3e} exceeds {limit:.3e}")


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()
