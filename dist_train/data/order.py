"""Which sample comes when, and its share of chance, as pure functions of the seed and the position in the stream.

Position p belongs to epoch p // N; a batch may straddle two. Nothing here knows of ranks, workers or passes, so every
topology sees the same stream, and the only state worth saving is how many samples were consumed. Of numpy's random
machinery only `random_raw` is used: bit generators are frozen by NEP 19, `Generator.permutation` is not, so an upgrade
cannot change a half-finished run.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
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
_WINDOWED = 7  # by epoch
_BLOCK = 8  # by block
MASK_DROPOUT = 9
_ONE_SET = np.zeros(1, np.int64)


class Order:
    """Which sample comes at each position of the stream, of one data set or of several with fixed shares.

    Every epoch of every data set is another permutation of all its samples. Of several, each block of sum(shares)
    positions holds each set exactly `share` times, and each set goes through its own epochs at its own pace, so that
    its samples are used equally often, but for one.

    With a `window` the order is one for shards that are far away: shards in random order, shuffled inside, make a line
    that is cut into `lanes` equal parts, in each of which samples then move on by up to `window` places; the parts are
    read side by side, sample by sample. If there are as many lanes as samples in a global batch, a lane is a place in
    the batch, and a node reads the shards of its own lanes and no others. Of several data sets that takes a global
    batch that is a multiple of sum(shares).

    Args:
        shards: for each data set the number of samples in each of its shards; samples are numbered through them all.
        seed: of the run.
        shares: of each set, in positions per block; None: there is one.
        window: in samples of a lane; None: each epoch is one shuffle of all.
        lanes: of a windowed order, over all sets together.
        start: position at which this stream begins; others begin anew with other permutations.
    """

    def __init__(
        self,
        shards: Sequence[Sequence[int]],
        *,
        seed: int,
        shares: Sequence[int] | None = None,
        window: int | None = None,
        lanes: int = 1,
        start: int = 0,
    ) -> None:
        self._shards = tuple(np.array(of_set) for of_set in shards)
        self._shares = tuple(shares or (1,))
        assert len(self._shares) == len(self._shards)
        self._sizes = tuple(int(of_set.sum()) for of_set in self._shards)
        self._first = (0, *accumulate(self._sizes))
        self._seed, self._window, self._lanes, self._start = seed, window, lanes, start
        self._epochs: tuple[dict[int, np.ndarray], ...] = tuple({} for _ in self._shards)

    def at(self, position: int) -> int:
        """Number of the sample at a position."""
        block, place = divmod(position - self._start, sum(self._shares))
        which = int(self._sets(block)[place])
        epoch, place = divmod(self._visits(position, which), self._sizes[which])
        return self._first[which] + int(self._epoch(which, epoch)[place])

    def epoch_at(self, position: int, number: int) -> int:
        """Epoch in which the data set of a sample is when the stream is at a position."""
        which = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._visits(position, which) // self._sizes[which]

    def _visits(self, position: int, which: int) -> int:
        """Samples of a set before a position."""
        block, place = divmod(position - self._start, sum(self._shares))
        return block * self._shares[which] + int(np.count_nonzero(self._sets(block)[:place] == which))

    def _sets(self, block: int) -> np.ndarray:
        """The data set at each place of a block; with lanes the same in all, so that a lane stays in its set."""
        if len(self._shares) == 1:
            return _ONE_SET
        return _sets_of_block(self._seed, 0 if self._window else block, self._start, self._shares)

    def _epoch(self, which: int, epoch: int) -> np.ndarray:
        kept = self._epochs[which]
        if epoch not in kept:
            while len(kept) > 1:  # a batch may straddle two
                del kept[next(iter(kept))]
            bits = _philox(self._seed, epoch, _WINDOWED if self._window else _ORDER, which=which, start=self._start)
            if self._window is None:
                kept[epoch] = _shuffled(bits, self._sizes[which])
            else:
                lanes = max(1, self._lanes * self._shares[which] // sum(self._shares))
                kept[epoch] = _windowed(bits, self._shards[which], window=self._window, lanes=lanes)
        return kept[epoch]


def _windowed(bits: np.random.Philox, shards: np.ndarray, *, window: int, lanes: int) -> np.ndarray:
    """One epoch of a windowed order; see `Order`."""
    num = int(shards.sum())
    place_of_shard = np.argsort(_shuffled(bits, len(shards)))
    line = np.lexsort((bits.random_raw(num), np.repeat(place_of_shard, shards)))
    lengths = num // lanes + (np.arange(lanes) < num % lanes)
    begins = np.cumsum(lengths) - lengths
    lane = np.repeat(np.arange(lanes), lengths)
    # Places and jitter in units of 2**-32 samples.
    moved = (np.arange(num, dtype=np.uint64) << 32) + (bits.random_raw(num) >> 32) * np.uint64(window)
    line = line[np.lexsort((moved, lane))]
    places = np.arange(num)
    return line[begins[places % lanes] + places // lanes]


def _shuffled(bits: np.random.Philox, num: int) -> np.ndarray:
    return np.argsort(bits.random_raw(num), kind="stable")


@lru_cache(maxsize=64)  # a mixed batch looks at all blocks of its step
def _sets_of_block(seed: int, block: int, start: int, shares: tuple[int, ...]) -> np.ndarray:
    bits = _philox(seed, block, _BLOCK, start=start)
    return np.repeat(np.arange(len(shares)), shares)[_shuffled(bits, sum(shares))]


def partner_at(position: int, *, seed: int, global_batch: int) -> int:
    """Position of a sample of the same global batch, now and then the same; each step permutes its batch anew."""
    step, place = divmod(position, global_batch)
    return step * global_batch + int(_partners(seed, step, global_batch)[place])


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


@lru_cache(maxsize=4)
def _partners(seed: int, step: int, global_batch: int) -> np.ndarray:
    return _shuffled(_philox(seed, step, _PARTNER), global_batch)


def _philox(seed: int, number: int, stream: int, *, which: int = 0, start: int = 0) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, number], np.uint64), counter=[0, which, start, stream])
