"""The predicates give exact signs, for every finite float64."""

from __future__ import annotations

import itertools
import random

import pytest

pytest.importorskip("numba")

from hull_cases import KINDS, exact_in_circle, exact_orientation, hard_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_attn.geometry import predicates

PREDICATES = {
    "orientation": (predicates.orientation, exact_orientation, 3, 2),
    "orientation_3d": (predicates.orientation_3d, exact_orientation, 4, 3),
    "in_circle": (predicates.in_circle, exact_in_circle, 4, 2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PREDICATES)
def test_signs_are_exact(name, kind):
    predicate, exact, count, dim = PREDICATES[name]
    numbers = random.Random(f"{name} {kind}")
    seen = set()
    for _ in range(1500):
        points = [[hard_numbers(kind, numbers) for _ in range(dim)] for _ in range(count)]
        expected = exact(*points)
        assert predicate(*itertools.chain(*points)) == expected, points
        seen.add(expected)
    assert {1, -1} <= seen
    assert 0 in seen or kind in ("random", "any", "mixed", "near")


@pytest.mark.parametrize("name", PREDICATES)
def test_signs_are_exact_near_degenerate(name):
    """Points a few roundings off a line, a plane or a circle, and multiples of their offsets."""
    predicate, exact, count, dim = PREDICATES[name]
    numbers = random.Random(name)
    for _ in range(3000):
        step = [numbers.uniform(-1, 1) for _ in range(dim)]
        start = [numbers.uniform(-10, 10) for _ in range(dim)]
        points = [
            [a + numbers.randint(-8, 8) * b for a, b in zip(start, step, strict=True)]
            for _ in range(count)
        ]
        assert predicate(*itertools.chain(*points)) == exact(*points), points


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=12, max_size=12))
def test_signs_are_exact_for_all_floats(numbers):
    for predicate, exact, count, dim in PREDICATES.values():
        flat = numbers[: count * dim]
        points = [flat[i : i + dim] for i in range(0, len(flat), dim)]
        assert predicate(*flat) == exact(*points)


def test_the_signs_mean_what_they_say():
    assert predicates.orientation(0.0, 0.0, 1.0, 0.0, 0.0, 1.0) == 1
    above, below = (0.0, 0.0, 1.0), (0.0, 0.0, -1.0)
    plane = (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    assert predicates.orientation_3d(*plane, *below) == 1
    assert predicates.orientation_3d(*plane, *above) == -1
    circle = (1.0, 0.0, 0.0, 1.0, -1.0, 0.0)
    assert predicates.in_circle(*circle, 0.0, 0.5) == 1
    assert predicates.in_circle(*circle, 0.0, -1.5) == -1
    assert predicates.in_circle(*circle, 0.0, -1.0) == 0
