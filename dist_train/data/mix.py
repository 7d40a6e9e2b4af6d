"""What recipes put into a sample beyond a crop and a flip: MixUp (Uformer) and RainMix (EfficientDerain v4).

Pictures are (3,P,P), grey levels in [0,255], uint8 or float32. Results are float32 and not rounded, as in the
official recipes: rounding would add noise (59 dB) to lq and gt alike.

All chance comes from `order.Chance`, whose draws are frozen. scipy and OpenCV, which make pictures of them, are not: an
upgrade of these may round otherwise.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from scipy.special import betaincinv

from dist_train.data.order import Chance
from shards.codec import decode_rgb
from shards.degrade import augmix, mixed_streaks, screen
from shards.layouts import pictures_below


def mixup_weight(chance: Chance, alpha: float) -> float:
    """Draw lam from Beta(alpha, alpha), by its inverse distribution function."""
    return float(betaincinv(alpha, alpha, chance.random()))


def mixup(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """weight * first + (1 - weight) * second, the same for lq and gt.

    As Uformer's: each sample has its own weight, and its partner is that of a permutation of the batch; the global one,
    so that it is the same for any world.
    """
    return np.float32(weight) * first + np.float32(1 - weight) * second


def rainmix(
    lq: np.ndarray, gt: np.ndarray, chance: Chance, *, clean: float, streaks: Sequence[Path] = ()
) -> np.ndarray:
    """Let further streaks fall on the rainy picture, or on the clean one.

    The released code rains on the whole picture, before cropping; here it rains on the crop, after flips and turns,
    which costs less, and rain falls down whatever becomes of the picture.

    Args:
        lq, gt: (3,P,P).
        chance: of the sample.
        clean: probability of the clean picture.
        streaks: pictures of streaks; none: they are drawn.

    Returns:
        What takes the place of `lq`.
    """
    base = gt if chance.random() < clean else lq
    crop_px = lq.shape[-1]
    size_px = crop_px, crop_px
    if not streaks:
        return screen(base, mixed_streaks(size_px, chance))
    layer = read_streaks(streaks[chance.below(len(streaks))], least_px=crop_px)
    return screen(base, augmix(layer, chance, size_px=size_px))


def streak_pictures(folder: str | Path, *, least_px: int) -> tuple[Path, ...]:
    """Pictures of streaks in a folder and below, each of which was read once.

    Raises:
        ValueError: no folder, no pictures, or one that cannot be read or is smaller than `least_px`.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"data.rainmix.streaks={folder} is no folder; leave it out, and streaks are drawn")
    paths = tuple(pictures_below(Path(folder)).values())
    if not paths:
        raise ValueError(f"data.rainmix.streaks={folder} holds no pictures; leave it out, and streaks are drawn")
    for path in paths:
        read_streaks(path, least_px=least_px)
    return paths


def read_streaks(path: Path, *, least_px: int) -> np.ndarray:
    """Read a picture of streaks: (H,W) float32 grey in [0,1]. Errors as `streak_pictures`."""
    try:
        grey = cv2.cvtColor(decode_rgb(path.read_bytes()), cv2.COLOR_RGB2GRAY)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.rainmix.streaks: {path}: {error}; remove it, or bring it back") from None
    if min(grey.shape) < least_px:
        size = f"{grey.shape[1]}x{grey.shape[0]}"
        raise ValueError(f"data.rainmix.streaks: {path} is {size}, smaller than crops of {least_px} px; remove it")
    return grey.astype(np.float32) / 255
