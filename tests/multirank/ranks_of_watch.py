"""One rank of a real run in which something goes wrong on rank 1, started with a launcher's variables and no launcher:
`python -m tests.multirank.ranks_of_watch CONFIG FAULT [key=value ...]`."""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from dist_train import ranks
from dist_train.priors.regions import RegionsPrior
from launch.train import main

BAD_STEP = 4


def hangs(step: int) -> None:
    if step == BAD_STEP:
        time.sleep(1000)


def dies(step: int) -> None:
    if step == BAD_STEP:
        os.kill(os.getpid(), signal.SIGKILL)


def fails(step: int) -> None:
    if step == BAD_STEP:
        raise RuntimeError("no memory left")


def lags(step: int) -> None:
    time.sleep(2.0)


def with_fault(call: Callable[..., Any], fault: Callable[[int], None]) -> Callable[..., Any]:
    """The prior, which is asked once a step; the one that lags also spoils the ground truth from `BAD_STEP` on."""
    step = 0

    def faulty(self: Any, images: torch.Tensor, batch: Any, **options: Any) -> Any:
        nonlocal step
        step += 1
        if ranks.rank() == 1:
            fault(step)
            if fault is lags and step >= BAD_STEP:
                batch.gt[1].fill_(torch.nan)
        return call(self, images, batch, **options)

    return faulty


if __name__ == "__main__":
    config, fault, *overrides = sys.argv[1:]
    RegionsPrior.__call__ = with_fault(RegionsPrior.__call__, globals()[fault])  # type: ignore[method-assign]
    sys.exit(main([config, *overrides]))
