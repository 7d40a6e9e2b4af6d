"""How data sets lie on disk: each layout is a function from a folder to its pairs, never matched by sorted order."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class Pair(NamedTuple):
    """Files of one sample; None where the partner is missing, which the writer reports."""

    key: str
    lq: Path | None
    gt: Path | None
    masks: Path | None = None
    """A grey picture, bright where something is; None: the data set has none."""
    side_by_side: bool = False
    """`lq` and `gt` are one file, lq its left half and gt its right."""


def pairs(src: Path, *, lq_dir: str | None = None, gt_dir: str | None = None) -> list[Pair]:
    """Two folders, at any depth the same relative path but for the suffix; sorted by key.

    Args:
        src: folder that holds both.
        lq_dir, gt_dir: the two, below `src` or absolute; `lq` and `gt` if not given.

    Raises:
        ValueError: a folder is missing, both are one, or two files of a side claim the same key.
    """
    lq_root, gt_root = src / (lq_dir or "lq"), src / (gt_dir or "gt")
    for option, root in (("--lq-dir", lq_root), ("--gt-dir", gt_root)):
        if not root.is_dir():
            raise ValueError(f"no folder {root}; point --src or {option} at it")
    if lq_root.resolve() == gt_root.resolve():
        raise ValueError(f"--lq-dir and --gt-dir are the same folder {lq_root}")
    lq, gt = pictures_below(lq_root), pictures_below(gt_root)
    return [Pair(key, lq.get(key), gt.get(key)) for key in sorted(lq.keys() | gt.keys())]


def rain100l(src: Path, *, lq_dir: str | None = None, gt_dir: str | None = None) -> list[Pair]:
    """Rain100L as distributed: rain/norain-N.png belongs to norain/norain-N.png; in the order of N."""
    return sorted(pairs(src, lq_dir=lq_dir or "rain", gt_dir=gt_dir or "norain"), key=lambda pair: _number(pair.key))


LAYOUTS: dict[str, Callable[..., list[Pair]]] = {"pairs": pairs, "rain100L": rain100l}


def select(found: list[Pair], numbers: str) -> list[Pair]:
    """Keep the pairs whose number (the last one in the key) is asked for.

    Args:
        found: pairs, whose order is kept.
        numbers: like `1-120` or `1-10,15`.

    Raises:
        ValueError: not readable, or some of the numbers are not there.
    """
    wanted: set[int] = set()
    for part in numbers.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(f"--select {numbers}: {part!r} is no number or range; write it like 1-120 or 1-10,15")
        wanted.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    absent = sorted(wanted - {_number(pair.key) for pair in found})
    if absent:
        raise ValueError(f"--select {numbers}: {len(absent)} of these are not there, the first is {absent[0]}")
    return [pair for pair in found if _number(pair.key) in wanted]


def pictures_below(root: Path) -> dict[str, Path]:
    """Pictures in a folder and those below it, by relative path without suffix; hidden files are passed over."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        key = path.relative_to(root).with_suffix("").as_posix()
        if key in found:
            raise ValueError(f"{found[key]} and {path.name} would both be sample {key!r}: keep one")
        found[key] = path
    return found


def _number(key: str) -> int:
    digits = re.findall(r"\d+", key)
    return int(digits[-1]) if digits else -1
