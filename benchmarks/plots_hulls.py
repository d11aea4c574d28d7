"""Pictures of convex hulls: speed against other libraries and orders, and what the filter keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

import entropy_attn as ea
from entropy_attn.benchmarks.plots import COLOURS, STYLE, cycled, save
from entropy_attn.benchmarks.points import family


def speed_ups(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, bool]]]], title: str, path: Path
) -> None:
    """A panel a dimension: of each set a bar a library, hatched where its result is wrong."""
    libraries = list(
        dict.fromkeys(name for sets in panels.values() for bars in sets.values() for name in bars)
    )
    colours = dict(zip(libraries, COLOURS, strict=False))
    heights = [sum(len(bars) + 1 for bars in sets.values()) for sets in panels.values()]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(8.0, 0.17 * sum(heights) + 1.8), layout="constrained",
            squeeze=False, sharex=True, height_ratios=heights,
        )  # fmt: skip
        for panel, (name, sets) in zip(axes[:, 0], panels.items(), strict=True):
            position, ticks = 0.0, {}
            for points, bars in sets.items():
                for offset, (library, (ratio, is_wrong)) in enumerate(bars.items()):
                    at = position + offset
                    panel.barh(
                        at, ratio - 1, 0.9, left=1, color=colours[library], alpha=0.9,
                        hatch="////" if is_wrong else None, edgecolor="white", linewidth=0,
                    )  # fmt: skip
                    panel.text(max(ratio, 1), at, f" {ratio:.1f}", va="center", fontsize=7)
                ticks[points] = position + (len(bars) - 1) / 2
                position += len(bars) + 1
            panel.axvline(1.0, color="black", linewidth=0.8)
            panel.set_xscale("log")
            panel.margins(x=0.08)
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            panel.set_yticks(list(ticks.values()), list(ticks), fontsize=8.5)
            panel.set_ylim(position - 0.6, -0.8)
            panel.grid(axis="y", visible=False)
            panel.tick_params(axis="y", length=0)
            panel.set_title(name, loc="left", fontsize=10)
        handles = [Patch(color=colours[name], label=name) for name in libraries]
        handles.append(Patch(facecolor="#999999", hatch="////", edgecolor="white", label="wrong"))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.legend(handles=handles, ncols=4, fontsize=8.5, loc="outside lower center")
        save(figure, path)


def time_against_order(
    curves: Mapping[str, Sequence[tuple[float, float, str]]], title: str, path: Path
) -> None:
    """A curve a set of points: (entropy left to sort, milliseconds, name of the order)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.0, 4.0), layout="constrained")
        for index, (points, curve) in enumerate(curves.items()):
            ordered = sorted(curve)
            style = cycled(index)
            entropies, times, names = zip(*ordered, strict=True)
            axes.plot(entropies, times, linewidth=0.8, markersize=5, label=points, **style)
            if index == 0:
                for x, y, name in zip(entropies, times, names, strict=True):
                    below = name.endswith("slabs")
                    axes.annotate(
                        name, (x, y), xytext=(0, -13 if below else 7), ha="center", fontsize=7,
                        textcoords="offset points",
                    )  # fmt: skip
        axes.margins(x=0.08, y=0.1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("left to sort, nats a point")
        axes.set_ylabel("ms")
        axes.set_title(title, loc="left")
        axes.legend(fontsize=9)
        save(figure, path)


def pictures_of_the_filter(path: Path, count: int = 4000) -> None:
    """What one polytope of 16 directions drops, keeps for the exact hull, and what that finds."""
    from entropy_attn.geometry.filter import outside, polytope

    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(1, 4, figsize=(12.4, 3.5), layout="constrained")
        for panel, name in zip(axes, ("square", "disk", "gauss", "clusters"), strict=True):
            points = family(name, count)
            kept, rest = outside(points, *polytope(points[::8], 16))
            hull = points[ea.geometry.convex_hull(points)]
            panel.scatter(*points.T, s=0.6, color="#999999", label="dropped, provably inside")
            panel.scatter(*rest.T, s=4, color=COLOURS[1], label="left to the exact hull")
            ring = np.concatenate((hull, hull[:1]))
            panel.plot(*ring.T, "o-", markersize=3, linewidth=0.8, color=COLOURS[0], label="hull")
            panel.set_title(
                f"{name}: {len(kept) / count:.1%} left, {len(hull)} vertices",
                loc="left",
                fontsize=9,
            )
            panel.set_aspect("equal")
            panel.set_axis_off()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=3, fontsize=9, loc="outside lower center")
        save(figure, path)
