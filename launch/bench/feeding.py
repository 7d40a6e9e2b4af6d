"""Loaders of training pairs, as work for a race; each gives batches of random crops, mirrored and turned, as floats."""

import ctypes
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from dist_train.config import BatchPlan, DataConfig
from dist_train.data.augment import geometry_at, turned_picture
from dist_train.data.loader import training_batches
from dist_train.data.reader import ShardReader
from launch.bench.race import Work
from shards.codec import decode_crop, decode_rgb
from shards.index import read_tar
from shards.tiles import Box, grid_of, is_tiles

_SHUFFLED = 16  # samples in the buffer of a loader that shuffles as it streams: few, they are in memory undecoded
_EPOCHS = 64  # that others take for one, since they begin each anew, at a cost that is none for a set of usual size
_PLANNED = 512  # crops that the limit has ready
_IDLE_S = 0.01
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 2**25  # the most that it takes


class Feed(NamedTuple):
    """A loader and what it reads."""

    loader: str
    folder: Path
    """With shards; loaders that want files of their own make them beside it."""
    num_pairs: int
    """In the set; the same pictures in each lap."""
    workers: int
    batch: int
    crop_px: int
    lap_s: float
    device: str
    spent: Tensor
    """(laps,3), shared: seconds, CPU seconds of all processes, and pairs of each lap."""


def prepare(feed: Feed) -> Work:
    """A lap takes all pairs once, or more often until `lap_s` are over, and waits for workers to fill their stores."""
    cv2.setNumThreads(0)
    _keep_memory()
    multiprocessing.set_start_method("fork", force=True)  # of workers; what it is here comes from how cases are started
    batches = LOADERS[feed.loader](feed)
    rows = iter(feed.spent)

    def lap() -> None:
        next(batches)  # memory that was given back between laps is there again
        _seconds_until_idle(0)
        start, own, others, num = time.perf_counter(), time.process_time(), _workers_cpu_s(), 0
        while not num or num % feed.num_pairs or time.perf_counter() - start < feed.lap_s:
            num += len(next(batches)[0])
        own = time.process_time() - own  # waiting is no part of it
        seconds = _seconds_until_idle(start)
        next(rows).copy_(torch.tensor([seconds, own + _workers_cpu_s() - others, num]))

    return Work(lap, held_bytes=0)


def _keep_memory() -> None:
    """Have the C library keep what is freed: how often it happens to ask for it anew is not what is measured."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(option, _KEPT_BYTES)


def _seconds_until_idle(start: float) -> float:
    """From a time on until the workers had nothing to do any more, which is waited for."""
    since, used = time.perf_counter(), _workers_cpu_s()
    while workers := multiprocessing.active_children():
        time.sleep(_IDLE_S)
        now_used = _workers_cpu_s()
        if now_used - used < _IDLE_S / 10 and all(_sleeps(worker.pid) for worker in workers):
            break
        since, used = time.perf_counter(), now_used
    return since - start


def _sleeps(pid: int | None) -> bool:
    """Whether a process waits, for something other than its turn on a core."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def _workers_cpu_s() -> float:
    """CPU seconds of this process's workers; the system sums up only those of the ones that ended."""
    libc, clock = ctypes.CDLL(None), ctypes.c_int()
    times = os.times()
    total = times.children_user + times.children_system
    for child in multiprocessing.active_children():
        if libc.clock_getcpuclockid(child.pid, ctypes.byref(clock)) == 0:
            total += time.clock_gettime(clock.value)
    return total


Pictures = tuple[Tensor, Tensor]  # lq, gt: (B,3,P,P) float32 in [0,1]


def _ours(feed: Feed) -> Iterator[Pictures]:
    data = DataConfig(train=str(feed.folder), crop_px=feed.crop_px, workers=feed.workers)
    plan = BatchPlan(feed.batch, feed.batch, 1)
    for batch in training_batches(ShardReader(feed.folder), data, seed=0, plan=plan, device=feed.device):
        yield batch.lq, batch.gt


def _limit(feed: Feed) -> Iterator[Pictures]:
    """Nothing but decoding, of files in memory; places of crops are drawn beforehand."""
    plan = []
    for position, (lq, gt, size_px) in zip(range(_PLANNED), itertools.cycle(_files(feed.folder)), strict=False):
        plan.append((lq, gt, geometry_at(0, position, size_px, crop_px=feed.crop_px, flips="all")))
    samples = itertools.cycle(plan)

    def batches() -> Iterator[list[Tensor]]:
        while True:
            pairs = []
            for lq, gt, geometry in itertools.islice(samples, feed.batch):
                box = (*geometry[:2], feed.crop_px, feed.crop_px)
                pairs.append([torch.from_numpy(turned_picture(_crop(data, box), geometry)) for data in (lq, gt)])
            yield _collated(pairs)

    return _to_floats(batches(), feed.device)


class _Files(NamedTuple):
    lq: bytes
    gt: bytes
    size_px: tuple[int, int]


