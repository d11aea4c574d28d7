"""The demo: a pretrained model reads real prose, dense and sparse, through the real drop-in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import entropy_attn as ea
from entropy_attn.benchmarks.baselines import our_backend
from entropy_attn.benchmarks.environment import environment, machine_name
from entropy_attn.benchmarks.model import (
    MODEL_NAME,
    KeptMass,
    LocalWindow,
    Setting,
    load_model,
    negative_log_likelihood,
    shared_copy,
    sparsify,
    windows,
)
from entropy_attn.benchmarks.plots import HeadPicture, Point, frontier, mask_heat_maps
from entropy_attn.benchmarks.prose import prose, prose_from_file
from entropy_attn.benchmarks.registry import short
from entropy_attn.benchmarks.store import Record, Store
from entropy_attn.benchmarks.timing import measure
from entropy_attn.reference.dense import entropy

CONTEXT_CPU, CONTEXT_GPU = 2048, 8192
QUICK_CONTEXT_CPU = 512
DENSE = "dense, SDPA"
ORACLE = "oracle"
PREDICTOR = ea.SparsityConfig().scorer
BUDGET = ea.SparsityConfig().budget


@dataclass(frozen=True)
class Outcome:
    """One line of the demo's table; None where a column does not apply."""

    name: str
    family: str
    label: str
    density: float
    kept_mass: float
    perplexity: float | None = None
    change: float | None = None
    milliseconds: float | None = None


