"""Scores on whole pictures: every picture once, shared out over the ranks, each number with its protocol's name."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from dist_train import ranks
from dist_train.data.batch import Batch
from dist_train.data.folder import Pictures
from dist_train.metrics import Picture, is_collapsed, score, to_u8
from dist_train.pictures import overlay, panel

Restorer = Callable[[Batch], dict[str, Tensor]]
"""A batch of one whole picture -> `student_out` and perhaps `teacher_out` (1,3,H,W) and `idmap` (1,H,W) int64."""

See = Callable[[str, str, Picture], None]
"""Called with the name of a version (`gt`, `input`, ...), the key of a picture, and it: (H,W,3) uint8 RGB."""


@dataclass(frozen=True)
class Row:
    """Scores of one version of one picture under one protocol."""

    key: str
    protocol: str
    name: str
    """`input`, `student`, `teacher`; what has another name in `restore`'s answer keeps it."""
    psnr: float
    ssim: float
    collapsed: bool = False
    """Whether it lost more than 3 dB of RGB PSNR against the input; see `dist_train.metrics.is_collapsed`."""


def evaluate(
    restore: Restorer, reader: Pictures, *, protocols: Sequence[str], device: torch.device, see: See | None = None
) -> list[Row]:
    """Score the degraded input and everything `restore` gives, on every picture of a data set. All ranks call.

    Every rank calls `restore` equally often, since it may gather weights from all (ZeRO-3): where the pictures do not
    come out even, the last call of some ranks is for a picture of another, and not counted.

    Args:
        restore: called once per picture, without gradient.
        reader: the pictures.
        protocols: of `dist_train.metrics.PROTOCOLS`; outputs are clamped and rounded to uint8 first.
        device: of this rank.
        see: shown every picture and version that this rank counts, and perhaps one that another counts.

    Returns:
        One row per picture, name and protocol, in the reader's order, the same on every rank.
    """
    scored: list[tuple[int, list[Row]]] = []
    num_passes, problem = 0, None
    try:
        for first in range(0, len(reader), ranks.world_size()):
            index = first + ranks.rank()
            rows = list(_score_picture(restore, reader, index % len(reader), protocols, device, see))
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
    restore: Restorer,
    reader: Pictures,
    index: int,
    protocols: Sequence[str],
    device: torch.device,
    see: See | None,
) -> Iterator[Row]:
    """Scores of one picture, for each version of it and each protocol."""
    batch, lq_u8, gt_u8 = whole_picture(reader, index, device)
    restored = restore(batch)
    versions = {"input": lq_u8}
    for name, image in restored.items():
        if name.endswith("_out"):
            versions[name.removesuffix("_out")] = to_u8(image[0].cpu())
    key = reader.keys[index]
    if see:
        for name, picture in (versions | {"gt": gt_u8}).items():
            see(name, key, picture)
    for name, picture in versions.items():
        collapsed = is_collapsed(picture, lq_u8, gt_u8)
        for protocol in protocols:
            values = score(picture, gt_u8, protocol)
            yield Row(key, protocol, name, values["psnr"], values["ssim"], collapsed)


@torch.no_grad()
def draw_panels(
    restore: Restorer,
    reader: Pictures,
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


def whole_picture(reader: Pictures, index: int, device: torch.device) -> tuple[Batch, np.ndarray, np.ndarray]:
    """One uncropped pair as a batch of one, and as uint8 lq and gt."""
    lq_read, gt_u8 = reader.pair(index)
    lq_u8 = lq_read if lq_read.dtype == np.uint8 else to_u8(lq_read.transpose(2, 0, 1))
    lq, gt = (torch.from_numpy(picture).permute(2, 0, 1)[None].float() for picture in (lq_read, gt_u8))
    lq, gt = lq.div(255) if lq_read.dtype == np.uint8 else lq, gt.div(255)
    masks = (torch.from_numpy(reader.masks(index)),) if reader.masks_note else None
    return Batch.of_images(lq, gt, keys=(reader.keys[index],), masks=masks).to(device), lq_u8, gt_u8


def means(rows: list[Row]) -> dict[str, float]:
    """Means over pictures, under the names they are logged by: `val/<protocol>/psnr/<name>` in dB, `.../ssim/...`.

    Where a teacher was scored, `.../lead` is how much it is better than its student. Where the input was,
    `val/mcr/<name>` is SAM-Deblur's mode collapse rate: percent of the pictures that lost more than 3 dB of RGB PSNR
    against it.
    """
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(f"val/{row.protocol}/psnr/{row.name}", []).append(row.psnr)
        groups.setdefault(f"val/{row.protocol}/ssim/{row.name}", []).append(row.ssim)
    found = {name: float(np.mean(values)) for name, values in groups.items()}
    teachers = [name for name in found if name.endswith("/teacher")]
    lead = {name: found[name] - found[name.replace("/teacher", "/student")] for name in teachers}
    found |= {name.replace("/teacher", "/lead"): value for name, value in lead.items()}
    if any(row.name == "input" for row in rows):
        restored = {(row.name, row.key): row.collapsed for row in rows if row.name != "input"}
        for version in dict.fromkeys(name for name, _ in restored):
            collapsed = [value for (name, _), value in restored.items() if name == version]
            found[f"val/mcr/{version}"] = 100 * float(np.mean(collapsed))
    return found


def as_records(rows: list[Row]) -> list[dict[str, str | float | bool]]:
    """Rows as plain dictionaries, for JSON."""
    return [asdict(row) for row in rows]
