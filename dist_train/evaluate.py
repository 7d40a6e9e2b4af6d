"""Scores on whole pictures: every picture once, shared out over the ranks, each number with its protocol's name."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from dist_train import ranks
from dist_train.data.batch import Batch
from dist_train.data.reader import ShardReader
from dist_train.metrics import score, to_u8
from dist_train.pictures import overlay, panel

Restorer = Callable[[Batch], dict[str, Tensor]]
"""A batch of one whole picture -> `student_out` and perhaps `teacher_out` (1,3,H,W) and `idmap` (1,H,W) int64."""


@dataclass(frozen=True)
class Row:
    """Scores of one version of one picture under one protocol."""

    key: str
    protocol: str
    name: str
    """`input`, `student` or `teacher`."""
    psnr: float
    ssim: float


def evaluate(restore: Restorer, reader: ShardReader, *, protocols: Sequence[str], device: torch.device) -> list[Row]:
    """Score the degraded input and everything `restore` gives, on every picture of a data set. All ranks call.

    Every rank calls `restore` equally often, since it may gather weights from all (ZeRO-3): where the pictures do not
    come out even, the last call of some ranks is for a picture of another, and not counted.

    Args:
        restore: called once per picture, without gradient.
        reader: the pictures.
        protocols: of `dist_train.metrics.PROTOCOLS`; outputs are clamped and rounded to uint8 first.
        device: of this rank.

    Returns:
        One row per picture, name and protocol, in the reader's order, the same on every rank.
    """
    scored: list[tuple[int, list[Row]]] = []
    num_passes, problem = 0, None
    try:
        for first in range(0, len(reader), ranks.world_size()):
            index = first + ranks.rank()
            rows = list(_score_picture(restore, reader, index % len(reader), protocols, device))
            num_passes += 1
            if index < len(reader):
                scored.append((index, rows))
    except Exception as error:  # every rank must hear of it, whatever it is
        problem = ranks.sendable(error)
    parts = ranks.gather_objects((scored, num_passes, problem))
    for *_, failed in parts:
        if failed is not None:
            raise failed
    everyone = sorted((item for part, *_ in parts for item in part), key=lambda item: item[0])
    assert [index for index, _ in everyone] == list(range(len(reader))), "every picture must be counted once"
    assert len({passes for _, passes, _ in parts}) == 1, "every rank must pass equally often"
    return [row for _, rows in everyone for row in rows]


@torch.no_grad()
def _score_picture(
    restore: Restorer, reader: ShardReader, index: int, protocols: Sequence[str], device: torch.device
) -> Iterator[Row]:
    """Scores of one picture, for each version of it and each protocol."""
    batch, lq_u8, gt_u8 = whole_picture(reader, index, device)
    restored = restore(batch)
    versions = {"input": lq_u8}
    for name in ("student", "teacher"):
        if f"{name}_out" in restored:
            versions[name] = to_u8(restored[f"{name}_out"][0].cpu())
    for name, picture in versions.items():
        for protocol in protocols:
            values = score(picture, gt_u8, protocol)
            yield Row(reader.keys[index], protocol, name, values["psnr"], values["ssim"])


@torch.no_grad()
def draw_panels(
    restore: Restorer,
    reader: ShardReader,
    *,
    indices: Iterable[int],
    device: torch.device,
    student_title: str = "student",
) -> dict[str, np.ndarray]:
    """Pictures of a data set: lq, student, teacher, gt and masks side by side, with RGB PSNR on each.

    Args:
        restore: called once per picture.
        reader: the pictures.
        indices: which; one after the other, on this rank alone.
        device: of this rank.
        student_title: what to call the student's picture.

    Returns:
        {`val/<key>`: (H',W',3) uint8 RGB}.
    """
    panels = {}
    for index in (index for index in indices if index < len(reader)):
        batch, lq_u8, gt_u8 = whole_picture(reader, index, device)
        out = restore(batch)
        titles = {"student_out": student_title, "teacher_out": "teacher"}
        pictures = {"degraded": lq_u8} | {titles[name]: to_u8(out[name][0].cpu()) for name in titles if name in out}
        columns = [(f"{title} {score(image, gt_u8, 'rgb')['psnr']:.2f} dB", image) for title, image in pictures.items()]
        columns.append(("clean", gt_u8))
        if "idmap" in out:
            columns.append(("masks", overlay(pictures[student_title], out["idmap"][0].cpu().numpy())))
        panels[f"val/{reader.keys[index]}"] = panel(columns)
    return panels


def whole_picture(reader: ShardReader, index: int, device: torch.device) -> tuple[Batch, np.ndarray, np.ndarray]:
    """One uncropped pair as a batch of one, and as uint8 lq and gt."""
    lq_u8, gt_u8 = reader.pair(index)
    lq, gt = (torch.from_numpy(picture).permute(2, 0, 1)[None].float().div(255) for picture in (lq_u8, gt_u8))
    masks = (torch.from_numpy(reader.masks(index)),) if reader.masks_note else None
    return Batch.of_images(lq, gt, keys=(reader.keys[index],), masks=masks).to(device), lq_u8, gt_u8


def means(rows: list[Row]) -> dict[str, float]:
    """Means over pictures, under the names they are logged by: `val/<protocol>/psnr/<name>` in dB, `.../ssim/...`."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(f"val/{row.protocol}/psnr/{row.name}", []).append(row.psnr)
        groups.setdefault(f"val/{row.protocol}/ssim/{row.name}", []).append(row.ssim)
    return {name: float(np.mean(values)) for name, values in groups.items()}


def as_records(rows: list[Row]) -> list[dict[str, str | float]]:
    """Rows as plain dictionaries, for JSON."""
    return [asdict(row) for row in rows]
