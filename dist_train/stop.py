"""Asking a run to stop: it saves at the end of its step, and the same command goes on from there."""

import contextlib
import logging
import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

from dist_train import ranks

log = logging.getLogger(__name__)

Ended = Literal["finished", "stopped", "interrupted"]

FLAG = "stop"
"""Name of the file, in a run's folder, that asks. Its content is the reason, for the log."""


class StopRequests:
    """Listens, while it is entered, for whoever wants the run to stop: RUN/stop, SIGTERM, SIGUSR1, a launcher's death.

    A signal may come anywhere in a step, so its handler only takes note; the loop asks at each step's end and the ranks
    agree. Ranks whose launcher was killed would train on unseen. All ranks enter; the main one looks for the file.

    Args:
        run_dir: the run's folder.

    Attributes:
        ended: how the run has, once the ranks have agreed to stop: `stopped` if the file alone has asked, which is to
            say that somebody wants it to rest; else `interrupted`, to go on as soon as it can.
    """

    def __init__(self, run_dir: Path) -> None:
        self._flag = run_dir / FLAG
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._signal = ""
        self._agreed = False
        self.ended: Ended = "finished"
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._agreed and kind is None and ranks.is_main():
            self._flag.unlink(missing_ok=True)  # obeyed: the next start shall not find it

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop, on all ranks alike. All ranks call, at each step's end."""
        reason = self._reason()
        self._agreed = ranks.any_rank(bool(reason))
        if self._agreed:
            reasons = list(filter(None, ranks.gather_objects(reason)))
            self.ended = "stopped" if all(reason.startswith(str(self._flag)) for reason in reasons) else "interrupted"
            log.info("stopping at the end of this step: %s", ", ".join(reasons))
        return self._agreed

    def _reason(self) -> str:
        """Why this rank has been asked to stop; empty if it has not."""
        if self._signal:
            return f"{self._signal} to rank {ranks.rank()}"
        if self._launcher is not None and os.getppid() != self._launcher:
            return f"the launcher of rank {ranks.rank()} has died"
        if ranks.is_main() and self._flag.exists():
            why = ""
            with contextlib.suppress(OSError):  # whoever may not read it, or finds it gone, has been asked all the same
                why = self._flag.read_text(errors="replace").strip()
            return f"{self._flag}: {why or 'no reason given'}"
        return ""
