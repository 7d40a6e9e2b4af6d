"""Restore pictures with an exported student: any size, grey, alpha, 16 bit, turned by EXIF."""

import os
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ALPHA_SUFFIXES = (".bmp", ".png", ".tif", ".tiff", ".webp")
DEEP_SUFFIXES = (".png", ".tif", ".tiff")

# JPEG with full colour resolution; above 100 WebP is lossless, as the others are without being asked.
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
ENCODING = {".jpg": _JPEG, ".jpeg": _JPEG, ".webp": [cv2.IMWRITE_WEBP_QUALITY, 101]}


class Restored(NamedTuple):
    """What became of a folder."""

    written: list[Path]
    failed: dict[Path, str]
    """Picture -> why it was left out."""


def restore_image(net: nn.Module, rgb: NDArray, *, device: torch.device | str = "cpu") -> NDArray:
    """Restore one picture.

    Args:
        net: maps (1,3,H,W) float32 RGB in [0,1] to the same, on `device`.
        rgb: (H,W,3) RGB, uint8 or uint16, any H and W.

    Returns:
        The restored picture, clamped and rounded, same shape and dtype.
    """
    peak = np.iinfo(rgb.dtype).max
    lq = torch.from_numpy(rgb.astype(np.float32) / peak).permute(2, 0, 1)[None].to(device)
    with torch.inference_mode():
        restored = net(lq)[0].float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return np.floor(restored.astype(np.float64) * peak + 0.5).astype(rgb.dtype)


def restore_folder(
    net: nn.Module, src: Path, dst: Path, *, device: torch.device | str = "cpu", overwrite: bool = False
) -> Restored:
    """Restore a picture, or all pictures in a folder and below it, with a progress bar.

    Each keeps its name and format: `src/a/b.jpg` becomes `dst/a/b.jpg`. Alpha is carried through, grey stays grey, 16
    bit stay 16 bit, and what EXIF turns is written turned (a picture with alpha excepted). One that cannot be read is
    noted and the others go on.

    Args:
        net: see `restore_image`.
        src: picture or folder.
        dst: folder; for a single picture a file name too. Pictures of `src` that lie in it are left alone.
        overwrite: whether outputs may replace files that are there; inputs are never replaced.

    Raises:
        ValueError: `src` has no pictures, or something would be overwritten.
    """
    pairs = _pairs(src, dst, overwrite=overwrite)
    result = Restored([], {})
    for picture, target in tqdm(pairs, unit="picture", disable=len(pairs) == 1):
        try:
            _restore_file(net, picture, target, device)
        except (ValueError, OSError, cv2.error, RuntimeError) as error:  # a RuntimeError: no memory for this one
            result.failed[picture] = str(error)
        else:
            result.written.append(target)
    return result


def _pairs(src: Path, dst: Path, *, overwrite: bool) -> list[tuple[Path, Path]]:
    """Pictures of `src` and where they go."""
    if src.is_file():
        pairs = [(src, dst if dst.suffix.lower() in SUFFIXES else dst / src.name)]
    else:
        below = (
            dst.resolve() if dst.resolve() != src.resolve() else None
        )  # outputs of an earlier call, in a folder of src
        pairs = [
            (path, dst / path.relative_to(src))
            for path in sorted(src.rglob("*"))
            if path.suffix.lower() in SUFFIXES
            and path.is_file()
            and not (below and path.resolve().is_relative_to(below))
        ]
    if not pairs:
        why = f"none of its files ends in {' '.join(SUFFIXES)}" if src.is_dir() else "no such file or folder"
        raise ValueError(f"no pictures to restore in {src}: {why}")
    inputs = {picture.resolve() for picture, _ in pairs}
    for _, target in pairs:
        if target.resolve() in inputs:
            raise ValueError(f"{target} is an input and would be overwritten; choose another output")
        if target.exists() and not overwrite:
            raise ValueError(f"{target} exists already; choose another output, or allow --overwrite")
    return pairs


def _restore_file(net: nn.Module, picture: Path, target: Path, device: torch.device | str) -> None:
    colour, alpha, is_grey = _read(picture)
    restored = cv2.cvtColor(restore_image(net, colour, device=device), cv2.COLOR_RGB2BGR)
    if is_grey:
        restored = cv2.cvtColor(restored, cv2.COLOR_BGR2GRAY)
    if alpha is not None:
        restored = np.dstack([restored, alpha])
    _write(target, restored, has_alpha=alpha is not None)


def _read(path: Path) -> tuple[NDArray, NDArray | None, bool]:
    """(H,W,3) RGB uint8 or uint16; (H,W) alpha or None; whether the file is grey."""
    data = path.read_bytes()
    if not data:
        raise ValueError("the file is empty")
    stored = _decode(data, cv2.IMREAD_UNCHANGED)
    if stored.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"its samples are {stored.dtype}; 8 and 16 bit integers are read")
    if stored.ndim == 3 and stored.shape[2] == 4:
        return cv2.cvtColor(stored, cv2.COLOR_BGRA2RGB), stored[..., 3], False
    upright = _decode(data, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    is_grey = upright.ndim == 2
    return cv2.cvtColor(upright, cv2.COLOR_GRAY2RGB if is_grey else cv2.COLOR_BGR2RGB), None, is_grey


def _decode(data: bytes, flags: int) -> NDArray:
    # Unlike imread, imdecode refuses a JPEG that is cut short instead of filling it up with grey.
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if picture is None:
        raise ValueError("not a readable picture, or a damaged one")
    return picture


def _write(path: Path, stored: NDArray, *, has_alpha: bool) -> None:
    suffix = path.suffix.lower()
    if has_alpha and suffix not in ALPHA_SUFFIXES:
        raise ValueError(f"{path}: {suffix} has no alpha; write one of {' '.join(ALPHA_SUFFIXES)}")
    if stored.dtype == np.uint16 and suffix not in DEEP_SUFFIXES:
        raise ValueError(f"{path}: {suffix} has no 16 bit; write one of {' '.join(DEEP_SUFFIXES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _, encoded = cv2.imencode(suffix, stored, ENCODING.get(suffix, []))
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_bytes(encoded.tobytes())
    part.replace(path)
