"""What a report shows: the records of runs, and pictures restored by their newest checkpoints."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from dist_train.checkpoint import find
from dist_train.config import RunConfig, load_run
from dist_train.data.reader import ShardReader
from dist_train.evaluate import Restorer, Row, whole_picture
from dist_train.metrics import is_collapsed, score, to_u8
from dist_train.pictures import Picture, overlay
from dist_train.priors import Priors, build_prior
from dist_train.protocols import PROTOCOLS_SAY
from dist_train.tasks import build_task
from dist_train.track import read_metrics
from shards.cache import ShardCache
from shards.schema import ShardError

log = logging.getLogger(__name__)

PROTOCOLS = tuple(name for name in PROTOCOLS_SAY if name != "awgn")
"""Those that pairs are scored under; `awgn` is of noise on clean pictures."""

ERROR_RANGE = 32
"""Error, in grey levels, at which the colours of an error map end."""


@dataclass
class RunRecord:
    """A run's folder, as it was found."""

    label: str
    """What the page calls it: the folder's name, or its path where two have the same."""
    folder: Path
    config: RunConfig
    metrics: list[dict[str, float]]
    env: dict[str, Any]
    """Of the last start; empty if the run has none."""
    checkpoint: Path | None
    """The newest that is whole."""
    rows: list[Row] = field(default_factory=list)
    """Scores of the pictures that were restored for the page, under every protocol."""
    notes: list[str] = field(default_factory=list)
    """What could not be shown, and why."""

    @property
    def step(self) -> int | None:
        """Steps done by the checkpoint."""
        return None if self.checkpoint is None else int(self.checkpoint.name.removeprefix("step-"))


@dataclass(frozen=True)
class Version:
    """One way to see a picture."""

    of: str
    """Label of the run; empty: of no run."""
    what: str
    """`degraded`, `clean`, `student`, `teacher`, `error` (of the student) or `masks`."""
    rgb_u8: Picture
    psnr_db: float | None = None
    """RGB, of the whole picture."""


@dataclass
class Shown:
    """A picture with all its versions; `part` says which part of it they are, if not all."""

    key: str
    data: str
    versions: list[Version]
    part: str = ""


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read the records of runs.

    Raises:
        ValueError: a folder is not a run's, or its configuration cannot be read by this version.
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    names = [folder.name for folder in folders]
    return [_read_run(folder, folder.name if names.count(folder.name) == 1 else str(folder)) for folder in folders]


def _read_run(folder: Path, label: str) -> RunRecord:
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run's folder: no config.yaml in it; give runs/NAME")
    env_file = folder / "env.json"
    starts = json.loads(env_file.read_text()) if env_file.is_file() else []
    starts = starts if isinstance(starts, list) else [starts]
    record = RunRecord(
        label=label,
        folder=folder,
        config=load_run(folder / "config.yaml"),
        metrics=read_metrics(folder),
        env=starts[-1] if starts else {},
        checkpoint=None,
    )
    try:
        record.checkpoint = find(folder)
    except ValueError as error:
        record.notes.append(str(error))
    else:
        if record.checkpoint is None:
            record.notes.append("no checkpoint yet: no pictures")
    return record


def restore_pictures(
    records: Sequence[RunRecord],
    *,
    num: int,
    keys: Sequence[str] = (),
    data: str | None = None,
    score_all: bool = False,
    teacher: bool = True,
    crop_px: int = 512,
    device: torch.device,
    cache: ShardCache | None = None,
) -> list[Shown]:
    """Restore validation pictures with each run's newest checkpoint, and score them; see `RunRecord.rows` and `.notes`.

    Runs that were validated on the same pictures share them. What fails for one run is noted there, and logged.

    Args:
        records: of `read_runs`; their rows and notes are filled.
        num: pictures of each data set, the first ones.
        keys: those instead.
        data: folder or URL of shards for all runs, instead of their data.val.
        score_all: score all pictures of a data set, not only the shown.
        teacher: also show the teacher and the masks it saw; SAM takes minutes a picture on a CPU.
        crop_px: of larger pictures the middle is shown, so many pixels high and wide; 0: all of it.
        device: where nets run.
        cache: for shards of a URL.
    """
    shown: dict[tuple[str, str], Shown] = {}
    for record in (record for record in records if record.checkpoint is not None):
        where = data or record.config.data.val
        if where is None:
            record.notes.append("no validation pictures (data.val is not set): none are shown; --data names others")
            continue
        try:
            reader = ShardReader(where, cache)
            restore = _restorer(record, reader, teacher=teacher, device=device)
            chosen = _choose(reader, num=num, keys=keys, score_all=score_all)
            for index, is_shown in tqdm(chosen, desc=record.label, unit="picture"):
                found = _restore_one(record, restore, reader, index, device)
                if is_shown:
                    _merge(shown, found, reader, index, where=str(where), crop_px=crop_px)
        except (ValueError, OSError, ShardError) as error:
            log.warning("%s: pictures left out: %s", record.label, error)
            record.notes.append(f"pictures left out: {error}")
    return list(shown.values())


