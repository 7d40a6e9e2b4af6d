"""Pictures for people: mask overlays, labelled panels, PNG files. All are (H,W,3) uint8 RGB."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.codec import encode_png
from shards.files import write_whole

Picture = NDArray[np.uint8]

PAPER, INK = 255, (40, 40, 40)
STRIP_PX = 28
GAP_PX = 6
MIN_COLUMN_PX = 192


def overlay(rgb_u8: Picture, idmap: NDArray[np.integer], alpha: float = 0.5) -> Picture:
    """Tint a picture by its masks and draw a thin white line around each.

    Args:
        rgb_u8: (H,W,3) uint8 RGB.
        idmap: (H,W) integers: 0 is no mask and stays as it is; n > 0 always has the same colour.
        alpha: strength of the tint in [0,1].
    """
    colours = np.array([(0, 0, 0), *(_colour(n) for n in range(1, int(idmap.max(initial=0)) + 1))], dtype=np.float32)
    tinted = rgb_u8 + alpha * (idmap > 0)[..., None] * (colours[idmap] - rgb_u8)
    # A pixel is on the line if its right or lower neighbour belongs to another mask: one pixel wide.
    edge = np.zeros(idmap.shape, dtype=bool)
    edge[:, :-1] |= idmap[:, :-1] != idmap[:, 1:]
    edge[:-1] |= idmap[:-1] != idmap[1:]
    tinted[edge] = 255
    return np.round(tinted).astype(np.uint8)


def panel(columns: Sequence[tuple[str, Picture]]) -> Picture:
    """Pictures of one size side by side on white, each under its title.

    Small pictures are enlarged by a whole factor, pixels kept square, until a title fits.

    Args:
        columns: (title, (H,W,3) uint8 RGB) from left to right, for example ("restored 31.07 dB", restored_u8).
    """
    width = columns[0][1].shape[1]
    zoom = -(-MIN_COLUMN_PX // width)
    return _beside([_titled(title, picture.repeat(zoom, 0).repeat(zoom, 1)) for title, picture in columns])


def grid(rows: Sequence[Picture]) -> Picture:
    """Panels below each other, left-aligned on white."""
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=PAPER) for row in rows]
    )


def write_png(path: Path, rgb_u8: Picture) -> None:
    """Write a PNG file, whole or not at all; its folder is made if need be."""
    write_whole(path, encode_png(rgb_u8))


def _colour(n: int) -> tuple[float, float, float]:
    # Steps of the golden ratio keep any run of hues apart, whatever the number of masks.
    red, green, blue = colorsys.hsv_to_rgb(n * 0.618034 % 1.0, (0.9, 0.65)[n % 2], (1.0, 0.85, 0.7)[n % 3])
    return 255 * red, 255 * green, 255 * blue


def _titled(title: str, picture: Picture) -> Picture:
    """The picture with a white strip above it that carries the title, as large as fits."""
    width = picture.shape[1]
    strip = np.full((STRIP_PX, width, 3), PAPER, dtype=np.uint8)
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.5
    (text_px, _), _ = cv2.getTextSize(title, font, scale, 1)
    scale = min(scale, scale * (width - 4) / max(text_px, 1))
    cv2.putText(strip, title, (2, STRIP_PX - 9), font, scale, INK, 1, cv2.LINE_AA)
    return np.concatenate([strip, picture])


def _beside(pictures: Sequence[Picture]) -> Picture:
    gap = ((GAP_PX, GAP_PX), (GAP_PX, 0), (0, 0))
    padded = [np.pad(picture, gap, constant_values=PAPER) for picture in pictures]
    return np.pad(np.concatenate(padded, axis=1), ((0, 0), (0, GAP_PX), (0, 0)), constant_values=PAPER)
