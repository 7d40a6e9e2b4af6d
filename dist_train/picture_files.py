"""Picture files with all that a restored one must keep: grey, alpha, 16 bits, the way up, the colour profile."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from shards.files import write_whole

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ALPHA_SUFFIXES = (".bmp", ".png", ".tif", ".tiff", ".webp")
DEEP_SUFFIXES = (".png", ".tif", ".tiff")

ENCODING: dict[str, dict[str, Any]] = {
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True, "exact": True},
    ".tif": {"compression": "tiff_lzw"},
    ".tiff": {"compression": "tiff_lzw"},
}
"""What Pillow is told; nothing is lost but by JPEG, whose colours have their full resolution."""

_BITS, _ORIENTATION, _EXTRA_SAMPLES, _ICC = 258, 274, 338, 34675  # tags of TIFF and EXIF
_COLOUR_SPACES = {True: b"GRAY", False: b"RGB "}


class Picture(NamedTuple):
    """A picture the right way up."""

    rgb: NDArray
    """(H,W,3) uint8 or uint16; three times the same where the file is grey."""
    alpha: NDArray | None = None
    """(H,W) of the same dtype."""
    is_grey: bool = False
    icc: bytes | None = None
    """The colour profile of the file."""


def read_picture(path: Path) -> Picture:
    """Read a picture, turned as its EXIF says.

    Raises:
        ValueError: empty, damaged, cut short, several pictures in one file, or neither 8 nor 16 bits.
    """
    data = path.read_bytes()
    if not data:
        raise ValueError("the file is empty")
    stored, header = _decode(data)
    if stored.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"its samples are {stored.dtype}; 8 and 16 bit integers are read")
    if (num := getattr(header, "n_frames", 1)) > 1:
        raise ValueError(f"it holds {num} pictures, of which one would be left; make a file of each")
    is_grey = stored.ndim == 2 or header.mode == "LA"
    # Both turn a TIFF by themselves.
    orientation = 1 if header.format == "TIFF" else header.getexif().get(_ORIENTATION, 1)
    # OpenCV adds one to a TIFF of CMYK.
    alpha = stored[..., 3] if stored.ndim == 3 and stored.shape[2] == 4 and header.mode != "CMYK" else None
    rgb = cv2.cvtColor(stored, cv2.COLOR_GRAY2RGB) if stored.ndim == 2 else stored[..., 2::-1]
    icc = header.info.get("icc_profile")
    if icc and icc[16:20] != _COLOUR_SPACES[is_grey]:  # of CMYK, say, which is RGB by now
        icc = None
    return Picture(
        _upright(rgb, orientation), None if alpha is None else _upright(alpha, orientation), is_grey, icc or None
    )


def check_holds(path: Path, picture: Picture) -> None:
    """Raise ValueError if the format that a file's name says cannot hold the picture."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: pictures are written as {' '.join(SUFFIXES)}")
    if picture.alpha is not None and suffix not in ALPHA_SUFFIXES:
        raise ValueError(f"{path}: {suffix} has no alpha; write one of {' '.join(ALPHA_SUFFIXES)}")
    if picture.rgb.dtype == np.uint16 and suffix not in DEEP_SUFFIXES:
        raise ValueError(f"{path}: {suffix} has no 16 bit; write one of {' '.join(DEEP_SUFFIXES)}")


def write_picture(path: Path, picture: Picture) -> None:
    """Write a picture in the format that the name says; the file appears whole or not at all.

    A grey picture is written by the luma of its RGB. Of metadata, the colour profile is written (not into BMP).

    Raises:
        ValueError: see `check_holds`.
    """
    check_holds(path, picture)
    stored = cv2.cvtColor(picture.rgb, cv2.COLOR_RGB2GRAY) if picture.is_grey else picture.rgb
    if picture.alpha is not None:
        stored = np.dstack([stored, picture.alpha])
    suffix = path.suffix.lower()
    encode = _encode_by_opencv if stored.dtype == np.uint16 or suffix == ".bmp" else _encode
    write_whole(path, encode(stored, suffix, picture.icc))


