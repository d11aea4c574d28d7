"""Libraries that find convex hulls, as one calls them on an array; all but scipy are optional."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import numpy as np

import entropy_attn as ea
from entropy_attn.benchmarks.environment import package_version

OURS = "ea.geometry.convex_hull"
QHULL = "Qhull (scipy)"


@dataclass(frozen=True)
class HullLibrary:
    """A library as it comes.

    Attributes:
        package: what one installs.
        dims: of the points that it takes.
        run: from (n, d) points to what it calls their hull.
        vertices: from the points and what ``run`` returned to the (h, d) vertices; not timed.
        most: points of a set with few vertices that it takes seconds for, not minutes.
        most_vertices: the same for a set where all points are vertices.
    """

    module: str
    package: str
    dims: tuple[int, ...]
    run: Callable[[np.ndarray], object]
    vertices: Callable[[np.ndarray, object], np.ndarray]
    most: int = 10**7
    most_vertices: int = 10**6

    @property
    def is_installed(self) -> bool:
        return find_spec(self.module) is not None

    @property
    def version(self) -> str | None:
        return package_version(self.package)


def _geos(points: np.ndarray) -> object:
    # Points of a line string: a tenth of the time of one geometry a point.
    shapely = import_module("shapely")
    return shapely.convex_hull(shapely.linestrings(points))


def _manifold(points: np.ndarray) -> object:
    manifold = import_module("manifold3d")
    kind = manifold.CrossSection if points.shape[1] == 2 else manifold.Manifold
    return kind.hull_points(points)


def _corners_of_manifold(points: np.ndarray, hull: object) -> np.ndarray:
    if points.shape[1] == 2:
        return np.concatenate(hull.to_polygons())
    return hull.to_mesh64().vert_properties


HULL_LIBRARIES = {
    OURS: HullLibrary(
        "numba", "numba", (2, 3), ea.geometry.convex_hull,
        lambda points, found: points[found], most_vertices=10**7,
    ),
    QHULL: HullLibrary(
        "scipy", "scipy", (2, 3), lambda points: import_module("scipy.spatial").ConvexHull(points),
        lambda points, found: points[found.vertices], most=10**6,
    ),
    "GEOS (shapely)": HullLibrary(
        "shapely", "shapely", (2,), _geos,
        lambda points, found: import_module("shapely").get_coordinates(found),
    ),
    "manifold3d": HullLibrary(
        "manifold3d", "manifold3d", (2, 3), _manifold, _corners_of_manifold, most_vertices=10**7
    ),
}  # fmt: skip
