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
from shards.degrade import light_streaks
from shards.layouts import pictures_below

_OPERATIONS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y", "zoom_x", "zoom_y")
_CHAINS = 3
_DEPTHS = (2, 3)
_SEVERITY = 3  # of 10


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
    if streaks:
        layer = read_streaks(streaks[chance.below(len(streaks))], least_px=crop_px)
    else:
        side_px = crop_px * 5 // 4  # room for a window that the black borders of shifted layers seldom reach
        layer = light_streaks((side_px, side_px), chance) / 255
    return screen(base, augmix(layer, chance, crop_px=crop_px))


def screen(picture: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """Screen a layer on: I + R - I * R, clipped, for I and R in units of white.

    The released code forgets to clip, so its pictures may be brighter than white.

    Args:
        picture: (3,P,P).
        layer: (P,P), not negative; 1 is white.
    """
    return np.minimum(picture + layer * (255 - picture.astype(np.float32)), 255)


def augmix(layer: np.ndarray, chance: Chance, *, crop_px: int) -> np.ndarray:
    """Mix a window of a layer with three warped copies.

        max(1 - m, 0.7) * layer + max(m, 0.5 / max(w)) * sum over i of w_i * chain_i(layer)

    with m uniform and w from Dirichlet(1, 1, 1). Unlike AugMix's, the two factors may add up to more than 1. This and
    the operations are EfficientDerain's released code. Ours: a chain is one warp, so nothing is blurred or cut twice,
    and only the window is computed. Theirs shifts whole pixels, turns whole degrees and rounds after each operation.

    Args:
        layer: (H,W) float32, neither side below `crop_px`.
        chance: of the sample.
        crop_px: side of the window, whose place is drawn.

    Returns:
        (crop_px, crop_px) float32, not negative; up to 2.5 times as bright.
    """
    h, w = layer.shape
    top, left = chance.below(h - crop_px + 1), chance.below(w - crop_px + 1)
    exponential = -np.log(chance.random(_CHAINS))
    weights = (exponential / exponential.sum()).tolist()  # Dirichlet(1, 1, 1)
    m = chance.random()
    depth = _DEPTHS[chance.below(len(_DEPTHS))]  # the same for all chains, as released
    window = np.array([[1, 0, left], [0, 1, top], [0, 0, 1]], np.float64)
    mixed = np.zeros((crop_px, crop_px), np.float32)
    for weight in weights:
        # Maps lead from a pixel back to where it came from, so the last operation comes first to the pixel.
        back = np.linalg.multi_dot([*(_operation(chance, h, w) for _ in range(depth)), window])
        mixed += weight * cv2.warpAffine(
            layer, back[:2], (crop_px, crop_px), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        )
    seen = layer[top : top + crop_px, left : left + crop_px]
    return max(1 - m, 0.7) * seen + max(m, 0.5 / max(weights)) * mixed


def _operation(chance: Chance, h: int, w: int) -> np.ndarray:
    """One operation at random: (3,3), from a pixel (x, y, 1) of its result to where that comes from."""
    name = _OPERATIONS[chance.below(len(_OPERATIONS))]
    level = chance.uniform(0.1, _SEVERITY) / 10
    positive = chance.random() < 0.5
    signed = level if positive else -level
    back = np.eye(3)
    if name == "rotate":  # about the centre, up to 9 degrees
        back[:2] = cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), 30 * signed, 1)
    elif name == "shear_x":
        back[0, 1] = 0.3 * signed
    elif name == "shear_y":
        back[1, 0] = 0.3 * signed
    elif name == "translate_x":
        back[0, 2] = signed * w / 3
    elif name == "translate_y":
        back[1, 2] = signed * h / 3
    else:  # by a factor of 0.06 to 1.8, which holds one edge in place and leaves what it no longer covers black
        axis, side_px = (0, w) if name == "zoom_x" else (1, h)
        rate = 1 / (6 * level)
        back[axis, axis] = rate
        back[axis, 2] = side_px * (1 - rate) if positive else 0
    return back


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
