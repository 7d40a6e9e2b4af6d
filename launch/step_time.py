"""How long a step takes on n ranks, from five numbers; and how those are fitted to steps that were measured.

    t(n) = T (1 + cv e(n)) + C(n) + f          C(n) = 2 (n - 1) / n * bytes / bandwidth + k (n - 1) latency

T is what a rank computes by itself, cv its standard deviation between ranks over its mean, e(n) the largest of n
standard normal numbers on average: the step waits for the slowest rank. C(n) is the gradients' all-reduce, in k calls
that go around a ring, and f what is left: DeepSpeed, the optimizer, Python.

What it leaves out: overlap of computing and sending (so C is at its worst), links that other jobs share, trees instead
of rings (which at many ranks have less latency), spread with heavier tails than the normal one's, reading of data.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import norm


class Link(NamedTuple):
    """What connects the ranks."""

    bytes_per_s: float
    """Of a rank, each way."""
    latency_s: float
    """Of one hop around the ring."""


class StepCost(NamedTuple):
    """What a step costs, whatever the number of ranks."""

    compute_s: float
    """T."""
    spread: float
    """cv."""
    fixed_s: float
    """f."""
    num_bytes: int
    """All gradients in float32."""
    calls: float
    """k. ZeRO-3 has some for each layer."""
    traffic: float = 1.0
    """Over that of one all-reduce; ZeRO-3 gathers the weights once more: 1.5."""

    def waiting_s(self, ranks: int) -> float:
        """T cv e(n): what the ranks wait for the slowest on average."""
        return self.compute_s * self.spread * expected_max(ranks)

    def communication_s(self, ranks: int, link: Link) -> float:
        """C(n)."""
        return self.traffic * _ring_bytes(ranks, self.num_bytes) / link.bytes_per_s + (
            self.calls * (ranks - 1) * link.latency_s
        )

    def seconds(self, ranks: int, link: Link) -> float:
        """t(n)."""
        return self.compute_s + self.waiting_s(ranks) + self.communication_s(ranks, link) + self.fixed_s

    def efficiency(self, ranks: int, link: Link) -> float:
        """t(1) / t(n): what n ranks do in a second, over n times what one does, each with as much to do."""
        return self.seconds(1, link) / self.seconds(ranks, link)

    def with_batch(self, factor: float) -> "StepCost":
        """For `factor` times the samples a rank: T grows with them; if they are independent, cv falls with the root."""
        return self._replace(compute_s=self.compute_s * factor, spread=self.spread / factor**0.5)


def expected_max(count: int) -> float:
    """Mean of the largest of `count` standard normal numbers: 0, 0.56, 0.85, 1.03 for 1, 2, 3, 4."""
    x = np.linspace(-9, 9, 4001)
    return float(np.trapezoid(x * count * norm.pdf(x) * norm.cdf(x) ** (count - 1), x))


def _ring_bytes(ranks: int, num_bytes: float) -> float:
    return 2 * (ranks - 1) / ranks * num_bytes


class AllReduce(NamedTuple):
    """One that was measured."""

    ranks: int
    num_bytes: int
    seconds: float


def fit_link(measured: Iterable[AllReduce]) -> Link:
    """Bandwidth and latency, neither negative, by least squares of relative errors.

    Raises:
        ValueError: they do not tell both: two sizes at least, on two ranks or more, and larger ones must take longer.
    """
    several = [one for one in measured if one.ranks > 1]
    rows = np.array([[_ring_bytes(one.ranks, one.num_bytes), one.ranks - 1] for one in several]).reshape(-1, 2)
    seconds = np.array([one.seconds for one in several])
    (per_byte, latency_s), _ = nnls(rows / seconds[:, None], np.ones(len(rows))) if several else ((0.0, 0.0), 0.0)
    if per_byte <= 0 or len({one.num_bytes for one in several}) < 2:
        raise ValueError(
            f"no bandwidth can be told from {len(several)} all-reduces: it takes two sizes, on 2 ranks or more, of "
            "which the larger takes longer"
        )
    return Link(1 / float(per_byte), float(latency_s))


class Steps(NamedTuple):
    """Steps that were measured, on one number of ranks."""

    wall_s: NDArray[np.float64]
    """(S,), of each step."""
    own_s: NDArray[np.float64]
    """(S,R), what each rank computed by itself."""
    calls: float = 0.0
    """Collectives of one step."""

    @property
    def ranks(self) -> int:
        """How many."""
        return self.own_s.shape[1]


def fit_step(measured: Sequence[Steps], link: Link, *, num_bytes: int) -> StepCost:
    """T, cv and f of steps with as much to do for each rank, whatever the number of ranks.

    T and cv are mean and standard deviation over all steps and ranks; f is the mean of what they and the all-reduce
    leave unexplained, and at least 0.

    Args:
        measured: on one or more numbers of ranks.
        link: between them.
        num_bytes: all gradients in float32.
    """
    own = np.concatenate([steps.own_s.ravel() for steps in measured])
    compute_s = float(own.mean())
    cost = StepCost(
        compute_s,
        spread=float(own.std() / compute_s),
        fixed_s=0.0,
        num_bytes=num_bytes,
        calls=max(steps.calls for steps in measured),
    )
    left = [float(steps.wall_s.mean()) - cost.seconds(steps.ranks, link) for steps in measured]
    return cost._replace(fixed_s=max(float(np.mean(left)), 0.0))


class Scaled(NamedTuple):
    """A step at some number of ranks, foretold."""

    ranks: int
    batch_per_rank: float
    seconds: float
    waiting_s: float
    communication_s: float
    efficiency: float
    """Samples a second, over those of one rank times the ranks."""


def weak_scaling(cost: StepCost, link: Link, ranks: Iterable[int], *, batch_per_rank: int) -> list[Scaled]:
    """Each rank has `batch_per_rank` samples, which `cost` is of: the global batch grows with the ranks."""
    return [_scaled(cost, link, n, batch_per_rank, cost.seconds(1, link)) for n in ranks]


def strong_scaling(
    cost: StepCost, link: Link, ranks: Iterable[int], *, batch_per_rank: int, global_batch: int
) -> list[Scaled]:
    """The same `global_batch` whatever the ranks, so that the method stays the same; as long as each has a sample.

    Args:
        cost: of a step with `batch_per_rank` samples a rank.
        link: between the ranks.
        ranks: those that do not divide the global batch are left out.
        batch_per_rank: see `cost`.
        global_batch: samples a step.
    """
    alone_s = cost.with_batch(global_batch / batch_per_rank).seconds(1, link)
    shares = {n: global_batch // n for n in ranks if global_batch % n == 0}
    return [_scaled(cost.with_batch(b / batch_per_rank), link, n, b, alone_s / n) for n, b in shares.items()]


def _scaled(cost: StepCost, link: Link, ranks: int, batch: int, ideal_s: float) -> Scaled:
    seconds = cost.seconds(ranks, link)
    waiting_s, communication_s = cost.waiting_s(ranks), cost.communication_s(ranks, link)
    return Scaled(ranks, batch, seconds, waiting_s, communication_s, ideal_s / seconds)
