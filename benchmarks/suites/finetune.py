"""Fine-tuning for sparse attention: held-out perplexity against density, by regularizer.

SmolLM2-135M is fine-tuned on prose once for each method, strength and seed, and read through the
real drop-in on prose that it was not trained on, with blocks chosen by the default predictor and
by an oracle that knows the true attention mass. One record holds one trained model: its dense
perplexity, the density that its attention needs, and both frontiers.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import entropy_attn as ea
from entropy_attn.benchmarks.model import (
    MODEL_NAME,
    Setting,
    load_model,
    perplexity,
    sparsify,
    windows,
)
from entropy_attn.benchmarks.penalties import DENSITY, FEW_LAYERS, KeyRangeEntropy, make_penalty
from entropy_attn.benchmarks.prose import prose, training_prose
from entropy_attn.benchmarks.registry import Context, Row, short
from entropy_attn.benchmarks.training import (
    Schedule,
    Trainee,
    batches,
    checkpoint_of,
    runs_to_do,
    train,
)

NAME = "finetune"
# Of the experiment as a whole: a change that makes older records incomparable raises it.
VERSION = 2
BLOCK = 64
UNTRAINED, PLAIN = "not trained", "plain"
PREDICTED, ORACLE, TOP_K = "predicted", "oracle", "top-k"


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: of the regularizer, see `make_penalty`; UNTRAINED, or PLAIN for none.
        strength: of the regularizer.
        budget: of sparse attention in training, the blocks chosen by the default predictor; None
            for dense attention.
        length: of the training, in lengths of the plan's.
    """

    name: str
    strength: float = 0.0
    budget: ea.TopK | ea.TopP | None = None
    length: int = 1

    def config(self, plan: Plan) -> dict[str, Any]:
        """For a record."""
        attends = "dense" if self.budget is None else short(self.budget)
        steps = plan.steps * self.length
        return {
            "method": self.name, "strength": self.strength, "attends": attends, "steps": steps
        }  # fmt: skip

    def __str__(self) -> str:
        words = self.name if self.name in (UNTRAINED, PLAIN) else f"{self.name} {self.strength:g}"
        words += "" if self.budget is None else f", sparse by {short(self.budget)}"
        return words if self.length == 1 else f"{words}, {self.length} times as long"


@dataclass(frozen=True)
class Plan:
    """How much is trained and read.

    Attributes:
        length: tokens of a sequence, in training and held out.
        batch, steps, learning_rate: of the training.
        windows: held-out sequences.
        layers: of the model that are kept, None for all.
        seeds: of the order of the batches and of the samples.
    """

    length: int
    batch: int
    steps: int
    learning_rate: float
    windows: int
    layers: int | None
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, form: str) -> Plan:
        if form == "small":
            return cls(256, 1, 3, 1e-4, 1, 2, (0,))
        steps, seeds = (20, (0,)) if form == "quick" else (120, (0, 1, 2))
        return cls(8192, 2, steps, 1e-4, 2, None, seeds)


def methods(form: str) -> list[Method]:
    """What is compared. Sparse attention in training is no regularizer: it is crossed with ours."""
    sparse = ea.TopP(0.85)
    if form == "small":
        return [Method(PLAIN), Method(DENSITY, 0.1, sparse), Method("range entropy of keys", 0.1)]
    main = [Method(PLAIN), Method(PLAIN, budget=sparse), Method(DENSITY, 0.1, sparse)]
    if form == "quick":
        return [Method(UNTRAINED), *main]
    return [
        Method(UNTRAINED),
        *main,
        Method(DENSITY, 0.13, sparse),
        Method(FEW_LAYERS, 0.13, sparse),
        Method(DENSITY, 0.1),
        Method("row entropy", 0.03),
        Method("L1 of scores", 0.02),
        Method("range entropy of keys", 0.1),
        Method(PLAIN, budget=ea.TopK(0.15)),
        Method(DENSITY, 0.05),
        Method("row entropy", 0.1),
        Method("L1 of scores", 0.1),
        # Whether what the regularizer costs at first comes back. It does not: with so little text
        # these runs overfit.
        Method(PLAIN, length=4),
        Method(PLAIN, budget=sparse, length=4),
        Method(DENSITY, 0.1, sparse, length=4),
    ]


def settings(form: str) -> list[Setting]:
    """The points of the frontiers."""
    if form == "small":
        return [Setting(PREDICTED, ea.Envelope(8), ea.TopP(0.9), BLOCK)]
    shares = (0.6, 0.75, 0.85, 0.92, 0.97)
    found = [Setting(PREDICTED, ea.Envelope(8), ea.TopP(p), BLOCK) for p in shares]
    found += [Setting(ORACLE, ea.TrueMass(), ea.Perplexity(c), BLOCK) for c in (0.6, 1.0)]
    return found + [Setting(TOP_K, ea.Envelope(8), ea.TopK(k), BLOCK) for k in (0.06, 0.12, 0.25)]


