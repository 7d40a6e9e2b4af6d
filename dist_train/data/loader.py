"""The endless stream of training batches: each rank's share of each global batch."""

import itertools
import signal
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dist_train.config import BatchPlan, DataConfig
from dist_train.data.augment import geometry_at, turned, turned_picture
from dist_train.data.batch import BadSample, Batch
from dist_train.data.mix import mixup, mixup_weight, rainmix, streak_pictures
from dist_train.data.mixture import Pairs, order_of
from dist_train.data.order import MIXUP, RAINMIX, STAND_IN, Chance, Order, draws, partner_at
from dist_train.data.reader import BadSampleError, Box
from shards.parallel import end_with_parent
from shards.schema import ShardError

_READS = 4  # of a sample that fails: three more
_STAND_INS = 8  # tried for it
_LAST_S = 60  # that a worker goes on for after SIGTERM
_NONE = np.empty(0)
_AHEAD = 16  # steps for which a shard that is far away is asked for before it is needed


def training_batches(
    reader: Pairs,
    data: DataConfig,
    *,
    seed: int,
    plan: BatchPlan,
    order: Order | None = None,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    masks: bool = False,
    device: torch.device | str = "cpu",
) -> Generator[Batch, None, None]:
    """Micro-batches of one rank, without end.

    Pass a of step s on rank r holds the batch_per_rank positions from s * global_batch + (a * world + r) *
    batch_per_rank, so a global batch is the same samples, crops, flips and mixtures for any world size and number of
    workers; all its crops have one side.

    Args:
        reader: the training set.
        data: crops, augmentation, workers.
        seed: of the run.
        plan: for this `world`.
        order: of the samples; None: `order_of` the reader, from the beginning.
        rank, world: whose share.
        start_step: step to begin with; resuming reads nothing twice.
        masks: whether batches bring the masks that the shards hold.
        device: where they are wanted. Pictures travel there as bytes, and become floats there.

    Returns:
        A generator; closing it (or dropping it) ends its workers.

    Raises:
        ValueError: the data set does not fit the configuration. Raised here, not at the first batch.
    """
    _check_fit(reader, data, plan)
    order = order or order_of(reader, data, seed=seed, global_batch=plan.global_batch)
    loader: DataLoader = DataLoader(
        _Samples(reader, order, data, seed, plan.global_batch, masks=masks),
        batch_sampler=_positions(plan, rank=rank, world=world, start_step=start_step),
        num_workers=data.workers,
        collate_fn=_collate,
        worker_init_fn=_set_up_worker,
        generator=torch.Generator(),  # else the loader draws from the global one, and resuming is not exact
    )
    return _finished(loader, device)


def _positions(plan: BatchPlan, *, rank: int, world: int, start_step: int) -> Iterator[range]:
    for step in itertools.count(start_step):
        for micro_step in range(plan.grad_accum):
            first = step * plan.global_batch + (micro_step * world + rank) * plan.batch_per_rank
            yield range(first, first + plan.batch_per_rank)


Geometry = tuple[int, int, int, int]
_Read = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # lq, gt, masks of the crop, not turned yet


class _Sample(NamedTuple):
    lq: np.ndarray  # (3,P,P) in [0,255]: uint8, a quarter of the floats on their way out of the worker, unless mixed
    gt: np.ndarray
    key: str
    position: int
    geometry: tuple[int, int, int, int]
    bad: tuple[BadSample, ...]
    masks: Tensor | None


class _Collated(NamedTuple):
    """A batch on its way out of a worker, in arrays: each tensor would take a file, a connection and new memory."""

    lq: np.ndarray
    gt: np.ndarray
    samples: tuple[_Sample, ...]  # without their pictures


