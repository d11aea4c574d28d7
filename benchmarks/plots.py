"""Pictures, drawn from records and tensors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

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


def for_pages():
    """A context in which pictures are made to stand in a page: text stays text, no background."""
    return plt.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "entropy-attn", "savefig.transparent": True}
    )


@dataclass(frozen=True)
class Point:
    """One way of choosing blocks: its family, its budget as "Kind(amount)", and what it costs."""

    family: str
    budget: str
    density: float
    change: float

    @property
    def kind(self) -> str:
        return self.budget.split("(")[0]

    @property
    def amount(self) -> str:
        return self.budget.removeprefix(f"{self.kind}(").removesuffix(")")


def frontier(points: Sequence[Point], title: str, path: Path) -> None:
    """Change of perplexity against density: colours are families, markers are budgets.

    Where the colours run out they come again, hollow.
    """
    families = list(dict.fromkeys(point.family for point in points))
    kinds = list(dict.fromkeys(point.kind for point in points))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
        axes.axhline(0.0, color="black", linewidth=0.8)
        for family, kind in dict.fromkeys((point.family, point.kind) for point in points):
            curve = [p for p in points if (p.family, p.kind) == (family, kind)]
            curve.sort(key=lambda point: point.density)
            turn, index = divmod(families.index(family), len(COLOURS))
            colour = COLOURS[index]
            axes.plot(
                [100 * point.density for point in curve],
                [point.change for point in curve],
                color=colour,
                marker=MARKERS[kinds.index(kind) % len(MARKERS)],
                markerfacecolor="white" if turn else colour,
                linestyle="--" if turn else "-",
                linewidth=1.5,
            )
            for point in curve:
                axes.annotate(
                    point.amount,
                    (100 * point.density, point.change),
                    textcoords="offset points",
                    xytext=(5, 5),
                    fontsize=7.5,
                    color=colour,
                )
        handles: list[Artist] = [
            Patch(
                edgecolor=COLOURS[i % len(COLOURS)],
                facecolor=COLOURS[i] if i < len(COLOURS) else "white",
                label=name,
            )
            for i, name in enumerate(families)
        ]
        handles += [
            Line2D(
                [], [], color="black", marker=MARKERS[i % len(MARKERS)], ls="", label=f"{kind}()"
            )
            for i, kind in enumerate(kinds)
        ]
        axes.set_xlabel("density: share of the causal tiles that are computed")
        axes.set_ylabel("change of perplexity")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, loc="left")
        axes.margins(x=0.1, y=0.12)
        figure.legend(handles=handles, fontsize=9, loc="outside right upper")
        save(figure, path)


LEAST_MASS = 1e-4  # that a heat map tells from none


@dataclass(frozen=True)
class HeadPicture:
    """One attention head.

    Attributes:
        mass: (M, M) true mean attention of each tile; kept: (M, M) bool, the chosen blocks.
        density: share of the visible tiles that are kept; kept_mass: of the attention.
    """

    title: str
    mass: np.ndarray
    kept: np.ndarray
    density: float
    kept_mass: float


def mask_heat_maps(heads: Sequence[HeadPicture], title: str, path: Path) -> None:
    """The attention mass of each tile above the blocks that were chosen without knowing it."""
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, rows = plt.subplots(
            2, len(heads), figsize=(3.0 * len(heads), 6.6), layout="constrained", squeeze=False
        )
        for column, head in enumerate(heads):
            top, bottom = rows[0, column], rows[1, column]
            visible = np.tril(np.ones_like(head.mass, dtype=bool))
            mass = np.where(visible, np.maximum(head.mass, LEAST_MASS), np.nan)
            norm = LogNorm(LEAST_MASS, 1.0)
            image = top.imshow(mass, norm=norm, cmap="magma", interpolation="nearest")
            top.set_title(head.title)
            chosen = np.where(visible, np.where(head.kept, 1.0, 0.15), np.nan)
            bottom.imshow(chosen, cmap="Blues", vmin=0, vmax=1.15, interpolation="nearest")
            share = f"{head.density:.0%} of the tiles, {head.kept_mass:.1%} of the mass"
            bottom.set_title(share, fontsize=9)
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
        save(figure, path)


def bars(
    groups: Mapping[str, Mapping[str, float]],
    xlabel: str,
    title: str,
    path: Path,
    known: Sequence[str] = (),
) -> None:
    """Grouped bars: one group per case, one bar per contestant, the first on top.

    Args:
        known: contestants that have their colour by their place here, in whatever picture.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    places = list(dict.fromkeys([*known, *names]))
    count = sum(map(len, groups.values()))
    with plt.rc_context(STYLE):
        height = 0.17 * count + 0.2 * len(groups) + 1.6
        figure, axes = plt.subplots(figsize=(8.0, height), layout="constrained")
        position, ticks = 0.0, []
        for group in groups.values():
            present = [name for name in names if name in group]
            for offset, name in enumerate(present):
                at, value = position + offset, group[name]
                axes.barh(at, value, 0.9, **_filled(places, name))
                axes.text(value, at, f" {value:.0f}", va="center", fontsize=7)
            ticks.append(position + (len(present) - 1) / 2)
            position += len(present) + 1
        handles = [Patch(**_filled(places, name), label=name) for name in names]
        axes.set_yticks(ticks, list(groups), fontsize=8.5)
        axes.set_ylim(position - 0.6, -0.8)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(xlabel)
        axes.set_title(title, loc="left")
        figure.legend(handles=handles, ncols=3, fontsize=8.5, loc="outside lower center")
        save(figure, path)


