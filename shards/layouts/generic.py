"""Any data set: two folders with equal names, or two globs and a rule from the name of an lq to that of its gt."""

import glob
import re
from collections.abc import Callable
from pathlib import Path

from shards.layouts.layout import Pair, by_name, partner, pictures_below, there


def pairs(
    src: Path,
    *,
    split: str | None = None,
    lq_dir: str | None = None,
    gt_dir: str | None = None,
    lq: str | None = None,
    gt: str | None = None,
    map: str | None = None,
) -> list[Pair]:
    """Any pictures: folders lq and gt (or --lq-dir, --gt-dir) with equal names, or --lq GLOB --gt GLOB --map RULE.

    Args:
        src: folder that holds both.
        split: any name; it decides nothing here.
        lq_dir, gt_dir: the two folders, below `src` or absolute; at any depth the same relative path but for the
            suffix makes a pair.
        lq, gt, map: instead of folders, see `globs`.

    Raises:
        ValueError: a folder is missing, both are one, two files of a side claim the same key, or as `globs`.
    """
    if lq or gt or map:
        if lq_dir or gt_dir:
            raise ValueError(
                "--lq-dir and --gt-dir name folders, --lq, --gt and --map files: give the ones or the others"
            )
        return globs(src, lq=lq, gt=gt, map=map)
    lq_root, gt_root = src / (lq_dir or "lq"), src / (gt_dir or "gt")
    for option, root in (("--lq-dir", lq_root), ("--gt-dir", gt_root)):
        if not root.is_dir():
            raise ValueError(f"no folder {root}; point --src or {option} at it; {there(src)}")
    if lq_root.resolve() == gt_root.resolve():
        raise ValueError(f"--lq-dir and --gt-dir are the same folder {lq_root}")
    lq_files, gt_files = pictures_below(lq_root), pictures_below(gt_root)
    return [Pair(key, lq_files.get(key), gt_files.get(key)) for key in sorted(lq_files.keys() | gt_files.keys())]


def globs(
    src: Path,
    *,
    split: str | None = None,
    lq: str | None = None,
    gt: str | None = None,
    map: str | None = None,
) -> list[Pair]:
    """Two globs, and a rule that turns the name of an lq into that of its gt.

    A name is the path below `src` without suffix, such as `noisy/0001_real`. The name of the lq, with a dash for what
    a key may not hold, is the key.

    Args:
        src: folder the globs start from.
        split: any name; it decides nothing here.
        lq, gt: patterns such as `noisy/*.png` or `**/*_real.JPG`.
        map: a substitution such as `s/_real$/_mean/` or `s|^noisy/(.*)|clean/\\1|`, in Python's regular expressions;
            any character may follow the s. It must match each lq. A closing `n` (`s/_[0-9]+$//n`) says that several lq
            may have one gt. Without it the names must be equal.

    Raises:
        ValueError: a glob or the rule is missing, wrong, or matches nothing; two pictures claim one name, key or gt.
    """
    if not lq or not gt:
        raise ValueError(f"give both --lq GLOB and --gt GLOB, such as 'noisy/*.png'; {there(src)}")
    gt_of, many = _rule(map) if map else (str, False)
    return partner(
        _matches(src, lq, "--lq"),
        _matches(src, gt, "--gt"),
        gt_of=gt_of,
        lq_key=legal,
        gt_key=legal,
        many=many,
        hint="mend --map, or if several lq are to share a gt, close it with n, as in 's/_[0-9]+$//n'",
    )


def legal(name: str) -> str:
    """A key: the name, with a dash for each run of what a key may not hold."""
    return re.sub(r"[^A-Za-z0-9_/-]+", "-", name)


def _matches(src: Path, pattern: str, option: str) -> dict[str, Path]:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise ValueError(f"{option} {pattern}: write it from --src on, which is {src}")
    paths = (src / path for path in glob.glob(pattern, root_dir=src, recursive=True))
    found = by_name(paths, lambda path: path.relative_to(src).with_suffix("").as_posix())
    if not found:
        raise ValueError(f"{option} {pattern} matches no picture below {src}; {there(src)}")
    return found


def _rule(text: str) -> tuple[Callable[[str], str], bool]:
    """The substitution that `text` says, and whether several lq may share a gt."""
    parts = text[2:].split(text[1]) if re.match(r"s[^\w\s\\]", text) else []
    if len(parts) != 3 or parts[2] not in ("", "n"):
        raise ValueError(f"--map {text}: write it like s/_real$/_mean/ or, where several lq have one gt, s/_[0-9]+$//n")
    try:
        pattern = re.compile(parts[0])
        pattern.sub(parts[1], "")  # fails where the replacement names a group that is not there
    except (re.error, IndexError) as error:
        raise ValueError(f"--map {text}: no regular expression of Python's ({error})") from None

    def gt_of(name: str) -> str:
        replaced, times = pattern.subn(parts[1], name, count=1)
        if not times:
            raise ValueError(f"--map {text} does not match {name!r}: mend it, or make --lq match fewer")
        return replaced

    return gt_of, parts[2] == "n"