def _restorer(record: RunRecord, reader: ShardReader, *, teacher: bool, device: torch.device) -> Restorer:
    """The task of the checkpoint, with the averaged student if there is one."""
    run, folder = record.config, record.checkpoint
    assert folder is not None
    task = build_task(run)
    task.load_state_dict(load_file(folder / "model.safetensors"))
    if (averaged := folder / "ema.safetensors").exists():
        task.get_submodule("student").load_state_dict(load_file(averaged))
    distils = run.task == "distill"
    teacher = teacher and distils
    masks = None
    if teacher or (run.task != "plain" and not distils):
        try:
            if run.reads_masks and reader.masks_note is None:
                raise ValueError(f"prior.name=stored, but {reader.folder} holds no masks")
            masks = build_prior(run.prior.of if run.prior.name == "remote" else run.prior, device)
        except (ValueError, OSError) as error:
            if not distils:
                raise
            teacher = False
            record.notes.append(f"teacher and masks left out: {error}")
    return partial(task.to(device).eval().restore, priors=Priors(masks=masks), teacher=teacher)


def _choose(reader: ShardReader, *, num: int, keys: Sequence[str], score_all: bool) -> Iterable[tuple[int, bool]]:
    """Which pictures to restore, and whether each is shown."""
    if absent := [key for key in keys if key not in reader.keys]:
        raise ValueError(f"no picture {', '.join(absent)} in {reader.folder}; there are {', '.join(reader.keys[:20])}")
    some = [reader.keys.index(key) for key in keys] or list(range(min(num, len(reader))))
    return [(index, index in some) for index in (range(len(reader)) if score_all else some)]


@torch.no_grad()
def _restore_one(
    record: RunRecord, restore: Restorer, reader: ShardReader, index: int, device: torch.device
) -> list[Version]:
    """All versions of one picture by one run, whole; its scores go to the record."""
    batch, lq_u8, gt_u8 = whole_picture(reader, index, device)
    out = restore(batch)
    versions = [Version("", "degraded", lq_u8), Version("", "clean", gt_u8)]
    for name in (name for name in ("student", "teacher") if f"{name}_out" in out):
        versions.append(Version(record.label, name, to_u8(out[f"{name}_out"][0].cpu())))
    student_u8 = versions[2].rgb_u8
    if "idmap" in out:
        versions.append(Version(record.label, "masks", overlay(student_u8, out["idmap"][0].cpu().numpy())))
    versions.append(Version(record.label, "error", error_map(student_u8, gt_u8)))
    scored: list[Version] = []
    for version in versions:
        psnr_db = None
        if version.what in ("degraded", "student", "teacher"):
            values = {protocol: score(version.rgb_u8, gt_u8, protocol) for protocol in PROTOCOLS}
            name = "input" if version.what == "degraded" else version.what
            collapsed = is_collapsed(version.rgb_u8, lq_u8, gt_u8)
            record.rows += [
                Row(reader.keys[index], protocol, name, value["psnr"], value["ssim"], collapsed)
                for protocol, value in values.items()
            ]
            psnr_db = values["rgb"]["psnr"]
        scored.append(Version(version.of, version.what, version.rgb_u8, psnr_db))
    return scored


def _merge(
    shown: dict[tuple[str, str], Shown],
    found: list[Version],
    reader: ShardReader,
    index: int,
    *,
    where: str,
    crop_px: int,
) -> None:
    """Put a run's versions beside those of other runs on the same picture."""
    cut, part = _middle(found[0].rgb_u8.shape[:2], crop_px)
    place = (reader.fingerprint, reader.keys[index])
    picture = shown.setdefault(place, Shown(reader.keys[index], where, [], part))
    have = {(version.of, version.what) for version in picture.versions}
    picture.versions += [
        Version(version.of, version.what, cut(version.rgb_u8), version.psnr_db)
        for version in found
        if (version.of, version.what) not in have
    ]


def _middle(size_px: tuple[int, ...], crop_px: int) -> tuple[Callable[[Picture], Picture], str]:
    """How to cut the middle out of a picture, and what to call it."""
    h, w = (min(side, crop_px) if crop_px else side for side in size_px)
    if (h, w) == size_px:
        return lambda picture: picture, ""
    top, left = (size_px[0] - h) // 2, (size_px[1] - w) // 2
    part = f"the middle {w} x {h} px of {size_px[1]} x {size_px[0]}"
    return lambda picture: picture[top : top + h, left : left + w], part


def error_map(restored_u8: Picture, gt_u8: Picture) -> Picture:
    """Absolute error, mean over the channels, from black (none) to pale yellow (`ERROR_RANGE` grey levels or more)."""
    error = np.abs(restored_u8.astype(np.float32) - gt_u8).mean(axis=2) / ERROR_RANGE
    levels = np.round(255 * error.clip(0, 1)).astype(np.uint8)
    return np.asarray(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1], dtype=np.uint8)
