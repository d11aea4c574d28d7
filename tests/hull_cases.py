"""Exact hulls by rational arithmetic, and point sets that are hard on rounding, for the tests."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
from collections.abc import Sequence
from fractions import Fraction

Point = Sequence[float]


def sign(value: Fraction) -> int:
    return (value > 0) - (value < 0)


def determinant(rows: Sequence[Sequence[Fraction]]) -> Fraction:
    """By expansion along the first column."""
    if len(rows) == 1:
        return rows[0][0]
    minors = ([row[1:] for i, row in enumerate(rows) if i != k] for k in range(len(rows)))
    return sum(
        (-1) ** k * rows[k][0] * determinant(minor) for k, minor in enumerate(minors)
    )  # fmt: skip


def exact_orientation(*points: Point) -> int:
    """The sign of |p_1 - p_last, ..., p_(last-1) - p_last|, in any dimension."""
    *rows, last = (tuple(map(Fraction, point)) for point in points)
    return sign(determinant([[a - b for a, b in zip(row, last, strict=True)] for row in rows]))


def exact_in_circle(a: Point, b: Point, c: Point, d: Point) -> int:
    """The orientation of the points lifted onto a paraboloid around d."""
    dx, dy = map(Fraction, d)
    rows = [(Fraction(x) - dx, Fraction(y) - dy) for x, y in (a, b, c)]
    return sign(determinant([(x, y, x * x + y * y) for x, y in rows]))


def first_copies(points: Sequence[Point]) -> dict[tuple[Fraction, ...], int]:
    """Distinct points and the smallest index of each."""
    found: dict[tuple[Fraction, ...], int] = {}
    for i, point in enumerate(points):
        found.setdefault(tuple(map(Fraction, point)), i)
    return found


def exact_hull_2d(points: Sequence[Point]) -> list[int]:
    """Counterclockwise from the lexicographically smallest vertex: Andrew's chain on rationals."""
    index = first_copies(points)
    distinct = sorted(index)
    if len(distinct) <= 2:
        return [index[point] for point in distinct]

    def half(ordered):
        kept = []
        for point in ordered:
            while len(kept) >= 2 and exact_orientation(kept[-2], kept[-1], point) <= 0:
                kept.pop()
            kept.append(point)
        return kept[:-1]

    return [index[point] for point in half(distinct) + half(distinct[::-1])]


def exact_hull_3d(points: Sequence[Point]) -> list[int]:
    """Ascending: the polygons' vertices of all planes through three points with none beyond."""
    index = first_copies(points)
    distinct = list(index)
    found = set()
    for triple in itertools.combinations(distinct, 3):
        sides = {point: exact_orientation(*triple, point) for point in distinct}
        if set(sides.values()) in ({0, 1}, {0, -1}):
            plane = [point for point in distinct if sides[point] == 0]
            for i, j in ((0, 1), (1, 2), (2, 0)):
                shadow = [(point[i], point[j]) for point in plane]
                if len(set(shadow)) == len(plane) and len(exact_hull_2d(shadow)) > 2:
                    found |= {index[plane[k]] for k in exact_hull_2d(shadow)}
                    break
    return sorted(found)


def hard_numbers(kind: str, random: random.Random) -> float:
    """One coordinate: of a grid, a few roundings off some lines, or of any size at all."""
    return {
        "random": lambda: random.random(),
        "grid": lambda: float(random.randint(0, 4)),
        "decimal": lambda: random.randint(0, 10) * 0.1,
        "near": lambda: random.choice([0.5, 12.0, 24.0]) + random.randint(-3, 3) * 2.0**-50,
        "any": lambda: math.ldexp(random.uniform(-1, 1), random.randint(-1074, 1024)),
        "ends": lambda: random.choice([5e-324, -5e-324, 0.0, -0.0, 1e-310, 1.0, 1.7e308, -1.7e308]),
        "mixed": lambda: random.uniform(-1, 1) * 10.0 ** random.choice([-162, -160, 150, 160, 0]),
    }[kind]()


def few_directions(monkeypatch) -> None:
    """Spare Triton's interpreter most of the planes of the filter on tensors."""
    monkeypatch.setattr("entropy_attn.geometry.ops.DIRECTIONS", 8)
    if importlib.util.find_spec("triton"):
        monkeypatch.setattr("entropy_attn.kernels.hull_filter.PARTS", {2: 2, 3: 1})


KINDS = ("random", "grid", "decimal", "near", "any", "ends", "mixed")
