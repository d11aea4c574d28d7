"""Which backend runs a call, and why: the logic behind ``backend=`` and `ea.explain`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from entropy_attn.backend.table import BACKENDS, availability, triton_interprets
from entropy_attn.errors import BackendUnavailable

# The order in which `auto` tries dense backends.
DENSE_ORDER = ("flash-attn-4", "flash-attn-3", "flash-attn-2", "sdpa")


@dataclass(frozen=True)
class Call:
    """What a backend has to be able to do.

    Attributes:
        device, dtype, head_dim, q_len, kv_len: of the inputs.
        keeps_all: no block mask, or one that is known to keep every block.
        is_causal: causal, aligned to the last key.
        has_lens, has_window: valid lengths or a sliding window are given.
        wants_statistics: lse or an entropy is asked for.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    q_len: int
    kv_len: int
    keeps_all: bool
    is_causal: bool
    has_lens: bool
    has_window: bool
    wants_statistics: bool

    def needs_sparse(self) -> str | None:
        """The feature that dense backends lack, or None if a dense backend can run the call."""
        if not self.keeps_all:
            return "the block mask drops blocks, which dense attention would not"
        if self.has_lens:
            return "kv_lens or q_lens are given"
        if self.has_window:
            return "a sliding window is given"
        if self.wants_statistics:
            return "lse or entropies are asked for"
        if self.is_causal and self.q_len != self.kv_len:
            return "causal attention with different lengths is aligned to the last key"
        if self.q_len == 0 or self.kv_len == 0:
            return "a tensor of size zero has a defined result"
        return None


@dataclass(frozen=True)
class Choice:
    """The backend that runs, why, and why the others do not.

    Attributes:
        backend: a name of the table.
        reason: why this one.
        rejected: (name, reason) of the backends that were tried before it.
    """

    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected]
        return "\n".join(lines)


def unsupported(name: str, call: Call) -> str | None:
    """Why backend ``name`` cannot run ``call`` on this machine, or None if it can."""
    backend = BACKENDS[name]
    state = availability(name)
    if not state.available:
        return state.reason
    if name == "triton":
        if call.dtype == torch.float64:
            return "the kernels take fp16, bf16 and fp32, not fp64"
        if call.device != "cuda" and not triton_interprets():
            return f"the kernels run on a GPU and the tensors are on {call.device}"
        if call.dtype == torch.bfloat16 and triton_interprets():
            return "Triton's interpreter gives wrong products in bf16; use fp16 or fp32 there"
        return None
    if call.device not in backend.devices:
        return f"it does not run on {call.device}"
    if backend.sparse:
        return None
    missing = call.needs_sparse()
    if missing:
        return f"it is dense and {missing}"
    if name.startswith("flash-attn") and call.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes fp16 and bf16, not {call.dtype}"
    return None


def choose(call: Call, backend: str = "auto") -> Choice:
    """The backend for a call.

    Raises:
        ValueError: ``backend`` is not a name of the table.
        BackendUnavailable: the named backend cannot run this call; it never falls back.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend must be 'auto' or one of {tuple(BACKENDS)}, got {backend!r}")
        problem = unsupported(backend, call)
        if problem:
            raise BackendUnavailable(f"backend {backend!r} cannot run this call: {problem}")
        return Choice(backend, "named by the caller")

    rejected: list[tuple[str, str]] = []
    missing = call.needs_sparse()
    if missing is None:
        for name in DENSE_ORDER:
            problem = unsupported(name, call)
            if problem is None:
                return Choice(name, "every block is kept, so dense is fastest", tuple(rejected))
            rejected.append((name, problem))
        missing = "no dense backend takes it"
    # Triton's interpreter is for tests: nobody gets it without naming it.
    order = ("triton", "reference") if call.device == "cuda" else ("reference",)
    for name in order:
        problem = unsupported(name, call)
        if problem is None:
            return Choice(name, missing, tuple(rejected))
        rejected.append((name, problem))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise BackendUnavailable(f"no backend can run this call: {reasons}")
