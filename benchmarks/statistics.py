"""Means over a few seeds with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
_NORMAL = 1.960


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % confidence interval); the width of one value is nan.

    Student's t, that is for values that are normally distributed. Past 13 values the quantile is
    the normal distribution's, which is at most 0.21 too small.
    """
    if not values:
        raise ValueError("there is no mean of nothing")
    if len(values) == 1:
        return values[0], math.nan
    freedom = len(values) - 1
    quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else _NORMAL
    return fmean(values), quantile * stdev(values) / math.sqrt(len(values))


def with_interval(values: Sequence[float], form: str = ".1f", scale: float = 1.0) -> str:
    """ "93.1 ± 0.4"; without the interval where there is one value, "–" where there is none."""
    if not values:
        return "–"
    mean, half = (scale * part for part in mean_interval(values))
    return f"{mean:{form}}" + ("" if math.isnan(half) else f" ± {half:{form}}")
