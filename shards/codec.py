"""Bytes to pictures and back. The only place that knows how OpenCV orders colours; all others see RGB."""

import cv2
import numpy as np


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode a picture to (H,W,3) uint8 RGB, as stored: the EXIF orientation is ignored.

    Raises:
        ValueError: empty, truncated, or not a picture.
    """
    return _decode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def encode_png(rgb: np.ndarray) -> bytes:
    """Encode (H,W,3) uint8 RGB as PNG."""
    ok, data = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    assert ok
    return data.tobytes()


def inspect_colour(data: bytes) -> tuple[int, int]:
    """Height and width of an upright 8-bit colour picture; nothing is converted in silence.

    Raises:
        ValueError: with the reason why these bytes are something else.
    """
    picture = _decode(data, cv2.IMREAD_UNCHANGED)
    if picture.dtype != np.uint8:
        raise ValueError(f"{picture.dtype.itemsize * 8} bits per channel, 8 are wanted")
    if picture.ndim == 2:
        raise ValueError("grey, colour is wanted")
    if picture.shape[2] == 4 and picture[..., 3].min() < 255:
        raise ValueError("has transparent pixels")
    # Only a decoder that obeys EXIF tells whether an orientation tag matters; it is asked where there is a tag.
    if b"Exif" in data[:65536] or b"eXIf" in data:
        if not np.array_equal(_decode(data, cv2.IMREAD_COLOR), picture[..., :3]):
            raise ValueError("its EXIF tag says rotated: store it upright")
    return picture.shape[0], picture.shape[1]


def _decode(data: bytes, flags: int) -> np.ndarray:
    if not data:
        raise ValueError("empty file")
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # more pixels than OpenCV allows
        raise ValueError(f"not a readable picture ({error.err or error})") from None
    if picture is None:
        raise ValueError("not a readable picture: truncated, damaged, or of another kind")
    return picture
