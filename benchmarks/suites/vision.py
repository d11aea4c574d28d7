"""A small vision transformer trained with regularizers of attention and of outputs: accuracy under
sparse attention, corruption robustness, and how well the kept blocks match the object.

A unit is one model: a task, a method and a seed. Units come seed by seed, so that a run that is
cut off compares all methods; what the store holds is not trained again, and a unit that was cut
off goes on from its checkpoint. Magnitude pruning is no unit: it is plain training, pruned by the
true attention mass.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import entropy_attn as ea
from entropy_attn.benchmarks import images as sources
from entropy_attn.benchmarks.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from entropy_attn.benchmarks.images import Images
from entropy_attn.benchmarks.penalties import (
    AttentionPenalty,
    KeyRangeEntropy,
    make_penalty,
    outputs_penalty,
)
from entropy_attn.benchmarks.registry import Context, Row
from entropy_attn.benchmarks.scenes import SIZE, make_scenes
from entropy_attn.benchmarks.training import (
    Schedule,
    Trainee,
    batches,
    checkpoint_of,
    runs_to_do,
    train,
)
from entropy_attn.benchmarks.vision import (
    BLOCK,
    Geometry,
    TiledViT,
    accuracy,
    autocast,
    natural_density,
    object_overlap,
    sparse_accuracy,
)
from entropy_attn.selection import DEFAULT_SCORER

SUITE = "vision"
SPARSITIES = (0.5, 0.8, 0.9)
OVERLAP_SPARSITY = 0.8
SCORERS: dict[str, Callable[..., Tensor]] = {"true mass": ea.TrueMass(), "default": DEFAULT_SCORER}
FOLDER_VARIABLE = "ENTROPY_ATTN_IMAGES"  # an ImageNet-style folder with train and val
CIFAR_VARIABLE = "ENTROPY_ATTN_CIFAR100"  # with cifar-100-python and CIFAR-100-C below it


# --- what is trained ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A regularizer at a strength.

    Attributes:
        name: in tables.
        penalty: for `make_penalty` or `outputs_penalty`; None for plain training.
        strength: a target density for "density", else a weight.
        options: of the regularizer.
        part: "methods", "ablation", or "reference" for what is no contestant.
        trains: whether there are any steps.
    """

    name: str
    penalty: str | None = None
    strength: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    part: str = "methods"
    trains: bool = True


OUTPUT_PENALTIES = ("label smoothing", "confidence")
# Strengths from short runs of a smaller model on the digits: the largest of a few that left dense
# accuracy about as it was. No such weight of the last two lowered the density.
DENSITY, ROW, RANGE, SCORES = (
    Method("density (ours)", "density", 0.1),
    Method("row entropy", "row entropy", 0.3),
    Method("range entropy of keys (paper)", "range entropy of keys", 0.02),
    Method("L1 of scores", "L1 of scores", 0.02),
)
PLAIN = Method("plain")
# A target that stands out is found by random weights as well; overlaps start from there.
UNTRAINED = Method("random weights", part="reference", trains=False)
METHODS = (
    PLAIN,
    DENSITY,
    RANGE,
    ROW,
    SCORES,
    Method("label smoothing", "label smoothing", 0.1),
    Method("confidence penalty", "confidence", 0.1),
)


def _ablation(base: Method, changed: str, strength: float | None = None, **options: Any) -> Method:
    amount = base.strength if strength is None else strength
    return Method(f"{base.name}, {changed}", base.penalty, amount, options, "ablation")


