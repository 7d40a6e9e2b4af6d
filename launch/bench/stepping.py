"""What each rank of `launch.bench scaling` does: steps of the real engine, and all-reduces."""

import gc
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train import ranks
from dist_train.config import RunConfig, plan_batch
from dist_train.data.batch import Batch
from dist_train.engine import Engine
from dist_train.priors import Priors, build_prior
from dist_train.priors.vgg import load_features
from dist_train.spans import Span, Spans
from dist_train.tasks import build_task
from launch.bench.masking import photographs
from launch.bench.race import resident_mib

OWN = ("student", "prior", "teacher", "features", "losses", "backward")
"""Phases of a step in which a rank computes by itself."""


class Case(NamedTuple):
    """What the ranks of a world do in a step."""

    run: RunConfig
    """Its global batch is that of this world."""
    sleep_s: float | None = None
    """None: compute. Else a rank sleeps about so long instead, so that more ranks fit than there are cores; engine and
    all-reduce are the real ones."""
    spread: float = 0.0
    """Standard deviation of that over its mean, between steps and ranks; drawn from a normal distribution."""
    parameters: int = 0
    """Of what is trained where ranks sleep."""


class Told(NamedTuple):
    """What a rank tells of some steps."""

    wall_s: list[float]
    own_s: list[float]
    calls: float
    """Collectives of the last one."""
    grown_mib: float | None
    """CPU memory, at its peak, over that before there was a task; of the first request alone."""


def prepare(case: Case) -> Callable[[tuple[str, int]], object]:
    """Answers ("steps", how many) with `Told`, ("all_reduce", bytes) with seconds, and ("parameters", 0)."""
    device = ranks.start_ranks(case.run)
    import deepspeed  # noqa: F401  # before memory is looked at, and after `start_ranks` has told it the device

    batches = _pictures(case.run)
    spans = Spans(device)
    priors = _priors(case.run, device, spans) if case.sleep_s is None else Priors()
    gc.collect()
    before = resident_mib(restart_peak=True)
    torch.manual_seed(case.run.seed)
    task = build_task(case.run) if case.sleep_s is None else Sleeper(case, spans)
    parameters = sum(p.numel() for p in task.parameters() if p.requires_grad)
    engine = Engine(case.run, task, plan_batch(case.run.optim, ranks.world_size()), device, span=spans)

    def steps(count: int) -> Told:
        wall_s, own_s, calls = [], [], 0
        for _ in range(count):
            spans.take()
            engine.step(batches, priors)
            spent = spans.take()
            calls = spent["communication"].times if "communication" in spent else 0
            wall_s.append(sum(phase.seconds for phase in spent.values()))
            own_s.append(sum(spent[phase].seconds for phase in OWN if phase in spent))
        after = resident_mib()
        return Told(wall_s, own_s, calls, None if before is None or after is None else after - before)

    answers: dict[str, Callable[[int], object]] = {
        "steps": steps,
        "all_reduce": all_reduce,
        "parameters": lambda _: parameters,
    }

    def answer(request: tuple[str, int]) -> object:
        what, number = request
        return answers[what](number)

    return answer


def all_reduce(num_bytes: int, *, times: int = 5) -> list[float]:
    """Seconds of each all-reduce of so many bytes of float32, after one that does not count."""
    values, seconds = torch.ones(num_bytes // 4), []
    for _ in range(times + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - start)
        values.fill_(1)
    return seconds[1:]


class Sleeper(nn.Module):
    """A task whose forward pass sleeps, with gradients for `case.parameters`."""

    def __init__(self, case: Case, span: Span):
        super().__init__()
        self.student = nn.Linear(case.parameters, 1, bias=False)
        self._case, self._span, self._random = case, span, random.Random(ranks.rank())

    def forward(self, batch: Batch, priors: Priors, *, measure: bool = False) -> dict[str, Tensor]:
        """Sleep, then lose a little."""
        assert self._case.sleep_s is not None
        seconds = self._random.gauss(self._case.sleep_s, self._case.spread * self._case.sleep_s)
        with self._span("student"):
            time.sleep(max(seconds, 0.0))
        return {"total": self.student.weight.sum()}


def _priors(run: RunConfig, device: torch.device, span: Span) -> Priors:
    if run.task == "plain":
        return Priors(span=span)
    if run.prior.name in ("stored", "cached", "remote"):
        raise ValueError(
            f"prior.name={run.prior.name} wants a data set or servers, and here there are none; set prior.name=regions "
            "or sam"
        )
    features = load_features(run.features, device) if run.uses_sgr else None
    return Priors(build_prior(run.prior, device), features, span)


def _pictures(run: RunConfig) -> Iterator[Batch]:
    """Noisy crops of photographs, other ones on each rank and in each step."""
    px, draw = run.data.crop_px, random.Random(1000 + ranks.rank())
    photos = photographs(3, max(px, 300), max(px, 300))
    batch = plan_batch(run.optim, ranks.world_size()).batch_per_rank
    noise = torch.Generator().manual_seed(ranks.rank())
    while True:
        crops = []
        for _ in range(batch):
            top, left = (draw.randint(0, photos.shape[-1] - px) for _ in range(2))
            crops.append(photos[draw.randrange(3), :, top : top + px, left : left + px])
        gt = torch.stack(crops)
        pictures = Batch.of_images(gt + 0.05 * torch.randn(gt.shape, generator=noise), gt)
        yield replace(pictures, positions=torch.arange(batch))


def peak_mib(told: list[Told]) -> float | None:
    """Of the rank that grew most."""
    return max((rank.grown_mib for rank in told if rank.grown_mib is not None), default=None)
