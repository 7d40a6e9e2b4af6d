"""The same clean picture in two data sets, or twice in one: what was trained on must not be tested on.

A copy is found if its pixels are equal, or if it was encoded again, made smaller, brighter, or cut by about 2 %: then
its dHash is near and its thumbnail correlates. Of 260 photographs, all copies at half or a quarter of the
size were found, all but one as JPEG of quality 30, and 254 that had lost 2 % at two edges; of 33,670 pairs of strangers
none came near. Of pictures that lost 5 % at one edge a third is found; mirrored and turned ones never.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from shards.codec import decode_rgb
from shards.index import open_index
from shards.schema import ShardError

_HASH_PX = 16
_THUMB_PX = 32
_NEAR_BITS = 48  # of 256; the nearest strangers seen differ in 64
_ALIKE = 0.8  # correlation of thumbnails


class Leak(NamedTuple):
    """A clean picture that is there twice."""

    one: str
    """Key in the first data set."""
    other: str
    """Key in the second, or a later one in the first."""
    same: bool
    """True: every pixel is equal. False: a copy that was encoded or cut anew."""


class _Looks(NamedTuple):
    keys: list[str]
    sha1: list[bytes]
    bits: np.ndarray
    """(N,4) uint64: dHash, whether each of 16x16 places is brighter than its left neighbour."""
    thumbs: np.ndarray
    """(N,1024) float32: 32x32 grey pixels, of mean 0 and length 1; 0 if they are all alike."""


def find_leaks(one: str | Path, other: str | Path | None = None) -> list[Leak]:
    """Find clean pictures (gt) of one data set in another, or, without another, those that it holds more than once.

    Args:
        one, other: folders with a manifest.

    Raises:
        ShardError: a folder is no finished data set, or a picture in it cannot be read.
    """
    a = _looks(Path(one))
    b = _looks(Path(other)) if other is not None else a
    return list(_matches(a, b, only_later=other is None))


def _matches(a: _Looks, b: _Looks, *, only_later: bool) -> Iterator[Leak]:
    same: dict[bytes, list[int]] = {}
    for index, sha1 in enumerate(b.sha1):
        same.setdefault(sha1, []).append(index)
    seen: set[bytes] = set()
    for number, (key, sha1) in enumerate(zip(a.keys, a.sha1, strict=True)):
        if sha1 in seen:  # its first copy has been compared
            continue
        seen.add(sha1)
        near = np.flatnonzero(np.bitwise_count(b.bits ^ a.bits[number]).sum(1) <= _NEAR_BITS)
        near = near[b.thumbs[near] @ a.thumbs[number] >= _ALIKE]
        equal = set(same.get(sha1, ()))
        for index in sorted(equal.union(near.tolist())):
            if index > number or not only_later:
                yield Leak(key, b.keys[index], index in equal)


def _looks(folder: Path) -> _Looks:
    manifest, rows = open_index(folder)

    def look(row: np.void) -> tuple[bytes, np.ndarray, np.ndarray]:
        path = folder / manifest.shardlist[row["shard"]].url
        with open(path, "rb") as file:
            file.seek(row["gt_offset"])
            data = file.read(row["gt_size"])
        try:
            return _look(decode_rgb(data))
        except ValueError as error:
            raise ShardError(f"gt: {error}; run `check` on it", url=path, key=row["key"].decode()) from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV and hashlib work outside of Python's lock
        found = list(tqdm(pool.map(look, rows), desc=str(folder), total=len(rows), unit="picture", disable=None))
    sha1, bits, thumbs = zip(*found, strict=True)
    return _Looks([key.decode() for key in rows["key"]], list(sha1), np.stack(bits), np.stack(thumbs))


def _look(gt: np.ndarray) -> tuple[bytes, np.ndarray, np.ndarray]:
    digest = hashlib.sha1(repr(gt.shape).encode(), usedforsecurity=False)
    digest.update(np.ascontiguousarray(gt))
    grey = cv2.cvtColor(gt, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_HASH_PX + 1, _HASH_PX), interpolation=cv2.INTER_AREA)
    bits = np.packbits(small[:, 1:] > small[:, :-1]).view(np.uint64)
    thumb = cv2.resize(grey, (_THUMB_PX, _THUMB_PX), interpolation=cv2.INTER_AREA).ravel().astype(np.float32)
    thumb -= thumb.mean()
    return digest.digest(), bits, thumb / max(float(np.linalg.norm(thumb)), 1e-6)
