"""EntropyRegularizer: a loss term that lowers the complexity of a model's attention.

A block of queries effectively needs exp(H) of the V blocks of keys that it sees, H its tile
entropy. The density of a model, the share of the visible blocks that its attention needs, is the
sum of exp(H) over the sum of V, over layers, heads and blocks of queries: what the run time of
block-sparse attention is proportional to. It is differentiable, and minimised with the loss:

    loss + weight * density

with a weight that is given, or one that is steered until the density is the wanted one.
"""

from __future__ import annotations

import operator
import random
import warnings
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from entropy_attn.integrations.sites import Installation, check_reach, find_sites
from entropy_attn.regularizer.control import Control, DualAscent, FixedWeight
from entropy_attn.regularizer.layer import RegularizedLayer
from entropy_attn.regularizer.measure import MEASURES, Settings, Sums, measure_calls
from entropy_attn.validation import check_block_size, check_integer, check_positive, check_share

# Steps between looks at whether the target can be met, the only time that a step waits.
CHECK_EVERY = 100
# Relative error that counts as not met once the weight has reached its bound.
TOLERANCE = 0.05


@dataclass(frozen=True)
class RegularizerStatistics:
    """Attributes:
    step: steps so far.
    density: share of the visible blocks that attention needed in the last step, None if the
        measure does not tell.
    target: what it should have been in that step; None with a fixed weight.
    weight: loss per unit of the measure.
    measure: its value in the last step.
    penalty: weight * measure.
    floor: the least density there is: one block of keys for each block of queries.
    """

    step: int
    density: float | None
    target: float | None
    weight: float
    measure: float
    floor: float

    @property
    def penalty(self) -> float:
        return self.weight * self.measure

    def __str__(self) -> str:
        words = [f"step {self.step}"]
        if self.density is not None:
            goal = "" if self.target is None else f" (target {self.target:.4f})"
            words.append(f"density {self.density:.4f}{goal}")
        words += [f"weight {self.weight:.4g}", f"penalty {self.penalty:.4g}"]
        return ", ".join(words)


