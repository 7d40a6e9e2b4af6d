"""Noise: as strong everywhere (Gaussian), stronger where it is bright (Poisson), or as a camera has it (raw).

Figures are means over 60 photographs of 512x512, in brackets the 5th and 95th percentile of the pictures.
"""

import cv2
import numpy as np

from shards.degrade.chance import Range, draw
from shards.degrade.light import to_levels

_CURVE_GAMMA = 2.7  # a display's 2.2, and shadows lifted as cameras do: noise is then strongest below middle grey


def noise_gaussian(gt: np.ndarray, rng: np.random.Generator, *, sigma: Range = (5, 50)) -> np.ndarray:
    """Add white noise from N(0, sigma^2), independent for each pixel and colour.

    Sigma is in grey levels, as in the tables of denoisers (15, 25, 50). Those neither clip nor round what they add, and
    a picture file does both: it has 24.9, 20.7 and 15.3 dB of these sigmas, where theirs have 24.6, 20.2 and 14.2. The
    default leaves 20.6 dB (15.8-30.2).

    Args:
        gt: (H,W,3) uint8 RGB.
        rng: the only source of chance.
        sigma: of the whole picture, drawn uniformly.

    Returns:
        (H,W,3) uint8 RGB.
    """
    strength = draw(rng, "sigma", sigma)
    return to_levels(gt + np.float32(strength) * rng.standard_normal(gt.shape, np.float32))


def noise_poisson(gt: np.ndarray, rng: np.random.Generator, *, photons: Range = (30, 600)) -> np.ndarray:
    """Replace each grey level by a count of photons: 255 / n * Poisson(n * gt / 255).

    At a grey level g that is noise with a standard deviation of sqrt(255 * g / n). The default leaves 25.6 dB
    (19.5-30.4).

    Args:
        gt: (H,W,3) uint8 RGB.
        rng: the only source of chance.
        photons: n, the mean count where the picture is white, drawn log-uniformly.

    Returns:
        (H,W,3) uint8 RGB.
    """
    num = draw(rng, "photons", photons, log=True)
    return to_levels(rng.poisson(gt * (num / 255)) * (255 / num))


def noise_raw(
    gt: np.ndarray,
    rng: np.random.Generator,
    *,
    shot: Range = (0.0007, 0.0035),
    red_gain: Range = (1.4, 2.2),
    blue_gain: Range = (1.2, 1.8),
    luma_px: Range = (0.6, 1.2),
    chroma_px: Range = (2, 4),
) -> np.ndarray:
    """Add the noise that a sensor has and its camera then colours, smears and bends.

    Brooks et al. 2019, "Unprocessing Images for Learned Raw Denoising": back through an S-shaped tone curve and gamma
    to light, and through white balance to what a Bayer sensor (RGGB) counts; there, Gaussian noise of variance
    shot * x + read. Forth again goes the noise alone, with Gaussian windows for demosaicking and noise reduction, as gt
    has been through these already. Without their colour matrices; the gamma is fitted to PolyU, as are the defaults.

    | noise in even parts, grey levels, at brightness | 12 | 37 | 62 | 87 | 112 | 137 | 162 | 187 | 212 | 237 |
    |---|---|---|---|---|---|---|---|---|---|---|
    | 60 pairs of PolyU | 2.7 | 3.2 | 3.7 | 3.8 | 3.5 | 3.4 | 2.9 | 2.4 | 2.2 | 1.7 |
    | ours, on their clean pictures | 3.1 | 3.5 | 3.7 | 3.7 | 3.7 | 3.6 | 3.4 | 3.0 | 2.6 | 1.9 |

    | | input dB | std of red, green, blue | correlation of green with red, blue | and with itself 1, 2 px on |
    |---|---|---|---|---|
    | PolyU | 36.3 (32.9-39.8) | 4.0 3.6 4.1 | 0.68 0.69 | 0.66 0.34 |
    | ours | 38.0 (32.8-42.7) | 3.1 3.2 3.9 | 0.75 0.82 | 0.68 0.26 |

    What PolyU has more is at edges, where its shots are not quite aligned, and in blocks of JPEG.

    Args:
        gt: (H,W,3) uint8 RGB.
        rng: the only source of chance.
        shot: variance of the noise at x = 1, drawn log-uniformly.
        red_gain, blue_gain: of white balance.
        luma_px, chroma_px: standard deviations of the windows that smooth all colours, and then how they differ.

    Returns:
        (H,W,3) uint8 RGB.
    """
    light = _to_scene(gt)
    gains = np.array([draw(rng, "red_gain", red_gain), 1, draw(rng, "blue_gain", blue_gain)], np.float32)
    strength = draw(rng, "shot", shot, log=True)
    luma, chroma = draw(rng, "luma_px", luma_px), draw(rng, "chroma_px", chroma_px)
    h, w = gt.shape[:2]
    site = np.array([[0, 1], [1, 2]])[np.arange(h)[:, None] % 2, np.arange(w) % 2]  # its colour
    raw = np.take_along_axis(light / gains, site[..., None], axis=2)[..., 0]
    read = np.float32(np.exp(2.18 * np.log(strength) + 1.2))  # the line that they fitted to cameras
    noise = rng.standard_normal((h, w), np.float32) * np.sqrt(np.float32(strength) * raw + read)
    colours = np.stack([gain * _spread(noise, site == colour, luma) for colour, gain in enumerate(gains)], axis=-1)
    green = colours[..., 1:2]
    smooth = green + cv2.GaussianBlur(colours - green, (0, 0), chroma)
    return _from_scene(light + smooth)


def _spread(noise: np.ndarray, sites: np.ndarray, sigma_px: float) -> np.ndarray:
    """Fill the gaps between a colour's sites: mean of the sites around, weighted by a Gaussian window."""
    weights = sites.astype(np.float32)
    total = cv2.GaussianBlur(weights, (0, 0), sigma_px)
    return cv2.GaussianBlur(noise * weights, (0, 0), sigma_px) / np.maximum(total, 1e-6)  # one row has no blue site


def _to_scene(rgb: np.ndarray) -> np.ndarray:
    levels = np.float32(0.5) - np.sin(np.arcsin(1 - rgb / np.float32(127.5)) / 3)  # solves 3x^2 - 2x^3
    return levels**_CURVE_GAMMA


def _from_scene(light: np.ndarray) -> np.ndarray:
    levels = np.clip(light, 0, 1) ** (1 / _CURVE_GAMMA)
    return to_levels(255 * (3 * levels**2 - 2 * levels**3))
