"""What a prior sees in a picture, and what restoring did to each thing it sees: numbers, and pictures for people."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dist_train.pictures import INK, PAPER, Picture

Masks = NDArray[np.bool_]
"""(K,H,W), largest first."""

# The variance of rounding, in grey levels squared: an object restored without any error has this one, and 58.9 dB.
LEAST_ERROR = 1 / 12
FULL_DB = 6.0
BETTER, SAME, WORSE = (33, 102, 172), (247, 247, 247), (178, 24, 43)  # colour-blind people tell them apart
MAX_TEXTS = 24


class Extent(NamedTuple):
    """Size and place of a mask."""

    mask: int
    """1 for the largest; the number in `MaskSet.idmap`."""
    area_px: int
    area_share: float
    """Of the picture."""
    left_px: int
    top_px: int
    right_px: int
    bottom_px: int
    """Of the smallest box around it; right and bottom are past its last pixel."""


class Gain(NamedTuple):
    """How well one thing was restored."""

    mask: int
    """0: what lies in no mask, if anything does."""
    area_px: int
    degraded_db: float
    """RGB PSNR over its pixels, before; peak 255, at most 58.9 dB."""
    restored_db: float
    gain_db: float


def extents(masks: Masks) -> list[Extent]:
    """Of each mask; none may be empty."""
    found = []
    for number, mask in enumerate(masks, start=1):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        found.append(Extent(number, int(mask.sum()), float(mask.mean()), *box))
    return found


def gains(degraded_u8: Picture, restored_u8: Picture, gt_u8: Picture, masks: Masks) -> list[Gain]:
    """Error before and after restoring, of each mask by itself, and first of what lies in none.

    Args:
        degraded_u8, restored_u8, gt_u8: (H,W,3) uint8 RGB.
        masks: which may overlap.
    """
    before, after = (
        ((picture.astype(np.float64) - gt_u8.astype(np.float64)) ** 2).mean(2) for picture in (degraded_u8, restored_u8)
    )
    rest = ~masks.any(0)
    found = []
    for number, mask in enumerate([rest, *masks]):
        if mask.any():
            degraded_db, restored_db = (_psnr(error[mask].mean()) for error in (before, after))
            found.append(Gain(number, int(mask.sum()), degraded_db, restored_db, restored_db - degraded_db))
    return found


def paint_gains(rgb_u8: Picture, idmap: NDArray[np.integer], of: Sequence[Gain]) -> Picture:
    """Colour each thing by its gain: blue got better, red worse, full at 6 dB; the larger ones bear it in dB.

    Args:
        rgb_u8: (H,W,3) uint8 RGB, seen through in grey.
        idmap: (H,W), as of `MaskSet.idmap`: which thing a pixel shows.
        of: their gains.
    """
    colours = np.full((int(idmap.max(initial=0)) + 1, 3), SAME, np.float64)
    for gain in of:
        if gain.mask < len(colours):
            colours[gain.mask] = _colour(gain.gain_db)
    grey = cv2.cvtColor(rgb_u8, cv2.COLOR_RGB2GRAY).astype(np.float64)[..., None]
    painted = np.floor(colours[idmap] * (0.6 + 0.4 * grey / 255) + 0.5).astype(np.uint8)
    edge = np.zeros(idmap.shape, bool)
    edge[:, :-1] |= idmap[:, :-1] != idmap[:, 1:]
    edge[:-1] |= idmap[:-1] != idmap[1:]
    painted[edge] = PAPER
    for gain in sorted(of, key=lambda one: -one.area_px)[:MAX_TEXTS]:
        _write_on(painted, idmap == gain.mask, f"{gain.gain_db:+.1f}")
    return painted


def _psnr(error: float) -> float:
    return 10 * math.log10(255**2 / max(float(error), LEAST_ERROR))


def _colour(gain_db: float) -> NDArray[np.float64]:
    strength = min(abs(gain_db) / FULL_DB, 1.0)
    return np.array(SAME) + strength * (np.array(BETTER if gain_db > 0 else WORSE) - np.array(SAME))


def _write_on(picture: Picture, where: Masks, text: str) -> None:
    """Where the region is widest, if the text fits in there at all."""
    # Beyond the picture there is nothing of it: else texts would stand on the border.
    depth = cv2.distanceTransform(np.pad(where, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
    if 2 * depth[y, x] < height:
        return
    place = (min(max(int(x) - width // 2, 0), max(where.shape[1] - width, 0)), int(y) + height // 2)
    for colour, thick in (((PAPER,) * 3, 3), (INK, 1)):
        cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, thick, cv2.LINE_AA)
