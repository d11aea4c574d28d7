"""Soft and hard partitions by their definitions, with everything materialised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def entropy(mass: Tensor) -> Tensor:
    return -torch.special.xlogy(mass, mass).sum(-1)


def shares(cells: Tensor, weights: Tensor | None) -> Tensor:
    """(..., k) weighted mean of (..., n, k) over the points."""
    if weights is None:
        return cells.mean(-2)
    return (cells * weights[..., None]).sum(-2) / weights.sum(-1, keepdim=True)


def naive_range_entropy(x, anchors, alpha, weights=None) -> Tensor:
    """By the words of `ea.range_entropy`, in the dtype of x."""
    squared = (x[..., :, None, :] - anchors[..., None, :, :]).square().sum(-1)
    return entropy(shares((-alpha[..., None, None] * squared).softmax(-1), weights))


def matrix_range_entropy(x, anchors, alpha, weights=None) -> Tensor:
    """The same for sizes of a GPU: a matrix product in the dtype of x, the rest in fp32 or fp64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    product, anchors, alpha = (t.to(dtype) for t in (x @ anchors.mT, anchors, alpha))
    closeness = 2 * product - anchors.square().sum(-1)[..., None, :]
    weights = None if weights is None else weights.to(dtype)
    return entropy(shares((alpha[..., None, None] * closeness).softmax(-1), weights))


def naive_halfspace_entropy(x, normals, offsets, tau, weights=None) -> Tensor:
    """By the words of `ea.halfspace_entropy`, in the dtype of x."""
    sides = torch.sigmoid((x @ normals.mT - offsets[..., None, :]) / tau[..., None, None])
    cells = []
    for pattern in range(1 << normals.shape[-2]):
        bits = [bool(pattern >> t & 1) for t in range(normals.shape[-2])]
        factors = [sides[..., t] if bit else 1 - sides[..., t] for t, bit in enumerate(bits)]
        cells.append(torch.stack(factors, -1).prod(-1))
    return entropy(shares(torch.stack(cells, -1), weights))


