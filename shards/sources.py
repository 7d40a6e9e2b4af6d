"""A pair on disk -> a sample. What may be wrong with a picture is looked for here; nothing is converted in silence."""

import hashlib
import io
import json
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from shards.codec import decode_grey, decode_unchanged, encode_masks
from shards.layouts import Pair
from shards.pairing import measure
from shards.schema import MASKS, Rejected, key_problem
from shards.storage import Storage

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_GREY = frozenset({"1", "L", "LA", "La"})
_COLOUR = frozenset({"RGB", "RGBA", "RGBX", "P", "PA"})
_MASK_FROM = 128


class Recipe(NamedTuple):
    """How pictures become members of a shard."""

    storage: Storage = Storage()
    to8: Literal["shift"] | None = None
    """`shift`: the upper eight bits of sixteen; None: pictures of 16 bits are refused."""
    gray: Literal["expand"] | None = None
    """`expand`: grey pictures become RGB, if both of a pair are grey; None: they are refused."""
    max_mpix: float = 100.0
    """Larger pictures are refused before they are decoded."""


class Picture(NamedTuple):
    """One decoded file."""

    rgb: np.ndarray
    """(H,W,3) uint8 RGB."""
    data: bytes
    """The file."""
    as_is: bool
    """The file holds just that: 8-bit RGB, no alpha, no palette."""
    grey: bool


def load_pair(pair: Pair, *, recipe: Recipe, masked: bool = False) -> dict[str, Any] | Rejected:
    """A WebDataset sample; or, of a bad pair, the reason.

    Args:
        pair: from a layout.
        recipe: see there.
        masked: the data set has masks, so each pair must.
    """
    try:
        return _sample(pair, recipe, masked)
    except ValueError as error:
        return Rejected(key=pair.key, reason=str(error))


def read_pair(pair: Pair, *, recipe: Recipe) -> tuple[Picture, Picture]:
    """Decode lq and gt.

    Raises:
        ValueError: one is missing or bad, or they do not fit together.
    """
    if pair.lq is None or pair.gt is None:
        raise ValueError(f"no {'lq' if pair.lq is None else 'gt'} partner for {pair.lq or pair.gt}")
    if pair.side_by_side:
        lq, gt = _halves(pair.lq, recipe)
    else:
        lq, gt = read_picture(pair.lq, recipe=recipe), read_picture(pair.gt, recipe=recipe)
    (lq_h, lq_w, _), (gt_h, gt_w, _) = lq.rgb.shape, gt.rgb.shape
    if (lq_h, lq_w) != (gt_h, gt_w):
        raise ValueError(f"sizes differ: {pair.lq} is {lq_w}x{lq_h}, {pair.gt} is {gt_w}x{gt_h}")
    if lq.grey != gt.grey:
        raise ValueError(f"{pair.lq if lq.grey else pair.gt} is grey and its partner is in colour")
    return lq, gt


def read_picture(path: Path, *, recipe: Recipe) -> Picture:
    """Decode a file to 8-bit RGB.

    Raises:
        ValueError: unreadable, or something else than `recipe` allows; the message begins with the path.
    """
    try:
        data = path.read_bytes()
        mode = _checked_header(data, recipe.max_mpix)
        return _decoded(data, mode, recipe)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def source_line(key: str, note: dict[str, Any]) -> bytes | None:
    """What a sample adds to the hash of a data set's source files; None: its KEY.json does not tell of them.

    Of two pictures that are stored as they came it is `shards.index.content_line`.
    """
    if "lq_sha256" not in note or "gt_sha256" not in note:
        return None
    digests = [note[f"{role}_sha256"] for role in ("lq", "gt", "masks") if f"{role}_sha256" in note]
    return " ".join([key, *digests]).encode() + b"\n"


def source_note(pair: Pair) -> dict[str, Any]:
    """The part of KEY.json that `source_line` reads, from the files alone."""
    paths = {"lq": pair.lq, "gt": pair.gt, "masks": pair.masks}
    return {f"{role}_sha256": _sha256(path.read_bytes()) for role, path in paths.items() if path}


