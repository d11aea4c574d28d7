"""Pictures of orders of points, and of run time against their entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection

import entropy_attn as ea
from entropy_attn.benchmarks.orders import k_means, main_orders
from entropy_attn.benchmarks.plots import STYLE, cycled, save


def time_against_entropy(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], title: str, path: Path
) -> None:
    """A panel a library: (entropy of the order, run time over the least) of each set of points."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(3.4 * len(panels) + 1.2, 3.9), layout="constrained",
            squeeze=False, sharex=True,
        )  # fmt: skip
        for panel, (name, sets) in zip(axes[0], panels.items(), strict=True):
            for index, (points, curve) in enumerate(sets.items()):
                panel.plot(
                    *zip(*curve, strict=True),
                    linestyle="",
                    markersize=4.5,
                    alpha=0.8,
                    **cycled(index),
                    label=points,
                )
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            panel.set_title(name, loc="left", fontsize=10)
            panel.set_xlabel("entropy of the order, relative")
        axes[0, 0].set_ylabel("run time over the least")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=9, loc="outside right upper")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        save(figure, path)


def pictures_of_orders(path: Path, count: int = 2000) -> None:
    """Random points joined in four orders, from dark to bright along the order."""
    points = np.random.default_rng(3).random((count, 2))
    orders = {name: make() for name, make in main_orders(points).items()}
    # Of 2,000 points 256 cells would hold 8 each.
    anchors = k_means(points, 32)
    orders["32 k-means cells"] = ea.geometry.entropy_order(points, "cells", anchors=anchors)
    del orders["256 k-means cells"]
    with plt.rc_context(STYLE | {"axes.grid": False, "figure.dpi": 100}):
        figure, axes = plt.subplots(
            1, len(orders), figsize=(3.1 * len(orders), 4.0), layout="constrained"
        )
        for panel, (name, order) in zip(axes, orders.items(), strict=True):
            way = points[order]
            lines = LineCollection(
                np.stack((way[:-1], way[1:]), axis=1),
                array=np.linspace(0, 1, count - 1),
                cmap="viridis",
                linewidth=0.25 if name == "random" else 0.8,
            )
            panel.add_collection(lines)
            entropy = ea.geometry.order_entropy(points, order)
            relative = ea.geometry.order_entropy(points, order, relative=True)
            panel.set_title(f"{name}\nentropy {entropy:.2f} nats, relative {relative:.2f}")
            panel.set_xlim(0, 1)
            panel.set_ylim(0, 1)
            panel.set_aspect("equal")
            panel.set_xticks([])
            panel.set_yticks([])
        save(figure, path)
