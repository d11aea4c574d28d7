"""Registration of torch custom ops whose calls cost little on the host.

`torch.library.custom_op` wraps every call in Python that checks for aliases and, while gradients
are recorded, goes through autograd even where an op has no gradient: tens of microseconds, as much
as the launch of a small kernel. To record a gradient it takes hundreds, as it looks at the schema
again and again. Here an op is its implementation and nothing else, and a call that nobody watches
(no tracing, no profiler) goes there without the dispatcher, through an `autograd.Function` where a
gradient is recorded. That its outputs do not alias its inputs is what `torch.library.opcheck`
tests.

Ops that write to their arguments stay with `torch.library.custom_op`, which keeps autograd's
version counters right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library
from torch.nn import Parameter

NAMESPACE = "entropy_attn"

# An op exists as long as its library does.
_libraries: dict[str, Library] = {}


class CustomOp:
    """An op of plain tensors and numbers; torch.compile takes it as a whole.

    An op without `register_autograd` is not hidden from autograd: its callers detach tensors that
    need gradients or check that there are none. Where they do neither, call `refuse_gradients`.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        update_wrapper(self, function)
        self._function = function
        self._name = f"{NAMESPACE}::{name}"
        _libraries.pop(name, None)  # of a module that is being reloaded
        library = _libraries[name] = Library(NAMESPACE, "FRAGMENT")
        schema = torch.library.infer_schema(function, op_name=name, mutates_args=())
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        # For every device, and never traced by torch.compile.
        torch.library.register_kernel(self._name, None, function, lib=library)
        self._key = name
        self._recorded: type[torch.autograd.Function] | None = None
        self.overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: Any) -> Any:
        tensors = _tensors_of(args)
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            self._refuse_tangents(tensors)
        if _is_watched(tensors):
            return self.overload(*args)
        if not _records_gradients(tensors):
            return self._function(*args)
        return self.overload(*args) if self._recorded is None else self._recorded.apply(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the outputs, for tracing."""
        library = _libraries[self._key]
        return torch.library.register_fake(self._name, fake, lib=library)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any] | None = None
    ) -> None:
        """As `torch.library.register_autograd`."""
        library = _libraries[self._key]
        torch.library.register_autograd(
            self._name, backward, setup_context=setup_context, lib=library
        )
        function = self._function

        def forward(ctx: Any, *args: Any) -> Any:
            output = function(*args)
            if setup_context is not None:
                setup_context(ctx, args, output)
            return output

        parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._recorded = type(self._key, (torch.autograd.Function,), parts)

    def _refuse_tangents(self, tensors: list[Tensor]) -> None:
        """They would be lost without a word."""
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise NotImplementedError(
                f"{self._name} has no forward-mode derivative; use backward-mode autograd"
            )

    def refuse_gradients(self) -> None:
        """A backward through the op raises."""

        def backward(ctx: Any, *grads: Any) -> None:
            raise RuntimeError(f"there is no backward through {self._name}")

        self.register_autograd(backward)


def laid_out_like(query: Tensor, backend: str) -> Tensor:
    """An output for a fake: with the query's order of dimensions in memory, as kernels make it."""
    return query.new_empty(query.shape) if backend == "reference" else torch.empty_like(query)


def is_unwatched(args: Iterable[Any]) -> bool:
    """Whether the dispatcher would do nothing with a call but to run the implementation.

    That is: no tracing, no mode, no profiler, no subclass of tensors, no gradient to record,
    nothing that is negated when it is read. Kernels that others registered for an op do not count.
    """
    tensors = _tensors_of(args)
    may_have_tangents = forward_ad._current_level >= 0
    return not (may_have_tangents or _is_watched(tensors) or _records_gradients(tensors))


def _tensors_of(args: Iterable[Any]) -> list[Tensor]:
    return [x for x in args if isinstance(x, Tensor)]


def _is_watched(tensors: list[Tensor]) -> bool:
    """What `is_unwatched` asks, but for gradients."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
        or any(
            type(x) not in (Tensor, Parameter) or x.is_neg() or x._is_zerotensor() for x in tensors
        )
    )


def _records_gradients(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def custom_op(name: str) -> Callable[[Callable[..., Any]], CustomOp]:
    """Make a function with annotated arguments the op ``entropy_attn::name``."""
    return lambda function: CustomOp(name, function)
