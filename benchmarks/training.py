"""Training runs of the experiments: seeded, resumable, and not done twice.

A run is cut off when its time is over; started again, it goes on from its checkpoint and does
what it would have done: batches are drawn from the number of the step, and what has a state (the
optimizer, a regularizer) is saved with it. A run that is in the result store is not run again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from entropy_attn.benchmarks.registry import Context
from entropy_attn.benchmarks.store import Record, Store

Run = TypeVar("Run")
SAVE_EVERY = 60.0  # seconds


class Stateful(Protocol):
    """What a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Schedule:
    """AdamW, a linear warm-up over a tenth of the steps, and a cosine down to 0.

    Attributes:
        steps: of the optimizer.
        learning_rate: at its highest.
        weight_decay: of weights with two or more dimensions; others have none.
    """

    steps: int
    learning_rate: float
    weight_decay: float = 0.0

    def rate_at(self, step: int) -> float:
        """The factor of the learning rate in a step, counted from 0."""
        warmup = max(1, self.steps // 10)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass
class Trainee:
    """What is trained.

    Attributes:
        model: its parameters are trained; moved to its device before.
        loss: of a step, counted from 0, with everything that is added to it.
        after_step: called after each step of the optimizer.
        extra: other modules that are trained, by name.
        stateful: other things that a checkpoint holds, by name.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    after_step: Callable[[], None] = lambda: None
    extra: Mapping[str, nn.Module] = field(default_factory=dict)
    stateful: Mapping[str, Stateful] = field(default_factory=dict)


def train(
    trainee: Trainee,
    schedule: Schedule,
    checkpoint: Path,
    *,
    identity: Mapping[str, Any],
    progress: Callable[[str], None] = lambda text: None,
) -> float:
    """Train to the end of the schedule, from the checkpoint if there is one of this run.

    Args:
        checkpoint: a file; removed when the run is over.
        identity: what tells this run from others; a checkpoint of another run is not used.

    Returns:
        The mean loss of the last tenth of the steps that this call ran, nan if it ran none.
    """
    modules = {"model": trainee.model, **trainee.extra}
    parameters = [p for module in modules.values() for p in module.parameters()]
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": schedule.weight_decay},
         {"params": others, "weight_decay": 0.0}],
        schedule.learning_rate, fused=parameters[0].is_cuda,
    )  # fmt: skip
    saved: dict[str, Stateful] = {**modules, "optimizer": optimizer, **trainee.stateful}
    first = _load(checkpoint, saved, identity)
    trainee.model.train()
    losses: list[Tensor] = []
    last_save = time.monotonic()
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * schedule.rate_at(step)
        loss = trainee.loss(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trainee.after_step()
        losses.append(loss.detach())
        if step % max(1, schedule.steps // 20) == 0:
            progress(f"step {step} of {schedule.steps}")
        if time.monotonic() - last_save > SAVE_EVERY:
            _save(checkpoint, saved, identity, step + 1)
            last_save = time.monotonic()
    trainee.model.eval()
    checkpoint.unlink(missing_ok=True)
    tail = losses[-max(1, schedule.steps // 10) :]
    return torch.stack(tail).mean().item() if tail else math.nan


def _save(
    path: Path, saved: Mapping[str, Stateful], identity: Mapping[str, Any], step: int
) -> None:
    states = {name: part.state_dict() for name, part in saved.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    torch.save({"identity": dict(identity), "step": step, "states": states}, unfinished)
    unfinished.replace(path)  # a run that is cut off here keeps the older checkpoint


def _load(path: Path, saved: Mapping[str, Stateful], identity: Mapping[str, Any]) -> int:
    """Restore a checkpoint of this run; returns the step to go on with."""
    if not path.exists():
        return 0
    found = torch.load(path, map_location="cpu", weights_only=True)
    if found["identity"] != dict(identity):
        return 0
    for name, part in saved.items():
        part.load_state_dict(found["states"][name])
    return found["step"]


def runs_to_do(
    context: Context, suite: str, runs: Iterable[tuple[Run, dict[str, Any]]]
) -> list[tuple[Run, dict[str, Any]]]:
    """Of the runs, each with the config of its record, those of this process that are not done.

    Processes that share the runs of a suite may share a result store too.
    """
    done = _done(Store(context.out), suite)
    mine = list(islice(runs, context.share.index, None, context.share.count))
    left = [(run, config) for run, config in mine if config not in done]
    if len(left) < len(mine):
        context.progress(f"{len(mine) - len(left)} of {len(mine)} runs are in the store")
    return left


def is_done(store: Store, suite: str, config: Mapping[str, Any]) -> bool:
    """Whether the store has this measurement from a machine like this one, with status ok."""
    return dict(config) in _done(store, suite)


def _done(store: Store, suite: str) -> list[dict[str, Any]]:
    """The configs of all such measurements."""
    machine = Record(suite, {}, {}).machine
    found = (r for r in store.load(suite) if r.machine == machine)
    return [r.config for r in found if r.result["status"] == "ok"]


def checkpoint_of(context: Context, suite: str, config: Mapping[str, Any]) -> Path:
    """Where the checkpoint of a run stands; each run has its own file."""
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode()).hexdigest()[:12]
    return context.out / "checkpoints" / f"{suite}_{digest}.pt"


def batches(count: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Which of ``count`` samples each step takes: epochs in a new order each, by a seed."""
    generator = torch.Generator().manual_seed(seed)
    needed = steps * size
    epochs = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
    return list(torch.cat(epochs)[:needed].view(steps, size))
