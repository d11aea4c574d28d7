"""Pictures, drawn from records and tensors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"
STYLE = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Point:
    """One point of a frontier."""

    density: float
    change: float
    label: str


def frontier(curves: Mapping[str, Sequence[Point]], title: str, path: Path) -> None:
    """Perplexity change against density, one curve per way of choosing blocks."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
        axes.axhline(0.0, color="black", linewidth=0.8)
        for index, (name, points) in enumerate(curves.items()):
            points = sorted(points, key=lambda point: point.density)
            axes.plot(
                [100 * point.density for point in points],
                [point.change for point in points],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                linewidth=1.5,
                label=name,
            )
            for point in points:
                axes.annotate(
                    point.label,
                    (100 * point.density, point.change),
                    textcoords="offset points",
                    xytext=(6, 5),
                    fontsize=7.5,
                    color=COLOURS[index % len(COLOURS)],
                )
        axes.set_xlabel("density: share of the causal tiles that are computed")
        axes.set_ylabel("change of perplexity")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, loc="left")
        axes.margins(x=0.12, y=0.12)
        axes.legend()
        _save(figure, path)


@dataclass(frozen=True)
class HeadPicture:
    """One attention head: true mass (M, M), kept blocks (M, M) bool, and a title."""

    title: str
    mass: np.ndarray
    kept: np.ndarray


def mask_heat_maps(heads: Sequence[HeadPicture], title: str, path: Path) -> None:
    """The attention mass of each tile above the blocks that were chosen without knowing it."""
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, rows = plt.subplots(
            2, len(heads), figsize=(3.0 * len(heads), 6.6), layout="constrained", squeeze=False
        )
        for column, head in enumerate(heads):
            top, bottom = rows[0, column], rows[1, column]
            visible = np.tril(np.ones_like(head.mass, dtype=bool))
            mass = np.where(visible, np.maximum(head.mass, 1e-4), np.nan)
            image = top.imshow(mass, norm=LogNorm(1e-4, 1.0), cmap="magma", interpolation="nearest")
            top.set_title(head.title)
            chosen = np.where(visible, np.where(head.kept, 1.0, 0.15), np.nan)
            bottom.imshow(chosen, cmap="Blues", vmin=0, vmax=1.15, interpolation="nearest")
            share = head.kept[visible].mean()
            kept_mass = (head.mass * head.kept).sum(-1).mean()
            bottom.set_title(f"{share:.0%} of the tiles, {kept_mass:.1%} of the mass", fontsize=9)
            for axes in (top, bottom):
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set_visible(False)
        rows[0, 0].set_ylabel("attention mass (log scale)\nquery tile")
        rows[1, 0].set_ylabel("kept blocks\nquery tile")
        for axes in rows[1]:
            axes.set_xlabel("key block")
        figure.colorbar(
            image, ax=rows[0], shrink=0.85, label="mean attention of the tile's queries"
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        _save(figure, path)


def bars(groups: Mapping[str, Mapping[str, float]], ylabel: str, title: str, path: Path) -> None:
    """Grouped bars: one group per case, one bar per contestant, in the order of first mention."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    with plt.rc_context(STYLE):
        width = max(7.5, 0.24 * sum(map(len, groups.values())) + 2)
        figure, axes = plt.subplots(figsize=(width, 4.6), layout="constrained")
        position, ticks = 0.0, []
        for group in groups.values():
            present = [name for name in names if name in group]
            for offset, name in enumerate(present):
                axes.bar(position + offset, group[name], 0.9, color=_colour(names, name))
            ticks.append(position + (len(present) - 1) / 2)
            position += len(present) + 1.2
        for name in names:
            axes.bar(0, 0, color=_colour(names, name), label=name)
        axes.set_xticks(ticks, list(groups))
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(ylabel)
        axes.set_title(title, loc="left")
        axes.legend(ncols=2, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16))
        _save(figure, path)


def break_even(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, path: Path) -> None:
    """The density below which sparse attention is faster than dense, against length."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.0, 4.4), layout="constrained")
        for index, (name, points) in enumerate(curves.items()):
            lengths, densities = zip(*sorted(points), strict=True)
            axes.plot(
                lengths,
                [100 * density for density in densities],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("sequence length")
        axes.set_ylabel("break-even density, selection included")
        axes.set_title(title, loc="left")
        axes.legend()
        _save(figure, path)


def _colour(names: Sequence[str], name: str) -> str:
    return COLOURS[names.index(name) % len(COLOURS)]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
