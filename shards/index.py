"""The strict reading of tars, and the index that gives random access to them.

Python's tarfile and WebDataset take a damaged header, or a file cut between two members, for the regular end of the
archive, and half a shard is lost without a word. Here the end counts only if nothing but zeros follows.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.schema import INDEX, MASKS, Manifest, ShardError, index_dtype, key_problem, load_manifest

_BLOCK = 512
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_ROLES = ("lq", "gt", "json")  # of every sample; and `masks` of all or of none


class Member(NamedTuple):
    """One file in a tar: sample, ending (`lq.png`), where its bytes begin, and the bytes."""

    key: str
    ending: str
    offset: int
    data: bytes

    @property
    def role(self) -> str:
        """`lq`, `gt`, `json` or `masks`."""
        return self.ending.partition(".")[0]


class Entry(NamedTuple):
    """One sample in a tar."""

    key: str
    h: int
    w: int
    note: dict[str, Any]
    """What KEY.json holds."""
    lq: Member
    gt: Member
    masks: Member | None


def read_tar(path: Path) -> Iterator[Entry]:
    """Walk the samples of a shard in order.

    Raises:
        ShardError: damaged or cut anywhere, links, folders, unknown or repeated members, half pairs, scattered pairs.
    """
    seen: set[str] = set()
    group: dict[str, Member] = {}
    for member in _members(path):
        if group and member.key != next(iter(group.values())).key:
            yield _entry(path, group)
            group = {}
        if member.role in group or (not group and member.key in seen):
            raise ShardError("comes twice, or apart from its sample; write the set again", url=path, key=member.key)
        seen.add(member.key)
        group[member.role] = member
    if group:
        yield _entry(path, group)


def build_index(tars: Sequence[Path]) -> tuple[np.ndarray, str]:
    """Index shards in order.

    Returns:
        Rows of `index_dtype`, and the sha256 over the `content_line` of every sample.
    """
    content, entries, masked = hashlib.sha256(), [], set()
    for shard, path in enumerate(tars):
        for entry in read_tar(path):
            content.update(content_line(entry.key, entry.lq.data, entry.gt.data))
            entries.append(row(entry, shard))
            masked.add(entry.masks is not None)
    if len(masked) > 1:
        raise ShardError("some samples have masks and some have none; write the set again", url=tars[0].parent)
    key_bytes = max((len(entry[0]) for entry in entries), default=1)
    rows = np.array(entries, index_dtype(key_bytes, masks=True in masked))
    keys, counts = np.unique(rows["key"], return_counts=True)
    if (counts > 1).any():
        raise ShardError("lies in two shards; write the set again", key=keys[counts > 1][0].decode())
    return rows, content.hexdigest()


def row(entry: Entry, shard: int) -> tuple:
    """An entry as a row of `index_dtype`."""
    values: list[bytes | int] = [entry.key.encode(), shard, entry.h, entry.w]
    for member in (entry.lq, entry.gt, *([entry.masks] if entry.masks else [])):
        values += [member.offset, len(member.data), zlib.crc32(member.data)]
    return tuple(values)


def content_line(key: str, lq: bytes, gt: bytes) -> bytes:
    """What a sample adds to a data set's content hash: its key and the sha256 of both files."""
    return f"{key} {hashlib.sha256(lq).hexdigest()} {hashlib.sha256(gt).hexdigest()}\n".encode()


def masks_line(key: str, masks: bytes) -> bytes:
    """What a sample adds to the hash of a data set's masks."""
    return f"{key} {hashlib.sha256(masks).hexdigest()}\n".encode()


def open_index(folder: str | Path) -> tuple[Manifest, np.ndarray]:
    """Manifest and index of a finished folder, after every check that needs no reading of shards.

    Raises:
        ShardError: unfinished, index changed, or shards missing or of another size (all are named).
    """
    manifest, rows = load_index(folder)
    found = (size_problem(Path(folder) / shard.url, shard.filesize) for shard in manifest.shardlist)
    problems = [problem for problem in found if problem]
    if problems:
        raise ShardError("; ".join(problems), url=folder)
    return manifest, rows


def load_index(folder: str | Path) -> tuple[Manifest, np.ndarray]:
    """Manifest and index alone, without a look at the shards."""
    manifest, path = load_manifest(folder), Path(folder) / INDEX
    if not path.is_file():
        raise ShardError("is missing; copy it again or write the set again", url=path)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        raise ShardError("is not the one the manifest names; copy both again or write the set again", url=path)
    rows = np.load(io.BytesIO(data), allow_pickle=False)
    if len(rows) != manifest.num_samples:
        raise ShardError(f"has {len(rows)} rows, the manifest {manifest.num_samples}; write the set again", url=path)
    return manifest, rows


def size_problem(path: Path, filesize: int) -> str | None:
    """What is wrong with a shard at first sight, or None."""
    if not path.is_file():
        return f"shard {path.name} is missing: copy it again, then run `python -m shards check {path.parent}`"
    if path.stat().st_size != filesize:
        return (
            f"shard {path.name} has {path.stat().st_size} bytes instead of {filesize}: copy it again, then run "
            f"`python -m shards check {path.parent}`"
        )
    return None


def _members(path: Path) -> Iterator[Member]:
    with open(path, "rb") as file:
        while True:
            header = file.read(_BLOCK)
            if len(header) < _BLOCK:
                raise ShardError("is cut off: the end-of-archive mark is missing; copy or write it again", url=path)
            if not any(header):
                break
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            except (tarfile.HeaderError, UnicodeDecodeError) as error:
                what = f"has a damaged header at byte {file.tell() - _BLOCK} ({error}); copy or write it again"
                raise ShardError(what, url=path) from error
            key, _, ending = info.name.partition(".")
            if info.type not in _FILES:
                raise ShardError("is no plain file (a link, a folder, a long name)", url=path, member=info.name)
            known = ending.partition(".")[0] in _ROLES or ending == MASKS
            problem = key_problem(key) if known else f"is neither KEY.lq.EXT, KEY.gt.EXT, KEY.json nor KEY.{MASKS}"
            if problem:
                raise ShardError(problem, url=path, member=info.name)
            offset = file.tell()
            data = file.read(info.size)
            if len(data) < info.size:
                raise ShardError("is cut off in the middle; copy or write the shard again", url=path, member=info.name)
            file.seek(-info.size % _BLOCK, 1)
            yield Member(key, ending, offset, data)
        tail = file.read()
        if len(tail) < _BLOCK or any(tail):
            raise ShardError("goes on after its end-of-archive mark: damaged; copy or write it again", url=path)


def _entry(path: Path, group: dict[str, Member]) -> Entry:
    key = next(iter(group.values())).key
    absent = set(_ROLES) - group.keys()
    if absent:
        raise ShardError(f"has no {' and no '.join(sorted(absent))}; write the set again", url=path, key=key)
    try:
        note = json.loads(group["json"].data)
        return Entry(key, int(note["h"]), int(note["w"]), note, group["lq"], group["gt"], group.get("masks"))
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"does not tell h and w ({error!r})", url=path, member=f"{key}.json") from error