class _Samples(Dataset):
    """Position in the stream -> sample."""

    def __init__(
        self, reader: Pairs, order: Order, data: DataConfig, seed: int, global_batch: int, *, masks: bool
    ) -> None:
        self.reader, self.order, self.data, self.masks = reader, order, data, masks
        self.seed, self.global_batch = seed, global_batch
        folder = data.rainmix and data.rainmix.streaks
        self.streaks = streak_pictures(folder, least_px=_largest_crop(data)[1]) if folder else ()

    def __getitems__(self, positions: Sequence[int]) -> "list[_Sample] | ShardError":
        try:
            return [self[position] for position in positions]
        except ShardError as error:  # what a worker raises would arrive as the text of its traceback
            return error

    def __getitem__(self, position: int) -> _Sample:
        sample, config = self._unmixed(position), self.data.mixup
        if config is None or position // self.global_batch < config.from_step:
            return sample
        partner = self._unmixed(partner_at(position, seed=self.seed, global_batch=self.global_batch))
        weight = mixup_weight(Chance(self.seed, position, MIXUP), config.alpha)
        lq, gt = (mixup(one, other, weight) for one, other in ((sample.lq, partner.lq), (sample.gt, partner.gt)))
        return sample._replace(lq=lq, gt=gt, bad=sample.bad + partner.bad)

    def _unmixed(self, position: int) -> _Sample:
        self.reader.prefetch(self.order.at(position + _AHEAD * self.global_batch))
        number, geometry, (lq_u8, gt_u8, cut), bad = self._readable(position)
        lq, gt = (turned_picture(rgb, geometry) for rgb in (lq_u8, gt_u8))
        if config := self.data.rainmix:
            chance = Chance(self.seed, position, RAINMIX)
            lq = rainmix(lq, gt, chance, clean=config.clean, streaks=self.streaks)
        masks = None if cut is None else turned(torch.from_numpy(cut), geometry).contiguous()
        return _Sample(lq, gt, self.reader.keys[number], position, geometry, bad, masks)

    def _readable(self, position: int) -> tuple[int, Geometry, _Read, tuple[BadSample, ...]]:
        """The sample, or a stand-in that depends on the position alone, so that it too is the same for any world."""
        number = self.order.at(position)
        try:
            return number, *self._read(number, position), ()
        except BadSampleError as error:
            if self.data.strict:
                raise
            bad = BadSample(self.reader.keys[number], position, error.url, str(error))
            for draw in draws(self.seed, position, STAND_IN, _STAND_INS):
                stand_in = draw % len(self.reader)
                try:
                    read = self._read(stand_in, position)
                except BadSampleError:
                    continue
                return stand_in, *read, (bad,)
            raise

    def _read(self, number: int, position: int) -> tuple[Geometry, _Read]:
        crop_px = self.data.crop_px_at(position // self.global_batch)
        geometry = geometry_at(self.seed, position, self.reader.size_px(number), crop_px=crop_px, flips=self.data.flips)
        box = (geometry[0], geometry[1], crop_px, crop_px)
        for _ in range(_READS - 1):  # a network disk may fail once
            try:
                return geometry, self._read_once(number, box)
            except BadSampleError:
                pass
        return geometry, self._read_once(number, box)

    def _read_once(self, number: int, box: Box) -> _Read:
        return *self.reader.pair(number, box), self.reader.masks(number, box) if self.masks else None


def _collate(samples: list[_Sample] | ShardError) -> _Collated | ShardError:
    if isinstance(samples, ShardError):
        return samples
    lq, gt = (np.stack(side) for side in zip(*((sample.lq, sample.gt) for sample in samples), strict=True))
    return _Collated(lq, gt, tuple(sample._replace(lq=_NONE, gt=_NONE) for sample in samples))


def _batch(collated: _Collated, device: torch.device | str) -> Batch:
    lq, gt = (torch.from_numpy(side).to(device).float().div_(255) for side in collated[:2])
    samples = collated.samples
    masks = [sample.masks.to(device) for sample in samples if sample.masks is not None]  # of all or of none
    return Batch(
        lq,
        gt,
        keys=tuple(sample.key for sample in samples),
        positions=torch.tensor([sample.position for sample in samples]),
        geometry=torch.tensor([sample.geometry for sample in samples]),
        bad=tuple(bad for sample in samples for bad in sample.bad),
        masks=tuple(masks) if masks else None,
    )


def _finished(loader: DataLoader, device: torch.device | str) -> Generator[Batch, None, None]:
    try:
        for collated in loader:
            if isinstance(collated, ShardError):
                raise collated
            yield _batch(collated, device)
    except Exception as error:
        if loader.num_workers:
            # The worker's own traceback is in the message. That of this process, through torch, would hold the workers
            # in a reference cycle, and ending them from the garbage collector takes 5 s for each.
            raise error.with_traceback(None) from None
        raise


def _set_up_worker(_: int) -> None:
    cv2.setNumThreads(0)  # torch does the same for itself
    # A cluster's SIGTERM goes to every process. The rank wants its batches to end the step and save, and ends us then;
    # one that has failed sends it too, as it exits, and waits for us.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_LAST_S))
    end_with_parent()  # torch's own watch stands still while a batch waits to be fetched


def _check_fit(reader: Pairs, data: DataConfig, plan: BatchPlan) -> None:
    where = ", ".join(str(part.folder) for part in reader.parts)
    if plan.global_batch > len(reader):
        raise ValueError(
            f"optim.global_batch={plan.global_batch} but data.train={where} has {len(reader)} samples; set "
            f"optim.global_batch to at most {len(reader)}, or write more samples"
        )
    setting, crop_px = _largest_crop(data)
    sizes = {key: reader.size_px(number) for number, key in enumerate(reader.keys)}
    small = [f"{key} ({w}x{h})" for key, (h, w) in sizes.items() if min(h, w) < crop_px]
    if small:
        listed = ", ".join(small[:10]) + (f" and {len(small) - 10} more" if len(small) > 10 else "")
        raise ValueError(
            f"{setting}={crop_px} but data.train={where} has smaller pictures: {listed}; set "
            f"{setting} to at most {min(map(min, sizes.values()))}, or write the shards without them"
        )


def _largest_crop(data: DataConfig) -> tuple[str, int]:
    """The setting, and its side; crops only grow."""
    if not data.progressive:
        return "data.crop_px", data.crop_px
    return f"data.progressive.{len(data.progressive) - 1}.crop_px", data.progressive[-1].crop_px
