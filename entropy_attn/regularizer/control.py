"""What the penalty weighs: a constant, or what a target density needs (dual ascent).

Everything stays on the device: reading a density every step would make training wait for it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Control(Protocol):
    """Attributes:
    state: named tensors without dimensions, what `load_state_dict` restores.
    """

    state: dict[str, Tensor]

    def weight(self, step: int) -> Tensor | float:
        """Loss per unit of the measure; a tensor has no dimensions."""
        ...

    def update(self, density: Tensor, step: int) -> None:
        """Take in the density that was seen in step ``step``, counted from 0."""
        ...


class FixedWeight:
    """A constant after a linear warm-up.

    Args:
        weight: loss per unit of the measure.
        warmup_steps: steps until it has its full size.
    """

    def __init__(self, weight: float, warmup_steps: int) -> None:
        self.full = weight
        self.warmup_steps = warmup_steps
        self.state: dict[str, Tensor] = {}

    def weight(self, step: int) -> float:
        return self.full * _progress(step, self.warmup_steps)

    def update(self, density: Tensor, step: int) -> None:
        pass


class DualAscent:
    """The multiplier of the constraint density <= target.

    With the error e = log(density / target) of each step,

        integral <- clip(integral + rate * e, 0, largest)
        multiplier = clip(integral + damping * e, 0, largest)

    which is gradient ascent on the Lagrangian's dual, and a term that damps its swings. The target
    itself falls in the course of the warm-up from the first density that was seen, so that the
    weight does not overshoot while the model has had no time to follow. The multiplier is the loss
    that a density equal to the target costs; it cannot exceed ``largest``, whatever the error.

    Args:
        target: density in (0, 1).
        rate: how fast the multiplier follows an error, a step.
        damping: multiplier that an error of 1 adds while it lasts.
        largest: bound of the multiplier.
        warmup_steps: steps until the target is the wanted one.
        device: of the state.
    """

    def __init__(
        self,
        target: float,
        rate: float,
        damping: float,
        largest: float,
        warmup_steps: int,
        device: torch.device,
    ) -> None:
        self.target = target
        self.rate = rate
        self.damping = damping
        self.largest = largest
        self.warmup_steps = warmup_steps
        self.state = {
            name: torch.zeros((), dtype=torch.float32, device=device)
            for name in ("integral", "multiplier", "first_density")
        }

    def weight(self, step: int) -> Tensor:
        return self.state["multiplier"] / self.target

    def target_at(self, step: int) -> Tensor | float:
        """What the density should be at a step; on the way down, equal ratios a step."""
        progress = _progress(step, self.warmup_steps)
        if progress == 1.0:
            return self.target
        first = self.state["first_density"].clamp(min=self.target)
        return first ** (1.0 - progress) * self.target**progress

    def update(self, density: Tensor, step: int) -> None:
        if step == 0:
            self.state["first_density"].copy_(density)
        error = (density.clamp(min=1e-6) / self.target_at(step)).log_()
        integral = self.state["integral"].add_(error, alpha=self.rate).clamp_(0.0, self.largest)
        multiplier = torch.add(integral, error, alpha=self.damping).clamp_(0.0, self.largest)
        self.state["multiplier"].copy_(multiplier)


def _progress(step: int, warmup_steps: int) -> float:
    """Share of the warm-up that is over once ``step`` is done."""
    return min(1.0, (step + 1) / max(1, warmup_steps))
