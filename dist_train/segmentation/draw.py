"""Frames and what was found in them, side by side."""

from collections.abc import Mapping

import cv2
import numpy as np

from dist_train.pictures import INK, PAPER, Picture, grid, panel
from dist_train.segmentation.cityscapes import CLASSES, IGNORE, paint

WIDTH_PX = 640


def draw(versions: Mapping[str, Picture], found: Mapping[str, Picture], labels: Picture) -> Picture:
    """Frames above and their class maps below; in the last column the labels, and what the colours mean.

    Args:
        versions: title -> frame, (H,W,3) uint8 RGB; larger ones than `WIDTH_PX` are shrunk.
        found: title -> class map, (H,W) uint8; black where nothing is labelled, as in the labels.
        labels: (H,W) uint8.
    """
    frames = [(title, _shrink(picture)) for title, picture in versions.items()]
    maps = [(title, paint(_shrink(np.where(labels == IGNORE, labels, one)))) for title, one in found.items()]
    painted = paint(_shrink(labels))
    return grid([panel([*frames, ("labels", painted)]), panel([*maps, ("classes", _legend(*painted.shape[:2]))])])


def _shrink(picture: Picture) -> Picture:
    """A frame, averaged; or classes, of which there is no average."""
    height, width = picture.shape[:2]
    if width <= WIDTH_PX:
        return picture
    how = cv2.INTER_AREA if picture.ndim == 3 else cv2.INTER_NEAREST
    shrunk = cv2.resize(picture, (WIDTH_PX, round(height * WIDTH_PX / width)), interpolation=how)
    return shrunk.astype(np.uint8, copy=False)


def _legend(height: int, width: int) -> Picture:
    legend = np.full((height, width, 3), PAPER, np.uint8)
    per_column = -(-len(CLASSES) // 2)
    for number, one in enumerate(CLASSES):
        column, row = divmod(number, per_column)
        x, y, step = column * width // 2, row * height // per_column, height // per_column
        legend[y + 2 : y + step - 2, x + 2 : x + step - 2] = one.rgb
        cv2.putText(
            legend, one.name, (x + step + 4, y + step // 2 + step // 6), cv2.FONT_HERSHEY_SIMPLEX, step / 64, INK, 1,
            cv2.LINE_AA,
        )  # fmt: skip
    return legend
