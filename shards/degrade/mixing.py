"""RainMix (EfficientDerain): a layer of streaks mixed with warped copies of itself."""

import cv2
import numpy as np

from shards.degrade.chance import Rng, below
from shards.degrade.light import to_levels
from shards.degrade.rain import light_streaks, screen

_OPERATIONS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y", "zoom_x", "zoom_y")
_CHAINS = 3
_DEPTHS = (2, 3)
_SEVERITY = 3  # of 10


def rainmix(gt: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Screen on a mixture of drawn streaks and warped copies.

    As in training, where it comes on top of a data set's rain, it is weak: on 60 backgrounds of Rain100L the input PSNR
    is 30.1 dB (5th and 95th percentile 24.4-36.1), 0.17 of a picture is covered, and R is 18 there.

    Args:
        gt: (H,W,3) uint8 RGB.
        rng: the only source of chance.

    Returns:
        (H,W,3) uint8 RGB.
    """
    h, w = gt.shape[:2]
    return to_levels(screen(gt, mixed_streaks((h, w), rng)[..., None]))


def mixed_streaks(size_px: tuple[int, int], rng: Rng) -> np.ndarray:
    """The layer that `rainmix` screens on: (H,W) float32, not negative; 1 is white."""
    h, w = size_px
    # Room for a window that the black borders of shifted layers seldom reach.
    return augmix(light_streaks((h * 5 // 4, w * 5 // 4), rng) / 255, rng, size_px=size_px)


def augmix(layer: np.ndarray, rng: Rng, *, size_px: tuple[int, int]) -> np.ndarray:
    """Mix a window of a layer with three warped copies.

        max(1 - m, 0.7) * layer + max(m, 0.5 / max(w)) * sum over i of w_i * chain_i(layer)

    with m uniform and w from Dirichlet(1, 1, 1). Unlike AugMix's, the two factors may add up to more than 1. This and
    the operations are EfficientDerain's released code. Ours: a chain is one warp, so nothing is blurred or cut twice,
    and only the window is computed. Theirs shifts whole pixels, turns whole degrees and rounds after each operation.

    Args:
        layer: (H,W) float32, no smaller than the window.
        rng: the only source of chance.
        size_px: height and width of the window, whose place is drawn.

    Returns:
        Of that size, float32, not negative; up to 2.5 times as bright.
    """
    h, w = layer.shape
    height, width = size_px
    top, left = below(rng, h - height + 1), below(rng, w - width + 1)
    exponential = -np.log(rng.random(_CHAINS))
    weights = (exponential / exponential.sum()).tolist()  # Dirichlet(1, 1, 1)
    m = rng.random()
    depth = _DEPTHS[below(rng, len(_DEPTHS))]  # the same for all chains, as released
    window = np.array([[1, 0, left], [0, 1, top], [0, 0, 1]], np.float64)
    mixed = np.zeros(size_px, np.float32)
    for weight in weights:
        # Maps lead from a pixel back to where it came from, so the last operation comes first to the pixel.
        back = np.linalg.multi_dot([*(_operation(rng, h, w) for _ in range(depth)), window])
        mixed += weight * cv2.warpAffine(
            layer, back[:2], (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        )
    seen = layer[top : top + height, left : left + width]
    return max(1 - m, 0.7) * seen + max(m, 0.5 / max(weights)) * mixed


def _operation(rng: Rng, h: int, w: int) -> np.ndarray:
    """One operation at random: (3,3), from a pixel (x, y, 1) of its result to where that comes from."""
    name = _OPERATIONS[below(rng, len(_OPERATIONS))]
    level = rng.uniform(0.1, _SEVERITY) / 10
    positive = rng.random() < 0.5
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