ABLATION = (
    _ablation(DENSITY, "target 0.07", 0.07),
    _ablation(DENSITY, "target 0.2", 0.2),
    _ablation(ROW, "weight 0.1", 0.1),
    _ablation(SCORES, "weight 0.1", 0.1),
    _ablation(RANGE, "weight 0.1", 0.1),
    _ablation(RANGE, "weight 0.5", 0.5),
    _ablation(RANGE, "alpha x 0.5", sharpness=0.5),
    _ablation(RANGE, "alpha x 4", sharpness=4.0),
    _ablation(RANGE, "64 anchors", num_anchors=64),
    _ablation(RANGE, "no Lloyd steps", lloyd_steps=0),
    _ablation(RANGE, "learned anchors", learn_anchors=True),
)


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        geometry: of the model.
        batch: images a step.
        steps: of each task, by its name; others have "other".
        train, test: images that are made, of tasks that are made.
        corruptions: that are tried.
    """

    geometry: Geometry
    batch: int
    steps: dict[str, int]
    train: int
    test: int
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    ablation: tuple[Method, ...]
    corruptions: tuple[str, ...]
    learning_rate: float = 1e-3
    weight_decay: float = 0.05

    @classmethod
    def of(cls, form: str) -> Plan:
        if form == "small":
            geometry = Geometry(hidden=32, layers=2, heads=1, mlp=64)
            few = {"scenes": 3, "other": 3}
            return cls(geometry, 8, few, 24, 16, (0,), (PLAIN, DENSITY), (), ("contrast",))
        steps = {"scenes": 500, "photographs": 300, "digits": 150, "other": 2000}
        every = tuple(CORRUPTIONS)
        if form == "quick":
            steps = {name: count // 5 for name, count in steps.items()}
            return cls(Geometry(), 256, steps, 10240, 512, (0,), METHODS[:3], (), every)
        return cls(Geometry(), 256, steps, 40960, 1024, tuple(range(5)), METHODS, ABLATION, every)

    def steps_of(self, unit: Unit) -> int:
        return self.steps.get(unit.task, self.steps["other"]) if unit.method.trains else 0


@dataclass(frozen=True)
class Unit:
    """One model to be trained."""

    task: str
    method: Method
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}, {self.method.name}, seed {self.seed}"

    def config(self, form: str, plan: Plan) -> dict[str, Any]:
        """For a record."""
        return {
            "form": form,
            "task": self.task,
            "method": self.method.name,
            "penalty": self.method.penalty,
            "strength": self.method.strength,
            "options": self.method.options,
            "part": self.method.part,
            "seed": self.seed,
            "steps": plan.steps_of(self),
            "batch": plan.batch,
            "learning_rate": plan.learning_rate,
            "weight_decay": plan.weight_decay,
            "block": BLOCK,
            **asdict(plan.geometry),
        }


def units(plan: Plan, tasks: tuple[str, ...]) -> Iterator[Unit]:
    """Seed by seed; what is of the scenes alone, last; the ablation after the first seed."""
    for seed in plan.seeds:
        for task in tasks:
            yield from (Unit(task, method, seed) for method in plan.methods)
        yield Unit("scenes", UNTRAINED, seed)
        if seed == plan.seeds[0]:
            yield from (Unit("scenes", method, seed) for method in plan.ablation)


# --- what it is trained on ----------------------------------------------------------------------


@dataclass
class Task:
    """A data set on the device, with its test images corrupted.

    Attributes:
        make_corrupted: by corruption, the images of every severity.
    """

    train: Images
    test: Images
    make_corrupted: Callable[[Images], dict[str, list[Images]]]

    @cached_property
    def corrupted(self) -> dict[str, list[Images]]:
        return self.make_corrupted(self.test)


def makers(plan: Plan, device: torch.device) -> dict[str, Callable[[], Task]]:
    """How each task that this machine has the data of is made."""

    def corrupted(test: Images) -> dict[str, list[Images]]:
        return {
            name: [
                Images(test.name, corrupt(test.images, name, severity + 1), test.labels, ())
                for severity in range(SEVERITIES)
            ]
            for name in plan.corruptions
        }

    def scenes() -> Task:
        return Task(
            make_scenes(plan.train, 0, device), make_scenes(plan.test, 1, device), corrupted
        )

    def photographs() -> Task:
        parts = sources.photographs("train", plan.train), sources.photographs("test", plan.test)
        return Task(*(part.to(device) for part in parts), corrupted)

    def digits() -> Task:
        return Task(*(sources.digits(split).to(device) for split in sources.SPLITS), corrupted)

    found: dict[str, Callable[[], Task]] = {"scenes": scenes}
    if find_spec("skimage") and find_spec("sklearn"):
        found["photographs"] = photographs
    if find_spec("sklearn"):
        found["digits"] = digits
    if folder := os.environ.get(FOLDER_VARIABLE):
        root = Path(folder)
        found[root.name] = lambda: Task(
            *(sources.image_folder(root, split, SIZE).to(device) for split in ("train", "val")),
            corrupted,
        )
    if cifar := os.environ.get(CIFAR_VARIABLE):
        found["CIFAR-100"] = lambda: _cifar(Path(cifar), device)
    return found


def _cifar(root: Path, device: torch.device) -> Task:
    folder = root / "cifar-100-python"
    train_part, test = (sources.cifar100(folder, split).to(device) for split in sources.SPLITS)
    return Task(train_part, test, lambda _: {
        name: [part.to(device) for part in severities]
        for name, severities in sources.cifar100_c(root / "CIFAR-100-C").items()
    })  # fmt: skip


# --- the suite ----------------------------------------------------------------------------------


def run(context: Context) -> Iterator[Row]:
    plan = Plan.of(context.form)
    if context.form == "small" and find_spec("kornia") is None:
        context.progress("kornia is not installed: no corruptions")
        plan = replace(plan, corruptions=())
    make = makers(plan, context.device)
    if context.form == "small":
        make = {"scenes": make["scenes"]}
    elif plan.corruptions:
        corrupt(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), "contrast", 1)  # kornia is there
    tasks: dict[str, Task] = {}
    runs = ((unit, unit.config(context.form, plan)) for unit in units(plan, tuple(make)))
    for unit, config in runs_to_do(context, SUITE, runs):
        if unit.task not in tasks:
            context.progress(f"making {unit.task}")
            tasks[unit.task] = make[unit.task]()
        result = run_unit(unit, plan, tasks[unit.task], config, context)
        pruned = ", ".join(
            f"{sparsity} {found['accuracy']:.3f}"
            for sparsity, found in result["sparse"]["true mass"].items()
        )
        text = f"{unit.name}: accuracy {result['accuracy']:.3f}, at sparsity {pruned}"
        yield Row(config, result, text, is_ours=True)


def run_unit(
    unit: Unit, plan: Plan, task: Task, config: dict[str, Any], context: Context
) -> dict[str, Any]:
    """Train a model and measure everything on it."""
    started = time.monotonic()
    checkpoint = checkpoint_of(context, SUITE, config)
    model, loss = train_unit(
        unit, plan, task.train, checkpoint, config, lambda text: context.progress(
            f"{unit.name}: {text}"
        )
    )  # fmt: skip
    trained = time.monotonic()
    context.progress(f"{unit.name}: measuring")
    test = task.test
    result: dict[str, Any] = {
        "status": "ok",
        "train_loss": None if math.isnan(loss) else loss,  # of a run that ended as it was cut off
        "accuracy": accuracy(model, test.images, test.labels),
        "natural_density": natural_density(model, test.images),
        "sparse": {
            scorer: {
                f"{sparsity:g}": dict(
                    zip(
                        ("accuracy", "density"),
                        sparse_accuracy(model, test, sparsity, choose),
                        strict=True,
                    )
                )
                for sparsity in SPARSITIES
            }
            for scorer, choose in SCORERS.items()
        },
        "errors": {
            corruption: [1.0 - accuracy(model, part.images, part.labels) for part in severities]
            for corruption, severities in task.corrupted.items()
        },
    }
    if test.masks is not None:
        result["overlap"] = asdict(object_overlap(model, test, OVERLAP_SPARSITY))
    return result | {"train_s": trained - started, "measure_s": time.monotonic() - trained}


def train_unit(
    unit: Unit, plan: Plan, data: Images, checkpoint: Path, config: dict[str, Any],
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[TiledViT, float]:  # fmt: skip
    """The trained model and its loss at the end."""
    device, method, steps = data.images.device, unit.method, plan.steps_of(unit)
    torch.manual_seed(unit.seed)
    model = TiledViT(plan.geometry, data.images.shape[-1], len(data.classes)).to(device).train()
    if not steps:
        return model.eval(), math.nan
    order = torch.stack(batches(len(data), plan.batch, steps, unit.seed)).to(device)
    penalty = None
    if method.penalty is not None and method.penalty not in OUTPUT_PENALTIES:
        penalty = make_penalty(
            method.penalty, model.vit, method.strength, block_size=BLOCK, steps=steps,
            seed=unit.seed, options=method.options,
        )  # fmt: skip

    def loss(step: int) -> Tensor:
        index = order[step]
        with autocast(device):
            logits = model(data.images[index])
        found = F.cross_entropy(logits.float(), data.labels[index])
        if method.penalty in OUTPUT_PENALTIES:
            return found + method.strength * outputs_penalty(logits, method.penalty)
        return found if penalty is None else found + penalty.penalty()

    trainee = Trainee(model, loss)
    if isinstance(penalty, AttentionPenalty):
        if isinstance(penalty, KeyRangeEntropy):
            with autocast(device):
                model(data.images[order[0]])
            penalty.start()
        trainee = Trainee(model, loss, penalty.step, extra={"penalty": penalty})
    elif penalty is not None:
        trainee = Trainee(model, loss, penalty.step, stateful={"penalty": penalty})
    schedule = Schedule(steps, plan.learning_rate, plan.weight_decay)
    found = train(trainee, schedule, checkpoint, identity=config, progress=progress)
    if penalty is not None:
        penalty.remove()
    return model, found