def _files(folder: Path) -> list[_Files]:
    tars = sorted(folder.glob("*.tar"))
    return [_Files(entry.lq.data, entry.gt.data, (entry.h, entry.w)) for tar in tars for entry in read_tar(tar)]


def _crop(data: bytes, box: Box) -> np.ndarray:
    if is_tiles(data):
        return decode_crop(lambda start, size: data[start : start + size], grid_of(data), size=len(data), box=box)
    return _cut(decode_rgb(data), box)


def _cut(rgb: np.ndarray, box: Box) -> np.ndarray:
    return rgb[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]


class _Cropping:
    """What the loaders of others do with a pair of whole pictures."""

    def __init__(self, crop_px: int) -> None:
        self.crop_px, self.chance = crop_px, np.random.default_rng(0)

    def __call__(self, lq: np.ndarray, gt: np.ndarray) -> list[Tensor]:
        h, w, _ = lq.shape
        top, left = self.chance.integers(h - self.crop_px + 1), self.chance.integers(w - self.crop_px + 1)
        geometry = (int(top), int(left), int(self.chance.integers(2)), int(self.chance.integers(4)))
        box = (*geometry[:2], self.crop_px, self.crop_px)
        return [torch.from_numpy(turned_picture(_cut(rgb, box), geometry)) for rgb in (lq, gt)]


def _collated(pairs: list[list[Tensor]]) -> list[Tensor]:
    return [default_collate(list(side)) for side in zip(*pairs, strict=True)]


def _to_floats(batches: Any, device: str) -> Iterator[Pictures]:
    for lq, gt in batches:
        yield lq.to(device).float().div_(255), gt.to(device).float().div_(255)


def _webdataset(feed: Feed) -> Iterator[Pictures]:
    import webdataset

    cropping = _Cropping(feed.crop_px)

    def decoded(sample: dict[str, Any]) -> list[Tensor]:
        files = {name.partition(".")[0]: data for name, data in sample.items() if isinstance(data, bytes)}
        return cropping(decode_rgb(files["lq"]), decode_rgb(files["gt"]))

    urls = _EPOCHS * [str(tar) for tar in sorted(feed.folder.glob("*.tar"))]
    stream = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(_SHUFFLED).map(decoded).repeat()
    loader = webdataset.WebLoader(
        stream.batched(feed.batch, collation_fn=_collated),
        batch_size=None,
        num_workers=feed.workers,
        worker_init_fn=_one_thread,
    )
    return _to_floats(loader, feed.device)


def _mosaic(feed: Feed) -> Iterator[Pictures]:
    import streaming

    folder = feed.folder.with_name(f"{feed.folder.name}-mosaic{feed.workers}")  # which it has for itself
    with streaming.MDSWriter(out=str(folder), columns={"lq": "bytes", "gt": "bytes"}) as writer:
        for files in _files(feed.folder):
            writer.write({"lq": files.lq, "gt": files.gt})
    epoch = _EPOCHS * feed.num_pairs
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=feed.batch, epoch_size=epoch)
    loader = DataLoader(
        dataset,
        feed.batch,
        num_workers=feed.workers,
        collate_fn=_Collating(feed.crop_px),
        worker_init_fn=_one_thread,
        drop_last=True,
        persistent_workers=feed.workers > 0,
    )
    return _to_floats(itertools.chain.from_iterable(itertools.repeat(loader)), feed.device)


def _litdata(feed: Feed) -> Iterator[Pictures]:
    import litdata
    from litdata.streaming.writer import BinaryWriter

    folder = feed.folder.with_name(f"{feed.folder.name}-litdata{feed.workers}")
    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, files in enumerate(_files(feed.folder)):
        writer[number] = {"lq": files.lq, "gt": files.gt}
    writer.done()
    writer.merge()
    loader = litdata.StreamingDataLoader(
        litdata.StreamingDataset(str(folder), shuffle=True, subsample=float(_EPOCHS)),
        batch_size=feed.batch,
        num_workers=feed.workers,
        collate_fn=_Collating(feed.crop_px),
        worker_init_fn=_one_thread,
        drop_last=True,
        persistent_workers=feed.workers > 0,
    )
    return _to_floats(itertools.chain.from_iterable(itertools.repeat(loader)), feed.device)


class _Collating:
    """Files of pairs to crops, in a batch."""

    def __init__(self, crop_px: int) -> None:
        self.cropping = _Cropping(crop_px)

    def __call__(self, samples: list[dict[str, bytes]]) -> list[Tensor]:
        pairs = ([decode_rgb(bytes(files[role])) for role in ("lq", "gt")] for files in samples)
        return _collated([self.cropping(*pair) for pair in pairs])


def _one_thread(_: int) -> None:
    cv2.setNumThreads(0)


LOADERS: dict[str, Callable[[Feed], Iterator[Pictures]]] = {
    "limit": _limit,
    "ours": _ours,
    "webdataset": _webdataset,
    "mosaic": _mosaic,
    "litdata": _litdata,
}
PACKAGES = {"mosaic": "streaming", "litdata": "litdata"}
"""What a loader needs that is no part of an installation; `pip install mosaicml-streaming litdata`, apart."""
