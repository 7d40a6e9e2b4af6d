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

from shards.fetch import fetch_bytes, file_url, locate
from shards.schema import (
    INDEX,
    MANIFEST,
    MASKS,
    Manifest,
    ShardError,
    index_dtype,
    key_problem,
    load_manifest,
    parse_manifest,
)

_BLOCK = 512
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_MAX_PX = 2**20
_RESHARD = "; `python -m shards reshard` writes it anew, if nothing is lost"
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
            name = f"{member.key}.{member.ending}"
            raise ShardError("comes twice, or apart from its sample" + _RESHARD, url=path, member=name)
        seen.add(member.key)
        group[member.role] = member
    if not group:
        raise ShardError("holds no sample; leave it out", url=path)
    yield _entry(path, group)


def index_of(entries: Sequence[tuple]) -> np.ndarray:
    """What `row` made of each sample, in order, as rows of `index_dtype`.

    Raises:
        ShardError: a key comes twice, or only some samples have masks.
    """
    widths = {len(entry) for entry in entries}
    if len(widths) > 1:
        raise ShardError("some samples have masks and some have none; write the set again", key=entries[0][0].decode())
    key_bytes = max((len(entry[0]) for entry in entries), default=1)
    rows = np.array(
        list(entries), index_dtype(key_bytes, masks=widths == {len(index_dtype(1, masks=True).names or ())})
    )
    keys, counts = np.unique(rows["key"], return_counts=True)
    if (counts > 1).any():
        raise ShardError("lies in two shards; write the set again", key=keys[counts > 1][0].decode())
    return rows


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
    """Manifest and index of a finished data set, after every check that needs no reading of shards.

    Args:
        folder: here, or a URL (see `shards.fetch`), whose shards are seen when they are fetched.

    Raises:
        ShardError: unfinished, index changed, or shards missing or of another size (all are named).
    """
    manifest, rows = load_index(folder)
    if isinstance(place := locate(folder), Path):
        found = (size_problem(place / shard.url, shard.filesize) for shard in manifest.shardlist)
        problems = [problem for problem in found if problem]
        if problems:
            raise ShardError("; ".join(problems), url=place)
    return manifest, rows


def load_index(folder: str | Path) -> tuple[Manifest, np.ndarray]:
    """Manifest and index alone, without a look at the shards; those of a URL are fetched anew."""
    path: Path | str
    if isinstance(place := locate(folder), Path):
        manifest, path = load_manifest(place), place / INDEX
        if not path.is_file():
            raise ShardError("is missing; copy it again or write the set again", url=path)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
            what = "is not the one the manifest names; copy both again or write the set again"
            raise ShardError(what, url=path)
    else:
        url, path = file_url(place, MANIFEST), file_url(place, INDEX)
        manifest = parse_manifest(fetch_bytes(url), url=url)
        data = fetch_bytes(path, sha256=manifest.index_sha256)
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
    filesize, last = path.stat().st_size, "its start"
    with open(path, "rb") as file:
        while True:
            header = file.read(_BLOCK)
            if len(header) < _BLOCK:
                what = f"is cut off after {last}: the end-of-archive mark is missing; copy or write it again"
                raise ShardError(what, url=path)
            if not any(header):
                break
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            except (tarfile.HeaderError, UnicodeDecodeError) as error:
                what = f"has a damaged header after {last}, at byte {file.tell() - _BLOCK} ({error})"
                raise ShardError(f"{what}; copy or write it again", url=path) from error
            key, _, ending = info.name.partition(".")
            if info.type not in _FILES:
                what = "is no plain file (a link, a folder, a long name)"
                raise ShardError(what + _RESHARD, url=path, member=info.name)
            known = ending.partition(".")[0] in ("lq", "gt") or ending in ("json", MASKS)
            what = f"is neither KEY.lq.EXT, KEY.gt.EXT, KEY.json nor KEY.{MASKS}"
            problem = key_problem(key) if known else what + _RESHARD
            if problem:
                raise ShardError(problem, url=path, member=info.name)
            offset = file.tell()
            if not 0 < info.size <= filesize - offset:
                what = f"is empty or cut off ({info.size} bytes, {filesize - offset} are there)"
                raise ShardError(f"{what}; copy or write the shard again", url=path, member=info.name)
            data, last = file.read(info.size), info.name
            file.seek(-info.size % _BLOCK, 1)
            yield Member(key, ending, offset, data)
        tail = file.read()
        if len(tail) < _BLOCK or any(tail):
            what = f"the end-of-archive mark after {last} is broken, or something follows it; copy or write it again"
            raise ShardError(what, url=path)


def _entry(path: Path, group: dict[str, Member]) -> Entry:
    key = next(iter(group.values())).key
    absent = set(_ROLES) - group.keys()
    if absent:
        raise ShardError(f"has no {' and no '.join(sorted(absent))} beside it{_RESHARD}", url=path, key=key)
    try:
        note = json.loads(group["json"].data)
        h, w = int(note["h"]), int(note["w"])
        if not (0 < h < _MAX_PX and 0 < w < _MAX_PX):
            raise ValueError(f"{w}x{h}")
        return Entry(key, h, w, note, group["lq"], group["gt"], group.get("masks"))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ShardError(f"does not tell h and w ({error!r})", url=path, member=f"{key}.json") from error
