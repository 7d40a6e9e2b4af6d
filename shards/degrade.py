"""Synthetic degradations: functions of a clean picture and a random generator."""

from collections.abc import Callable
from typing import Any, Protocol

import cv2
import numpy as np


class Rng(Protocol):
    """Source of chance: numpy's Generator, or whatever has these of its methods."""

    def random(self, size: Any = None) -> Any:
        """Uniform in [0, 1]."""

    def uniform(self, low: float, high: float, size: Any = None) -> Any:
        """Uniform in [low, high]."""

    def normal(self, loc: float, scale: float) -> float:
        """Of this mean and standard deviation."""


def rain_light(gt: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add one layer of sparse streaks, like Rain100L: grey, additive, clipped.

    Args:
        gt: (H,W,3) uint8 RGB.
        rng: the only source of chance.

    Returns:
        (H,W,3) uint8 RGB. Parameters are fitted to 300 pairs of Rain100L: streaks (more than 10 grey levels) cover 15 %
        of the picture, are 32 levels bright in the mean, and leave 25.5 dB PSNR.
    """
    return _add(gt, light_streaks(gt.shape[:2], rng))


def light_streaks(shape: tuple[int, ...], rng: Rng) -> np.ndarray:
    """The layer that `rain_light` adds: (H,W) float32, grey levels in [0, 90]."""
    return _streaks(
        shape,
        rng,
        density=rng.uniform(0.0015, 0.004),
        length_px=rng.uniform(19, 44),
        width_px=rng.uniform(1.0, 1.8),
        angle_deg=rng.normal(0, 13),
        amplitude=rng.uniform(30, 90),
    )


def rain_heavy(gt: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add five layers of streaks that nearly share a direction, like Rain100H. Arguments as `rain_light`; 12-15 dB."""
    angle_deg = rng.normal(0, 5)
    layers = [
        _streaks(
            gt.shape[:2],
            rng,
            density=rng.uniform(0.001, 0.0035),
            length_px=rng.uniform(30, 60),
            width_px=rng.uniform(1.2, 2.6),
            angle_deg=angle_deg + rng.uniform(-6, 6),
            amplitude=rng.uniform(40, 110),
        )
        for _ in range(5)
    ]
    return _add(gt, np.sum(layers, axis=0))


Degradation = Callable[[np.ndarray, np.random.Generator], np.ndarray]
DEGRADATIONS: dict[str, Degradation] = {"rain_heavy": rain_heavy, "rain_light": rain_light}


def _add(gt: np.ndarray, layer: np.ndarray) -> np.ndarray:
    return np.clip(gt + np.rint(layer)[..., None], 0, 255).astype(np.uint8)


def _streaks(
    shape: tuple[int, ...],
    rng: Rng,
    *,
    density: float,
    length_px: float,
    width_px: float,
    angle_deg: float,
    amplitude: float,
) -> np.ndarray:
    """Impulses of random strength, each drawn as an anti-aliased line; (H,W) float32 in [0, amplitude]."""
    kernel = _line(length_px, width_px, angle_deg)
    margin = kernel.shape[0] // 2  # streaks that begin outside reach into the picture
    padded = (shape[0] + 2 * margin, shape[1] + 2 * margin)
    impulses = (rng.random(padded) < density) * rng.uniform(0.4, 1.0, padded)
    streaks = cv2.filter2D(impulses.astype(np.float32), -1, kernel)[margin:-margin, margin:-margin]
    return amplitude * np.clip(streaks, 0, 1)


def _line(length_px: float, width_px: float, angle_deg: float) -> np.ndarray:
    """Line through the centre, `angle_deg` from the vertical, of Gaussian profile and peak 1."""
    radius = int(np.ceil(length_px / 2 + 2 * width_px))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    angle = np.deg2rad(angle_deg)
    along = y * np.cos(angle) + x * np.sin(angle)
    across = x * np.cos(angle) - y * np.sin(angle)
    profile = np.exp(-4 * np.log(2) * (across / width_px) ** 2)  # width_px is the width at half height
    return (profile * np.clip(length_px / 2 - np.abs(along) + 0.5, 0, 1)).astype(np.float32)
