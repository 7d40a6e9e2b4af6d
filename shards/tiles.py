"""The file form of a picture in tiles, of which a crop reads no more than it needs.

A file is a header, the tiles, row by row, and nothing else. All numbers are little-endian:

    magic, version, coding             8 + 1 + 1 bytes, and 2 that are zero
    h, w, tile_h, tile_w               4 x uint32; the last tiles of a row or column may be smaller
    where each tile begins, and the end of the file    (tiles + 1) x uint32
    crc32 of each tile                 tiles x uint32
    crc32 of all of the above          uint32

Tiles of coding WEBP are pictures. Those of coding RAW are as wide as the picture and hold its pixels, (H,W,3) uint8
RGB: one after the other they are the whole picture.
"""

import itertools
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Box = tuple[int, int, int, int]
"""Part of a picture: top, left, height, width."""
Read = Callable[[int, int], bytes]
"""From an offset in the file, so many bytes."""

RAW, WEBP = 0, 1

_MAGIC = b"\x89TILES\r\n"
_VERSION = 1
_START = struct.Struct("<8sBBxxIIII")


class Grid(NamedTuple):
    """How a picture is cut; tells how long the header is."""

    h: int
    w: int
    tile_h: int
    tile_w: int
    coding: int

    @property
    def rows(self) -> int:
        """Tiles from top to bottom."""
        return -(-self.h // self.tile_h)

    @property
    def columns(self) -> int:
        """Tiles from left to right."""
        return -(-self.w // self.tile_w)

    @property
    def header_bytes(self) -> int:
        """What comes before the first tile."""
        return _START.size + 4 * (2 * self.rows * self.columns + 2)

    def box(self, row: int, column: int) -> Box:
        """Where a tile lies."""
        top, left = row * self.tile_h, column * self.tile_w
        return top, left, min(self.tile_h, self.h - top), min(self.tile_w, self.w - left)


def is_tiles(data: bytes) -> bool:
    """Whether a file begins like one of ours."""
    return data.startswith(_MAGIC)


def grid_of(data: bytes) -> Grid:
    """The grid of a file, from its first bytes.

    Raises:
        ValueError: of another kind or version, or cut off.
    """
    if len(data) < _START.size or not is_tiles(data):
        raise ValueError("not tiles: empty, truncated, or of another kind")
    _, version, coding, h, w, tile_h, tile_w = _START.unpack_from(data)
    if version != _VERSION:
        raise ValueError(f"tiles of version {version}; this program reads version {_VERSION}")
    if not (h and w and tile_h and tile_w) or coding not in (RAW, WEBP):
        raise ValueError(f"damaged header of tiles ({h=}, {w=}, {tile_h=}, {tile_w=}, {coding=})")
    return Grid(h, w, tile_h, tile_w, coding)


def encode_tiles(rgb: np.ndarray, grid: Grid, encode: Callable[[np.ndarray], bytes]) -> bytes:
    """A picture as a file of tiles.

    Args:
        rgb: (H,W,3) uint8 RGB.
        grid: of its size.
        encode: a tile of coding WEBP to its bytes.
    """
    assert rgb.shape == (grid.h, grid.w, 3) and (grid.coding == WEBP or grid.tile_w == grid.w)
    parts = []
    for row, column in itertools.product(range(grid.rows), range(grid.columns)):
        top, left, h, w = grid.box(row, column)
        tile = rgb[top : top + h, left : left + w]
        parts.append(tile.tobytes() if grid.coding == RAW else encode(tile))
    ends = itertools.accumulate(map(len, parts), initial=grid.header_bytes)
    table = np.array([*ends, *map(zlib.crc32, parts)])
    if table[len(parts)] >= 2**32:
        raise ValueError("a picture of 4 GiB and more does not fit into tiles")
    start = _START.pack(_MAGIC, _VERSION, grid.coding, *grid[:4])
    header = start + table.astype("<u4").tobytes()
    return b"".join([header, struct.pack("<I", zlib.crc32(header)), *parts])


def read_tiles(
    read: Read, grid: Grid, decode: Callable[[bytes | memoryview], np.ndarray], *, size: int, box: Box | None = None
) -> np.ndarray:
    """Part of a picture, read in one piece for the header and one for each row of tiles that it touches.

    Args:
        read: of the file.
        grid: that the file must be of.
        decode: a tile of coding WEBP to its (H,W,3) pixels.
        size: of the file, in bytes.
        box: the part; None: all of it.

    Returns:
        (H,W,3) uint8 RGB, of the size of the box.

    Raises:
        ValueError: not such a file, of another grid, or damaged in what the part needs.
    """
    starts, crc32s = _table(read(0, grid.header_bytes), grid, size)
    top, left, h, w = box or (0, 0, grid.h, grid.w)
    assert 0 <= top <= top + h <= grid.h and 0 <= left <= left + w <= grid.w
    across = grid.columns
    rows = range(top // grid.tile_h, -(-(top + h) // grid.tile_h))
    columns = range(left // grid.tile_w, -(-(left + w) // grid.tile_w))
    rgb = np.empty((h, w, 3), np.uint8)
    # Whole rows follow one another in the file, and are read at once.
    for group in [rows] if len(columns) == across else [range(row, row + 1) for row in rows]:
        start, end = starts[group[0] * across + columns[0]], starts[group[-1] * across + columns[-1] + 1]
        data = memoryview(read(start, end - start))
        for row, column in itertools.product(group, columns):
            number = row * across + column
            coded = data[starts[number] - start : starts[number + 1] - start]
            y, x, tile_h, tile_w = grid.box(row, column)
            if zlib.crc32(coded) != crc32s[number]:
                raise ValueError(f"the tile at {(y, x)} is damaged: its crc32 differs")
            tile = np.frombuffer(coded, np.uint8).reshape(tile_h, tile_w, 3) if grid.coding == RAW else decode(coded)
            if tile.shape[:2] != (tile_h, tile_w):
                raise ValueError(f"the tile at {(y, x)} is {tile.shape[:2]}, not {(tile_h, tile_w)}")
            # What tile and box have in common, as both count it.
            y0, x0, y1, x1 = max(y, top), max(x, left), min(y + tile_h, top + h), min(x + tile_w, left + w)
            rgb[y0 - top : y1 - top, x0 - left : x1 - left] = tile[y0 - y : y1 - y, x0 - x : x1 - x]
    return rgb


def _table(header: bytes, grid: Grid, size: int) -> tuple[list[int], list[int]]:
    found = grid_of(header)
    if found != grid:
        raise ValueError(f"tiles of {found}, wanted are {grid}")
    if len(header) < grid.header_bytes or zlib.crc32(header[:-4]) != int.from_bytes(header[-4:], "little"):
        raise ValueError("damaged header of tiles: cut off, or its crc32 differs")
    num = grid.rows * grid.columns
    table = np.frombuffer(header, "<u4", count=2 * num + 1, offset=_START.size).tolist()
    if table[num] != size:
        raise ValueError(f"tiles of {table[num]} bytes in a file of {size}")
    return table[: num + 1], table[num + 1 :]
