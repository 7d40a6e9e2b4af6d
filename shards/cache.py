"""Shards of far data sets on a disk of this node, fetched once for all its processes and within a limit.

DIR/<sha256>        a whole shard, verified when it came; its mtime is when it was last read
DIR/<sha256>.part   one on its way, or what a killed process left; as large as the shard from the start
DIR/lock            held by whoever makes room or gives a shard its name

Whoever fetches a shard holds a lock (flock) on its .part, and others who want it wait for that lock. The kernel frees
the locks of the dead, so a .part that nobody has locked is rubbish. A .part is renamed or removed only under its own
lock, and counts with its full size, so the limit holds at every moment.

What is thrown away while somebody reads it stays readable to him, and takes its room on the disk until he closes it.
So readers open, read and close. All locks and names are of one node: put DIR on a disk of the node's own.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from shards.fetch import fetch
from shards.schema import Shard, ShardError, sha256_of

logger = logging.getLogger(__name__)

_OURS = re.compile(r"[0-9a-f]{64}(\.part)?")
_WAIT_S = 0.1
_GIB = 2**30


class ShardCache:
    """Where shards lie after they were fetched; making one touches no disk.

    Args:
        folder: shared by the processes of a node, and by data sets. None: ~/.cache/restill/shards.
        limit_gib: the most it may hold.
    """

    def __init__(self, folder: str | Path | None = None, *, limit_gib: float = 50) -> None:
        self.folder = Path(folder or "~/.cache/restill/shards").expanduser()
        self.limit = int(limit_gib * _GIB)
        self._expected: dict[str, int] = {}

    def check_room(self, shards: Sequence[Shard]) -> None:
        """Make sure, before anything starts, that these shards, and those of calls before, can be kept as they come.

        Raises:
            ValueError: the folder cannot be written, or a shard does not fit into the limit, or the limit (or all the
                shards, if they are less) not onto the disk.
        """
        largest = max(shard.filesize for shard in shards)
        if largest > self.limit:
            raise ValueError(
                f"the cache {self.folder} may hold {self.limit / _GIB:.3g} GiB, and the largest shard alone has "
                f"{largest / _GIB:.3g}: raise data.cache_gib (or --cache-gib)"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._remove_stale()
                room = sum(stat.st_size for stat in self._held().values()) + shutil.disk_usage(self.folder).free
        except OSError as error:
            raise ValueError(
                f"the cache folder {self.folder} cannot be used ({error.strerror}): set data.cache_dir (or "
                "--cache-dir) to a folder that may be written, on a disk of this node"
            ) from error
        self._expected |= {shard.sha256: shard.filesize for shard in shards}
        if room < (wanted := min(sum(self._expected.values()), self.limit)):
            raise ValueError(
                f"the cache {self.folder} would grow to {wanted / _GIB:.3g} GiB, and its disk has room for "
                f"{room / _GIB:.3g}: lower data.cache_gib (or --cache-gib), or name a folder on a larger disk "
                "in data.cache_dir (or --cache-dir)"
            )

    def open(self, shard: Shard, url: str) -> int:
        """A descriptor of a shard, fetched if it is not here; it stays readable whatever the cache does.

        Args:
            shard: of the manifest.
            url: where it lies.

        Raises:
            ShardError: it cannot be fetched, or is not what the manifest says, or the disk is full.
        """
        path = self.folder / shard.sha256
        part = path.with_suffix(".part")
        try:
            while True:
                if (found := _open_whole(path, shard.filesize)) is not None:
                    return found
                with _claimed(part) as file:
                    if file is None or path.exists():  # another process has fetched it meanwhile
                        continue
                    logger.info("fetching %s (%.3g GiB)", url, shard.filesize / _GIB)
                    self._reserve(file, shard.filesize)
                    with os.fdopen(file, "r+b", closefd=False) as stream:
                        fetch(url, stream, size=shard.filesize, sha256=shard.sha256)
                    whole = os.open(part, os.O_RDONLY)
                    with self._alone():  # or who makes room just now would see neither name
                        os.rename(part, path)
                    return whole
        except OSError as error:
            what = f"could not be kept in the cache {self.folder}: {error.strerror}; free its disk, then start again"
            raise ShardError(what, url=url) from error

    def holds(self, shard: Shard) -> bool:
        """Whether a shard is here, or on its way."""
        path = self.folder / shard.sha256
        return path.exists() or path.with_suffix(".part").exists()

    def drop_damaged(self, shard: Shard) -> bool:
        """Read a whole shard again, and throw it away if it has changed since it came; returns whether it had."""
        path = self.folder / shard.sha256
        with contextlib.suppress(FileNotFoundError):
            if sha256_of(path) == shard.sha256:
                return False
            logger.warning("%s has changed on the disk and is fetched again: see whether the disk is sound", path)
            path.unlink()
        return True

    def _reserve(self, file: int, size: int) -> None:
        """Give an empty .part its full size, throwing away what was read longest ago."""
        while True:
            with self._alone():
                self._remove_stale()
                held = self._held()
                excess = sum(stat.st_size for stat in held.values()) + size - self.limit
                whole = sorted((stat.st_mtime_ns, path) for path, stat in held.items() if not path.suffix)
                for _, path in whole:
                    if excess <= 0:
                        break
                    path.unlink(missing_ok=True)
                    excess -= held[path].st_size
                if excess <= 0:
                    os.posix_fallocate(file, 0, size)
                    return
            time.sleep(_WAIT_S)  # all else is on its way, and can be thrown away once it is here

    def _held(self) -> dict[Path, os.stat_result]:
        held = {}
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    held[path] = path.stat()
        return held

    def _remove_stale(self) -> None:
        for part in self.folder.glob("*.part"):
            with contextlib.suppress(BlockingIOError, FileNotFoundError), _claimed(part, wait=False):
                pass  # nobody else claims it; it goes on leaving

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        file = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            _unlock(file)


@contextlib.contextmanager
def _claimed(part: Path, *, wait: bool = True) -> Iterator[int | None]:
    """Lock a .part, and remove it in the end if it still has that name.

    Args:
        part: made if need be.
        wait: for others; otherwise BlockingIOError, and FileNotFoundError if there is none.

    Yields:
        Its descriptor, or None: while we waited it came to an end.
    """
    file = os.open(part, os.O_RDWR | (os.O_CREAT if wait else 0), 0o666)
    locked = False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        locked = True
        yield file if _is(file, part) else None
    finally:
        if locked and _is(file, part):
            part.unlink()
        _unlock(file)


def _unlock(file: int) -> None:
    """Closing alone frees no lock of which a process forked meanwhile holds a copy."""
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _is(file: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _open_whole(path: Path, size: int) -> int | None:
    """A descriptor of a shard that is here, which counts as read now; None if it is not here or not whole."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(file).st_size == size:
        with contextlib.suppress(PermissionError):  # another user's; then it is merely thrown away sooner
            os.utime(file, ns=(time.time_ns(),) * 2)  # of itself the kernel would round to its ticks
        return file
    os.close(file)
    logger.warning("%s was cut short on the disk and is fetched again: see whether the disk is sound", path)
    path.unlink(missing_ok=True)
    return None
