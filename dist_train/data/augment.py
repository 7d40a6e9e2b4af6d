"""Crops, flips and turns, described by four numbers, so that whatever is known of a whole picture can follow its crop.

A geometry is (top, left, flip, turns): cut full[top : top + crop_px, left : left + crop_px], mirror left-right if
flip is 1, then turn counter-clockwise `turns` times by 90 degrees.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from dist_train.data.order import CROP, draws

_ROTATIONS = {1: cv2.ROTATE_90_COUNTERCLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_CLOCKWISE}


def geometry_at(
    seed: int, position: int, size_px: tuple[int, int], *, crop_px: int, flips: str
) -> tuple[int, int, int, int]:
    """Geometry of the sample at a position, whatever rank or worker asks.

    Args:
        seed, position: what all chance is keyed by.
        size_px: height and width of the whole picture, at least `crop_px`.
        crop_px: side of the crop.
        flips: `DataConfig.flips`.
    """
    h, w = size_px
    top, left, flip, turns = draws(seed, position, CROP, 4)
    return (
        top % (h - crop_px + 1),
        left % (w - crop_px + 1),
        flip % 2 if flips != "none" else 0,
        turns % 4 if flips == "all" else 0,
    )


def apply_geometry(whole: Tensor, geometry: Sequence[int] | Tensor, crop_px: int) -> Tensor:
    """Cut, mirror and turn.

    Args:
        whole: (..., H, W), any dtype: a picture, its masks, a map of regions.
        geometry: four numbers, such as a row of `Batch.geometry`.
        crop_px: side of the crop.

    Returns:
        (..., crop_px, crop_px).
    """
    top, left = int(geometry[0]), int(geometry[1])
    return turned(whole[..., top : top + crop_px, left : left + crop_px], geometry)


def turned(crop: Tensor, geometry: Sequence[int] | Tensor) -> Tensor:
    """Mirror and turn a crop (..., P, P) that is cut already."""
    flip, turns = int(geometry[2]), int(geometry[3])
    return torch.rot90(crop.flip(-1) if flip else crop, turns, (-2, -1))


def turned_picture(crop: np.ndarray, geometry: Sequence[int]) -> np.ndarray:
    """A crop (P,P,3) that is cut already, mirrored and turned, as (3,P,P): `turned` in half the time."""
    if geometry[2]:
        crop = cv2.flip(crop, 1)
    if geometry[3]:
        crop = cv2.rotate(crop, _ROTATIONS[geometry[3]])
    return np.stack(cv2.split(crop))


def undo_turns(crop: Tensor, geometry: Sequence[int] | Tensor) -> Tensor:
    """Turn and mirror a crop (..., P, P) back to how it lies in the whole picture, at top and left."""
    flip, turns = int(geometry[2]), int(geometry[3])
    upright = torch.rot90(crop, -turns, (-2, -1))
    return upright.flip(-1) if flip else upright
