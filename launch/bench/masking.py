"""Making masks, alone and inside a training step, as work for a race."""

import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.config import (
    CachedConfig,
    NetConfig,
    PspConfig,
    RegionsConfig,
    RemoteConfig,
    SamConfig,
    StoredConfig,
    parse_run,
)
from dist_train.data.augment import apply_geometry, geometry_at
from dist_train.data.batch import Batch
from dist_train.priors import Priors
from dist_train.priors.cached import CachedPrior
from dist_train.priors.mask_files import MaskFiles
from dist_train.priors.masks import MaskSet, largest_first, matched_iou
from dist_train.priors.psp import PspPrior, load_psp_prior
from dist_train.priors.regions import RegionsPrior
from dist_train.priors.remote import RemotePrior, load_remote_prior, make_key
from dist_train.priors.sam import SamPrior, load_sam_prior
from dist_train.priors.stored import StoredPrior
from dist_train.priors.vgg import load_features
from dist_train.tasks import build_task
from launch.bench.race import Work
from launch.mask_server import serve


class Stopwatch:
    """What the parts of a lap take: seconds of the CPU, over all threads, or of CUDA's stream, by events."""

    def __init__(self, device: str):
        self._cuda, self._marks = torch.device(device).type == "cuda", list[tuple[str, Any, Any]]()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around what counts as `name`; parts may lie within each other."""
        start = self._mark()
        yield
        self._marks.append((name, start, self._mark()))

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count each call of a method, of an object or a class, as `name`."""
        inner = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, method, watched)

    def lap(self, step: Callable[[], Tensor | None], names: tuple[str, ...], spent: Tensor) -> Work:
        """Work whose n-th lap leaves in `spent[n]` what it took in all, and what each of its parts did."""
        rows = iter(spent)

        def lap() -> Tensor | None:
            with self.part("all"):
                value = step()
            if self._cuda:
                torch.cuda.synchronize()
            seconds = dict.fromkeys(("all", *names), 0.0)
            for name, start, end in self._marks:
                if name in seconds:
                    seconds[name] += start.elapsed_time(end) / 1000 if self._cuda else end - start
            self._marks.clear()
            next(rows).copy_(torch.tensor(list(seconds.values())))
            return value

        return Work(lap, held_bytes=0)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Segment(NamedTuple):
    """Masks of some photographs; or what nothing is faster than: a product of matrices, a copy."""

    build: Callable[[], Any]
    """A SAM with random weights, for where `config` has no checkpoint."""
    config: SamConfig
    limit: Literal["", "matmul", "copy"]
    batch: int
    height: int
    width: int
    device: str
    spent: Tensor
    """(laps,3) float64, shared: of each lap seconds in all, on the picture (encoder), on prompts (decoder, scores)."""


SQUARE_SIDE = {"cpu": 1024, "cuda": 8192}
NUM_COPIED = {"cpu": 2**25, "cuda": 2**29}


def prepare_segment(case: Segment) -> Work:
    """A case as work that returns masks (B,K,H,W) bool, those that are not valid empty."""
    watch, parts = Stopwatch(case.device), ("picture", "prompts")
    if case.limit:
        kind = torch.device(case.device).type
        auto = torch.float16 if kind == "cuda" else torch.float32
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(case.config.dtype, auto)
        if case.limit == "copy":
            there, here = torch.ones(2, NUM_COPIED[kind], device=case.device, dtype=dtype)
            return watch.lap(lambda: there.copy_(here)[:1], parts, case.spent)
        square = torch.rand(SQUARE_SIDE[kind], SQUARE_SIDE[kind], device=case.device, dtype=dtype)
        return watch.lap(lambda: (square @ square)[:1, :1], parts, case.spent)
    images = photographs(case.batch, case.height, case.width).to(case.device)
    prior, held = sam_prior(case.build, case.config, case.device)
    if case.config.generator == "batched":
        watch.watch(prior._segment, "_look", "picture")
        watch.watch(prior._segment, "_score", "prompts")
    else:
        from segment_anything import SamAutomaticMaskGenerator, SamPredictor

        watch.watch(SamPredictor, "set_image", "picture")
        watch.watch(SamAutomaticMaskGenerator, "_process_batch", "prompts")

    def segment() -> Tensor:
        found = prior(images)
        return found.masks & found.valid[:, :, None, None]

    return watch.lap(segment, parts, case.spent)._replace(held_bytes=held)


