"""What a run writes down of its samples: those that could not be read, and on request all."""

import hashlib
import json
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from dist_train import ranks
from dist_train.config import RunConfig
from dist_train.data.batch import BadSample, Batch
from shards.files import write_whole

_IN_A_ROW = 100  # whatever may be bad, so many one after the other are no bad samples but a bad disk

log = logging.getLogger(__name__)

BAD = "bad_samples.jsonl"
SEEN = "samples-rank{}.jsonl"
"""One line for each micro-batch: step, and of each sample position, key and `pixels_sha1`."""


class Ledger:
    """Counts the bad samples of all ranks, and keeps the record of what each rank saw.

    What a resumed run will see again is struck from the record first, so that it tells of each position once, whatever
    the number of ranks before and now.

    Args:
        run: the run.
        num_samples: of the training set.
        start_step: steps done by the checkpoint that this run goes on from.
    """

    def __init__(self, run: RunConfig, *, num_samples: int, start_step: int) -> None:
        self._run, limit = run, run.data.max_bad_samples
        self._limit = num_samples // 1000 if limit is None else limit
        self._new: list[BadSample] = []
        self._bad: dict[str, BadSample] = {}
        self._row = range(0)
        self._open = ExitStack()
        ranks.on_main(lambda: _strike(run.dir, after_step=start_step))
        self._seen = None
        if run.track.samples:
            run.dir.mkdir(parents=True, exist_ok=True)
            self._seen = self._open.enter_context((run.dir / SEEN.format(ranks.rank())).open("a", buffering=1))

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def num_bad(self) -> int:
        """Samples that any rank could not read since this start; each counts once, however often it comes."""
        return len(self._bad)

    def note(self, batch: Batch) -> None:
        """Write down a batch of this rank that is about to be trained on."""
        self._new += batch.bad
        if self._seen is not None:
            positions = batch.positions.tolist()
            line = {
                "step": self._step(positions[0]),
                "positions": positions,
                "keys": batch.keys,
                "sha1": pixels_sha1(batch),
            }
            self._seen.write(json.dumps(line) + "\n")

    def settle(self) -> None:
        """Tell all ranks of the bad samples that any of them met since the last call, and write them down.

        Raises:
            ValueError: on all ranks, if together they have met more than the run allows, or 100 in a row.
        """
        if not ranks.any_rank(bool(self._new)):
            return
        met = [(rank, bad) for rank, of_rank in enumerate(ranks.gather_objects(self._new)) for bad in of_rank]
        self._new = []
        for _, bad in met:
            if bad.key not in self._bad and ranks.is_main():
                log.warning("replaced a bad sample: %s", bad.reason)
            self._bad.setdefault(bad.key, bad)
        ranks.on_main(lambda: self._write_bad(met))
        for position in sorted({bad.position for _, bad in met}):
            self._row = range(self._row.start if position == self._row.stop else position, position + 1)
            if len(self._row) == _IN_A_ROW:
                raise ValueError(
                    f"{_IN_A_ROW} samples in a row, up to position {position}, could not be read; the last: "
                    f"{met[-1][1].reason}\nSee whether the disk or the network is sound, then start again"
                )
        if self.num_bad > self._limit:
            raise ValueError(
                f"{self.num_bad} samples could not be read and data.max_bad_samples is {self._limit}:\n  "
                + "\n  ".join(sorted(bad.reason for bad in self._bad.values())[:10])
                + "\nMend the shards, or raise data.max_bad_samples to go on without these"
            )

    def _write_bad(self, met: Iterable[tuple[int, BadSample]]) -> None:
        with (self._run.dir / BAD).open("a") as file:
            for rank, bad in met:
                data_set, _, shard = bad.shard.rpartition("/")
                line = {
                    "step": self._step(bad.position),
                    "position": bad.position,
                    "rank": rank,
                    "data_set": data_set,
                    "shard": shard,
                    "key": bad.key,
                    "reason": bad.reason,
                }
                file.write(json.dumps(line) + "\n")

    def _step(self, position: int) -> int:
        return position // self._run.optim.global_batch + 1


def pixels_sha1(batch: Batch) -> list[str]:
    """Of each sample the SHA-1 of its lq, then its gt, as float32 in [0,1], (3,H,W) each."""
    return [
        hashlib.sha1(lq.numpy().tobytes() + gt.numpy().tobytes()).hexdigest()
        for lq, gt in zip(batch.lq.cpu(), batch.gt.cpu(), strict=True)
    ]


def _strike(folder: Path, *, after_step: int) -> None:
    """Remove the lines of later steps, and any that a crash cut short."""
    for path in [*folder.glob(SEEN.format("*")), *folder.glob(BAD)]:
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_whole(path, "".join(line for line in lines if json.loads(line)["step"] <= after_step))
