"""The suites by name, and what a suite gets and gives back.

A suite is a module in `suites/` with a function ``run(context)`` that yields `Row`s. Adding one
is adding its module and a line here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

Case = TypeVar("Case")


@dataclass(frozen=True)
class Share:
    """Which of the runs of a suite of training runs a process does: every ``count``-th of them."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """Of "2/4", the second of four.

        Raises:
            ValueError: the text is something else.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"a share is written like 2/4, the second of four; got {text!r}")
        return cls(int(match[1]) - 1, int(match[2]))


@dataclass(frozen=True)
class Context:
    """What a suite runs with.

    Attributes:
        device: where the tensors go.
        quick: finish within a minute.
        out: folder for files beside the records.
        progress: called with a short text before each step.
        share: of the runs, in suites whose runs are shared between processes.
        measures_cpu: the suite measures the CPU, which has no small form then.
        is_measured: whether a part of a record's config is to be left out, as it was measured.
        only: texts; a case is run if its name has one of them. None of them runs all cases.
    """

    device: torch.device
    quick: bool
    out: Path
    progress: Callable[[str], None] = field(default=lambda text: None)
    share: Share = Share()
    measures_cpu: bool = False
    is_measured: Callable[[Mapping[str, Any]], bool] = field(default=lambda config: False)
    only: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def form(self) -> str:
        """Which form of a suite runs: "full", "quick", or "small" without the machine for it."""
        if not self.on_gpu and not self.measures_cpu:
            return "small"
        return "quick" if self.quick else "full"

    def left(
        self,
        cases: Iterable[Case],
        config_of: Callable[[Case], dict[str, Any]] = asdict,
        contestants: Iterable[str] = (),
    ) -> list[Case]:
        """The cases that are to be run: those that were asked for and not measured yet.

        Args:
            config_of: what the records of a case share in their configs, besides the form.
            contestants: whose records a case that was measured has, each.
        """
        names = [{"contestant": name} for name in contestants] or [{}]

        def is_left(case: Case) -> bool:
            shared = {"form": self.form, **config_of(case)}
            return not all(self.is_measured({**shared, **name}) for name in names)

        return [case for case in cases if self._is_wanted(case) and is_left(case)]

    def _is_wanted(self, case: object) -> bool:
        name = getattr(case, "name", str(case))
        return not self.only or any(text in name for text in self.only)


def short(choice: Any) -> str:
    """A scorer or budget as one writes it: TopK(0.25), Pooled(8, max)."""
    shown = {f.name: (getattr(choice, f.name), f) for f in fields(choice)}
    words = [str(value) for value, f in shown.values() if not f.kw_only and value is not None]
    words += [
        f"{name}={value}" for name, (value, f) in shown.items() if f.kw_only and value != f.default
    ]
    return f"{type(choice).__name__}({', '.join(words)})"


@dataclass(frozen=True)
class Row:
    """One measurement of a suite, to be stored and shown.

    Attributes:
        config: what was measured, the key of the record.
        result: what came out; "status" is "ok" if all is well.
        text: for the terminal, one line.
        is_ours: whether a bad status is a fault of this package.
    """

    config: dict[str, Any]
    result: dict[str, Any]
    text: str
    is_ours: bool = False


@dataclass(frozen=True)
class Suite:
    """A suite of measurements.

    Attributes:
        trains: it consists of training runs, which processes may share.
        measures_cpu: it measures the CPU, whether there is a GPU or not.
        has_cases: it consists of cases of which some can be run; see `Context.left`.
    """

    name: str
    summary: str
    trains: bool = False
    measures_cpu: bool = False
    has_cases: bool = True

    def run(self, context: Context) -> Iterator[Row]:
        module = import_module(f"entropy_attn.benchmarks.suites.{self.name}")
        yield from module.run(context)


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("attention", "speed of the kernels, forward and backward, against all baselines"),
        Suite("select", "cost of choosing blocks, as a share of the sparse attention's time"),
        Suite("decode", "one token a sequence against a long cache, lists and pages"),
        Suite("reorder", "what sorting tokens costs, and how many blocks it saves"),
        Suite("entropy", "range-partition entropy against eager PyTorch, torch.compile and a copy"),
        Suite("hull", "convex hulls of points on a GPU: the filter beside a copy, and Qhull"),
        Suite("vit", "ViT-B/16 end to end, 224 to 1024 pixels, by attention"),
        Suite("llm", "prefill and decoding of language models of 7B parameters, by attention"),
        Suite("train", "what the regularizer adds to a training step"),
        Suite(
            "finetune",
            "perplexity against density of SmolLM2 fine-tuned with regularizers",
            trains=True,
            has_cases=False,
        ),
        Suite("crossover", "where sparse attention with its selection beats the best dense one"),
        Suite("quality", "perplexity of a real language model against density"),
        Suite(
            "vision",
            "small vision transformers by regularizer: sparse, corrupted, and where they look",
            trains=True,
            has_cases=False,
        ),
        Suite(
            "geometry",
            "convex hulls, orders of points by entropy, and the triangulations that they speed up",
            measures_cpu=True,
        ),
        Suite(
            "masks",
            "where SmolLM2-135M looks, and the blocks that are chosen: pictures",
            measures_cpu=True,
            has_cases=False,
        ),
        Suite(
            "demo",
            "SmolLM2-135M on real prose, dense and sparse: table and pictures",
            has_cases=False,
        ),
    )
}
