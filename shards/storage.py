"""The forms in which a shard may hold a picture, all of them exact, and what each is called.

    keep          the file as it came
    webp          lossless WebP: about 0.78 of a PNG's bytes, 1.3 times as fast to decode
    tiles:SIDE    lossless WebP in tiles of SIDE px, of which a crop reads those it needs: for pictures of more than
                  twice its side. With 1280x720 and crops of 256, tiles of 64 take 0.83 of a PNG's bytes and a seventh
                  of its time, tiles of 128 0.82 and a sixth
    raw           the pixels, of which a crop reads its rows: 2.3 times a PNG's bytes, and next to no time

`webp:LEVEL` and `tiles:SIDE:LEVEL` choose how hard to try, as `cwebp -z LEVEL` does: 0 is four times as fast to encode
as the default of 1 and takes 9 % more bytes, 4 a third as fast, and 8 % fewer.
"""

import re
from typing import Any, Literal, NamedTuple

import numpy as np

from shards.codec import WEBP_LEVELS, decode_rgb, encode_png, encode_webp
from shards.schema import ShardError
from shards.tiles import RAW, WEBP, Grid, encode_tiles

LEVEL = 1
SIDES_PX = range(16, 4097)
MAX_WEBP_PX = 16383
"""Largest side that the format can hold."""
RAW_ROWS = 16  # of a raw tile: a crop reads up to 15 rows too many above and below, and each tile has its own crc
_NAME = re.compile(r"(keep|raw)|(webp|tiles:(?P<side>[0-9]{2,4}))(:(?P<level>[0-9]))?")


class Storage(NamedTuple):
    """One form; `str` gives its name, which `parse` reads."""

    form: Literal["keep", "webp", "tiles", "raw"] = "keep"
    side_px: int = 0
    level: int = LEVEL

    def __str__(self) -> str:
        side = f":{self.side_px}" if self.form == "tiles" else ""
        return self.form + side + (f":{self.level}" if self.level != LEVEL else "")

    def encode(self, data: bytes | None, suffix: str, rgb: np.ndarray) -> tuple[str, bytes]:
        """A picture as a file of this form.

        Args:
            data: the file it came from, which `keep` keeps; None: there is none, and `keep` makes a PNG.
            suffix: of that file, such as `.png`.
            rgb: (H,W,3) uint8 RGB, what the file holds.

        Returns:
            The new file's suffix, and its bytes, of which it is proved that they give `rgb` back.

        Raises:
            ValueError: too large for the form.
            ShardError: they do not.
        """
        if self.form == "keep" and data is not None:
            return suffix, data
        ending, encoded = self._encoded(np.ascontiguousarray(rgb))
        if not np.array_equal(decode_rgb(encoded), rgb):
            raise ShardError(f"the encoder of {self} changes pixels here: choose another storage, or mend Pillow")
        return ending, encoded

    def grid(self, size_px: tuple[int, int]) -> Grid | None:
        """How a picture of a height and width is cut into tiles; None where forms hold it in one piece."""
        if self.form == "tiles":
            return Grid(*size_px, self.side_px, self.side_px, WEBP)
        if self.form == "raw":
            return Grid(*size_px, RAW_ROWS, size_px[1], RAW)
        return None

    def _encoded(self, rgb: np.ndarray) -> tuple[str, bytes]:
        if self.form == "keep":
            return ".png", encode_png(rgb)
        if self.form == "webp":
            if max(rgb.shape) > MAX_WEBP_PX:
                raise ValueError(f"{rgb.shape[1]}x{rgb.shape[0]} is more than WebP can hold: choose tiles:64 or keep")
            return ".webp", encode_webp(rgb, level=self.level)
        grid = self.grid((rgb.shape[0], rgb.shape[1]))
        assert grid is not None
        return f".{self.form}", encode_tiles(rgb, grid, lambda tile: encode_webp(tile, level=self.level))


def parse(text: str) -> Storage:
    """A form by its name.

    Raises:
        ValueError: there is no such form.
    """
    match = _NAME.fullmatch(text)
    if not match or (match["side"] and int(match["side"]) not in SIDES_PX):
        raise ValueError(
            f"storage {text!r} is none of keep, raw, webp, webp:LEVEL, tiles:SIDE, tiles:SIDE:LEVEL, like tiles:64; "
            f"SIDE is from {SIDES_PX[0]} to {SIDES_PX[-1]} px, LEVEL from 0 (fast) to {len(WEBP_LEVELS) - 1} (small)"
        )
    form: Any = text.partition(":")[0]
    return Storage(form, int(match["side"] or 0), int(match["level"] or LEVEL))
