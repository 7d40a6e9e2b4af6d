"""Random access to the pairs of a data set, here or far away."""

import contextlib
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.cache import ShardCache
from shards.codec import decode_crop, decode_masks, decode_rgb
from shards.fetch import file_url, locate
from shards.index import open_index
from shards.schema import Masks, ShardError
from shards.storage import parse
from shards.tiles import Box

logger = logging.getLogger(__name__)

_AHEAD = 4  # shards that one process fetches before they are read


class BadSampleError(ShardError):
    """One sample cannot be read; the rest of its shard may be fine."""


class ShardReader:
    """Pairs by number.

    Of pictures stored in tiles, or raw, a part is read without the rest.

    Shards of a folder are opened when first read and stay open; reads carry their own offset, so forked processes may
    share them, and a pickled reader opens its own. Shards of a URL are fetched into the node's cache when first read.

    Args:
        folder: with a manifest; here, or a URL (see `shards.fetch`).
        cache: for the shards of a URL. None: that of the node, as large as is usual.

    Raises:
        ShardError: unfinished, or a shard is missing or of another size, or it cannot be fetched.
        ValueError: shards are to be fetched, and the cache cannot take them.
    """

    def __init__(self, folder: str | Path, cache: ShardCache | None = None) -> None:
        self.folder = locate(folder)
        self.manifest, self._rows = open_index(self.folder)
        self._cache = cache or ShardCache()
        if isinstance(self.folder, str):
            self._cache.check_room(self.manifest.shardlist)
        self.keys: tuple[str, ...] = tuple(key.decode() for key in self._rows["key"].tolist())
        try:
            self._storage = parse(self.manifest.storage)
        except ValueError as error:
            raise ShardError(f"{error}; a newer version of this program may read it", url=self.folder) from None
        self._files: dict[int, int] = {}
        self._ahead: dict[int, threading.Thread] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def parts(self) -> tuple["ShardReader", ...]:
        """Itself; of a `dist_train.data.mixture.Mixture`, the data sets in it."""
        return (self,)

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
        return self._picture(number, "lq", box), self._picture(number, "gt", box)

    def lq(self, number: int, box: Box | None = None) -> np.ndarray:
        """The degraded picture of a pair alone, (H,W,3) uint8 RGB; errors as `pair`."""
        return self._picture(number, "lq", box)

    @property
    def masks_note(self) -> Masks | None:
        """Where the masks beside the pictures come from; None: there are none."""
        return self.manifest.masks

    def masks(self, number: int, box: Box | None = None) -> np.ndarray:
        """The masks of a pair, (K,H,W) bool, K its own; only where there are any. Errors as `pair`."""
        masks = self._decoded(number, "masks", lambda member: decode_masks(member.whole(), self.size_px(number)))
        return _cut(masks.transpose(1, 2, 0), box).transpose(2, 0, 1)

    def prefetch(self, number: int) -> None:
        """Begin to fetch the shard of a sample if it is far away, not in the cache, and few are on their way."""
        if isinstance(self.folder, Path):
            return
        shard = int(self._rows["shard"][number])
        self._ahead = {other: thread for other, thread in self._ahead.items() if thread.is_alive()}
        if shard in self._ahead or len(self._ahead) == _AHEAD or self._cache.holds(self.manifest.shardlist[shard]):
            return
        self._ahead[shard] = threading.Thread(target=self._touch, args=(shard,), daemon=True)
        self._ahead[shard].start()

    def close(self) -> None:
        """Close the shards; they open again when read."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_ahead": {}}

    def _picture(self, number: int, role: str, box: Box | None) -> np.ndarray:
        size_px = self.size_px(number)
        grid = self._storage.grid(size_px)

        def decode(member: _Member) -> np.ndarray:
            if box is not None and grid is not None:
                return decode_crop(member.read, grid, size=member.size, box=box)
            picture = decode_rgb(member.whole())
            if picture.shape[:2] != size_px:
                raise ValueError(f"is {picture.shape[:2]}, the index says {size_px}; write the set again")
            return _cut(picture, box)

        return self._decoded(number, role, decode)

    def _decoded(
        self, number: int, role: str, decode: "Callable[[_Member], np.ndarray]", *, again: bool = True
    ) -> np.ndarray:
        row, key = self._rows[number], self.keys[number]
        shard = int(row["shard"])
        try:
            with self._opened(shard) as file:
                return decode(_Member(file, *(int(row[f"{role}_{what}"]) for what in ("offset", "size", "crc32"))))
        except (OSError, ValueError) as error:
            if isinstance(self.folder, Path):
                hint = f"run `python -m shards check {self.folder}`"
            elif again and self._cache.drop_damaged(self.manifest.shardlist[shard]):
                return self._decoded(number, role, decode, again=False)
            else:
                hint = "its shard came as it was written: write the set again"
            raise BadSampleError(f"{error}; {hint}", url=self._url(shard), key=key, member=f"{key}.{role}") from error

    def _url(self, shard: int) -> Path | str:
        name = self.manifest.shardlist[shard].url
        return self.folder / name if isinstance(self.folder, Path) else file_url(self.folder, name)

    @contextlib.contextmanager
    def _opened(self, shard: int) -> Iterator[int]:
        """The descriptor of a shard; from the cache closed after use, or what is thrown away would fill the disk."""
        url = self._url(shard)
        if isinstance(url, str):
            file = self._cache.open(self.manifest.shardlist[shard], url)
            try:
                yield file
            finally:
                os.close(file)
            return
        if shard not in self._files:
            try:
                self._files[shard] = os.open(url, os.O_RDONLY)
            except OSError as error:
                what = f"{error.strerror}: bring it back, then run `python -m shards check {self.folder}`"
                raise ShardError(what, url=url) from error
        yield self._files[shard]

    def _touch(self, shard: int) -> None:
        try:
            with self._opened(shard):
                pass
        except ShardError as error:
            logger.debug("not fetched ahead: %s", error)  # whoever reads it tries again, and is told


class _Member(NamedTuple):
    """One file within a shard that is open."""

    file: int
    offset: int
    size: int
    crc32: int

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.file, size, self.offset + start)

    def whole(self) -> bytes:
        data = self.read(0, self.size)
        if zlib.crc32(data) != self.crc32:
            raise ValueError("crc32 differs")
        return data


def _cut(whole: np.ndarray, box: Box | None) -> np.ndarray:
    if box is None:
        return whole
    top, left, h, w = box
    return whole[top : top + h, left : left + w]
