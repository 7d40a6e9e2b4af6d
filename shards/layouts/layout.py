"""What a layout is, and what all are made of: pictures by name, and partners by a rule, never by sorted order."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

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


def as_given(src: Path, *, split: str | None, **options: str) -> dict[str, str]:
    """The options of a layout that leaves none open."""
    return options


class Layout(NamedTuple):
    """How one data set lies on disk."""

    find: Callable[..., list[Pair]]
    """`find(src, *, split, **options)`: the pairs of a split; ValueError tells what is not where it should be. `src` is
    the folder of the data set or that of the split; without a split, only the latter."""
    kind: Literal["rain", "blur", "noise", "any"]
    """What is wrong with its lq."""
    counts: Mapping[str, int]
    """How many pairs each split has, where known; under `VARIANT/SPLIT` where a variant has a number of its own."""
    options: tuple[str, ...] = ()
    """Names of the options that `find` takes, each a str."""
    settle: Callable[..., dict[str, str]] = as_given
    """`settle(src, *, split, **options)`: the options as `find` goes by them, what was left open filled in with what is
    on the disk. These belong in the manifest."""

    def expected(self, split: str | None, options: Mapping[str, str]) -> dict[str, int]:
        """How many pairs a split should have under settled options; of a split that is not known, each that is."""
        known = {name: num for name, num in self.counts.items() if "/" not in name}
        own = f"{options.get('variant')}/"
        known |= {name.removeprefix(own): num for name, num in self.counts.items() if name.startswith(own)}
        return {split: known[split]} if split in known else known


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
    return by_name(root.rglob("*"), lambda path: path.relative_to(root).with_suffix("").as_posix())


def pictures_in(root: Path) -> dict[str, Path]:
    """Pictures in a folder, not those below it, by name without suffix; hidden files are passed over."""
    return by_name(root.glob("*"), lambda path: path.stem)


def by_name(paths: Iterable[Path], name_of: Callable[[Path], str]) -> dict[str, Path]:
    """Those of the paths that are pictures, by name.

    Raises:
        ValueError: two of them have one name.
    """
    found: dict[str, Path] = {}
    for path in sorted(paths):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        name = name_of(path)
        if name in found:
            raise ValueError(f"{found[name]} and {path} would both be sample {name!r}: keep one")
        found[name] = path
    return found


def partner(
    lq: Mapping[str, Path],
    gt: Mapping[str, Path],
    *,
    gt_of: Callable[[str], str] = str,
    lq_key: Callable[[str], str] = str,
    gt_key: Callable[[str], str] = str,
    many: bool = False,
    hint: str = "rename or remove one",
) -> list[Pair]:
    """Pair pictures by a rule on their names; in the natural order of the keys.

    Args:
        lq, gt: pictures of the two sides by name.
        gt_of: the name of an lq -> that of its gt.
        lq_key, gt_key: the name of an lq, of a gt that no lq has -> the key of the sample.
        many: several lq may share a gt.
        hint: how to mend two that claim the same.

    Raises:
        ValueError: two lq claim one gt, two samples one key, or a picture is both sides of a pair.
    """
    claimed: dict[str, Path] = {}
    pairs: dict[str, Pair] = {}
    for name, path in lq.items():
        wanted = gt_of(name)
        if wanted in claimed and not many:
            raise ValueError(f"{claimed[wanted]} and {path} would both have the gt {wanted!r}: {hint}")
        if gt.get(wanted) == path:
            raise ValueError(f"{path} would be its own gt")
        claimed[wanted] = path
        _add(pairs, Pair(lq_key(name), path, gt.get(wanted)), hint)
    for name in gt.keys() - claimed.keys():
        _add(pairs, Pair(gt_key(name), None, gt[name]), hint)
    return [pairs[key] for key in sorted(pairs, key=natural)]


def natural(key: str) -> list[tuple[int, int, str]]:
    """Sorting by this puts 9 before 10."""
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.findall(r"[0-9]+|[^0-9]+", key)]


def home(src: Path, *names: str) -> tuple[Path, tuple[str, ...]]:
    """Where a split lies: the first of the folders below `src` that is there, or else `src` itself.

    Returns:
        The folder, and the names that were looked for in vain if it is `src`.
    """
    for name in names:
        if (src / name).is_dir():
            return src / name, ()
    return src, names


def folder(root: Path, *names: str, option: str = "--src", vain: tuple[str, ...] = ()) -> Path:
    """The first of the folders below `root` that is there.

    Args:
        root: where to look.
        names: paths below it, or absolute ones.
        option: what the user can mend it with.
        vain: what else was looked for, for the message.

    Raises:
        ValueError: none is; tells what is there instead.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    others = [*map(str, (root / name for name in names[1:])), *vain]
    nor = f" (nor {', '.join(others)})" if others else ""
    raise ValueError(f"no folder {root / names[0]}{nor}; point {option} at it; {there(root)}")


def there(root: Path) -> str:
    """What a folder holds, for a message."""
    if not root.is_dir():
        return f"{root} is no folder"
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir() if not path.name.startswith("."))
    return f"{root} holds {', '.join(names[:10]) or 'nothing'}" + f" and {len(names) - 10} more" * (len(names) > 10)


def one_of(value: str | None, choices: Iterable[str], *, option: str) -> str:
    """`value`, if it is one of the choices.

    Raises:
        ValueError: it is not.
    """
    if value is None or value not in choices:
        raise ValueError(f"{option} {value or 'is needed'}: choose one of {', '.join(choices)}")
    return value


def _add(pairs: dict[str, Pair], pair: Pair, hint: str) -> None:
    if pair.key in pairs:
        other = pairs[pair.key]
        raise ValueError(f"{other.lq or other.gt} and {pair.lq or pair.gt} would both be sample {pair.key!r}: {hint}")
    pairs[pair.key] = pair


def _number(key: str) -> int:
    digits = re.findall(r"\d+", key)
    return int(digits[-1]) if digits else -1
