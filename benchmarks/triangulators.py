"""Libraries that triangulate the plane; all but scipy are optional.

Triangle and shull are contestants alone: neither licence suits a dependency.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import numpy as np

from entropy_attn.benchmarks.environment import package_version


@dataclass(frozen=True)
class Triangulator:
    """A library as it comes, fed with points in a given order.

    Attributes:
        package: what one installs.
        run: from (n, 2) distinct points to something with a length, its triangles.
        is_incremental: it inserts points in the order given.
        is_slow: takes many seconds for a million points, at least at random orders.
    """

    package: str
    module: str
    run: Callable[[np.ndarray], object]
    is_incremental: bool
    is_slow: bool = False

    @property
    def is_installed(self) -> bool:
        return find_spec(self.module) is not None

    @property
    def version(self) -> str | None:
        return package_version(self.package)


def _ours(name: str) -> Callable[[np.ndarray], object]:
    def run(points: np.ndarray) -> object:
        from entropy_attn.geometry.triangulation import LIBRARIES

        return LIBRARIES[name].run(points)

    return run


def _startinpy(points: np.ndarray) -> object:
    # It merges points closer than 0.001.
    return _ours("startinpy")(points * 2.0**60)


def _triangle(switches: str) -> Callable[[np.ndarray], object]:
    def run(points: np.ndarray) -> object:
        return import_module("triangle").triangulate({"vertices": points}, switches)["triangles"]

    return run


def _shull(points: np.ndarray) -> object:
    return import_module("shull").Delaunay(points).simplices


def _scipy(points: np.ndarray) -> object:
    return import_module("scipy.spatial").Delaunay(points).simplices


TRIANGULATORS = {
    "Triangle, incremental": Triangulator("triangle", "triangle", _triangle("iQ"), True),
    "startinpy": Triangulator("startinpy", "startinpy", _startinpy, True, is_slow=True),
    "pythoncdt": Triangulator("pythoncdt", "pythoncdt", _ours("pythoncdt"), True),
    "Triangle": Triangulator("triangle", "triangle", _triangle("Q"), False),
    "shull": Triangulator("shull", "shull", _shull, False),
    "GEOS": Triangulator("shapely", "shapely", _ours("shapely"), False, is_slow=True),
    "scipy": Triangulator("scipy", "scipy", _scipy, False, is_slow=True),
}
