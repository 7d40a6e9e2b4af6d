"""One writer for a run's folder."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

from dist_train import ranks

log = logging.getLogger(__name__)

BEAT_S = 5.0
"""The owner touches its file so often."""
SILENT_S = 30.0
"""An owner that has not for so long is dead."""
WAIT_S = 40.0
"""How long a start waits for an owner that lives; it may be about to end."""


class RunLock:
    """RUN/lock, held while it is entered. All ranks enter and leave; the main one holds it.

    The file names its owner, who touches it as long as it lives. System locks would do that better, but many clusters'
    filesystems keep those to one machine, or have none. An owner on this machine is dead when its process is; one
    elsewhere, when its file stays untouched while we look. Two starts that find the same dead owner in the same
    millisecond may both take over: the later one keeps the folder, and the earlier ends at its next `check`. So does an
    owner that was frozen and declared dead.

    Args:
        run_dir: the run's folder; made if need be.

    Raises:
        ValueError: another start of this run lives; the message names it. On every rank.
        OSError: the folder cannot be written. On every rank.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "lock"
        self._mine = ""
        self._released = threading.Event()

    def __enter__(self) -> "RunLock":
        ranks.on_main(self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine:
            self._released.set()
            if self._read()[0] == self._mine:
                self._path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # nothing came of it
                    self._path.parent.rmdir()

    def check(self) -> None:
        """Make sure, before files are written, that the folder is still ours. All ranks call.

        Raises:
            ValueError: another start has taken it over; on every rank.
        """
        ranks.on_main(self._check)

    def _check(self) -> None:
        owner = self._read()[0]
        if owner != self._mine:
            raise ValueError(
                f"{self._path.parent} has been taken over by another start of this run ({_in_words(owner)}) while this "
                "one did not move; it goes on there"
            )

    def _take(self) -> None:
        me = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "job": os.environ.get("SLURM_JOB_ID", ""),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "machine": _machine(),
            }
        )
        try:
            self._wait_for_turn()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("x") as file:
                file.write(me)
        except FileExistsError:
            raise ValueError(f"another start of {self._path.parent} came first; wait for it") from None
        except OSError as error:
            raise OSError(
                f"the run's folder {self._path.parent} cannot be written: {error}; mend it, or set out=FOLDER"
            ) from error
        self._mine = me
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def _wait_for_turn(self) -> None:
        """Come back when there is no owner, or it is dead and its file removed."""
        begun = last_move = time.monotonic()
        seen = self._read()
        if seen[0]:
            log.info("%s: waiting for its owner, %s", self._path, _in_words(seen[0]))
        while (now := self._read())[0]:
            if now != seen:
                seen, last_move = now, time.monotonic()
            if _is_gone(now[0]) or time.monotonic() - last_move > SILENT_S:
                log.warning("%s: its owner is dead, %s; taking over", self._path, _in_words(now[0]))
                self._path.unlink(missing_ok=True)
            elif time.monotonic() - begun > WAIT_S:
                raise ValueError(
                    f"{self._path.parent} is being written by another start of this run: {_in_words(now[0])}. Wait for "
                    f"it, end it (touch {self._path.parent / 'stop'}), or give this run another name"
                )
            else:
                time.sleep(0.2)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a network disk may fail for a while; the next beat will do
                if self._read()[0] == self._mine:
                    os.utime(self._path)

    def _read(self) -> tuple[str, int]:
        """Content and time of the last touch, which a network disk brings up to date when a file is opened."""
        try:
            with self._path.open() as file:
                return file.read() or "{}", os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return "", 0


def _machine() -> str:
    """What a process number means something in: this boot of this machine, and the container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_gone(owner: str) -> bool:
    """Whether the owner is known to be dead: it ran here, and does no more."""
    told = _parse(owner)
    if not told.get("machine") or told["machine"] != _machine():
        return False
    try:
        os.kill(told["pid"], 0)
        status = Path(f"/proc/{told['pid']}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:  # somebody else's, and alive
        return False
    return status.rpartition(")")[2].split()[0] == "Z"  # dead, but nobody has asked how it ended


def _in_words(owner: str) -> str:
    told = _parse(owner)
    job = f", SLURM job {told['job']}" if told.get("job") else ""
    return f"process {told.get('pid', '?')} on {told.get('host', '?')}{job}, since {told.get('since', '?')}"


def _parse(owner: str) -> dict:
    try:
        return json.loads(owner)
    except json.JSONDecodeError:  # still being written
        return {}
