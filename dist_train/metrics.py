"""PSNR and SSIM under the named protocols of the field's tables.

"SSIM" of one picture pair spans 0.70 to 0.81 over the implementations in use, and PSNR 1.3 dB, so a number without its
protocol means nothing. Each protocol below equals the authors' own code to 1e-5: their MATLAB, but for SSIM of `gopro`,
which is NAFNet's Python. Everywhere: two (H,W,3) uint8 RGB pictures, no border cropped, K1=0.01, K2=0.03, an 11 px
Gaussian of sigma 1.5.

This module needs numpy and scipy only. SSIM is Wang et al., IEEE TIP 13(4), 2004, Eq. 13.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, uniform_filter

from dist_train.protocols import protocol_name

Picture = NDArray[np.uint8]
Plane = NDArray[np.float64]

RADIUS = 5
SIGMA = 1.5
COLLAPSE_DB = 3.0


def score(restored_u8: Picture, gt_u8: Picture, protocol: str) -> dict[str, float]:
    """PSNR and SSIM of a restored picture.

    Args:
        restored_u8: (H,W,3) uint8 RGB, rounded (see `to_u8`), H and W at least 11.
        gt_u8: the ground truth, of the same shape.
        protocol: a key of `PROTOCOLS`, or a former name.

    Returns:
        `{"psnr": dB, "ssim": at most 1}`; the PSNR of equal pictures is infinite.

    Raises:
        ValueError: unknown protocol, or pictures that cannot be compared.
    """
    measures = PROTOCOLS[protocol_name(protocol)]
    for picture in (restored_u8, gt_u8):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"metrics want (H,W,3) uint8 RGB, not {picture.shape} {picture.dtype}")
    if restored_u8.shape != gt_u8.shape:
        raise ValueError(f"the restored picture is {restored_u8.shape[:2]}, the ground truth {gt_u8.shape[:2]}")
    if min(gt_u8.shape[:2]) < 2 * RADIUS + 1:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 px, not {gt_u8.shape[:2]}")
    return {name: measure(restored_u8, gt_u8) for name, measure in measures.items()}


def is_collapsed(restored_u8: Picture, input_u8: Picture, gt_u8: Picture) -> bool:
    """Whether restoring made a picture worse by more than 3 dB of RGB PSNR: the "mode collapse" of SAM-Deblur.

    The share of such pictures in a data set is its MCR. Exactly 3 dB is no collapse.
    """
    return psnr(input_u8, gt_u8) - psnr(restored_u8, gt_u8) > COLLAPSE_DB


def to_u8(image: Any) -> Picture:
    """A picture as it is scored and written: clamped, rounded half up.

    Args:
        image: (3,H,W) float RGB in [0,1]: a numpy array or a CPU tensor without gradient.

    Returns:
        (H,W,3) uint8 RGB.
    """
    unit = np.clip(np.asarray(image, dtype=np.float32), 0.0, 1.0)
    return np.floor(unit * 255.0 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def y_double(rgb_u8: Picture) -> Plane:
    """Luma of MATLAB's `rgb2ycbcr(im2double(rgb))` times 255: (H,W) float64 in [16,235], not rounded."""
    return rgb_u8 @ (np.array([65.481, 128.553, 24.966]) / 255.0) + 16.0


def y_uint8(rgb_u8: Picture) -> Plane:
    """Luma of MATLAB's `rgb2ycbcr` of a uint8 picture: (H,W), rounded to whole grey levels."""
    return np.floor(y_double(rgb_u8) + 0.5)


def psnr(restored: NDArray, gt: NDArray) -> float:
    """Peak signal-to-noise ratio in dB of two arrays of one shape, peak 255; infinite if they are equal."""
    error = np.mean((restored.astype(np.float64) - gt.astype(np.float64)) ** 2)
    return 10.0 * math.log10(255.0**2 / error) if error > 0 else math.inf


def ssim(restored: NDArray, gt: NDArray) -> float:
    """Wang's first SSIM, `ssim_index.m`: (H,W) or (H,W,C), window inside the picture only, mean over the channels."""
    inside = slice(RADIUS, -RADIUS)
    return float(_ssim_map(restored, gt, axes=(0, 1), border="reflect")[inside, inside].mean())


def ssim_downsampled(restored: Plane, gt: Plane) -> float:
    """Wang's later SSIM, `ssim.m`: the planes are first shrunk by round(shorter side / 256), then as `ssim`."""
    factor = max(1, math.floor(min(gt.shape) / 256 + 0.5))
    return ssim(_shrink(restored, factor), _shrink(gt, factor))


def ssim_3d(restored_u8: Picture, gt_u8: Picture) -> float:
    """SSIM of NAFNet, HINet and SAM-Deblur, which is MATLAB's `ssim` of an RGB picture: colour is a third axis.

    The window is an 11 x 11 x 11 Gaussian, edges are replicated, the mean is over every pixel and channel.
    """
    return float(_ssim_map(restored_u8, gt_u8, axes=(0, 1, 2), border="nearest").mean())


def _ssim_map(a: NDArray, b: NDArray, *, axes: tuple[int, ...], border: str) -> NDArray[np.float64]:
    window = np.exp(-(np.arange(-RADIUS, RADIUS + 1) ** 2) / (2 * SIGMA**2))
    window /= window.sum()

    def blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
        for axis in axes:
            x = correlate1d(x, window, axis=axis, mode=border)
        return x

    a, b = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    return ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def _shrink(plane: Plane, factor: int) -> Plane:
    """Box filter as `imfilter(x, ones(f)/f^2, 'symmetric')`, then every f-th pixel from the first."""
    # MATLAB centres a window of even size before its middle, scipy after it.
    return uniform_filter(plane, factor, mode="reflect", origin=-1 if factor % 2 == 0 else 0)[::factor, ::factor]


_RGB: dict[str, Callable[[Picture, Picture], float]] = {"psnr": psnr, "ssim": ssim}

PROTOCOLS: dict[str, dict[str, Callable[[Picture, Picture], float]]] = {
    "rgb": _RGB,
    "rain200": {
        "psnr": lambda a, b: psnr(y_uint8(a), y_uint8(b)),
        "ssim": lambda a, b: ssim(y_uint8(a), y_uint8(b)),
    },
    "did_ddn": {
        "psnr": lambda a, b: psnr(y_double(a), y_double(b)),
        "ssim": lambda a, b: ssim_downsampled(y_double(a), y_double(b)),
    },
    "gopro": {"psnr": psnr, "ssim": ssim_3d},
    "awgn": _RGB,  # of grey pictures, whose three channels are equal, this is the value of one
}
"""Protocol -> measure -> function of (restored_u8, gt_u8); `dist_train.protocols` says what each is."""