def _decode(data: bytes) -> tuple[NDArray, Image.Image]:
    """What is stored, in OpenCV's order, not yet turned unless it is a TIFF; and the header as Pillow reads it."""
    try:
        header = _header(data)
        if isinstance(header, TiffImageFile) and header.mode in ("LA", "RGBA") and set(header.tag_v2[_BITS]) == {8}:
            # OpenCV multiplies by alpha, takes LA for two channels, and fails if they are to be turned.
            return cv2.cvtColor(np.asarray(header.convert("RGBA")), cv2.COLOR_RGBA2BGRA), header
        # Unlike imread, imdecode refuses a JPEG that is cut short instead of filling it up with grey.
        stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except UnidentifiedImageError:  # which speaks of an object in memory
        raise ValueError("not a readable picture, or none at all") from None
    except (OSError, cv2.error) as error:  # no picture, or more pixels than OpenCV allows
        raise ValueError(f"not a readable picture: {error}") from None
    if stored is None:
        raise ValueError("not a readable picture, or a damaged one")
    return stored, header


def _header(data: bytes) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # guards against decoding, which has happened by now
    try:
        return Image.open(io.BytesIO(data))
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _upright(stored: NDArray, orientation: int) -> NDArray:
    """Turn and mirror as EXIF's orientation says, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        stored = stored.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        stored = stored[::-1]
    if orientation in (2, 3, 6, 7):
        stored = stored[:, ::-1]
    return np.ascontiguousarray(stored)


def _encode(stored: NDArray, suffix: str, icc: bytes | None) -> bytes:
    """8 bits a sample: (H,W), (H,W,2) grey and alpha, (H,W,3) RGB or (H,W,4) RGBA."""
    file = io.BytesIO()
    picture = Image.fromarray(stored)
    if picture.mode == "LA" and suffix == ".webp":
        picture = picture.convert("RGBA")  # WebP has no grey
    picture.save(file, Image.registered_extensions()[suffix], icc_profile=icc, **ENCODING.get(suffix, {}))
    return file.getvalue()


def _encode_by_opencv(stored: NDArray, suffix: str, icc: bytes | None) -> bytes:
    """16 bits a sample, and BMP with alpha, which Pillow does not write. OpenCV writes no profile; that is put in."""
    if stored.ndim == 3 and stored.shape[2] == 2:
        stored = np.dstack([stored[..., :1]] * 3 + [stored[..., 1:]])  # OpenCV writes no grey with alpha
    orders = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    ok, encoded = cv2.imencode(suffix, stored if stored.ndim == 2 else cv2.cvtColor(stored, orders[stored.shape[2]]))
    assert ok
    data = encoded.tobytes()
    has_alpha = stored.ndim == 3 and stored.shape[2] == 4
    if suffix == ".png":
        return _png_with_profile(data, icc) if icc else data
    if suffix != ".bmp" and (icc or has_alpha):
        return _tiff_with_tags(data, icc, has_alpha=has_alpha)
    return data


def _png_with_profile(data: bytes, icc: bytes) -> bytes:
    """Put an iCCP chunk behind the header, which is the first 33 bytes."""
    chunk = b"iCCP" + b"icc\0\0" + zlib.compress(icc)
    return data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def _tiff_with_tags(data: bytes, icc: bytes | None, *, has_alpha: bool) -> bytes:
    """Append a directory that has the old one's tags, the profile, and that the fourth sample is an alpha."""
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    entries = [data[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
    data += b"\0" * (len(data) % 2)
    if icc:
        entries.append(struct.pack(order + "HHII", _ICC, 7, len(icc), len(data)))
        data += icc + b"\0" * (len(icc) % 2)
    if has_alpha:  # 2: colours are not multiplied by it
        entries.append(struct.pack(order + "HHIHH", _EXTRA_SAMPLES, 3, 1, 2, 0))
    entries.sort(key=lambda entry: struct.unpack_from(order + "H", entry))
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + struct.pack(order + "I", 0)
    return data[:4] + struct.pack(order + "I", len(data)) + data[8:] + directory
