"""Grey levels and the light they stand for. The curve is a power of 2.2, as of GoPro's `blur_gamma`."""

import numpy as np

GAMMA = 2.2


def to_light(rgb: np.ndarray) -> np.ndarray:
    """Grey levels in [0,255], of any shape -> float32 light in [0,1]."""
    return (np.asarray(rgb, np.float32) / 255) ** GAMMA


def from_light(light: np.ndarray) -> np.ndarray:
    """Light -> uint8 grey levels, clipped and rounded."""
    return to_levels(255 * np.clip(light, 0, 1) ** (1 / GAMMA))


def to_levels(levels: np.ndarray) -> np.ndarray:
    """Real grey levels -> uint8, clipped and rounded."""
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)
