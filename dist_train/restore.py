"""Restore files: pictures of every kind, folders, patterns, videos; what is done is not done again."""

import glob
import mimetypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dist_train.picture_files import SUFFIXES, Picture, check_holds, read_picture, write_picture
from dist_train.video import change_video, check_writes, is_video


class Restored(NamedTuple):
    """What became of the inputs."""

    written: list[Path]
    skipped: list[Path]
    """Outputs that were there."""
    failed: dict[Path, str]
    """Input -> why it was left out."""


class _Loaded(NamedTuple):
    source: Path
    target: Path
    picture: Picture


def restore_image(net: Callable[[Tensor], Tensor], rgb: NDArray, *, device: torch.device | str = "cpu") -> NDArray:
    """Restore one picture; see `restore_images`."""
    return restore_images(net, [rgb], device=device)[0]


def restore_images(
    net: Callable[[Tensor], Tensor], pictures: Sequence[NDArray], *, device: torch.device | str = "cpu"
) -> list[NDArray]:
    """Restore pictures of one size at once.

    Args:
        net: maps (B,3,H,W) float32 RGB in [0,1] to the same, on `device`: a net, or `dist_train.inference.restorer`'s.
        pictures: (H,W,3) RGB, uint8 or uint16, any H and W.

    Returns:
        The restored pictures, clamped and rounded, same shape and dtype.
    """
    dtype = pictures[0].dtype
    peak = np.iinfo(dtype).max
    lq = torch.from_numpy(np.stack(pictures).astype(np.float32) / peak).permute(0, 3, 1, 2).to(device)
    with torch.inference_mode():
        restored = net(lq).float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    # A picture at a time: float64 of a whole batch would be large.
    return [np.floor(picture.astype(np.float64) * peak + 0.5).astype(dtype) for picture in restored]


def restore_files(
    net: Callable[[Tensor], Tensor],
    inputs: Sequence[Path | str],
    dst: Path,
    *,
    device: torch.device | str = "cpu",
    batch: int = 1,
    overwrite: bool = False,
) -> Restored:
    """Restore pictures and videos, with a progress bar; one that cannot be is noted and the others go on.

    Each keeps its name and format: `src/a/b.jpg` of the folder `src` becomes `dst/a/b.jpg`. Kept are size, 16 bits,
    grey, alpha and colour profile; what EXIF turns is written turned, and other metadata is left behind.

    Args:
        net: see `restore_images`.
        inputs: pictures, videos, folders (all pictures in and below them) and patterns (`shots/**/*.png`).
        dst: folder; for a single file a file name too. Pictures of an input folder that lie in it are left alone.
        batch: how many pictures or frames of one size go through at once.
        overwrite: whether outputs may replace files that are there, which are skipped else; inputs never are replaced.

    Raises:
        ValueError: an input has no pictures, two would get one name, or an input would be overwritten.
    """
    pairs = _pairs(inputs, dst)
    result = Restored([], [], {})
    wanted = []
    for source, target in pairs:
        if target.exists() and not overwrite:
            result.skipped.append(target)
        else:
            wanted.append((source, target))
    videos = [pair for pair in wanted if is_video(pair[0])]
    pictures = [pair for pair in wanted if not is_video(pair[0])]
    with tqdm(total=len(pictures), unit="picture", disable=len(pictures) < 2) as bar:
        for group in _groups(pictures, batch, result):
            _restore_group(net, group, device, result)
            bar.update(len(result.written) + len(result.failed) - bar.n)
    for source, target in videos:
        try:
            change_video(lambda frames: restore_images(net, frames, device=device), source, target, batch=batch)
        except (ValueError, OSError, RuntimeError) as error:
            result.failed[source] = str(error)
        else:
            result.written.append(target)
    return result


def _groups(pairs: Sequence[tuple[Path, Path]], batch: int, result: Restored) -> Iterator[list[_Loaded]]:
    """Pictures that follow one another and are alike, at most `batch`."""
    group: list[_Loaded] = []
    for source, target in pairs:
        try:
            loaded = _Loaded(source, target, read_picture(source))
            check_holds(target, loaded.picture)
        except (ValueError, OSError) as error:
            result.failed[source] = str(error)
            continue
        rgb = loaded.picture.rgb
        first = group[0].picture.rgb if group else rgb
        if len(group) == batch or (rgb.shape, rgb.dtype) != (first.shape, first.dtype):
            yield group
            group = []
        group.append(loaded)
    if group:
        yield group


def _restore_group(
    net: Callable[[Tensor], Tensor], group: Sequence[_Loaded], device: torch.device | str, result: Restored
) -> None:
    try:
        restored = restore_images(net, [loaded.picture.rgb for loaded in group], device=device)
    except RuntimeError as error:  # no memory for so many, perhaps
        if len(group) == 1:
            result.failed[group[0].source] = str(error)
        else:
            for loaded in group:
                _restore_group(net, [loaded], device, result)
        return
    for loaded, rgb in zip(group, restored, strict=True):
        try:
            write_picture(loaded.target, loaded.picture._replace(rgb=rgb))
        except (ValueError, OSError) as error:
            result.failed[loaded.source] = str(error)
        else:
            result.written.append(loaded.target)


def _pairs(inputs: Sequence[Path | str], dst: Path) -> list[tuple[Path, Path]]:
    """Inputs and where they go."""
    found = [pair for item in inputs for pair in _found(item, dst)]
    if dst.is_file() or (_is_called_a_file(dst) and not dst.is_dir()):
        if len(found) > 1 or not Path(inputs[0]).is_file():
            raise ValueError(f"{dst} is one file, which only a single file can become; give a folder as output")
        pairs = [(found[0][0], dst)]
    else:
        pairs = [(source, dst / name) for source, name in found]
    sources = {source.resolve() for source, _ in pairs}
    taken: dict[Path, Path] = {}
    for source, target in pairs:
        if target.resolve() in sources:
            raise ValueError(f"{target} is an input and would be overwritten; choose another output")
        if target in taken:
            raise ValueError(f"{taken[target]} and {source} would both become {target}; restore them to two folders")
        taken[target] = source
        if is_video(source):
            check_writes(target)
    return pairs


def _is_called_a_file(path: Path) -> bool:
    """Whether a name is that of a picture or a video, of any format: a folder is not called so."""
    kind, _ = mimetypes.guess_type(path.name)
    return path.suffix.lower() in SUFFIXES or is_video(path) or (kind or "").startswith("image/")


def _found(item: Path | str, dst: Path) -> list[tuple[Path, Path]]:
    """Files that an input names, and each one's name in the output folder."""
    path = Path(item)
    if path.is_file():
        return [(path, Path(path.name))]
    if path.is_dir():
        base, candidates, videos = path, list(path.rglob("*")), False
        why = f"none of its files ends in {' '.join(SUFFIXES)}"
    elif glob.has_magic(str(item)):
        fixed = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
        base, videos = Path(*path.parts[:fixed]), True
        candidates = [Path(name) for name in glob.iglob(str(item), recursive=True)]
        why = "no picture or video is called so"
    else:
        raise ValueError(f"no pictures to restore in {path}: no such file or folder")
    # Outputs of an earlier call, in a folder of the inputs.
    below = dst.resolve() if dst.resolve() != base.resolve() else None
    found = [
        (file, file.relative_to(base))
        for file in sorted(candidates)
        if (file.suffix.lower() in SUFFIXES or (videos and is_video(file)))
        and file.is_file()
        and not (below and file.resolve().is_relative_to(below))
    ]
    if not found:
        raise ValueError(f"no pictures to restore in {path}: {why}")
    return found