@dataclass(frozen=True)
class Case:
    """Points with cells of one kind; what is drawn lies away from the origin.

    Attributes:
        cells: anchors, or halfspaces if ``halfspaces``.
        batch: leading dimensions of the points. shared: whether the cells have none.
        fused: the points are a transposed slice, as of a fused projection.
    """

    n: int
    d: int
    cells: int
    halfspaces: bool = False
    batch: tuple[int, ...] = ()
    shared: bool = True
    weights: bool = False
    fused: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [f"n={self.n}", f"d={self.d}", f"{'T' if self.halfspaces else 'k'}={self.cells}"]
        words += [f"batch={'x'.join(map(str, self.batch))}"] * bool(self.batch)
        words += [name for name in ("weights", "fused") if getattr(self, name)]
        words += ["own cells"] * (not self.shared) + ["fp16"] * (self.dtype == torch.float16)
        return " ".join(words)

    def build(self, device: str) -> list[Tensor]:
        """x, then anchors and alpha, or normals, offsets and tau; then weights if any."""
        leading = () if self.shared else self.batch
        if self.fused:  # (B, n, H, 2 d) seen as (B, H, n, d)
            outer, inner = self.batch
            x = torch.randn(outer, self.n, inner, 2 * self.d, device=device).to(self.dtype)
            x = (x + 2).transpose(1, 2)[..., self.d :]
        else:
            x = (torch.randn(*self.batch, self.n, self.d, device=device) + 2).to(self.dtype)
        cells = torch.randn(*leading, self.cells, self.d, device=device)
        if self.halfspaces:
            offsets = cells.sum(-1) * 2 + torch.randn(cells.shape[:-1], device=device)
            given = [cells, offsets, torch.tensor(self.d**0.5, device=device)]
        else:
            given = [cells + 2, torch.tensor(1.5 / self.d, device=device)]
        if self.weights:
            given.append(torch.rand(*self.batch, self.n, device=device).clamp(min=0.2) - 0.2)
        rounded = [t.to(self.dtype).float() for t in given]
        return [x, *rounded]

    def leaves(self, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Leaves in a dtype; only points and cells in half precision, as for the kernels."""
        statistics = dtype and torch.promote_types(dtype, torch.float32)
        dtypes = [dtype, dtype, *[statistics] * (len(inputs) - 2)]
        return [
            t.detach().to(wanted or t.dtype).requires_grad_()
            for t, wanted in zip(inputs, dtypes, strict=True)
        ]

    def naive(self, *inputs: Tensor) -> Tensor:
        """The definition; for many points of balls by a matrix product."""
        if self.halfspaces:
            return naive_halfspace_entropy(*inputs)
        is_large = self.n * self.cells * self.d > 2**24
        return (matrix_range_entropy if is_large else naive_range_entropy)(*inputs)

    @property
    def names(self) -> tuple[str, ...]:
        cells = ("normals", "offsets", "tau") if self.halfspaces else ("anchors", "alpha")
        return ("entropy", "x", *cells, *["weights"] * self.weights)


def values_and_gradients(function, leaves: list[Tensor]) -> list[Tensor]:
    """The entropies, then the gradients of a sum of them with unequal factors.

    The factors are about n: a gradient of a mean over n points is below what fp16 holds.
    """
    out = function(*leaves)
    factors = torch.linspace(0.5, 1.5, out.numel(), device=out.device, dtype=out.dtype)
    factors = factors * max(1, leaves[0].shape[-2])
    return [out.detach(), *torch.autograd.grad((out * factors.reshape(out.shape)).sum(), leaves)]


def plain_results(case: Case, inputs: list[Tensor], exact: list[Tensor], functions=()) -> list:
    """The exact values and gradients, each off by the worst error of plain PyTorch.

    Plain PyTorch is the definition in the dtype of the points, and ``functions`` besides. Each runs
    with points, cells and coordinates in several orders: the error of one number may be 0 by luck,
    and in another order it is another draw.
    """
    worst = [torch.zeros_like(wanted) for wanted in exact]
    runs = [(case.naive, case.dtype), *((function, None) for function in functions)]
    for _ in range(4):
        orders = [torch.randperm(size) for size in (case.n, case.cells, case.d)]
        moved = _reordered(case, inputs, *orders)
        for function, dtype in runs:
            value, *grads = values_and_gradients(function, case.leaves(moved, dtype))
            back = [value, *_reordered(case, grads, *(order.argsort() for order in orders))]
            for error, got, wanted in zip(worst, back, exact, strict=True):
                error.copy_(torch.maximum(error, (got.double() - wanted).abs()))
    assert all(torch.isfinite(error).all() for error in worst)
    return [wanted + error for wanted, error in zip(exact, worst, strict=True)]


def _reordered(case: Case, tensors: list[Tensor], points, cells, coordinates) -> list[Tensor]:
    x, first, *rest = tensors
    x = x[..., points, :][..., coordinates]
    first = first[..., cells, :][..., coordinates]
    if case.halfspaces:
        rest[0] = rest[0][..., cells]
    if case.weights:
        rest[-1] = rest[-1][..., points]
    return [x, first, *rest]


def least_contiguous_entropy(points: Tensor, longest: float) -> float:
    """The exact least entropy of a partition of points on a line into runs of sorted points, each
    inside an interval of length ``longest``, by dynamic programming over prefixes."""
    x = points.sort().values.tolist()
    n = len(x)
    best = [0.0] + [math.inf] * n
    for end in range(1, n + 1):
        for start in range(end - 1, -1, -1):
            if x[end - 1] - x[start] > longest:
                break
            share = (end - start) / n
            best[end] = min(best[end], best[start] - share * math.log(share))
    return best[n]
