"""Synthetic degradations: functions of a clean picture and a source of chance, calibrated to real pairs."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from shards.degrade.blur import blur_camera, blur_frames, blur_local
from shards.degrade.chance import Range, Rng
from shards.degrade.mixing import augmix, mixed_streaks, rainmix
from shards.degrade.noise import noise_gaussian, noise_poisson, noise_raw
from shards.degrade.rain import NUM_PHOTOSHOP, light_streaks, rain_heavy, rain_light, rain_photoshop, screen

__all__ = [
    "DEGRADATIONS", "Degradation", "Range", "Rng", "augmix", "blur_camera", "blur_frames", "blur_local",
    "light_streaks", "mixed_streaks", "noise_gaussian", "noise_poisson", "noise_raw", "rain_heavy", "rain_light",
    "rain_photoshop", "rainmix", "screen",
]  # fmt: skip


class Degradation(NamedTuple):
    """A function, and how it wants to be used."""

    make: Callable[..., Any]
    """From gt, or frames, and a Generator, to lq, or to lq and a mask."""
    variants: int = 2
    """Of each picture, if not told otherwise."""
    numbered: bool = False
    """It takes the number of the variant, `variant`."""
    margin_px: int = 0
    """How far around a piece of a picture it should see, for what moves into it."""

    @property
    def options(self) -> dict[str, Any]:
        """The numbers, ranges and names that may be set, with their defaults."""
        parameters = inspect.signature(self.make).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is not None}


DEGRADATIONS: dict[str, Degradation] = {
    "blur_camera": Degradation(blur_camera, margin_px=32),
    "blur_frames": Degradation(blur_frames, variants=1),
    "blur_local": Degradation(blur_local),
    "noise_gaussian": Degradation(noise_gaussian),
    "noise_poisson": Degradation(noise_poisson),
    "noise_raw": Degradation(noise_raw),
    "rain_heavy": Degradation(rain_heavy),
    "rain_light": Degradation(rain_light),
    "rain_photoshop": Degradation(rain_photoshop, variants=NUM_PHOTOSHOP, numbered=True),
    "rainmix": Degradation(rainmix),
}
