"""Means over seeds with their intervals, and differences between runs that started from the same seed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean and how far it may be off."""

    mean: float
    half: float | None
    """Half the width of the 95 % interval; None: one value tells nothing of spread."""
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of values drawn alike, with Student's interval: t(0.975, n - 1) s / sqrt(n).

    Args:
        values: at least one, for example a score from each seed.
    """
    n = len(values)
    half = float(t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return Estimate(float(np.mean(values)), half, n)


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Estimate | None:
    """The mean difference of what two ways gave from the same seeds: what both owe to a seed falls out.

    Args:
        values, base: seed -> score.

    Returns:
        Of `values` over `base`; None if they share no seed.
    """
    differences = [values[seed] - base[seed] for seed in values if seed in base]
    return estimate(differences) if differences else None
