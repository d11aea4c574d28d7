"""Delaunay triangulations of the plane: points in a good order, then the best library installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from entropy_attn.geometry.copies import first_of_equals
from entropy_attn.geometry.orders import entropy_order
from entropy_attn.geometry.points import finite_points

# Exponents of coordinates for which the exact predicates neither over- nor underflow (Shewchuk,
# "Adaptive precision floating-point arithmetic", Discrete & Computational Geometry 18, 1997).
_LARGEST, _SMALLEST = 200, -142


@dataclass(frozen=True)
class Library:
    """A library that triangulates.

    Attributes:
        module: what it is imported as.
        package: what one installs.
        exact: whether its predicates are.
        run: from (n, 2) distinct float64 points to (m, 3) their triangles.
    """

    module: str
    package: str
    exact: bool
    run: Callable[[np.ndarray], np.ndarray]

    @property
    def is_installed(self) -> bool:
        return find_spec(self.module) is not None


def triangulate(points: Any, *, library: str = "auto", order: str | None = "hilbert") -> np.ndarray:
    """The Delaunay triangulation of points in the plane.

    The points are sorted (`entropy_order`), scaled by a power of two into the range of the exact
    predicates, and handed to a library. "pythoncdt" and "startinpy" are exact: every triangle is
    counterclockwise, no point lies inside a circumcircle, and the union is the convex hull,
    whatever the points. "shapely" (GEOS) and "scipy" (Qhull) round; they are for comparison, may
    keep triangles that are not Delaunay where points are nearly cocircular, and Qhull leaves out
    points of very uneven sets.

    Where four points or more lie on one circle and no other inside, any triangulation of them is
    Delaunay; the library chooses. A point that is given twice is used once, by its first index.

    Args:
        points: (n, 2) floats or integers.
        library: "pythoncdt", "startinpy", "shapely" or "scipy"; "auto" is the first of the exact
            ones that is installed.
        order: a method of `entropy_order` that needs no anchors, or None to leave them as they are.

    Returns:
        (m, 3) int64 indices into ``points``, counterclockwise; m = 0 for fewer than three distinct
        points, or if all lie on one line.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
        ImportError: the library is not installed; the message says what to install.
    """
    chosen = choose_library(library)
    array = finite_points(points, dims=(2,))
    along = np.arange(len(array)) if order is None else entropy_order(array, order)
    along = along[first_of_equals(array)[along]]
    if len(along) < 3:
        return np.empty((0, 3), np.int64)
    scaled = _scaled(array, _LARGEST if chosen.exact else 0)[along]
    found = along[chosen.run(np.ascontiguousarray(scaled))]
    return found.astype(np.int64, copy=False).reshape(-1, 3)


def choose_library(name: str = "auto") -> Library:
    """The library of that name, if it is installed.

    Raises:
        ValueError: there is none of that name.
        ImportError: it is not installed.
    """
    if name == "auto":
        exact = [each for each in LIBRARIES.values() if each.exact]
        for each in exact:
            if each.is_installed:
                return each
        wanted = " or ".join(each.package for each in exact)
        raise ImportError(
            "no exact library for triangulations is installed: "
            f"pip install 'entropy-attn[geometry]', or {wanted}; "
            "library='scipy' runs without, but rounds"
        )
    if name not in LIBRARIES:
        raise ValueError(f"library must be auto, {', '.join(LIBRARIES)}, got {name!r}")
    if not LIBRARIES[name].is_installed:
        raise ImportError(f"library={name!r} needs: pip install {LIBRARIES[name].package}")
    return LIBRARIES[name]


def _scaled(points: np.ndarray, exponent: int) -> np.ndarray:
    """float64 points times the power of two that gives the largest coordinate this exponent."""
    scaled = points.astype(np.float64)
    size = np.abs(scaled)
    shift = exponent - math.frexp(size.max())[1]
    least = size[size > 0].min(initial=np.inf)
    if math.frexp(least)[1] + shift < _SMALLEST:
        row = int((size == least).any(axis=1).argmax())
        raise ValueError(
            f"points[{row}] is {points[row].tolist()}, beside coordinates up to {size.max():g}: "
            "exact predicates would underflow; the exponents may span 340 powers of two"
        )
    # In two steps, since 2^shift itself may not be a float64.
    scaled *= math.ldexp(1.0, shift // 2)
    scaled *= math.ldexp(1.0, shift - shift // 2)
    return scaled


def _pythoncdt(points: np.ndarray) -> np.ndarray:
    cdt = import_module("pythoncdt")
    found = cdt.Triangulation(
        cdt.VertexInsertionOrder.AS_PROVIDED, cdt.IntersectingConstraintEdges.NOT_ALLOWED, 0.0
    )
    found.insert_vertices(points)
    found.erase_super_triangle()
    return found.triangles_array(copy=False)["vertices"]


def _startinpy(points: np.ndarray) -> np.ndarray:
    found = import_module("startinpy").DT()
    # Far below the distance of two float64 numbers of this size; 0 would mean the default.
    found.snap_tolerance = 1e-300
    found.insert(np.column_stack((points, np.zeros(len(points)))))
    # Vertex 0 is the one at infinity.
    return found.triangles.astype(np.int64).reshape(-1, 3) - 1


def _shapely(points: np.ndarray) -> np.ndarray:
    shapely = import_module("shapely")
    # GEOS returns coordinates, but it carries a third one along: the index.
    numbered = np.column_stack((points, np.arange(len(points))))
    found = shapely.delaunay_triangles(shapely.multipoints(numbered))
    corners = shapely.get_coordinates(shapely.get_parts(found), include_z=True)
    triangles = corners.reshape(-1, 4, 3)[:, :3, 2].astype(np.int64)
    return _counterclockwise(points, triangles)


def _scipy(points: np.ndarray) -> np.ndarray:
    spatial = import_module("scipy.spatial")
    try:
        return _counterclockwise(points, spatial.Delaunay(points).simplices)
    except spatial.QhullError as error:
        if _on_one_line(points):
            return np.empty((0, 3), np.int64)
        raise ValueError(
            "Qhull cannot triangulate these points, which are nearly on a line; "
            "library='pythoncdt' and 'startinpy' are exact"
        ) from error


LIBRARIES = {
    "pythoncdt": Library("pythoncdt", "pythoncdt", True, _pythoncdt),
    "startinpy": Library("startinpy", "startinpy", True, _startinpy),
    "shapely": Library("shapely", "shapely", False, _shapely),
    "scipy": Library("scipy", "scipy", False, _scipy),
}


def _counterclockwise(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    a, b, c = (points[triangles[:, corner]] for corner in range(3))
    turn = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    return np.where((turn < 0)[:, None], triangles[:, ::-1], triangles)


def _on_one_line(points: np.ndarray) -> bool:
    exact = [[Fraction(x), Fraction(y)] for x, y in points.tolist()]
    (ax, ay), (bx, by) = exact[:2]
    return all((bx - ax) * (y - ay) == (by - ay) * (x - ax) for x, y in exact[2:])
