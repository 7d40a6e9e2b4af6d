"""A folder of shards while it is written: who writes it, and which of its shards are finished.

DIR/.writing          held locked by the one who writes; tells what
DIR/000000.tar.tmp    half-written; removed by whoever comes next
DIR/000000.tar.json   says that 000000.tar is finished, and of what; removed once there is a manifest
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from shards.files import sync
from shards.schema import MANIFEST, Rejected, ShardError, sha256_of

logger = logging.getLogger(__name__)

_MIB = 2**20
_WRITING = ".writing"
_PARTIAL = ".tmp"
_NOTE = ".json"
_HINTS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your disk quota is used up: free some space",
    errno.EACCES: "no permission to write here: ask for the right to",
    errno.EPERM: "no permission to write here: ask for the right to",
    errno.EROFS: "this disk is read-only",
}


class Finished(BaseModel):
    """What stands beside a finished shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: str
    """Hash of all that the shard is a function of."""
    nsamples: int
    """0: all pairs were rejected, and there is no tar."""
    filesize: int
    sha256: str
    rejected: tuple[Rejected, ...] = ()


@contextmanager
def making(parent: Path, *, prefix: str) -> Iterator[Path]:
    """A folder in `parent` for what is made on the way; what killed processes left of such is removed first."""
    for left in (path for path in parent.iterdir() if path.name.startswith(prefix)):
        with suppress(OSError), _alone(left):
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as made, ExitStack() as held:
        with suppress(OSError):  # a file system without locks: then nobody removes what is left
            held.enter_context(_alone(Path(made)))
        yield Path(made)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A lock that a dying process lets go; OSError if another has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def being_written(out: Path, *, what: str) -> Iterator[None]:
    """Hold `out`, a new or an unfinished folder, for writing `what`; left without a shard, it is removed again.

    Raises:
        ValueError: something else lies there, or somebody writes there now.
        ShardError: the disk is full or may not be written; finished shards stay.
    """
    lock: IO[str] | None = None
    try:
        if out.exists() and not (out / _WRITING).exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is in the way: it is no data set of ours and not empty; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        lock = _lock(out, what)
        _remove_partial(out)
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, error.strerror or str(error))
        raise ShardError(
            f"cannot go on ({hint}, or choose another --out); finished shards are kept, so the same command goes on",
            url=out,
        ) from error
    finally:
        if lock:
            with suppress(OSError):  # clearing up after an error must not hide it
                _remove_partial(out)
                if not any(out.glob("*.tar*")):
                    (out / _WRITING).unlink(missing_ok=True)
                    out.rmdir()
            lock.close()


def finished(tar: Path, *, inputs: str, verify: bool = False) -> Finished | None:
    """What is known of a shard that an earlier writing finished; None: it must be written.

    Args:
        tar: the shard.
        inputs: hash of what it should be of.
        verify: read it, and compare its sha256.
    """
    try:
        note = Finished.model_validate_json(_beside(tar).read_bytes())
        size = tar.stat().st_size if note.nsamples else 0
    except (FileNotFoundError, ValidationError):
        return None
    if note.inputs != inputs or note.filesize != size:
        return None
    return None if verify and note.nsamples and sha256_of(tar) != note.sha256 else note


def draft(tar: Path, samples: Iterable[dict[str, Any]]) -> int:
    """Write WebDataset samples where a shard is to be; returns their number. `keep` makes a shard of it."""
    import webdataset  # pulls in torch, which takes seconds

    num = 0
    with open(_draft(tar), "wb") as file:
        with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            for sample in samples:
                writer.write(sample)
                num += 1
        file.flush()
        os.fsync(file.fileno())
    return num


def keep(tar: Path, *, inputs: str, nsamples: int, rejected: Sequence[Rejected] = ()) -> Finished:
    """Make a draft the shard; from here on it counts as finished."""
    # Should there be a shard of other inputs, its note goes first: no note ever stands beside a tar it is not of.
    _beside(tar).unlink(missing_ok=True)
    sync(tar.parent)
    if nsamples:
        size, sha256 = _draft(tar).stat().st_size, sha256_of(_draft(tar))
        os.replace(_draft(tar), tar)
    else:
        size, sha256 = 0, ""
        tar.unlink(missing_ok=True)
    sync(tar.parent)
    note = Finished(inputs=inputs, nsamples=nsamples, filesize=size, sha256=sha256, rejected=tuple(rejected))
    write_file(_beside(tar), note.model_dump_json().encode())
    return note


def need_space(out: Path, needed_bytes: float) -> None:
    """Refuse, before the start, what does not fit on the disk.

    Raises:
        ShardError: naming both sizes.
    """
    free = shutil.disk_usage(out).free
    if needed_bytes > free:
        what = (
            f"needs some {needed_bytes / _MIB:.0f} MiB, free are {free / _MIB:.0f}: free some, or choose another --out"
        )
        raise ShardError(what, url=out)


def write_file(path: Path, data: bytes) -> None:
    """A file that is there whole, on the disk, or not at all."""
    half = path.with_name(path.name + _PARTIAL)
    with open(half, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)
    sync(path.parent)


def clear(out: Path, shards: Collection[str]) -> None:
    """Remove from a finished folder what served the writing, and shards of an earlier plan."""
    for path in (*out.glob("*.tar"), *out.glob("*.tar" + _NOTE), out / _WRITING):
        if path.name not in shards:
            path.unlink()


def _lock(out: Path, what: str) -> IO[str]:
    """The open file of the lock, which a dying process lets go."""
    lock = open(out / _WRITING, "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = _told(lock).get("who", "another process")
        lock.close()
        raise ValueError(f"{out} is being written by {who}; wait for it, or choose another --out") from None
    except OSError as error:  # a file system without locks
        logger.warning("%s: cannot be locked (%s); see that no other process writes it", out, error.strerror)
    try:
        before = _told(lock).get("what", what)
        if (out / MANIFEST).exists():
            raise ValueError(f"{out} has been finished meanwhile; run the same command again")
        if before != what:
            raise ValueError(
                f"{out} holds the unfinished writing of {before}, not of {what}: finish that by its own command, "
                "delete the folder, or choose another --out"
            )
        lock.truncate(0)
        lock.write(json.dumps({"what": what, "who": f"process {os.getpid()} on {socket.gethostname()}"}))
        lock.flush()
    except BaseException:
        lock.close()
        raise
    return lock


def _told(lock: IO[str]) -> dict[str, str]:
    lock.seek(0)
    try:
        return json.loads(lock.read())
    except ValueError:  # new, or cut off by a power failure
        return {}


def _remove_partial(out: Path) -> None:
    for path in out.glob("*" + _PARTIAL):
        path.unlink(missing_ok=True)


def _draft(tar: Path) -> Path:
    return tar.with_name(tar.name + _PARTIAL)


def _beside(tar: Path) -> Path:
    return tar.with_name(tar.name + _NOTE)
