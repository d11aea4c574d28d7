"""A picture of EntropyNet's cells and of its order, beside the Hilbert order."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

import entropy_attn as ea
from entropy_attn.benchmarks.plots import STYLE, save
from entropy_attn.benchmarks.points import PointsNotFound, family, real

# Points of a set, and those of them that orders are drawn through.
_COUNT, _DRAWN = 40_000, 2500


def pictures_of_cells(path: Path) -> bool:
    """A row for each set: cells with the path through them, and two orders of some points.

    Returns:
        whether it was drawn: a picture that is there may show cities, and stays if this one cannot.
    """
    sets = {"clusters": family("clusters", _COUNT), "gauss": family("gauss", _COUNT)}
    try:
        sets["cities"] = real("cities")
    except PointsNotFound:
        if path.exists():
            return False
    net = ea.geometry.EntropyNet.pretrained()
    heights = [max(0.3, float(np.divide(*np.ptp(points, 0)[::-1]))) for points in sets.values()]
    with plt.rc_context(STYLE | {"axes.grid": False, "figure.dpi": 110}):
        figure, axes = plt.subplots(
            len(sets), 3, figsize=(10.5, 0.5 + 3.4 * sum(heights)), layout="constrained",
            squeeze=False, height_ratios=heights, sharex="row", sharey="row",
        )  # fmt: skip
        for row, (name, points) in zip(axes, sets.items(), strict=True):
            _cells(row[0], points, net.cells(points))
            row[0].set_title(f"{name}: learned cells")
            orders = {"EntropyNet": net.order(points), "Hilbert": ea.geometry.entropy_order(points)}
            for panel, (order_name, order) in zip(row[1:], orders.items(), strict=True):
                _way(panel, points, order)
                panel.set_title(order_name)
            for panel in row:
                panel.set_aspect("equal")
                panel.set_axis_off()
        save(figure, path)
    return True


def _cells(panel: Axes, points: np.ndarray, cells: np.ndarray) -> None:
    shown = np.random.default_rng(0).permutation(len(points))[: 4 * _DRAWN]
    panel.scatter(
        *points[shown].T, c=cells[shown] % 20, cmap="tab20", s=2.5, linewidths=0, rasterized=True
    )
    middles = np.stack([points[cells == cell].mean(0) for cell in np.unique(cells)])
    panel.plot(*middles.T, color="black", linewidth=1.2, marker="o", markersize=4)
    panel.plot(*middles[0], color="white", marker="o", markersize=2)


def _way(panel: Axes, points: np.ndarray, order: np.ndarray) -> None:
    """The order of some points; of an order in rounds, of those that come late."""
    late = order[len(order) // 8 :]
    kept = np.sort(np.random.default_rng(0).permutation(len(late))[:_DRAWN])
    way = points[late[kept]]
    lines = LineCollection(
        np.stack((way[:-1], way[1:]), axis=1),
        array=np.linspace(0, 1, len(way) - 1),
        cmap="viridis",
        linewidth=0.7,
    )
    panel.add_collection(lines)
    panel.autoscale_view()
