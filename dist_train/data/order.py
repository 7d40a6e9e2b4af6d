"""Which sample comes when, and its share of chance, as pure functions of the seed and the position in the stream.

Position p belongs to epoch p // N; a batch may straddle two. Nothing here knows of ranks, workers or passes, so every
topology sees the same stream, and the only state worth saving is how many samples were consumed. Of numpy's random
machinery only `random_raw` is used: bit generators are frozen by NEP 19, `Generator.permutation` is not, so an upgrade
cannot change a half-finished run.
"""

from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

_ORDER = 0  # Streams share keys (an epoch and a position may be equal) and are told apart by Philox's counter.
CROP = 1
STAND_IN = 2
NETS = 3  # what a net draws in a pass, by step and rank
MIXUP = 4
RAINMIX = 5
_PARTNER = 6  # by step


def sample_at(position: int, *, seed: int, num_samples: int) -> int:
    """Index of the sample at a position of the stream; each epoch is a permutation of all."""
    epoch, place = divmod(position, num_samples)
    return int(_permutation(seed, epoch, _ORDER, num_samples)[place])


def partner_at(position: int, *, seed: int, global_batch: int) -> int:
    """Position of a sample of the same global batch, now and then the same; each step permutes its batch anew."""
    step, place = divmod(position, global_batch)
    return step * global_batch + int(_permutation(seed, step, _PARTNER, global_batch)[place])


def draws(seed: int, position: int, stream: int, num: int) -> list[int]:
    """Uniform 64-bit numbers of a position; other streams (1, 2, ...) give independent ones."""
    return _philox(seed, position, stream).random_raw(num).tolist()


class Chance:
    """Real random numbers of a position, one after the other: those methods of numpy's Generator that we need, by
    formulas of our own. Other streams give independent ones."""

    def __init__(self, seed: int, position: int, stream: int) -> None:
        self._bits = _philox(seed, position, stream)

    def random(self, size: Any = None) -> Any:
        """Uniform in (0, 1), neither end ever: a float, or an array of shape `size`."""
        raw = self._bits.random_raw(1 if size is None else int(np.prod(size)))
        uniform = ((raw >> np.uint64(12)) + 0.5) * 2.0**-52
        return float(uniform[0]) if size is None else uniform.reshape(size)

    def uniform(self, low: float, high: float, size: Any = None) -> Any:
        """Uniform in (low, high)."""
        return low + (high - low) * self.random(size)

    def normal(self, loc: float, scale: float) -> float:
        """Gaussian of this mean and standard deviation."""
        return NormalDist(loc, scale).inv_cdf(self.random())

    def below(self, num: int) -> int:
        """Uniform in 0 ... num - 1."""
        return int(num * self.random())


@lru_cache(maxsize=4)  # two epochs, two steps
def _permutation(seed: int, number: int, stream: int, num: int) -> np.ndarray:
    return np.argsort(_philox(seed, number, stream).random_raw(num), kind="stable")


def _philox(seed: int, number: int, stream: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, number], np.uint64), counter=[0, 0, 0, stream])
