"""Range-partition entropy of a large set of points: time, memory and bandwidth.

Forward and backward against the definition in eager PyTorch and under torch.compile, and against a
copy of the points in the same run. The forward has to read the points once, the backward to read
them and to write their gradients: `bandwidth` is those bytes over the time, as a share of the
bandwidth of the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

import entropy_attn as ea
from entropy_attn.benchmarks.baselines import our_backend
from entropy_attn.benchmarks.environment import sm_clock_mhz
from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.timing import measure, peak_bytes
from entropy_attn.testing import assert_close_to_reference

OURS, EAGER, COMPILED, COPY = "entropy-attn", "eager", "torch.compile", "copy"


@dataclass(frozen=True)
class Case:
    """points x dim, and the number of anchors."""

    points: int
    dim: int
    anchors: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"n={self.points:,} d={self.dim} k={self.anchors} {self.dtype}"


def cases(form: str) -> list[Case]:
    if form == "small":
        return [Case(20_000, 16, 16)]
    first = Case(1_000_000, 64, 64, "bfloat16")
    if form == "quick":
        return [first]
    return [first, Case(1_000_000, 64, 64), Case(1_000_000, 3, 64), Case(1_000_000, 64, 256)]


def definition(
    points: Tensor, anchors: Tensor, alpha: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The entropy as one would write it, computed in ``dtype``; stores points x anchors."""
    points, anchors = points.to(dtype), anchors.to(dtype)
    scores = -alpha * torch.cdist(points, anchors).square()
    mass = scores.softmax(-1).mean(-2)
    return -(mass * mass.log()).sum(-1)


def run(context: Context) -> Iterator[Row]:
    done = {"direction": "backward"}  # the last to be written
    for case in context.left(cases(context.form), lambda c: asdict(c) | done, (OURS,)):
        context.progress(f"entropy, {case.name}")
        yield from _run_case(context, case)


def _run_case(context: Context, case: Case) -> Iterator[Row]:
    device = context.device
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    points = torch.randn(case.points, case.dim, device=device, generator=generator).to(dtype)
    anchors = torch.randn(case.anchors, case.dim, device=device, generator=generator).to(dtype)
    alpha = torch.tensor(0.5 / case.dim, device=device)
    leaves = [t.requires_grad_() for t in (points, anchors, alpha)]

    def ours(points, anchors, alpha):
        return ea.range_entropy(points, anchors, alpha, backend=our_backend(device))

    functions: dict[str, Callable[..., Tensor]] = {OURS: ours, EAGER: definition}
    if context.on_gpu:
        functions[COMPILED] = torch.compile(definition, dynamic=False)
    wrong = _wrong(ours, leaves)
    if wrong is not None:
        yield _row(context, case, "forward", OURS, {"status": "wrong", "reason": wrong})
        return

    target = torch.empty_like(points)
    seconds = {"full": 1.0, "quick": 0.5, "small": 0.05}[context.form]
    for direction in ("forward", "backward"):
        calls: dict[str, Callable[[], object]] = {}
        for name, function in functions.items():
            calls[name] = _call(function, leaves, direction)
        memory = {name: peak_bytes(call, device) for name, call in calls.items()}
        calls[COPY] = lambda: target.copy_(points.detach())
        timings = measure(
            {name: [call] for name, call in calls.items()}, seconds=seconds, device=device
        )
        size = points.numel() * points.element_size()
        copied = 2 * size / timings[COPY].median_ms
        moved = size if direction == "forward" else 2 * size
        for name, timing in timings.items():
            result = {
                "status": "ok",
                **timing.as_dict(),
                "copy_gb_s": copied / 1e6,
                "sm_clock_mhz": sm_clock_mhz(),
            }
            if name != COPY:
                result |= {
                    "bandwidth": moved / timing.median_ms / copied,
                    "peak_bytes": memory[name] or None,
                    "speedup": timing.median_ms / timings[OURS].median_ms,
                }
            yield _row(context, case, direction, name, result)


def _call(function: Callable[..., Tensor], leaves: list[Tensor], direction: str):
    if direction == "forward":
        plain = [t.detach() for t in leaves]
        return lambda: function(*plain)
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, retain_graph=True)


def _wrong(ours: Callable[..., Tensor], leaves: list[Tensor]) -> str | None:
    """Compare value and gradients with the definition in fp64."""
    exact = [t.detach().double().requires_grad_() for t in leaves]
    plain = [t.detach().requires_grad_() for t in leaves]

    def results(function, leaves):
        value = function(*leaves)
        return [value, *torch.autograd.grad(value, leaves)]

    @torch.no_grad()
    def sizes(points, anchors, alpha) -> list[float]:
        """Of the terms whose sum is each result; those of alpha's gradient cancel."""
        distances = torch.cdist(points, anchors).square()
        p = (-alpha * distances).softmax(-1)
        surprise = -p.mean(-2).log()
        flow = p * (surprise - (p * surprise).sum(-1, keepdim=True)).abs()
        return [0.0, 0.0, 0.0, (flow * distances).sum(-1).mean().item()]

    precise = partial(definition, dtype=torch.float64)
    names = ("entropy", "gradient of points", "gradient of anchors", "gradient of alpha")
    compared = (results(ours, leaves), results(definition, plain), results(precise, exact))
    for name, size, *results_of in zip(names, sizes(*exact), *compared, strict=True):
        try:
            assert_close_to_reference(*results_of, name, magnitude=size)
        except AssertionError as error:
            return str(error)
    return None


def _row(context: Context, case: Case, direction: str, name: str, result: dict) -> Row:
    config = {"form": context.form, **asdict(case), "direction": direction, "contestant": name}
    text = f"{case.name} {direction} | {name}: "
    if result["status"] != "ok":
        return Row(config, result, text + f"{result['status']}: {result['reason']}", name == OURS)
    text += f"{result['median_ms']:.3f} ms"
    if name == COPY:
        text += f", {result['copy_gb_s']:.0f} GB/s"
    else:
        text += f", {result['bandwidth']:.0%} of the copy's bandwidth"
    return Row(config, result, text, name == OURS)