class EntropyRegularizer:
    """Adds to the loss what the attention of a model costs; also a context manager.

        regularizer = ea.EntropyRegularizer(model, target_density=0.1)
        for batch in data:
            loss = model(**batch).loss + regularizer.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            regularizer.step()

    Only calls in training mode with gradients are measured. Works with `ea.apply`, if that came
    first: the model attends as it did. Works with autocast, gradient accumulation (a penalty a
    backward, a step an optimizer step), non-reentrant activation checkpointing, torch.compile,
    DistributedDataParallel and fully_shard (make it before you wrap the model).

    Args:
        model: a model of transformers or timm, or a module that contains one.
        target_density: in (0, 1). The weight is steered until the attention needs this share of
            the visible blocks; see `DualAscent`.
        weight: instead of it, a fixed weight: loss per unit of the measure.
        measure: what is minimised. "density": the share of the visible blocks that is needed;
            "tile": the mean tile entropy in nats; with a fixed weight also "row" and "block",
            the mean entropies of a query over keys and over blocks of keys.
        block_size: of the blocks and tiles, in tokens; the one you will run sparse with.
        tile_fraction: of all blocks of queries, measured in each call: at random, without bias,
            whole batch rows where the share is large enough, of which a number is taken that
            divides the batch: of 7 rows less than asked for. 1 measures all of them.
        layer_fraction: of the layers that are measured in each step, at random.
        warmup_steps: steps in which the target falls to ``target_density``, or in which the
            weight grows to ``weight``.
        rate, damping, max_weight: of the `DualAscent`.
        seed: of the samples.
        process_group: over which densities are averaged where torch.distributed runs.
        partial: allow attention modules that cannot be reached; they are left out.
        backend: of the measurement, "auto" or a name of `ea.backends()`.

    Raises:
        TypeError, ValueError: an argument is not allowed, or attention of the model cannot be
            reached; the message says which.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_density: float | None = None,
        weight: float | None = None,
        measure: str = "density",
        block_size: int | tuple[int, int] = 64,
        tile_fraction: float = 0.125,
        layer_fraction: float = 0.5,
        warmup_steps: int = 100,
        rate: float = 0.01,
        damping: float = 0.5,
        max_weight: float = 10.0,
        seed: int = 0,
        process_group: Any = None,
        partial: bool = False,
        backend: str = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if (target_density is None) == (weight is None):
            raise ValueError(
                f"give target_density or weight, one of them; got target_density={target_density} "
                f"and weight={weight}"
            )
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {MEASURES}, got {measure!r}")
        settings = Settings(
            measure,
            check_block_size(block_size),
            check_share("tile_fraction", tile_fraction),
            backend,
        )
        self.layer_fraction = check_share("layer_fraction", layer_fraction)
        check_integer("warmup_steps", warmup_steps, 0)
        self.target_density = target_density
        self.settings = settings
        self.process_group = process_group

        sites = find_sites(model)
        check_reach(model, sites, partial)
        device = _device_of(model)
        self._control: Control
        if weight is not None:
            self._control = FixedWeight(check_positive("weight", weight), warmup_steps)
        else:
            self._control = self._make_ascent(rate, damping, max_weight, warmup_steps, device)
        self._random = random.Random(seed)
        self._measure = torch.zeros(())
        # kept blocks, visible blocks and tiles since the last step, and those of the last step
        self._seen: tuple[Any, Any, Any] | None = None
        self._last: tuple[Any, Any, Any] = (0.0, 0.0, 0.0)
        self._count = 0
        self._has_warned = False
        self.layers = tuple(
            RegularizedLayer(site, index, settings.tile_fraction, settings.block_size[0])
            for index, site in enumerate(sites)
        )
        self._draw()
        self._installation = Installation(sites, self.layers)

    def _make_ascent(
        self, rate: float, damping: float, max_weight: float, warmup: int, device: torch.device
    ) -> DualAscent:
        target = check_share("target_density", self.target_density)
        if target == 1.0:
            raise ValueError("target_density must be less than 1, which is dense attention")
        if not self.settings.tells_density:
            raise ValueError(
                f"measure={self.settings.measure!r} does not tell the density: with target_density "
                "use 'density' or 'tile', or give a fixed weight"
            )
        largest = check_positive("max_weight", max_weight)
        rate = check_positive("rate", rate)
        if damping < 0:
            raise ValueError(f"damping must be 0 or more, got {damping}")
        return DualAscent(target, rate, damping, largest, warmup, device)

    def penalty(self) -> Tensor:
        """weight * measure of the forward passes since the last call, to be added to the loss.

        Returns:
            fp32, without dimensions, with a gradient to the model.

        Raises:
            RuntimeError: no attention was measured since the last call.
        """
        seen = [call for layer in self.layers for call in layer.take()]
        if not seen:
            raise RuntimeError(
                "no attention was measured: run the model in training mode and with gradients "
                "before penalty(). Under reentrant activation checkpointing the forward has no "
                'gradients: pass {"use_reentrant": False} to gradient_checkpointing_enable'
            )
        sums = measure_calls(seen, self.settings)
        self._move(sums[0].measure.device)
        measure = _total(sums, "measure") / _at_least_one(_total(sums, "count"))
        kept, visible, tiles = (_total(sums, name) for name in ("kept", "visible", "tiles"))
        if self._seen is not None:
            kept, visible, tiles = map(operator.add, self._seen, (kept, visible, tiles))
        self._seen, self._measure = (kept, visible, tiles), measure.detach()
        return self._control.weight(self._count) * measure

    def step(self) -> None:
        """After each step of the optimizer: steer the weight and draw the next sample.

        Raises:
            RuntimeError: `penalty` was not called since the last step.
        """
        if self._seen is None:
            raise RuntimeError("call penalty() and add it to the loss before step()")
        seen, self._seen = self._seen, None
        with torch.no_grad():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                seen = self._summed_over_processes(seen)
            if self.settings.tells_density:
                self._control.update(seen[0] / _at_least_one(seen[1]), self._count)
        self._last = seen
        self._count += 1
        self._draw()
        if self._count % CHECK_EVERY == 0:
            self._warn_if_out_of_reach()

    def stats(self) -> RegularizerStatistics:
        """The numbers of the last step. Waits for the device."""
        kept, visible, tiles = map(float, self._last)
        target = None
        if isinstance(self._control, DualAscent):
            # Without an observation there is no density to start from.
            reached = self._control.target_at(self._count - 1) if self._count else None
            target = self._control.target if reached is None else float(reached)
        return RegularizerStatistics(
            step=self._count,
            density=kept / visible if kept and visible else None,
            target=target,
            weight=float(self._control.weight(self._count)),
            measure=float(self._measure),
            floor=tiles / visible if visible else 0.0,
        )

    def state_dict(self) -> dict[str, Any]:
        """What continues a run: plain numbers."""
        return {
            "step": self._count,
            "control": {name: float(value) for name, value in self._control.state.items()},
            "random": self._before_draw,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict` of a regularizer with the same arguments."""
        if set(state["control"]) != set(self._control.state):
            raise ValueError(
                "the state is of a regularizer with "
                + ("a fixed weight" if not state["control"] else "target_density")
            )
        self._count = state["step"]
        for name, value in state["control"].items():
            self._control.state[name].fill_(value)
        version, internal, gauss = state["random"]  # lists, if it went through JSON
        self._random.setstate((version, tuple(internal), gauss))
        self._draw()

    def remove(self) -> None:
        """Give the model its attention back; a second call does nothing."""
        self._installation.remove()
        for layer in self.layers:
            layer.take()

    def __enter__(self) -> EntropyRegularizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _summed_over_processes(self, seen: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        device = self._measure.device
        # What is made of numbers would wait for the device; filling does not.
        total = torch.stack([
            x.float() if isinstance(x, Tensor) else torch.full((), float(x), device=device)
            for x in seen
        ])  # fmt: skip
        torch.distributed.all_reduce(total, group=self.process_group)
        kept, visible, tiles = total.unbind()
        return kept, visible, tiles

    def _draw(self) -> None:
        """Which layers and which blocks of queries the next step measures."""
        self._before_draw = self._random.getstate()
        draws = [self._random.random() for _ in self.layers]
        count, share = len(self.layers), self.layer_fraction
        size = max(1, round(count * share))
        first = self._random.random()
        active = {min(count - 1, int((k + first) * count / size)) for k in range(size)}
        for index, (layer, draw) in enumerate(zip(self.layers, draws, strict=True)):
            layer.draw = draw if index in active else None

    def _move(self, device: torch.device) -> None:
        """Follow a model that was moved after the regularizer was made."""
        state = self._control.state
        if any(value.device != device for value in state.values()):
            state.update({name: value.to(device) for name, value in state.items()})

    def _warn_if_out_of_reach(self) -> None:
        control = self._control
        if self._has_warned or not isinstance(control, DualAscent):
            return
        stats, reason = self.stats(), None
        is_at_bound = float(control.state["multiplier"]) >= control.largest
        is_above = (stats.density or 0.0) > (1 + TOLERANCE) * (stats.target or 0.0)
        if stats.floor > control.target:
            reason = (
                f"at these lengths it cannot be less than {stats.floor:.4f}, one block of keys for "
                f"each block of queries of {self.settings.block_size[0]} tokens; use smaller blocks"
            )
        elif is_at_bound and is_above:
            reason = (
                f"the weight has reached max_weight={control.largest} and stays there; allow more, "
                "or a higher density"
            )
        if reason is not None:
            self._has_warned = True
            warnings.warn(
                f"target_density={control.target} is not met after {self._count} steps, density "
                f"is {stats.density:.4f}: {reason}",
                stacklevel=3,
            )


def _total(sums: list[Sums], name: str) -> Any:
    """A tensor without dimensions, or a number where the host knows it."""
    device = sums[0].measure.device
    found = (getattr(each, name) for each in sums)
    return reduce(operator.add, (x.to(device) if isinstance(x, Tensor) else x for x in found))


def _at_least_one(count: Tensor | float) -> Tensor | float:
    return count.clamp(min=1.0) if isinstance(count, Tensor) else max(count, 1.0)


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None or first.is_meta else first.device
