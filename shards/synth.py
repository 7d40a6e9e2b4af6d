"""Photographs and a synthetic degradation -> training and validation shards, split by photograph."""

import importlib.resources
import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from shards.codec import decode_rgb, encode_png
from shards.degrade import DEGRADATIONS
from shards.layouts import pairs, pictures_below
from shards.schema import Manifest
from shards.write import write_shards

# Photographs that lie inside scikit-image's wheel, so nothing is downloaded. The two motorcycles are a stereo pair.
TRAIN_PHOTOS = (
    "astronaut.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg", "camera.png", "brick.png",
    "grass.png", "gravel.png", "coins.png", "ihc.png",
)  # fmt: skip
VAL_PHOTOS = ("chelsea.png", "coffee.png")
MAX_PX = 768
TILE_PX = 256
VAL_PX = 480


def synthesise(
    degradation: str, out: str | Path, *, src: str | Path | None = None, seed: int = 0, variants: int = 2
) -> tuple[Manifest, Manifest]:
    """Write OUT/train and OUT/val.

    Training photographs are cut into tiles of 256 px at two scales; those held out stay whole, at most 480 px a side.

    Args:
        degradation: a name in `DEGRADATIONS`.
        out: folder of the two.
        src: folder of clean photographs, the last tenth of which by name is held out; none: scikit-image's.
        seed: decides, with the key of a picture, its degradation.
        variants: degradations of each picture.

    Raises:
        ValueError: no such degradation, too few photographs, an unreadable one.
        ShardError: as `write_shards`.
    """
    if degradation not in DEGRADATIONS:
        raise ValueError(f"no degradation {degradation!r}; there are {', '.join(DEGRADATIONS)}")
    train, val = _sample_photographs() if src is None else _photographs_in(Path(src))
    manifests = []
    for split, photographs in (("train", train), ("val", val)):
        with tempfile.TemporaryDirectory(prefix="restill-synth-") as scratch:
            for path in tqdm(photographs, desc=f"{split} photographs", unit="photograph", disable=None):
                for name, gt in _pieces(path) if split == "train" else _whole(path):
                    for variant in range(variants):
                        key = f"{name}-{variant}"
                        rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(key.encode())]))
                        _save(Path(scratch, "lq", f"{key}.png"), DEGRADATIONS[degradation](gt, rng))
                        _save(Path(scratch, "gt", f"{key}.png"), gt)
            manifest = write_shards(
                pairs(Path(scratch)),
                Path(out, split),
                src="scikit-image" if src is None else str(src),
                layout=f"synth_{degradation}",
                split=split,
                arguments={"seed": seed, "variants": variants, "photographs": [path.name for path in photographs]},
            )
            manifests.append(manifest)
    return manifests[0], manifests[1]


def _sample_photographs() -> tuple[list[Path], list[Path]]:
    folder = Path(str(importlib.resources.files("skimage"))) / "data"
    absent = [name for name in TRAIN_PHOTOS + VAL_PHOTOS if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"this scikit-image has no {', '.join(absent)} in {folder}; give your own photographs by --src"
        )
    return [folder / name for name in TRAIN_PHOTOS], [folder / name for name in VAL_PHOTOS]


def _photographs_in(folder: Path) -> tuple[list[Path], list[Path]]:
    paths = list(pictures_below(folder).values())
    if len(paths) < 2:
        raise ValueError(f"{folder} holds {len(paths)} photographs; two are the least, one to train on, one held out")
    num_val = max(1, len(paths) // 10)
    return paths[:-num_val], paths[-num_val:]


def _whole(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    rgb = _read(path)
    yield _name(path), _resize(rgb, min(1.0, VAL_PX / max(rgb.shape)))


def _pieces(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Tiles that cover a photograph, and a smaller copy of it, evenly."""
    rgb = _read(path)
    largest = min(1.0, MAX_PX / max(rgb.shape))
    for level, scale in enumerate((largest, 0.6 * largest)):
        scaled = _resize(rgb, scale)
        if level and min(scaled.shape[:2]) < TILE_PX:
            return
        corners = [(top, left) for top in _starts(scaled.shape[0]) for left in _starts(scaled.shape[1])]
        for number, (top, left) in enumerate(corners):
            yield f"{_name(path)}-{level}-{number:02d}", scaled[top : top + TILE_PX, left : left + TILE_PX]


def _starts(length: int) -> list[int]:
    last = max(0, length - TILE_PX)
    return [round(start) for start in np.linspace(0, last, -(-length // TILE_PX))] if last else [0]


def _read(path: Path) -> np.ndarray:
    try:
        return decode_rgb(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; remove it from the folder") from None


def _resize(rgb: np.ndarray, scale: float) -> np.ndarray:
    return rgb if scale == 1 else cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", path.stem)


def _save(path: Path, rgb: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "xb") as file:  # two photographs of one name would be an error here, not a loss
        file.write(encode_png(rgb))
