"""`cached`: masks of whole pictures as the student restores them, remade every few epochs and carried to each crop.

At a visit in epoch e a sample's masks are those of version e - e mod `refresh`: made in that epoch, at the sample's
visit, by the student as it then was. So which masks a visit sees depends on its position in the stream alone, whatever
the number of ranks, and one visit in `refresh` has to make some.

All samples are remade in the same epochs. Taking turns, a tenth of the samples each epoch, would cost one rank the
same, but of many ranks some one would have a picture to make in most steps, and the others would wait for it.

Masks lie in the run's folder, where a resumed run finds what it had: of each sample the two newest versions, and those
that the checkpoints on the disk would go on with. Where that is not so (files were deleted) masks are made anew at the
visit that misses them, which is logged as `masks_remade`.

A student with batch norm restores by its running statistics, so ranks must have the same: batch_norm=synced. They move
once per pass, not per step: where gradients are accumulated over passes, masks differ a little between world sizes.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train import ranks
from dist_train.config import CachedConfig
from dist_train.priors.mask_files import MaskFiles
from dist_train.priors.masks import MaskSet, Prior, Restore, Samples, largest_first
from shards.schema import ShardError

log = logging.getLogger(__name__)

EpochAt = Callable[[int, int], int]
"""Position in the stream, number of a sample -> the epoch in which its data set is there (`Order.epoch_at`)."""


class Pictures(Protocol):
    """Whole degraded pictures by number: `dist_train.data.mixture.Pairs`."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Of all samples, in order."""

    def size_px(self, number: int) -> tuple[int, int]:
        """Height and width."""

    def lq(self, number: int) -> NDArray:
        """(H,W,3) uint8 RGB."""


def version_at(epoch: int, refresh: int) -> int:
    """The epoch whose masks a visit in `epoch` sees; they are made at the visit if it is the same."""
    return epoch - epoch % refresh


class CachedPrior:
    """Masks of `inner`, remembered.

    Args:
        inner: what makes masks. Pictures from outside the stream go straight to it.
        config: see there.
        pictures: the training set.
        files: where the masks lie.
        global_batch: samples of a step.
        checkpoints: steps of the checkpoints on the disk, at the moment of the call.
        epoch_at: in which each sample is visited once; None: of one data set from the beginning of the stream.
        sharded: whether ranks share the student's weights among them (ZeRO-3).
    """

    def __init__(
        self,
        inner: Prior,
        config: CachedConfig,
        *,
        pictures: Pictures,
        files: MaskFiles,
        global_batch: int,
        checkpoints: Callable[[], Iterable[int]] = tuple,
        epoch_at: EpochAt | None = None,
        sharded: bool = False,
    ):
        self._inner, self._config, self._pictures, self._files = inner, config, pictures, files
        self._global_batch, self._checkpoints, self._sharded = global_batch, checkpoints, sharded
        self._numbers = {key: number for number, key in enumerate(pictures.keys)}
        self._epoch_at = epoch_at or (lambda position, _: position // len(self._numbers))

    def __call__(self, images: Tensor, batch: Samples | None = None, *, restore: Restore | None = None) -> MaskSet:
        """The masks of each sample's whole picture, carried to its crop; see `Prior`."""
        if batch is None or (batch.positions < 0).any():
            outside = self._inner(images, batch)
            return self._largest(
                [masks & valid[:, None, None] for masks, valid in zip(outside.masks, outside.valid, strict=True)]
            )
        assert restore is not None, "pictures of the stream come with the student"
        positions, numbers = batch.positions.tolist(), [self._numbers[key] for key in batch.keys]
        epochs = [self._epoch_at(*visit) for visit in zip(positions, numbers, strict=True)]
        versions = [version_at(epoch, self._config.refresh) for epoch in epochs]
        found = [
            None if version == epoch else self._files.read(key, version, self._pictures.size_px(number))
            for key, number, epoch, version in zip(batch.keys, numbers, epochs, versions, strict=True)
        ]
        absent = [row for row, masks in enumerate(found) if masks is None]
        # Where a step straddles two epochs a sample may come twice, and its masks of the first are made in this very
        # step, perhaps on another rank. They are made here too, then, from the same weights.
        first = positions[0] // self._global_batch * self._global_batch
        lost = [row for row in absent if versions[row] < self._epoch_at(first, numbers[row])]
        if self._sharded:
            # Each pass of the student gathers its weights from all ranks, so all must pass equally often. A batch that
            # straddles two epochs, or a file that is lost, gives one rank more to do than another.
            for _ in range(ranks.largest(len(absent)) - len(absent)):
                restore(images[:1])
        crops = [
            self._make(images[row : row + 1], batch, row, versions[row], restore)
            if masks is None
            else batch.carry(torch.from_numpy(masks).to(images.device), row)
            for row, masks in enumerate(found)
        ]
        ages = [0 if row in lost else epochs[row] - versions[row] for row in range(len(found))]
        notes = {"mask_age_epochs": sum(ages) / len(ages), "masks_remade": len(lost) / len(ages)}
        return replace(self._largest(crops), notes=notes)

    def describe(self) -> dict[str, Any]:
        """For the run record: what makes the masks, and how old they become."""
        inner = self._inner.describe()
        return inner | {
            "name": self._config.name,
            "what": f"{inner['what']}; of whole pictures, remade every {self._config.refresh} epochs",
            "parameters": self._config.model_dump(exclude={"name", "of"})
            | {"of": {"name": inner["name"], **inner["parameters"]}},
        }

    def _largest(self, pictures: Sequence[Tensor]) -> MaskSet:
        return largest_first(pictures, num_masks=self._config.num_masks)

    def _make(self, image: Tensor, batch: Samples, row: int, version: int, restore: Restore) -> Tensor:
        """Make and keep the masks of a whole picture; returns them carried to the crop."""
        key = batch.keys[row]
        number = self._numbers[key]
        try:
            lq = self._pictures.lq(number)
        except ShardError as error:
            # The loader could read it a moment ago. One rank must not stop alone, nor leave out its pass.
            log.warning("%s; this once the masks are of the crop alone", error)
            restore(image)
            return _only_valid(self._inner(image))
        whole = torch.from_numpy(lq).to(image.device).permute(2, 0, 1)[None].float() / 255
        masks = _only_valid(self._inner(restore(whole)))
        going_on = {self._epoch_at(step * self._global_batch, number) for step in self._checkpoints()}
        refresh = self._config.refresh
        keep = {version - refresh, *(version_at(epoch, refresh) for epoch in going_on)}
        self._files.write(key, version, masks.cpu().numpy(), keep=keep)
        return batch.carry(masks, row)


def _only_valid(masks: MaskSet) -> Tensor:
    """The masks (K,H,W) of the one picture of a set."""
    return masks.masks[0][masks.valid[0]]
