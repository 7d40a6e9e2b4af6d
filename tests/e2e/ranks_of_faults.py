"""What goes wrong inside a rank, to be set up before it begins: `functools.partial`s of these are sabotage."""

import os
import signal
import sys
from pathlib import Path

from dist_train import lock, ranks
from dist_train.data.batch import Batch
from dist_train.data.ledger import Ledger


def die_at(event: str, path: str, *, rank: int = 0) -> None:
    """kill -9 of this rank just before a file operation: an audit event of Python, and the end of its last path."""
    if ranks.rank() != rank:
        return

    def watch(what: str, arguments: tuple) -> None:
        if what == event and any(str(argument).endswith(path) for argument in arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def poison(step: int) -> None:
    """From this step on rank 1 trains on NaN."""
    note = Ledger.note

    def poisoned(self: Ledger, batch: Batch) -> None:
        note(self, batch)
        if ranks.rank() == 1 and batch.positions[0] // (ranks.world_size() * len(batch.positions)) + 1 >= step:
            batch.gt.fill_(float("nan"))

    Ledger.note = poisoned  # type: ignore[method-assign]


def be_impatient(*, wait_s: float = lock.WAIT_S, silent_s: float = lock.SILENT_S) -> None:
    """Wait for another start of the run, and for a sign of life of it, for seconds instead of most of a minute."""
    lock.WAIT_S, lock.SILENT_S = wait_s, silent_s


def tree_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
