"""Which sample comes when, and its share of chance, as pure functions of the seed and the position in the stream.

Position p belongs to epoch p // N; a batch may straddle two. Nothing here knows of ranks, workers or batches, so every
topology sees the same stream, and the only state worth saving is how many samples were consumed. Of numpy's random
machinery only `random_raw` is used: bit generators are frozen by NEP 19, `Generator.permutation` is not, so an upgrade
cannot change a half-finished run.
"""

from functools import lru_cache

import numpy as np

_ORDER = 0  # Streams share keys (an epoch and a position may be equal) and are told apart by Philox's counter.
CROP = 1
STAND_IN = 2
NETS = 3  # what a net draws in a pass, by step and rank


def sample_at(position: int, *, seed: int, num_samples: int) -> int:
    """Index of the sample at a position of the stream; each epoch is a permutation of all."""
    epoch, place = divmod(position, num_samples)
    return int(_permutation(seed, epoch, num_samples)[place])


def draws(seed: int, position: int, stream: int, num: int) -> list[int]:
    """Uniform 64-bit numbers of a position; other streams (1, 2, ...) give independent ones."""
    return _raw(seed, position, stream, num).tolist()


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return np.argsort(_raw(seed, epoch, _ORDER, num_samples), kind="stable")


def _raw(seed: int, number: int, stream: int, num: int) -> np.ndarray:
    return np.random.Philox(key=np.array([seed, number], np.uint64), counter=[0, 0, 0, stream]).random_raw(num)
