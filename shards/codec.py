"""Bytes to pictures and masks, and back. The only place that knows how OpenCV orders colours; all others see RGB."""

import io
import struct
import zlib

import cv2
import numpy as np

from shards.tiles import Box, Grid, Read, grid_of, is_tiles, read_tiles

WEBP_LEVELS = ((0, 0), (1, 20), (2, 25), (3, 30), (3, 50), (4, 50), (4, 75), (4, 90), (5, 90), (6, 100))
"""Method and quality of libwebp's ten levels of lossless effort, those of `cwebp -z`."""
_PNG_START = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">II5B")  # of a PNG: width, height, bits, colour, compression, filters, interlacing
_BILEVEL = (1, 0, 0, 0, 0)


def decode_rgb(data: bytes) -> np.ndarray:
    """Decode a picture of any form of `shards.storage` to (H,W,3) uint8 RGB; the EXIF orientation is ignored.

    Raises:
        ValueError: empty, truncated, damaged, or not a picture.
    """
    if is_tiles(data):
        return decode_crop(lambda start, size: data[start : start + size], grid_of(data), size=len(data))
    return _decode_file(data)


def decode_crop(read: Read, grid: Grid, *, size: int, box: Box | None = None) -> np.ndarray:
    """Decode part of a picture that is in tiles: `shards.tiles.read_tiles`."""
    return read_tiles(read, grid, _decode_file, size=size, box=box)


def _decode_file(data: bytes | memoryview) -> np.ndarray:
    return _decode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def encode_png(rgb: np.ndarray) -> bytes:
    """Encode (H,W,3) uint8 RGB as PNG."""
    ok, data = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    assert ok
    return data.tobytes()


def encode_webp(rgb: np.ndarray, *, level: int) -> bytes:
    """Encode (H,W,3) uint8 RGB as lossless WebP, of at most 16383 px a side; `level` is an index of WEBP_LEVELS."""
    from PIL import Image  # OpenCV has one level, which takes three times as long for 8 % fewer bytes than level 1

    method, quality = WEBP_LEVELS[level]
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "WEBP", lossless=True, exact=True, method=method, quality=quality)
    return file.getvalue()


def decode_unchanged(data: bytes) -> np.ndarray:
    """Decode a file with the channels and the depth it has; the EXIF orientation is ignored.

    Returns:
        (H,W), (H,W,3) RGB or (H,W,4) RGBA; mostly uint8 or uint16.

    Raises:
        ValueError: empty, truncated, damaged, or not a picture.
    """
    picture = _decode(data, cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    orders = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}
    return picture if picture.ndim == 2 else cv2.cvtColor(picture, orders[picture.shape[2]])


def decode_grey(data: bytes) -> np.ndarray:
    """Decode a picture of any kind to (H,W) uint8; errors as `decode_unchanged`."""
    return _decode(data, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)


def encode_masks(masks: np.ndarray) -> bytes:
    """Encode (K,H,W) bool as a PNG of one bit a pixel, the masks one below another, which any program opens.

    Written and read here rather than by OpenCV, which makes bytes of the bits: a quarter of its time to read, a half to
    write. 32 masks of 481x321 take 9 KiB, as bits that are packed and deflated without being a picture do.

    Of no mask at all one black mask is written, since a picture has at least one row.
    """
    if not len(masks):
        masks = np.zeros((1, *masks.shape[1:]), bool)
    num, h, w = masks.shape
    bits = np.packbits(masks.reshape(num * h, w), axis=1)
    rows = np.pad(bits, ((0, 0), (1, 0)))  # each row says first how it is filtered: not at all, which is smallest here
    header = _HEADER.pack(w, num * h, *_BILEVEL)
    return _PNG_START + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows.tobytes())) + _chunk(b"IEND", b"")


def decode_masks(data: bytes, size_px: tuple[int, int]) -> np.ndarray:
    """Decode what `encode_masks` wrote.

    Args:
        data: the file.
        size_px: height and width of one mask.

    Returns:
        (K,H,W) bool; K is 0 for one black mask.

    Raises:
        ValueError: truncated, damaged, of another size, or not such a file.
    """
    h, w = size_px
    start = len(_PNG_START) + 8
    if len(data) < start + _HEADER.size or not data.startswith(_PNG_START):
        raise ValueError("not masks: empty, truncated, or of another kind")
    width, height, *kind = _HEADER.unpack_from(data, start)
    if tuple(kind) != _BILEVEL or width != w or height % h:
        raise ValueError(f"not masks of {w}x{h}: a picture of {width}x{height}")
    try:
        rows = zlib.decompress(data[start + _HEADER.size + 12 : -16])
    except zlib.error as error:
        raise ValueError(f"damaged masks ({error})") from None
    if len(rows) != height * (1 + (w + 7) // 8):
        raise ValueError("damaged masks (they end early)")
    bits = np.frombuffer(rows, np.uint8).reshape(height, -1)
    if bits[:, 0].any():
        raise ValueError("masks that another program has written anew; make them again")
    masks = np.unpackbits(bits[:, 1:], axis=1, count=w).view(bool).reshape(-1, h, w)
    return masks if len(masks) > 1 or masks.any() else masks[:0]


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _decode(data: bytes | memoryview, flags: int) -> np.ndarray:
    if not data:
        raise ValueError("empty file")
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # more pixels than OpenCV allows
        raise ValueError(f"not a readable picture ({error.err or error})") from None
    if picture is None:
        raise ValueError("not a readable picture: truncated, damaged, or of another kind")
    return picture
