"""Cityscapes: its 19 classes, its labels in the three forms they come in, and frames beside their labels."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.codec import decode_unchanged
from shards.layouts import pictures_below

IGNORE = 255


class _Class(NamedTuple):
    name: str
    id: int
    """In labelIds; its place in `CLASSES` is that in labelTrainIds."""
    rgb: tuple[int, int, int]


CLASSES = (
    _Class("road", 7, (128, 64, 128)),
    _Class("sidewalk", 8, (244, 35, 232)),
    _Class("building", 11, (70, 70, 70)),
    _Class("wall", 12, (102, 102, 156)),
    _Class("fence", 13, (190, 153, 153)),
    _Class("pole", 17, (153, 153, 153)),
    _Class("traffic light", 19, (250, 170, 30)),
    _Class("traffic sign", 20, (220, 220, 0)),
    _Class("vegetation", 21, (107, 142, 35)),
    _Class("terrain", 22, (152, 251, 152)),
    _Class("sky", 23, (70, 130, 180)),
    _Class("person", 24, (220, 20, 60)),
    _Class("rider", 25, (255, 0, 0)),
    _Class("car", 26, (0, 0, 142)),
    _Class("truck", 27, (0, 0, 70)),
    _Class("bus", 28, (0, 60, 100)),
    _Class("train", 31, (0, 80, 100)),
    _Class("motorcycle", 32, (0, 0, 230)),
    _Class("bicycle", 33, (119, 11, 32)),
)
NUM_CLASSES = len(CLASSES)
# Of what is labelled but not scored: nothing, dynamic, ground, parking, rail track, guard rail, bridge, tunnel,
# caravan, trailer. Licence plates have the colour of cars, groups of poles that of a pole.
_NOT_SCORED = (
    (0, 0, 0), (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140), (180, 165, 180), (150, 100, 100),
    (150, 120, 90), (0, 0, 90), (0, 0, 110),
)  # fmt: skip
_KINDS = ("labelTrainIds", "labelIds", "color")  # the best first: colours cannot tell all classes apart


class Frame(NamedTuple):
    """A picture and the file of its labels."""

    key: str
    picture: Path
    labels: Path


def find_frames(frames: Path, labels: Path) -> list[Frame]:
    """Frames and their labels, in the folders or below them, which may be the same one.

    Names are Cityscapes': KEY_leftImg8bit*.png and KEY_gtFine_{labelTrainIds,labelIds,color}.png, of which the first
    that is there is taken; or both KEY.*. Labels without a frame are passed over.

    Raises:
        ValueError: no frames, a frame without labels, or two frames of one key.
    """
    pictures = by_key(frames)
    found: dict[str, dict[str, Path]] = {}
    for path in _pictures_below(labels):
        if (kind := _kind(path)) is not None:
            found.setdefault(_key(path), {})[kind] = path
    if missing := [pictures[key] for key in pictures if key not in found]:
        raise ValueError(
            f"{len(missing)} of {len(pictures)} frames have no labels in {labels}, such as {missing[0]}; "
            f"wanted is {_key(missing[0])}_gtFine_({'|'.join(_KINDS)}).png, or {_key(missing[0])}.png"
        )
    return [
        Frame(key, path, next(found[key][kind] for kind in (*_KINDS, "") if kind in found[key]))
        for key, path in sorted(pictures.items())
    ]


def by_key(folder: Path) -> dict[str, Path]:
    """Pictures that are no labels in a folder and below it, by what stands before _leftImg8bit in their names.

    Raises:
        ValueError: there are none, or two of one key.
    """
    found: dict[str, Path] = {}
    for path in _pictures_below(folder):
        if "_gtFine" in path.stem:
            continue
        other = found.setdefault(_key(path), path)
        if other != path:
            raise ValueError(f"{other} and {path} would both be the frame {_key(path)}; keep one")
    if not found:
        raise ValueError(f"no frames in {folder}")
    return found


def read_labels(path: Path) -> NDArray[np.uint8]:
    """Labels of a frame.

    Args:
        path: colours if it has three channels or four; else numbers, those of labelIds if its name ends so, or else
            of labelTrainIds.

    Returns:
        (H,W) uint8: 0 ... 18 as in `CLASSES`, or `IGNORE`.

    Raises:
        ValueError: the file is damaged, or holds what no such file can.
    """
    try:
        stored = decode_unchanged(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if stored.dtype != np.uint8:
        raise ValueError(f"{path}: labels are wanted, whose samples are uint8, not {stored.dtype}")
    if stored.ndim == 3:
        packed = stored[..., :3].astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        known = {_packed(one.rgb): number for number, one in enumerate(CLASSES)} | dict.fromkeys(
            map(_packed, _NOT_SCORED), IGNORE
        )
        return _look_up(packed, known, path, "colour #{:06x}")
    if path.stem.endswith("labelIds"):
        # 0 ... 33 are all ids there are; as a byte, -1 of a licence plate is 255.
        known = dict.fromkeys([*range(34), 255], IGNORE) | {one.id: number for number, one in enumerate(CLASSES)}
        return _look_up(stored, known, path, "label id {}")
    return _look_up(stored, {number: number for number in (*range(NUM_CLASSES), IGNORE)}, path, "train id {}")


def paint(classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Classes (H,W), as of `read_labels`, in Cityscapes' colours: (H,W,3) uint8 RGB, black where they are ignored."""
    palette = np.zeros((256, 3), np.uint8)
    palette[:NUM_CLASSES] = [one.rgb for one in CLASSES]
    return palette[classes]


def _look_up(stored: NDArray, known: Mapping[int, int], path: Path, what: str) -> NDArray[np.uint8]:
    values, places = np.unique(stored, return_inverse=True)
    if strange := [int(value) for value in values if int(value) not in known]:
        raise ValueError(f"{path}: {what.format(strange[0])} is none of Cityscapes'; are these its labels?")
    return np.array([known[int(value)] for value in values], np.uint8)[places].reshape(stored.shape)


def _packed(rgb: tuple[int, int, int]) -> int:
    return rgb[0] << 16 | rgb[1] << 8 | rgb[2]


def _pictures_below(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    return list(pictures_below(folder).values())


def _key(path: Path) -> str:
    return re.split("_(?:leftImg8bit|gtFine)", path.stem)[0]


def _kind(path: Path) -> str | None:
    """One of `_KINDS`; "" for a name that is not Cityscapes'; None if these are no labels of classes."""
    if "_gtFine" in path.stem:
        return next((kind for kind in _KINDS if path.stem.endswith(f"_{kind}")), None)
    return None if "_leftImg8bit" in path.stem else ""