def _sample(pair: Pair, recipe: Recipe, masked: bool) -> dict[str, Any]:
    problem = key_problem(pair.key)
    if problem:
        raise ValueError(problem)
    lq, gt = read_pair(pair, recipe=recipe)
    h, w, _ = lq.rgb.shape
    note: dict[str, Any] = {"h": h, "w": w}
    sample: dict[str, Any] = {"__key__": pair.key}
    for role, picture, path in (("lq", lq, pair.lq), ("gt", gt, pair.gt)):
        assert path is not None
        data = picture.data if picture.as_is else None
        suffix, stored = recipe.storage.encode(data, path.suffix.lower(), picture.rgb)
        sample[role + suffix] = stored
        note |= {role: f"{path.parent.name}/{path.name}", f"{role}_sha256": _sha256(picture.data)}
    # Rounded, for the last digits may depend on the processor, and a shard on its inputs alone.
    measures = measure(lq.rgb, gt.rgb)._asdict()
    note["measures"] = {name: round(value, 4) if type(value) is float else value for name, value in measures.items()}
    if masked:
        sample[MASKS], more = _masks(pair, (h, w))
        note |= more
    return sample | {"json": json.dumps(note, sort_keys=True).encode()}


def _checked_header(data: bytes, max_mpix: float) -> str:
    """Pillow's name of the kind of pixels. Nothing is decoded."""
    if not data:
        raise ValueError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # --max-mpix decides
            header = Image.open(io.BytesIO(data))
        # A PNG would be decoded to its end in search of a tag behind the pixels.
        exif = header.getexif() if header.format != "PNG" or b"eXIf" in data else {}
    except Image.DecompressionBombError as error:
        raise ValueError(f"too many pixels for Pillow, whatever --max-mpix is ({error})") from None
    except (OSError, SyntaxError):
        raise ValueError("not a readable picture: damaged, or of another kind") from None
    w, h = header.size
    if w * h > max_mpix * 1e6:
        raise ValueError(f"{w}x{h} are {w * h / 1e6:.1f} megapixels; if that is right, raise --max-mpix {max_mpix:g}")
    if exif.get(_ORIENTATION, 1) not in (0, 1):
        raise ValueError("its EXIF tag says rotated: store it upright")
    return header.mode


def _decoded(data: bytes, mode: str, recipe: Recipe) -> Picture:
    pixels = decode_unchanged(data)
    deep = pixels.dtype != np.uint8
    if deep and (pixels.dtype != np.uint16 or recipe.to8 is None):
        hint = "; --to8 shift takes the upper eight" if pixels.dtype == np.uint16 else ""
        raise ValueError(f"{pixels.dtype.itemsize * 8} bits per channel, 8 are wanted{hint}")
    grey = pixels.ndim == 2 or mode in _GREY
    if grey and recipe.gray is None:
        raise ValueError("grey, colour is wanted; --gray expand makes RGB of it")
    if not grey and mode not in _COLOUR:
        raise ValueError(f"its pixels are {mode}: store it as RGB")
    alpha = pixels.ndim == 3 and pixels.shape[2] == 4
    if alpha and pixels[..., 3].min() < (65535 if deep else 255):
        raise ValueError("has transparent pixels: store it without an alpha channel")
    if deep:
        pixels = np.right_shift(pixels, 8, dtype=np.uint16).astype(np.uint8)
    rgb = np.stack([pixels] * 3, axis=2) if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., :3])
    return Picture(rgb, data, as_is=not (deep or grey or alpha or mode in ("P", "PA")), grey=grey)


def _halves(path: Path, recipe: Recipe) -> tuple[Picture, Picture]:
    whole = read_picture(path, recipe=recipe)
    w = whole.rgb.shape[1]
    if w % 2:
        raise ValueError(f"{path}: {w} px wide, so it is not two halves side by side")
    left, right = np.split(whole.rgb, 2, axis=1)
    return whole._replace(rgb=left, as_is=False), whole._replace(rgb=right, as_is=False)


def _masks(pair: Pair, size_px: tuple[int, int]) -> tuple[bytes, dict[str, Any]]:
    if pair.masks is None:
        raise ValueError("has no masks, and other pairs have some")
    try:
        data = pair.masks.read_bytes()
        grey = decode_grey(data)
        if grey.shape != size_px:
            raise ValueError(f"{grey.shape[1]}x{grey.shape[0]}, masks of {size_px[1]}x{size_px[0]} are wanted")
    except (OSError, ValueError) as error:
        raise ValueError(f"{pair.masks}: {error}") from None
    mask = grey >= _MASK_FROM
    return encode_masks(mask[None]), {"masks": int(mask.any()), "masks_sha256": _sha256(data)}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
