"""Tars that others wrote: where the pictures of each sample lie, whatever order, names and headers they have.

Everything is accepted that loses nothing: long names, folders, links to other members, pairs that lie apart, members
that come twice with equal bytes, tars one after the other in one file, keys that ours may not be. What may have lost
something is refused, as `shards.index` refuses it.
"""

import hashlib
import logging
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from shards.layouts.layout import SUFFIXES
from shards.schema import MAX_KEY, ShardError, key_problem

logger = logging.getLogger(__name__)

_BLOCK = 512
_FOREIGN = re.compile(r"[^A-Za-z0-9_/-]+")
_HASH_LETTERS = 8
_NAMED = 10
_PICTURES = SUFFIXES | {".raw", ".tiles"}  # the latter two are ours: `shards.storage`


class Place(NamedTuple):
    """Bytes in a tar, and the name they have there."""

    tar: Path
    name: str
    offset: int
    size: int
    suffix: str = ""
    """Of a picture: `.png`."""

    def read(self) -> bytes:
        """The bytes.

        Raises:
            ShardError: the tar has become shorter.
        """
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ShardError("is cut off: somebody writes it now?", url=self.tar, member=self.name)
        return data


def find_samples(tars: Sequence[Path], *, lq_ext: str, gt_ext: str) -> dict[str, dict[str, Place]]:
    """Samples by key, in the order in which they begin: where `lq` and `gt` lie, as far as they are there.

    What was passed over or renamed is logged.

    Args:
        tars: in order.
        lq_ext, gt_ext: what follows the key in the pictures' names: `input.png`, or `input` for any kind of picture.

    Raises:
        ValueError: `lq_ext` and `gt_ext` are the same, or nothing is called like them.
        ShardError: a tar is damaged or cut, two members claim one place, a link leads nowhere.
    """
    if lq_ext == gt_ext:
        raise ValueError(f"--lq-ext and --gt-ext are both {lq_ext}: make them differ")
    samples: dict[str, dict[str, Place]] = {}
    renamed: dict[str, str] = {}
    twice, left_out = 0, Counter[str]()
    for place in (place for tar in tars for place in _files(tar)):
        key, role, suffix = _parse(place.name.removeprefix("./"), {"lq": lq_ext, "gt": gt_ext})
        if not role:
            left_out[posixpath.basename(place.name).partition(".")[2]] += 1
            continue
        ours = our_key(key)
        if renamed.setdefault(ours, key) != key:
            what = f"and {renamed[ours]} would both be sample {ours!r}; rename one of them"
            raise ShardError(what, url=place.tar, member=place.name)
        there = samples.setdefault(ours, {}).setdefault(role, place._replace(suffix=suffix))
        if there[:3] != place[:3]:
            if there.read() != place.read():
                what = f"comes twice, with other bytes than {there.name} in {there.tar}; leave one of them out"
                raise ShardError(what, url=place.tar, member=place.name)
            twice += 1
    endings = ", ".join(f"{num} of KEY.{ending}" for ending, num in left_out.most_common(_NAMED))
    if not samples:
        where = ", ".join(map(str, tars[:_NAMED])) or "no tar"
        raise ValueError(
            f"no KEY.{lq_ext} and KEY.{gt_ext} in {where}; give --lq-ext and --gt-ext; there are {endings}"
        )
    if left_out:
        logger.warning("left out: %s", endings)
    if twice:
        logger.warning("%d members came twice with equal bytes, and are taken once", twice)
    other = {key: ours for ours, key in renamed.items() if ours != key}
    if other:
        logger.warning(
            "%d keys are no keys of ours and change; the first: %s -> %s", len(other), *next(iter(other.items()))
        )
    return samples


def our_key(key: str) -> str:
    """The key that ours may have: other letters become `_`, `.` and `..` go, and what is too long ends in a hash."""
    parts = (_FOREIGN.sub("_", part) for part in key.split("/") if part not in ("", ".", ".."))
    ours = "/".join(parts) or "_"
    if len(ours) > MAX_KEY:
        digest = hashlib.sha1(key.encode(), usedforsecurity=False).hexdigest()[:_HASH_LETTERS]
        ours = f"{ours[: MAX_KEY - _HASH_LETTERS - 1].rstrip('/')}_{digest}"
    assert key_problem(ours) is None, ours
    return ours


def _parse(name: str, exts: Mapping[str, str]) -> tuple[str, str, str]:
    """Key, role and suffix of the picture; of two endings that fit, the longer. No role: no part of a sample."""
    if posixpath.basename(name).startswith("."):
        return "", "", ""
    stem, suffix = posixpath.splitext(name)
    for role, ext in sorted(exts.items(), key=lambda item: -len(item[1])):
        if name.endswith(f".{ext}"):
            return name.removesuffix(f".{ext}"), role, suffix.lower()
        if stem.endswith(f".{ext}") and suffix.lower() in _PICTURES:
            return stem.removesuffix(f".{ext}"), role, suffix.lower()
    return "", "", ""


def _files(path: Path) -> Iterator[Place]:
    """Plain files in a tar, or in several that follow each other in one file; links are followed."""
    last = "its start"
    try:
        with open(path, "rb") as file:
            more = True
            while more:
                # From where the file stands, which is not always its start.
                with tarfile.open(fileobj=file, mode="r:", errors="strict") as tar:
                    infos = []
                    for info in tar:
                        if info.size < 0:  # tarfile would go back, and round and round
                            raise tarfile.ReadError(f"{info.name} has {info.size} bytes")
                        infos.append(info)
                        last = info.name
                    yield from _places(path, tar, infos)
                    more = _to_next(path, file, tar.offset, last)
    except (tarfile.TarError, UnicodeDecodeError) as error:
        hint = "unpack it first, with gunzip" if path.suffix in (".gz", ".tgz") else "copy or write it again"
        raise ShardError(f"is damaged after {last}, or no tar ({error}); {hint}", url=path) from error


def _places(path: Path, tar: tarfile.TarFile, infos: Sequence[tarfile.TarInfo]) -> Iterator[Place]:
    for info in infos:
        target = info
        if info.islnk() or info.issym():
            beside = posixpath.join(posixpath.dirname(info.name), info.linkname)
            try:
                target = tar.getmember(info.linkname if info.islnk() else posixpath.normpath(beside))
            except KeyError:
                raise ShardError(f"links to {info.linkname}, which is not in it", url=path, member=info.name) from None
        if target.isdir():
            continue
        if not target.isreg() or target.issparse():
            raise ShardError("is neither a file, nor a link to one; leave it out", url=path, member=info.name)
        yield Place(path, info.name, target.offset_data, target.size)


def _to_next(path: Path, file: IO[bytes], end: int, last: str) -> bool:
    """Go from the end of one tar to the start of the next; False: the file ends here, in order.

    Python takes a damaged header, and a file cut between two members, for the end; so zeros must follow.
    """
    size = file.seek(0, 2)
    file.seek(end)
    zeros = 0
    while block := file.read(_BLOCK):
        if any(block):
            if zeros < 2:
                raise ShardError(f"has a damaged header after {last}; copy or write it again", url=path)
            file.seek(-len(block), 1)
            return True
        zeros += 1
    if not zeros:
        raise ShardError(f"is cut off after {last}, at byte {size}; copy or write it again", url=path)
    return False