def sam_prior(build: Callable[[], Any], config: SamConfig, device: str) -> tuple[SamPrior, int]:
    """SAM with the weights of `config.checkpoint`, or random ones, always the same; and how many bytes they are."""
    if config.checkpoint is not None:
        return load_sam_prior(config, torch.device(device)), Path(config.checkpoint).stat().st_size
    torch.manual_seed(0)
    sam = build().to(device)
    return SamPrior(sam, config, weights="random"), _bytes_of(sam)


def _bytes_of(net: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())


def photographs(num: int, height: int, width: int) -> Tensor:
    """(num,3,height,width) float32 in [0,1]: the middle of scikit-image's sample photographs, mirrored on to size."""
    from skimage import data

    pictures = []
    for index in range(num):
        photo = (data.astronaut, data.chelsea, data.coffee)[index % 3]()[:, :: (-1) ** (index // 3)]
        more = [max(want - has, 0) for want, has in zip((height, width), photo.shape, strict=False)]
        photo = np.pad(photo, ((0, more[0]), (0, more[1]), (0, 0)), mode="symmetric")
        top, left = (photo.shape[0] - height) // 2, (photo.shape[1] - width) // 2
        pictures.append(torch.tensor(photo[top : top + height, left : left + width].copy()).permute(2, 0, 1) / 255)
    return torch.stack(pictures)


def agreement(found: Tensor | None, wanted: Tensor | None) -> dict[str, Any]:
    """How alike two sets of masks (B,K,H,W) are, largest first and padded with empty ones; see the bench's module."""
    if found is None or wanted is None or not wanted.any():
        return {}
    ious, pixels, same = [], [], 0
    for one, other in zip(found, wanted, strict=True):
        sets = [masks[masks.flatten(1).any(1)] for masks in (one, other)]
        ious.append(matched_iou(*sets))
        same += sum(any(torch.equal(mask, its) for its in sets[0]) for mask in sets[1])
        smallest = [MaskSet(masks[None], masks.flatten(1).any(1)[None]).idmap()[0].flatten() for masks in (one, other)]
        flat = [masks.flatten(1).double() for masks in sets]
        both = flat[0] @ flat[1].T
        table = torch.zeros(len(sets[0]) + 1, len(sets[1]) + 1, dtype=torch.float64)
        table[0, 0] = 1  # no mask around it, in either
        table[1:, 1:] = both / (flat[0].sum(1)[:, None] + flat[1].sum(1) - both)
        pixels.append(float(table[smallest[0], smallest[1]].mean()))
    num = int(wanted.flatten(2).any(2).sum())
    return {"IoU": statistics.mean(ious), "pixels": statistics.mean(pixels), "same": f"{same}/{num}"}


class Step(NamedTuple):
    """Forward and backward of the task `distill`, with masks from some provider."""

    net: NetConfig
    provider: str
    """regions, psp, batched, remote_batched, stored; fixed: masks that are ready, for nothing; of `cached`,
    made_regions and made_batched: a visit that makes masks of the whole picture, and read: one that reads them."""
    build: Callable[[], Any]
    sam: SamConfig
    batch: int
    crop_px: int
    height: int
    width: int
    """Of the whole pictures that crops are taken of."""
    device: str
    bf16: bool
    folder: Path
    spent: Tensor
    """(laps,2) float64, shared: of each lap seconds in all, and for masks."""


class _Photographs:
    """`dist_train.priors.cached.Pictures`."""

    def __init__(self, pictures: Tensor):
        self.keys = tuple(map(str, range(len(pictures))))
        self._lqs = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()

    def size_px(self, number: int) -> tuple[int, int]:
        return self._lqs.shape[1], self._lqs.shape[2]

    def lq(self, number: int) -> NDArray:
        return self._lqs[number]


def _served(case: Step) -> RemotePrior:
    """SAM in a process of its own, which ends with this one."""
    os.environ["XDG_CONFIG_HOME"] = str(case.folder)  # for the key
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve_sam, args=(theirs, case, torch.get_num_threads()), daemon=True).start()
    theirs.close()
    return load_remote_prior(RemoteConfig(of=case.sam, servers=(ours.recv(),)), torch.device(case.device))


def _serve_sam(pipe: Any, case: Step, threads: int) -> None:
    torch.set_num_threads(threads)
    sam, _ = sam_prior(case.build, case.sam, case.device)
    listener, key = socket.create_server(("127.0.0.1", 0)), make_key()
    pipe.send(f"127.0.0.1:{listener.getsockname()[1]}")
    serve(listener, sam, of=case.sam.model_dump(mode="json"), key=key, device=torch.device(case.device))


def prepare_step(case: Step) -> Work:
    """A case as work. The nets' weights are random, as are VGG's; the optimizer's part is left out."""
    tree = {
        "name": "bench",
        "data": {"train": "-", "crop_px": case.crop_px},
        "student": case.net.model_dump(),
        "features": {"weights": "random"},
    }
    run, device = parse_run(tree, source="bench"), torch.device(case.device)
    torch.manual_seed(0)
    task = build_task(run).to(device).train()
    held = _bytes_of(task)

    whole = photographs(case.batch, case.height, case.width)
    pictures, regions = _Photographs(whole), RegionsPrior(RegionsConfig())
    positions = torch.arange(case.batch) + (case.batch if case.provider == "read" else 0)  # the second epoch reads
    geometry = torch.tensor([
        geometry_at(0, position, (case.height, case.width), crop_px=case.crop_px, flips="all") for position in positions
    ])  # fmt: skip
    gt = torch.stack([apply_geometry(*pair, case.crop_px) for pair in zip(whole, geometry, strict=True)])
    batch = Batch((gt + 0.05 * torch.randn_like(gt)).to(device), gt.to(device), pictures.keys, positions, geometry)
    found = regions(whole)
    known = [masks[valid] for masks, valid in zip(found.masks, found.valid, strict=True)]
    carried = tuple(batch.carry(masks, row).to(device) for row, masks in enumerate(known))
    ready = largest_first(carried, num_masks=RegionsConfig().num_masks)

    if "batched" in case.provider and case.provider != "remote_batched":
        sam, more = sam_prior(case.build, case.sam, case.device)
        held += more
    if case.provider.startswith("made_") or case.provider == "read":
        files = MaskFiles(case.folder / case.provider, memory_mib=CachedConfig(of=RegionsConfig()).memory_mib)
        for key, masks in zip(pictures.keys, known, strict=True):
            files.write(key, 0, masks.numpy())
        inner = sam if "batched" in case.provider else regions
        config = CachedConfig(of=case.sam if "batched" in case.provider else RegionsConfig())
        masks_of: Any = CachedPrior(inner, config, pictures=pictures, files=files, global_batch=case.batch)
    else:
        masks_of = {
            "fixed": lambda: lambda images, batch, restore: ready,
            "regions": lambda: regions,
            "stored": lambda: StoredPrior(StoredConfig()),
            "batched": lambda: sam,
            "psp": lambda: load_psp_prior(PspConfig(weights="random"), device),
            "remote_batched": lambda: _served(case),
        }[case.provider]()
        batch = Batch(**{**batch.__dict__, "masks": carried})
    held += _bytes_of(masks_of.net) if isinstance(masks_of, PspPrior) else 0
    watch = Stopwatch(case.device)
    priors = Priors(masks_of, load_features(run.features, device), span=watch.part)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=case.bf16):
            losses = task(batch, priors)
        losses["total"].backward()
        task.zero_grad(set_to_none=True)  # afterwards, so that the next peak counts the gradients

    return watch.lap(step, ("prior",), case.spent)._replace(held_bytes=held)