@dataclass
class Demo:
    """Everything that the demo found out, and where its pictures are."""

    context: int
    text: str
    text_digest: str
    device: str
    backend: str
    sparse_calls: int
    rows: list[Outcome] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)

    def table(self) -> Table:
        table = Table(
            title=f"{MODEL_NAME}, {self.context} tokens of {self.text}, on {self.device}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("how blocks are chosen", no_wrap=True)
        for column in ("density", "kept mass", "perplexity", "change", "time"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.name,
                f"{row.density:.1%}",
                f"{row.kept_mass:.1%}",
                "–" if row.perplexity is None else f"{row.perplexity:.3f}",
                "–" if row.change is None else f"{row.change:+.3f}",
                "–" if row.milliseconds is None else _duration(row.milliseconds),
            )
        return table

    def notes(self) -> list[str]:
        lines = [
            f"predicted: {short(PREDICTOR)} guesses the attention of each tile from groups "
            "of tokens. oracle: it is known exactly. local window: the nearest blocks.",
            "density: share of the causal tiles that are computed.",
            "kept mass: share of the true attention that falls on them.",
            "time: median of whole forward passes, choice of blocks included.",
            f"All {self.sparse_calls} timed sparse calls ran sparse, by backend {self.backend!r}.",
        ]
        if self.backend == "reference":
            lines.append(
                "On a CPU the sparse attention is the plain PyTorch reference: judge the quality "
                "here, and the speed on a GPU."
            )
        return lines + [f"picture: {path}" for path in self.pictures]

    def records(self) -> list[Record]:
        """One record a row."""
        shared = {
            "model": MODEL_NAME,
            "context": self.context,
            "text": self.text,
            "text_digest": self.text_digest,
        }
        return [
            Record(
                "demo",
                {**shared, "name": row.name, "family": row.family, "budget": row.label},
                {
                    "status": "ok",
                    "density": row.density,
                    "kept_mass": row.kept_mass,
                    "perplexity": row.perplexity,
                    "change": row.change,
                    "median_ms": row.milliseconds,
                    "backend": self.backend,
                },
            )
            for row in self.rows
        ]


def demo_settings(on_gpu: bool, quick: bool) -> list[Setting]:
    """What the demo compares; a few points each of an oracle, a predictor and a plain window."""
    predictor = ("predicted", PREDICTOR)
    oracle = (ORACLE, ea.TrueMass())
    window = ("local window", LocalWindow())
    if quick:
        return [Setting(*predictor, BUDGET), Setting(*window, ea.TopK(0.3))]
    settings = [Setting(*predictor, budget) for budget in (ea.TopP(0.85), BUDGET, ea.TopP(0.98))]
    settings += [
        Setting(*oracle, ea.Perplexity(c)) for c in ((0.5, 1.0, 2.0) if on_gpu else (1.0,))
    ]
    settings += [Setting(*window, ea.TopK(k)) for k in ((0.15, 0.3, 0.5) if on_gpu else (0.3,))]
    return settings


def run_demo(
    *,
    device: torch.device,
    quick: bool,
    out: Path,
    text: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Demo:
    """Run the demo, write its pictures and records to ``out`` and return what it found.

    Raises:
        ModelNotFound: the model's file or a package that reads it is missing.
        RuntimeError: the drop-in did not run sparse where it was told to.
    """
    on_gpu = device.type == "cuda"
    context = CONTEXT_GPU if on_gpu else QUICK_CONTEXT_CPU if quick else CONTEXT_CPU
    source = prose_from_file(text) if text else prose("held-out")
    progress(f"loading {MODEL_NAME}")
    model, tokenizer = load_model(device, torch.bfloat16 if on_gpu else torch.float32)
    ids = windows(tokenizer, source.text, context, 1, device)[0]

    progress("dense attention")
    dense = math.exp(negative_log_likelihood(model, ids))
    rows = [Outcome(DENSE, "dense", "dense", 1.0, 1.0, dense)]
    settings = demo_settings(on_gpu, quick)
    tiles: list[tuple[Tensor, Tensor]] = []
    for number, setting in enumerate(settings, start=1):
        progress(f"quality, {number} of {len(settings)}: {setting.name}")
        drawn = setting == pictured(settings)
        probe = KeptMass(setting.scorer, setting.budget, keep_tiles=drawn)
        with sparsify(model, setting, scorer=probe):
            found = math.exp(negative_log_likelihood(model, ids))
        tiles += probe.tiles
        rows.append(Outcome(
            setting.name, setting.family, short(setting.budget), probe.density, probe.mass,
            found, found - dense,
        ))  # fmt: skip

    # The oracle's time would say nothing: it looks at all scores to choose blocks.
    timed = [setting for setting in settings if setting.family != ORACLE]
    progress(f"time: dense and {len(timed)} sparse models take turns")
    times, sparse_calls = _times(model, timed, ids)
    others = [
        Outcome(name, "dense", "dense", 1.0, 1.0)
        for name in times
        if name not in {row.name for row in rows}
    ]
    rows = [replace(row, milliseconds=times.get(row.name)) for row in (*others, *rows)]

    demo = Demo(
        context=context,
        text=source.name,
        text_digest=source.digest,
        device=machine_name(environment()),
        backend=our_backend(device),
        sparse_calls=sparse_calls,
        rows=rows,
    )
    progress("drawing")
    demo.pictures = _draw(demo, short(pictured(settings).scorer), tiles, out)
    store = Store(out)
    for record in demo.records():
        store.append(record)
    return demo


def pictured(settings: Sequence[Setting]) -> Setting:
    """The setting whose blocks are drawn: the default one."""
    return next(s for s in settings if (s.scorer, s.budget) == (PREDICTOR, BUDGET))


def _times(model: Any, settings: Sequence[Setting], ids: Tensor) -> tuple[dict[str, float], int]:
    """Median milliseconds of a forward pass by name, and how many attention calls ran sparse.

    Each contestant is a copy of the model with the weights of the original, so that all can take
    turns.
    """
    on_gpu = ids.device.type == "cuda"

    def forward(copied: Any) -> None:
        with torch.inference_mode():
            copied.base_model(input_ids=ids[None], use_cache=False)

    def flash(copied: Any) -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            forward(copied)

    calls: dict[str, list[Callable[[], None]]] = {DENSE: [partial(forward, shared_copy(model))]}
    if on_gpu:
        eager = shared_copy(model)
        eager.set_attn_implementation("eager")
        calls["dense, eager"] = [partial(forward, eager)]
        calls["dense, FlashAttention (SDPA)"] = [partial(flash, shared_copy(model))]
    with ExitStack() as stack:
        handles = []
        for setting in settings:
            copied = shared_copy(model)
            handles.append(stack.enter_context(sparsify(copied, setting)))
            calls[setting.name] = [partial(forward, copied)]
        # A pass on a CPU takes seconds: it is warm by now, and one round has to do.
        timings = measure(calls, seconds=10.0, rounds=None if on_gpu else 1, device=ids.device)
        sparse_calls = sum(handle.stats().sparse for handle in handles)
    return {name: timing.median_ms for name, timing in timings.items()}, sparse_calls


def _draw(demo: Demo, scorer: str, tiles: Sequence[tuple[Tensor, Tensor]], out: Path) -> list[Path]:
    points = [
        Point(row.family, row.label, row.density, row.change)
        for row in demo.rows
        if row.change is not None
    ]
    title = f"{MODEL_NAME}, {demo.context} tokens of prose: what sparse attention costs"
    files = [out / "frontier.png", out / "masks.png"]
    frontier(points, title, files[0])
    mask_heat_maps(
        heads_to_show(tiles),
        f"{MODEL_NAME}: the attention of four heads, and the blocks that {scorer} chose",
        files[1],
    )
    return files


def heads_to_show(tiles: Sequence[tuple[Tensor, Tensor]], count: int = 4) -> list[HeadPicture]:
    """Heads from simple to complex attention, by the mean effective number of blocks, exp(H).

    Args:
        tiles: for each layer the true mass (H, M, M) and the kept blocks (H, M, M).
    """
    effective = torch.stack([entropy(mass).exp().mean(-1) for mass, _ in tiles])  # layers, heads
    order = effective.flatten().argsort()
    pictures = []
    for share in np.linspace(0.05, 0.95, count):
        index = int(order[round(share * (len(order) - 1))])
        layer, head = divmod(index, effective.shape[1])
        mass, kept = (t[head].float().cpu().numpy() for t in tiles[layer])
        title = f"layer {layer}, head {head}\n{effective[layer, head]:.1f} effective blocks"
        pictures.append(HeadPicture(
            title, mass, kept.astype(bool), float(kept[np.tril(np.ones_like(kept)) > 0].mean()),
            float((mass * kept).sum(-1).mean()),
        ))  # fmt: skip
    return pictures


def _duration(milliseconds: float) -> str:
    return f"{milliseconds:.1f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"