def run(context: Context) -> Iterator[Row]:
    plan, is_small = Plan.of(context.form), context.form == "small"
    text, held_out = prose("development") if is_small else training_prose(), prose("held-out")
    shared = {
        "form": context.form, "version": VERSION, "model": MODEL_NAME, "block": BLOCK,
        "text_digest": text.digest, "held_out": held_out.name, "held_out_digest": held_out.digest,
        **{name: value for name, value in asdict(plan).items() if name != "seeds"},
    }  # fmt: skip
    runs = (
        (method, {**shared, **method.config(plan), "seed": seed})
        for seed in plan.seeds
        for method in methods(context.form)
        # Nothing of the untrained model is random, and no seed would save the long runs.
        if (method.name != UNTRAINED and method.length == 1) or seed == plan.seeds[0]
    )
    left = runs_to_do(context, NAME, runs)
    if not left:
        return
    context.progress(f"loading {MODEL_NAME}")
    original, tokenizer = load_model(context.device, torch.float32)
    if plan.layers is not None:
        original.model.layers = original.model.layers[: plan.layers]
        original.config.num_hidden_layers = plan.layers
    count = len(tokenizer(text.text, verbose=False)["input_ids"]) // plan.length
    training = windows(tokenizer, text.text, plan.length, count, context.device)
    ids = windows(tokenizer, held_out.text, plan.length, plan.windows, context.device)
    for method, config in left:
        title = f"{method}, seed {config['seed']}"
        start = time.perf_counter()
        model, result = _train(original, training, method, plan, config, context, title)
        context.progress(f"{title}: reading held-out prose")
        result |= _frontiers(model, ids, context.form)
        result |= {"status": "ok", "seconds": time.perf_counter() - start}
        text_line = (
            f"{title}: perplexity {result['perplexity']:.3f}, density {result['density']:.3f}; "
            + ", ".join(
                f"{p['perplexity']:.2f} at {p['density']:.3f}"
                for p in result["points"]
                if p["family"] == PREDICTED
            )
        )
        yield Row(config, result, text_line, is_ours=True)


def _train(
    original: Any,
    training: Tensor,
    method: Method,
    plan: Plan,
    config: dict[str, Any],
    context: Context,
    title: str,
) -> tuple[Any, dict[str, Any]]:
    """A trained copy of the model, and what its regularizer said last."""
    model = copy.deepcopy(original)
    if method.name == UNTRAINED:
        return model, {}
    steps = config["steps"]
    order = batches(len(training), plan.batch, steps, config["seed"])
    device = training.device

    def forward(step: int) -> Tensor:
        taken = training[order[step].to(device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=context.on_gpu):
            return model(taken, labels=taken, use_cache=False).loss

    trainee = Trainee(model, forward)
    with ExitStack() as undo:
        regularizer = None
        if method.budget is not None:
            setting = Setting(PREDICTED, ea.Envelope(8), method.budget, BLOCK)
            undo.enter_context(sparsify(model, setting))
        if method.name != PLAIN:
            regularizer = make_penalty(
                method.name, model, method.strength, block_size=BLOCK, steps=steps,
                seed=config["seed"],
            )  # fmt: skip
            undo.callback(regularizer.remove)
            trainee.loss = lambda step: forward(step) + regularizer.penalty()
            trainee.after_step = regularizer.step
            if isinstance(regularizer, KeyRangeEntropy):
                model.train()
                forward(0)
                regularizer.start()
            trainee.stateful = {"regularizer": regularizer}

        def tell(text: str) -> None:
            state = f", {regularizer.stats()}" if hasattr(regularizer, "stats") else ""
            context.progress(f"{title}: {text}{state}")

        loss = train(
            trainee,
            Schedule(steps, plan.learning_rate),
            checkpoint_of(context, NAME, config),
            identity=config,
            progress=tell,
        )
        found: dict[str, Any] = {} if math.isnan(loss) else {"loss": loss}
        if isinstance(regularizer, ea.EntropyRegularizer):
            stats = regularizer.stats()
            found["regularizer"] = {"weight": stats.weight, "density": stats.density}
    return model, found


def _frontiers(model: Any, ids: Tensor, form: str) -> dict[str, Any]:
    """Dense perplexity, the density that attention needs, and the points of the frontiers."""
    if ids.is_cuda:
        model = model.to(torch.bfloat16)
    model.eval()
    with ea.observe(model, block_size=BLOCK) as observation, torch.no_grad():
        for window in ids:
            model(window[None], use_cache=False, logits_to_keep=1)
    points = []
    for setting in settings(form):
        with sparsify(model, setting) as handle:
            found = perplexity(model, ids)
            density = handle.stats().density
        points.append({**setting.config(), "perplexity": found, "density": density})
    return {
        "perplexity": perplexity(model, ids),
        "density": observation.density,
        "points": points,
    }