def break_even(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, path: Path) -> None:
    """The density below which sparse attention is faster than dense, against length."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.0, 4.4), layout="constrained")
        for index, (name, points) in enumerate(curves.items()):
            lengths, densities = zip(*sorted(points), strict=True)
            axes.plot(
                lengths,
                [100 * density for density in densities],
                **cycled(index),
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
        save(figure, path)


def accuracy_against_density(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], title: str, path: Path
) -> None:
    """A line a method, through (density, accuracy, half width of its interval, 0 for none)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
        for index, (name, points) in enumerate(curves.items()):
            densities, accuracies, halves = zip(*sorted(points), strict=True)
            axes.errorbar(
                [100 * density for density in densities],
                [100 * accuracy for accuracy in accuracies],
                [100 * half for half in halves],
                **cycled(index),
                linewidth=1.5,
                capsize=3,
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        axes.set_xticks([100, 50, 25, 12.5])
        axes.set_ylim(top=min(axes.get_ylim()[1], 101.0))  # intervals do not know of 100 %
        axes.set_xlabel("density: share of the blocks that are computed")
        axes.set_ylabel("accuracy")
        axes.set_title(title, loc="left")
        figure.legend(fontsize=9, loc="outside right upper")
        save(figure, path)


def perplexity_against_density(
    curves: Mapping[str, Sequence[tuple[float, float]]], title: str, path: Path
) -> None:
    """A line a method, through (density, perplexity)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(11.0, 5.0), layout="constrained")
        for index, (name, points) in enumerate(curves.items()):
            densities, perplexities = zip(*points, strict=True)
            turn, place = divmod(index, len(COLOURS))
            axes.plot(
                [100 * density for density in densities],
                perplexities,
                color=COLOURS[place],
                marker=MARKERS[place % len(MARKERS)],
                markerfacecolor="white" if turn else COLOURS[place],
                linestyle="--" if turn else "-",
                linewidth=1.5,
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks([5, 10, 20, 40])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        axes.set_xlabel("density: share of the causal tiles that are computed")
        axes.set_ylabel("held-out perplexity")
        axes.set_title(title, loc="left")
        figure.legend(fontsize=9, loc="outside right upper")
        save(figure, path)


def speedup_against_density(
    curves: Mapping[str, Sequence[tuple[float, float]]], title: str, path: Path
) -> None:
    """How many times faster than the best dense attention, beside the ideal 1 / density.

    Args:
        curves: by name, (density, speed-up).
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.0, 5.0), layout="constrained")
        densities = sorted({density for points in curves.values() for density, _ in points})
        ideal = np.linspace(densities[0], densities[-1], 100)
        axes.plot(100 * ideal, 1 / ideal, color="#999999", linestyle=":", label="1 / density")
        axes.axhline(1.0, color="black", linewidth=0.8)
        for index, (name, points) in enumerate(curves.items()):
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(
                [100 * x for x in xs],
                ys,
                **cycled(index),
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks([100 * density for density in densities])
        for axis, form in ((axes.xaxis, "{:.0f} %"), (axes.yaxis, "{:.1f} x")):
            axis.set_major_formatter(FuncFormatter(lambda value, _, form=form: form.format(value)))
        axes.set_xlabel("density of the block mask")
        axes.set_ylabel("speed-up over the best dense attention")
        axes.set_title(title, loc="left")
        figure.legend(fontsize=8.5, ncols=2, loc="outside lower center")
        save(figure, path)


def scaling(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, path: Path) -> None:
    """Milliseconds against length, both logarithmic.

    Args:
        curves: by name, (length, milliseconds); a name that starts with "dense" is dashed.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.0, 4.4), layout="constrained")
        for index, (name, points) in enumerate(curves.items()):
            lengths, times = zip(*sorted(points), strict=True)
            axes.plot(
                lengths,
                times,
                **cycled(index // 2),
                linestyle="--" if name.startswith("dense") else "-",
                label=name,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=10)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.set_xlabel("sequence length")
        axes.set_ylabel("milliseconds, selection included")
        axes.set_title(title, loc="left")
        axes.legend(fontsize=8.5)
        save(figure, path)


def up_to_a_limit(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    limit: str,
    ylabel: str,
    title: str,
    path: Path,
) -> None:
    """Gains against size, a panel each, below the curve of what can be gained at most.

    Args:
        panels: by the label of the abscissa, (size, times) of each curve by name.
        limit: the name of the curve that bounds the others, dashed.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    names.sort(key=lambda name: name == limit)
    with plt.rc_context(STYLE):
        figure, row = plt.subplots(
            1, len(panels), figsize=(4.6 * len(panels), 4.2), layout="constrained", squeeze=False
        )
        for axes, (label, curves) in zip(row[0], panels.items(), strict=True):
            for name in (name for name in names if name in curves):
                xs, ys = zip(*sorted(curves[name]), strict=True)
                if name == limit:
                    axes.plot(xs, ys, color="black", linestyle="--", linewidth=1.2)
                    axes.fill_between(xs, ys, max(ys) * 1.05, color="#999999", alpha=0.15, lw=0)
                else:
                    axes.plot(xs, ys, **cycled(names.index(name)))
                axes.annotate(
                    f"{ys[-1]:.2f}", (xs[-1], ys[-1]), textcoords="offset points", xytext=(6, -3),
                    fontsize=8,
                )  # fmt: skip
            axes.axhline(1.0, color="black", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({x for points in curves.values() for x, _ in points}))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
            axes.set_xlabel(label)
        row[0, 0].set_ylabel(ylabel)
        handles = [
            Line2D([], [], color="black", linestyle="--", label=f"{name}: the limit")
            if name == limit
            else Line2D([], [], label=name, **cycled(names.index(name)))
            for name in names
        ]
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.legend(handles=handles, ncols=len(handles), fontsize=9, loc="outside lower center")
        save(figure, path)


def roofline(
    points: Mapping[str, Sequence[tuple[float, float]]],
    peak_tflops: float,
    copy_gb_s: float,
    title: str,
    path: Path,
) -> None:
    """Speed against arithmetic intensity, below what memory and the tensor cores allow.

    Args:
        points: by name, (FLOP a byte that has to be moved, TFLOP/s).
        peak_tflops: of the data sheet. copy_gb_s: measured.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.0, 4.4), layout="constrained")
        intensities = [x for group in points.values() for x, _ in group]
        xs = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
        roof = np.minimum(peak_tflops, xs * copy_gb_s / 1e3)
        axes.plot(xs, roof, color="black", linewidth=1.2)
        axes.text(xs[-1], peak_tflops, f"{peak_tflops:.0f} TFLOP/s ", ha="right", va="bottom")
        for index, (name, group) in enumerate(points.items()):
            axes.scatter(
                *zip(*group, strict=True),
                **cycled(index),
                label=name,
                zorder=3,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOP a byte that has to be read or written")
        axes.set_ylabel("TFLOP/s")
        axes.set_title(title, loc="left")
        axes.legend(fontsize=8.5)
        save(figure, path)


def cycled(index: int) -> dict[str, str]:
    """Colour and marker of a curve; where they run out they come again."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _colour(names: Sequence[str], name: str) -> str:
    return COLOURS[names.index(name) % len(COLOURS)]


def _filled(names: Sequence[str], name: str) -> dict[str, str]:
    """How a bar is filled: where the colours come again, they are hatched."""
    hatch = ("", "///", "...")[names.index(name) // len(COLOURS) % 3]
    return {"facecolor": _colour(names, name), "edgecolor": "white", "linewidth": 0, "hatch": hatch}


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date the same records give the same file.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
