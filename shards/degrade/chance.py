"""Where chance comes from, and numbers drawn from documented ranges."""

import math
from typing import Any, Protocol

Range = float | tuple[float, float]
"""A number, or the two ends between which one is drawn."""


class Rng(Protocol):
    """Source of chance: numpy's Generator, or whatever has these of its methods."""

    def random(self, size: Any = None) -> Any:
        """Uniform in [0, 1]."""

    def uniform(self, low: float, high: float, size: Any = None) -> Any:
        """Uniform in [low, high]."""

    def normal(self, loc: float, scale: float) -> float:
        """Of this mean and standard deviation."""


def draw(rng: Rng, name: str, bounds: Range, *, log: bool = False) -> float:
    """Draw uniformly from a range, or log-uniformly. A fixed number takes its draw too, so what follows stays the same.

    Raises:
        ValueError: the ends are not in order, or negative (for `log`: not positive).
    """
    low, high = bounds if isinstance(bounds, tuple) else (bounds, bounds)
    if not 0 <= low <= high < math.inf or (log and low == 0):
        least = "0 < low" if log else "0 <= low"
        raise ValueError(
            f"{name}={low:g},{high:g} is no range; write {name}=number, or {name}=low,high, {least} <= high"
        )
    return math.exp(rng.uniform(math.log(low), math.log(high))) if log else rng.uniform(low, high)


def below(rng: Rng, num: int) -> int:
    """Draw uniformly from 0 ... num - 1."""
    return min(int(num * rng.random()), num - 1)
