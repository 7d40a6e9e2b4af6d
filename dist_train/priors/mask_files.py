"""Masks of whole pictures in a folder, a few versions of each: what `cached` remembers.

    FOLDER/KEY/00000020.png      masks of sample KEY, version 20: see `shards.codec.encode_masks`

All ranks share the folder. What is lost or damaged is not there, and what cannot be written is warned of: whoever needs
masks can make them.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Collection, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train import ranks
from dist_train.priors.masks import matched_iou
from shards.codec import decode_masks, encode_masks

log = logging.getLogger(__name__)


class MaskFiles:
    """The folder, and in memory what was last used.

    Args:
        folder: made when first written to.
        memory_mib: limit on what is kept in memory, compressed as in the files.
    """

    def __init__(self, folder: Path, *, memory_mib: float):
        self._folder, self._max_bytes = folder, memory_mib * 2**20
        self._memory: OrderedDict[Path, bytes] = OrderedDict()
        self._num_bytes = 0

    def read(self, key: str, version: int, size_px: tuple[int, int]) -> NDArray[np.bool_] | None:
        """Masks (K,H,W) of one version; None if it is not there, or not what was written."""
        path = self._path(key, version)
        try:
            data = self._memory.get(path) or path.read_bytes()
            masks = decode_masks(data, size_px)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s: %s", path, error)
            return None
        self._remember(path, data)
        return masks

    def write(self, key: str, version: int, masks: NDArray[np.bool_], *, keep: Collection[int] = ()) -> None:
        """Write one version, whole or not at all, and delete all but it and those of `keep`."""
        path, data = self._path(key, version), encode_masks(masks)
        self._remember(path, data)
        part = path.with_name(f"{path.name}.{ranks.rank()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            os.replace(part, path)
            for other, its_path in _versions(path.parent).items():
                if other != version and other not in keep:
                    its_path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s was not written (%s); these masks will be made again when they are needed", path, error)

    def _path(self, key: str, version: int) -> Path:
        return self._folder / key / f"{version:08d}.png"

    def _remember(self, path: Path, data: bytes) -> None:
        self._num_bytes += len(data) - len(self._memory.pop(path, b""))
        self._memory[path] = data
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= len(self._memory.popitem(last=False)[1])


def iou_by_age(folder: Path, sizes_px: Mapping[str, tuple[int, int]]) -> dict[int, list[tuple[int, float]]]:
    """How masks age: those of a picture compared with what was made of it later.

    Args:
        folder: of a `MaskFiles`, with all versions that are to be compared.
        sizes_px: height and width of the picture of each sample.

    Returns:
        Age in epochs -> (epoch of the older, `matched_iou` of the two) of each pair of versions.
    """
    ious: dict[int, list[tuple[int, float]]] = {}
    for key, size_px in sizes_px.items():
        masks = {
            version: torch.from_numpy(decode_masks(path.read_bytes(), size_px))
            for version, path in _versions(folder / key).items()
        }
        for older, newer in combinations(masks, 2):
            ious.setdefault(newer - older, []).append((older, matched_iou(masks[older], masks[newer])))
    return dict(sorted(ious.items()))


def _versions(of_sample: Path) -> dict[int, Path]:
    return {int(path.stem): path for path in sorted(of_sample.glob("[0-9]" * 8 + ".png"))}
