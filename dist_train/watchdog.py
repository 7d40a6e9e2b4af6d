"""How a run ends when a rank hangs or dies: soon, and saying which one, where."""

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from types import TracebackType

from dist_train import ranks
from dist_train.config import RunConfig
from dist_train.ranks import TrainingError
from dist_train.spans import OWN, Spans
from shards.files import write_whole
from shards.schema import ShardError

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""How long a rank that ends waits for the last words of the others."""
LAST_RESORT_S = 60.0
"""So much later the process is ended from below Python, should this not have worked: a disk that hangs, for example."""
WAITS = "communication"
"""The phase of a rank that waits for others."""


class Watchdog:
    """Ends this rank, while it is entered, when it takes too long or when another one is lost. All ranks enter.

    A rank that stands still for longer than `expect` allows writes its last words (which rank, where, at what step and
    in which phase, and the stack of each thread) to stderr and to RUN/stacks/START/rankR.txt, and exits with 1, upon
    which torchrun and srun end the rest. Where one hangs all others wait for it, so all write. The first of them waits
    `GRACE_S` and says who did not wait, and who has written nothing, which is a rank that is dead. So the run ends
    `GRACE_S` after the limit, or `LAST_RESORT_S` where not even a thread can move.

    A rank whose collective fails, as gloo's do at once when a peer dies, does the same; its error goes on, with the
    summary as a note. NCCL's do not: there the limit ends the run, unless the launcher that saw its child die does.

    Args:
        run: names the folder and the limits.
        spans: tells the phase.
    """

    def __init__(self, run: RunConfig, spans: Spans) -> None:
        self._engine, self._spans = run.engine, spans
        self._rank, self._host = ranks.rank(), socket.gethostname()
        started = time.strftime("%Y%m%d-%H%M%S")
        told = ranks.gather_objects((self._host, started))
        self._hosts = [host for host, _ in told]
        self._folder = run.dir / "stacks" / told[0][1]
        self._over = threading.Event()
        self.expect("starting", slow=True)

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        met_by_all = isinstance(error, TrainingError | ValueError | ShardError) and self._spans.broke_in not in OWN
        if len(self._hosts) > 1 and isinstance(error, Exception) and not met_by_all:
            self._mourn(error)
            faulthandler.dump_traceback_later(LAST_RESORT_S, exit=True)  # leaving a broken group may hang

    def expect(self, what: str, *, slow: bool = False) -> None:
        """From now on this rank does `what`, for as long as engine.hang_timeout_s at most; or engine.slow_timeout_s."""
        field = "slow_timeout_s" if slow else "hang_timeout_s"
        limit = getattr(self._engine, field)
        self._what, self._limit = what, f"{limit:g} s (engine.{field})"
        self._deadline = time.monotonic() + limit
        self._spans.broke_in = None
        faulthandler.dump_traceback_later(limit + LAST_RESORT_S, exit=True)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, max(0.0, self._deadline - time.monotonic()))):
            if time.monotonic() >= self._deadline:
                words = f"{self._place(self._spans.phase)}: this has taken more than {self._limit}"
                self._write(f"{words}\n{_stacks()}")
                self._sum_up()
                os._exit(1)

    def _mourn(self, error: Exception) -> None:
        phase = self._spans.broke_in or self._spans.phase
        words = f"{self._place(phase)}: {type(error).__name__}: {error}".splitlines()[0]
        self._write(f"{words}\n{''.join(traceback.format_exception(error))}")
        if phase == WAITS or ranks.is_of_peers(error):  # else it is this rank's own, and the others wait for it
            if summary := self._sum_up():
                error.add_note(summary)

    def _place(self, phase: str) -> str:
        return f"rank {self._rank} on {self._host}, {self._what}, in {phase}"

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
        with contextlib.suppress(OSError):  # stderr has it
            write_whole(self._folder / f"rank{self._rank}.txt", text)

    def _sum_up(self) -> str:
        """Who is to blame, if there are others and this rank is the first that can tell."""
        if len(self._hosts) == 1:
            return ""
        time.sleep(GRACE_S)
        words = {}
        for rank in range(len(self._hosts)):
            with contextlib.suppress(OSError):
                words[rank] = (self._folder / f"rank{rank}.txt").read_text("utf-8").partition("\n")[0]
        if self._rank != min(words, default=self._rank):
            return ""
        blamed = [line for line in words.values() if f" in {WAITS}:" not in line]
        summary = [f"{len(words) - len(blamed)} of {len(self._hosts)} ranks waited for others", *blamed]
        summary += [
            f"rank {rank} on {host} has said nothing: it was killed, or its machine is down"
            for rank, host in enumerate(self._hosts)
            if rank not in words
        ]
        summary.append(f"stacks: {self._folder}")
        log.error("%s", "\n".join(summary))
        return "\n".join(summary)


def _stacks() -> str:
    """Of all threads, with the innermost call first."""
    with tempfile.TemporaryFile() as file:  # faulthandler wants one with a number
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")
