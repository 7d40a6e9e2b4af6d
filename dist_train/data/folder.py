"""Pictures that lie in folders, and noise on clean ones: what is scored without having been written as shards."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shards.codec import decode_unchanged
from shards.layouts import pictures_below
from shards.schema import Masks

MOST_NAMED = 5


class Pictures(Protocol):
    """Pairs of whole pictures by number, as `dist_train.data.reader.ShardReader` has them."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names."""

    def __len__(self) -> int: ...

    def pair(self, number: int, /) -> tuple[NDArray, NDArray[np.uint8]]:
        """lq and gt, (H,W,3) RGB; gt uint8, lq uint8 or float32 in about [0,1]."""

    @property
    def masks_note(self) -> Masks | None:
        """None: there are no masks."""

    def masks(self, number: int, /) -> NDArray[np.bool_]:
        """(K,H,W)."""


class PairFolder:
    """Pictures of one folder, each with that of another folder of the same name but for the suffix.

    Args:
        gt: folder of clean pictures, with folders in it or without.
        lq: of degraded ones; None: the clean ones stand for them.

    Raises:
        ValueError: no pictures, two of one name, or a clean picture without a degraded one.
    """

    masks_note = None

    def __init__(self, gt: Path, lq: Path | None = None) -> None:
        self._gt = by_stem(gt)
        self._lq = by_stem(lq, wanted=self._gt) if lq else self._gt
        self.keys = tuple(sorted(self._gt))

    def __len__(self) -> int:
        return len(self.keys)

    def pair(self, number: int, /) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Read a pair; grey pictures get three equal channels.

        Raises:
            ValueError: as `read_picture`, or their sizes differ.
        """
        key = self.keys[number]
        gt = read_picture(self._gt[key])
        if self._lq is self._gt:
            return gt, gt
        return read_picture(self._lq[key], like=gt), gt

    def masks(self, number: int, /) -> NDArray[np.bool_]:
        """None are to be had."""
        raise AssertionError("masks_note says that there are none")


class WithNoise:
    """The clean pictures of a data set with white Gaussian noise, in place of its degraded ones.

    The noise is that of KAIR's tests: numpy's MT19937 (`RandomState`) with seed 0 for each picture, in the order of
    (H,W,C); neither clipped nor rounded. Pictures whose channels are equal count as grey: one channel of noise.

    Args:
        clean: whose gt it goes by.
        sigma: standard deviation, of 255.
    """

    def __init__(self, clean: Pictures, *, sigma: float) -> None:
        self._clean, self._sigma = clean, sigma
        self.keys, self.masks_note, self.masks = clean.keys, clean.masks_note, clean.masks

    def __len__(self) -> int:
        return len(self.keys)

    def pair(self, number: int, /) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """The noisy picture, (H,W,3) float32 around [0,1], and the clean one, uint8."""
        _, gt = self._clean.pair(number)
        channels = 1 if (gt == gt[..., :1]).all() else 3
        noise = np.random.RandomState(0).normal(0, self._sigma / 255, (*gt.shape[:2], channels))
        return (gt / 255 + noise).astype(np.float32), gt


def by_stem(folder: Path, *, wanted: Iterable[str] = ()) -> dict[str, Path]:
    """The pictures in a folder and below it, by their path there without its suffix.

    Raises:
        ValueError: there are none, two have one name, or one of `wanted` is not there.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    found = pictures_below(folder)
    if not found:
        raise ValueError(f"no pictures in {folder}")
    if missing := [key for key in wanted if key not in found]:
        more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
        raise ValueError(
            f"{folder} has no picture for {', '.join(missing[:MOST_NAMED])}{more}; it has {min(found)} and others. "
            "Pictures belong together that have one name but for the suffix: name them alike"
        )
    return found


def read_picture(path: Path, *, like: NDArray | None = None) -> NDArray[np.uint8]:
    """Read a picture as (H,W,3) uint8 RGB; of a grey one all three channels are equal.

    Args:
        path: the file.
        like: what must be of the same size.

    Raises:
        ValueError: damaged, of another size, with alpha, or not of 8 bits.
    """
    try:
        picture = decode_unchanged(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if picture.dtype != np.uint8:
        raise ValueError(f"{path} has samples of {picture.dtype}; scores are of 8 bits: write it so")
    if picture.ndim == 3 and picture.shape[2] != 3:
        raise ValueError(f"{path} has {picture.shape[2]} channels; write it without alpha")
    if like is not None and picture.shape[:2] != like.shape[:2]:
        (h, w), (wanted_h, wanted_w) = picture.shape[:2], like.shape[:2]
        raise ValueError(f"{path} is {w}x{h}, its clean picture {wanted_w}x{wanted_h}; pairs must be of one size")
    return picture if picture.ndim == 3 else picture[..., None].repeat(3, axis=2)
