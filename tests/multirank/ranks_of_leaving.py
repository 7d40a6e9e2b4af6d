"""What is done to ranks in tests/multirank/test_leaving.py, before they begin."""

import time
from typing import Any

from dist_train import ranks
from dist_train.data.batch import Batch
from dist_train.data.ledger import Ledger
from dist_train.track import Tracker

BAD_STEP = 2


def spoil_a_step() -> None:
    """Rank 1 trains on NaN in `BAD_STEP`."""
    note = Ledger.note

    def spoilt(self: Ledger, batch: Batch) -> None:
        note(self, batch)
        if ranks.rank() == 1 and batch.positions[0] // (ranks.world_size() * len(batch.positions)) + 1 == BAD_STEP:
            batch.gt.fill_(float("nan"))

    Ledger.note = spoilt  # type: ignore[method-assign]


def close_slowly() -> None:
    """The main rank takes a while over its files, as with a slow wandb server, and all ranks say when they leave."""
    close, leave = Tracker.__exit__, ranks.stop_ranks

    def slow(self: Tracker, *error: Any) -> None:
        if ranks.is_main():
            time.sleep(2.0)
            print("files are closed", flush=True)
        close(self, *error)

    def tell() -> None:
        print("a rank leaves", flush=True)
        leave()

    Tracker.__exit__ = slow  # type: ignore[method-assign, assignment]
    ranks.stop_ranks = tell
