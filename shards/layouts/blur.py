"""Blur: GoPro, RealBlur-J, REDS, ReLoBlur."""

import re
from pathlib import Path

from shards.layouts.layout import (
    Layout,
    Pair,
    folder,
    home,
    natural,
    one_of,
    partner,
    pictures_below,
    pictures_in,
    there,
)

UNKNOWN = "unknown"


def gopro(src: Path, *, split: str | None = None, blur: str | None = None) -> list[Pair]:
    """GoPro: {train,test}/SEQUENCE/{blur,blur_gamma,sharp}/N.png, or a flat copy with input and target.

    `blur` chooses between blur (frames averaged in linear light, the default) and blur_gamma, which differ; which of
    them is in a flat copy cannot be seen, so that is `unknown`. Keys are SEQUENCE/N. Counts: certain.
    """
    root, blur = _gopro(src, split, blur)
    if blur == UNKNOWN:
        return partner(pictures_in(folder(root, "input")), pictures_in(folder(root, "target")))
    lq: dict[str, Path] = {}
    gt: dict[str, Path] = {}
    for sequence in sorted(path for path in root.iterdir() if path.is_dir()):
        for side, name in ((lq, blur), (gt, "sharp")):
            if (sequence / name).is_dir():
                side.update({f"{sequence.name}/{n}": path for n, path in pictures_in(sequence / name).items()})
    if not lq or not gt:
        inside = {path.name for path in root.glob("*/*") if path.is_dir()}
        raise ValueError(
            f"no SEQUENCE/{'sharp' if lq else blur} with pictures below {root}; choose --split and --blur to suit; "
            f"{there(root)}; the folders in these are {', '.join(sorted(inside)) or 'none'}"
        )
    return partner(lq, gt)


def realblur_j(src: Path, *, split: str | None = None) -> list[Pair]:
    """RealBlur-J: what RealBlur_J_{train,test}_list.txt pairs, the gt first, by paths from the list's folder on.

    Keys are like scene230/blur_7. Counts: of the test set certain, of the training set likely.
    """
    name = f"RealBlur_J_{one_of(split, ('train', 'test'), option='--split')}_list.txt"
    lists = [root / name for root in (src, src.parent) if (root / name).is_file()]
    if not lists:
        raise ValueError(f"no {name} in {src}; point --src at the folder with the lists; {there(src)}")
    found: dict[str, Pair] = {}
    absent, sharps = [], set()
    for number, line in enumerate(lists[0].read_text().splitlines(), 1):
        if not line.strip():
            continue
        key, sharp, blurred = _realblur_line(line, f"{lists[0]}, line {number}")
        if key in found or sharp in sharps:
            raise ValueError(f"{lists[0]}, line {number}: {key} or its gt is in the list before: keep one line")
        lq, gt = (path if path.is_file() else None for path in (lists[0].parent / blurred, lists[0].parent / sharp))
        if lq is None and gt is None:
            absent.append(line)
        found[key] = Pair(key, lq, gt)
        sharps.add(sharp)
    if absent:
        raise ValueError(
            f"{len(absent)} lines of {lists[0]} name files that are not there, such as {absent[0]}; "
            f"{there(lists[0].parent)}"
        )
    return [found[key] for key in sorted(found, key=natural)]


def reds(src: Path, *, split: str | None = None, blur: str = "blur") -> list[Pair]:
    """REDS: {train,val}/{train,val}_blur/SEQUENCE/FRAME.png to the same below {train,val}_sharp; val300 as others test.

    `blur` may be blur (the default), blur_comp or blur_jpeg. The split val300 is every tenth frame of val, those whose
    number ends in 9. Keys are SEQUENCE/FRAME. The targets of the test set are not public. Counts: certain.
    """
    part = one_of(split, ("train", "val", "val300"), option="--split").removesuffix("300")
    one_of(blur, ("blur", "blur_comp", "blur_jpeg"), option="--blur")
    root, vain = home(src, part)
    lq, gt = (pictures_below(folder(root, f"{part}_{name}", vain=vain)) for name in (blur, "sharp"))
    found = partner(lq, gt)
    return [pair for pair in found if pair.key.endswith("9")] if split == "val300" else found


