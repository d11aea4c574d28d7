"""Plans: what a launcher derives from the forms of its arguments, kept for the next such call.

A layer of a small model is done on a GPU in tens of microseconds. Choosing a configuration,
describing tensors to the copy engine and finding the compiled kernel, for which Triton looks at
every argument, takes a host longer than that. All of it follows from shapes, strides, dtypes and
numbers, so it is done once for each such combination. Then a launch costs what its driver call
and the allocation of its results do.

    @planned
    def _plan(query, ..., block_size) -> Launch:      # looks at no address and no value
        return Launch(_kernel, (programs,), [q_len, ...], BLOCK=block_size, num_warps=4)

    def launcher(query, ..., block_size):
        out = torch.empty(...)
        _plan(query, ..., block_size)(query, out, ...)
        return out
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Of each function; more forms than a serving process meets in a while. The oldest is forgotten.
MOST_PLANS = 1024
_all_plans: list[dict[tuple[Any, ...], Any]] = []
_changing = Lock()
_MISSING = object()


def forget_plans() -> None:
    """Work everything out anew, after a change of what no key says (see `planned`)."""
    with _changing:
        for plans in _all_plans:
            plans.clear()


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products follow PyTorch's setting: TF32 only where the user allowed it."""
    return "tf32" if dtype == torch.float32 and _allows_tf32() else "ieee"


def _allows_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)
    if setting is None:  # torch < 2.9; later ones raise here once the other setting is used
        return matmul.allow_tf32
    return (torch.backends.fp32_precision if setting == "none" else setting) == "tf32"


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    device = tensor.get_device()
    if device >= 0 and device != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def form(tensor: Tensor) -> tuple[Any, ...]:
    """What a compiled kernel and its launch depend on, of a tensor that they read.

    Triton compiles apart for addresses that are multiples of 16 bytes, and the copy engine takes no
    others.
    """
    aligned = tensor.data_ptr() % 16 == 0
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), aligned


def planned(make: Callable[P, R]) -> Callable[P, R]:
    """Keep what ``make`` returns for the forms of its tensors and the values of what else it takes.

    Its arguments are positional and, but for tensors, hashable. What it raises is not kept.
    Settings of torch and names of modules that it reads are not in the key: pass them, or call
    `forget_plans`.
    """
    plans: dict[tuple[Any, ...], Any] = {}
    _all_plans.append(plans)

    @wraps(make)
    def plan(*args: P.args, **kwargs: P.kwargs) -> R:
        assert not kwargs, "a plan is found by its positional arguments"
        key = tuple([form(x) if isinstance(x, Tensor) else x for x in args])
        found = plans.get(key, _MISSING)
        if found is _MISSING:
            found = make(*args, **kwargs)
            with _changing:  # no other thread may change the dict between these steps
                while len(plans) >= MOST_PLANS:
                    del plans[next(iter(plans))]
                plans[key] = found
        return found

    return plan


class Launch:
    """A kernel with all of its arguments but tensors.

    The first launch on a device goes through Triton's `JITFunction`, later ones to the kernel that
    it compiled. Launch hooks are called; what else it looks at in each call is not looked at again.

    Args:
        kernel: whose parameters are tensors, then ``numbers``, then ``constants``.
        grid: programs, one to three dimensions.
        described: descriptors for the copy engine that stand in place of a tensor, by position;
            those of later calls differ in the address only.
        workspace: shapes of tensors that the launcher allocates, for its use.
        constants: constexpr parameters and options such as num_warps.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: Sequence[Any],
        *,
        described: dict[int, Any] | None = None,
        workspace: Sequence[tuple[int, ...]] = (),
        **constants: Any,
    ) -> None:
        self.workspace = workspace
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._numbers = tuple(numbers)
        self._constants = constants
        # Without their tensors, which would live as long as the plan.
        self._described = tuple((n, _moved(d, None)) for n, d in (described or {}).items())
        self._rest: tuple[Any, ...] = ()
        # By device, as a compiled kernel is loaded for one.
        self._runs: dict[int, Callable[..., None]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        first = tensors[0]
        assert first is not None
        with device_of(first):
            self.on(first.get_device(), *tensors)

    def on(self, device: int, *arguments: Tensor | None) -> None:
        """Launch on the current device, which this one is."""
        tensors: list[Any] = list(arguments)
        for position, template in self._described:
            tensors[position] = _moved(template, tensors[position])
        run = self._runs.get(device)
        if run is not None:
            run(*tensors, *self._rest)
            return
        from triton.compiler import CompiledKernel  # plans of what runs without it need it not

        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
        if isinstance(compiled, CompiledKernel):  # Triton's interpreter returns nothing
            names = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            self._rest = (*self._numbers, *[self._constants[name] for name in names])
            self._runs[device] = compiled[self._grid]


def _moved(descriptor: Any, tensor: Tensor | None) -> Any:
    """The descriptor of another tensor of the same form, without the checks of its constructor."""
    moved = object.__new__(type(descriptor))
    moved.__dict__.update(descriptor.__dict__, base=tensor)
    return moved
