"""Random access to the pairs in a folder of shards."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shards.codec import decode_masks, decode_rgb
from shards.index import open_index
from shards.schema import Masks, ShardError

Box = tuple[int, int, int, int]
"""Part of a picture: top, left, height, width."""


class BadSampleError(ShardError):
    """One sample cannot be read; the rest of its shard may be fine."""


class ShardReader:
    """Pairs by number.

    Shards are opened when first read and stay open; reads carry their own offset, so forked processes may share them,
    and a pickled reader opens its own.

    Args:
        folder: with a manifest.

    Raises:
        ShardError: unfinished, or a shard is missing or of another size.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest, self._rows = open_index(self.folder)
        self.keys: tuple[str, ...] = tuple(key.decode() for key in self._rows["key"].tolist())
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """Changes if the keys, their order or any picture does."""
        return self.manifest.fingerprint

    def size_px(self, number: int) -> tuple[int, int]:
        """Height and width of a pair, from the index."""
        return int(self._rows["h"][number]), int(self._rows["w"][number])

    def pair(self, number: int, box: Box | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Read and decode a pair.

        Args:
            number: of the sample.
            box: the part that is wanted; None: all of it.

        Returns:
            lq and gt, (H,W,3) uint8 RGB, of the size of the box.

        Raises:
            BadSampleError: its bytes are not those that were written, or cannot be read.
            ShardError: the shard is gone.
        """
        return self.lq(number, box), _cut(self._decoded(number, "gt", _picture), box)

    def lq(self, number: int, box: Box | None = None) -> np.ndarray:
        """The degraded picture of a pair alone, (H,W,3) uint8 RGB; errors as `pair`."""
        return _cut(self._decoded(number, "lq", _picture), box)

    @property
    def masks_note(self) -> Masks | None:
        """Where the masks beside the pictures come from; None: there are none."""
        return self.manifest.masks

    def masks(self, number: int, box: Box | None = None) -> np.ndarray:
        """The masks of a pair, (K,H,W) bool, K its own; only where there are any. Errors as `pair`."""
        return _cut(self._decoded(number, "masks", decode_masks).transpose(1, 2, 0), box).transpose(2, 0, 1)

    def close(self) -> None:
        """Close the shards; they open again when read."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def _decoded(self, number: int, role: str, decode: Callable[[bytes, tuple[int, int]], np.ndarray]) -> np.ndarray:
        row = self._rows[number]
        url = self.folder / self.manifest.shardlist[row["shard"]].url
        file = self._open(int(row["shard"]), url)
        try:
            data = os.pread(file, int(row[f"{role}_size"]), int(row[f"{role}_offset"]))
            if zlib.crc32(data) != row[f"{role}_crc32"]:
                raise ValueError(f"crc32 differs; run `python -m shards check {self.folder}`")
            return decode(data, self.size_px(number))
        except (OSError, ValueError) as error:
            key = self.keys[number]
            raise BadSampleError(str(error), url=url, key=key, member=f"{key}.{role}") from error

    def _open(self, shard: int, url: Path) -> int:
        if shard not in self._files:
            try:
                self._files[shard] = os.open(url, os.O_RDONLY)
            except OSError as error:
                what = f"{error.strerror}: bring it back, then run `python -m shards check {self.folder}`"
                raise ShardError(what, url=url) from error
        return self._files[shard]


def _cut(whole: np.ndarray, box: Box | None) -> np.ndarray:
    if box is None:
        return whole
    top, left, h, w = box
    return whole[top : top + h, left : left + w]


def _picture(data: bytes, size_px: tuple[int, int]) -> np.ndarray:
    picture = decode_rgb(data)
    if picture.shape[:2] != size_px:
        raise ValueError(f"is {picture.shape[:2]}, the index says {size_px}; write the set again")
    return picture