def reloblur(src: Path, *, split: str | None = None) -> list[Pair]:
    """ReLoBlur: dataset/{train,test}/SCENE/N/N_blur.png to N_sharp.png beside it, masks in masks/{train,test}/SCENE/N.

    Keys are SCENE/N/N. Masks, bright where something moved, belong to all pairs or, without that folder, to none; where
    it lacks one, the writer reports that. Counts: certain. For academic use only.
    """
    root, _ = home(src, f"dataset/{split}", str(split))
    sides: dict[str, dict[str, Path]] = {"blur": {}, "sharp": {}}
    for name, path in pictures_below(root).items():
        match = re.fullmatch(r"([^/]+/[^/]+/[^/]+)_(blur|sharp)", name)
        if match:
            sides[match[2]][match[1]] = path
    if not any(sides.values()):
        raise ValueError(f"no SCENE/N/N_blur.png below {root}; point --src at it, or choose --split; {there(root)}")
    top = root.resolve()
    masks = next((m for m in (above / "masks" / top.name for above in top.parents[:2]) if m.is_dir()), None)
    found = partner(sides["blur"], sides["sharp"])
    return [pair._replace(masks=masks / f"{pair.key}.png") for pair in found] if masks else found


def _realblur_line(line: str, where: str) -> tuple[str, str, str]:
    """Key, gt and lq of a line."""
    match = re.fullmatch(
        r"((?:\S*/)?RealBlur-(\w)\w*/(\w+))/(gt|blur)/(\w+)\.\w+\s+\1/(gt|blur)/(\w+)\.\w+", line.strip()
    )
    if not match:
        raise ValueError(f"{where}: not like SET/sceneN/gt/gt_K.png SET/sceneN/blur/blur_K.png: {line!r}")
    if (match[4], match[6]) != ("gt", "blur"):
        raise ValueError(f"{where}: swapped? A line has the gt first and the blur second: {line!r}")
    if match[2] != "J":
        raise ValueError(f"{where}: of RealBlur-{match[2]}, not RealBlur-J: {line!r}")
    sharp, blurred = line.split()
    return f"{match[3]}/{match[7]}", sharp, blurred


def _gopro(src: Path, split: str | None, blur: str | None) -> tuple[Path, str]:
    """Folder of the split, and which blur it holds."""
    root, _ = home(src, *([split, f"GOPRO_Large/{split}"] if split else []))
    if not root.is_dir():
        raise ValueError(f"no folder {root}; point --src at it")
    if (root / "input").is_dir() or (root / "target").is_dir():
        if blur not in (None, UNKNOWN):
            raise ValueError(f"{root} is a flat copy, which does not tell its blur: leave --blur out")
        return root, UNKNOWN
    return root, one_of(blur or "blur", ("blur", "blur_gamma"), option="--blur")


def _settle_gopro(src: Path, *, split: str | None, blur: str | None = None) -> dict[str, str]:
    return {"blur": _gopro(src, split, blur)[1]}


def _settle_reds(src: Path, *, split: str | None, blur: str = "blur") -> dict[str, str]:
    return {"blur": blur}


LAYOUTS = {
    "gopro": Layout(gopro, "blur", {"train": 2103, "test": 1111}, ("blur",), _settle_gopro),
    "realblur_j": Layout(realblur_j, "blur", {"train": 3758, "test": 980}),
    "reds": Layout(reds, "blur", {"train": 24000, "val": 3000, "val300": 300}, ("blur",), _settle_reds),
    "reloblur": Layout(reloblur, "blur", {"train": 2010, "test": 395}),
}
