"""The command line of `python -m shards`: what each command takes."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shards.degrade import DEGRADATIONS
from shards.layouts import LAYOUTS
from shards.parallel import cores

Run = Callable[[argparse.Namespace], int]

LAYOUT_OPTIONS = {
    "lq_dir": ("FOLDER", "of the degraded pictures, below --src or absolute"),
    "gt_dir": ("FOLDER", "of the clean pictures, likewise"),
    "lq": ("GLOB", "the degraded pictures, such as 'noisy/*.png', below --src"),
    "gt": ("GLOB", "the clean pictures"),
    "map": ("RULE", "from the name of an lq to that of its gt, such as 's/_real$/_mean/'"),
    "blur": ("KIND", "which of the blurs that the data set comes with"),
    "variant": ("NAME", "which of the copies that go round; left open, the names of the files decide"),
}
"""Options of layouts; each layout takes some."""


def make_parser(runs: Mapping[str, Run]) -> argparse.ArgumentParser:
    """The parser; what it returns has `run`, the function of the command.

    Args:
        runs: by the name of the command.
    """
    prog = "restill shards" if Path(sys.argv[0]).stem == "restill" else "python -m shards"
    parser = argparse.ArgumentParser(prog=prog, description="Pairs of pictures -> WebDataset shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add in _COMMANDS.items():
        what, describe = add
        command = commands.add_parser(name, help=what, formatter_class=argparse.RawDescriptionHelpFormatter)
        describe(command)
        command.set_defaults(run=runs.get(name))
    return parser


def flag(option: str) -> str:
    """`lq_dir` as it is written on the command line."""
    return f"--{option.replace('_', '-')}"


def _write(command: argparse.ArgumentParser) -> None:
    command.description = "layouts:\n" + "\n".join(
        f"  {name:17} {(layout.find.__doc__ or '').splitlines()[0]}" for name, layout in LAYOUTS.items()
    )
    command.add_argument("layout", choices=LAYOUTS, metavar="LAYOUT", help="how the data set lies on disk")
    command.add_argument("--src", default=".", help="folder of the data set (default: this one)")
    command.add_argument("--out", required=True, help="folder to make, or to go on with")
    command.add_argument("--split", help="part of the data set, such as train; default: the last part of --out")
    for name, (metavar, what) in LAYOUT_OPTIONS.items():
        command.add_argument(flag(name), metavar=metavar, help=what)
    command.add_argument("--select", metavar="NUMBERS", help="only pairs with these numbers, such as 1-120 or 1-10,15")
    _add_writing(command)
    command.add_argument("--allow-count", action="store_true", help="take as many pairs as are there")
    command.add_argument(
        "--verify", action="store_true", help="going on, read again the shards that are finished already"
    )


def _reshard(command: argparse.ArgumentParser) -> None:
    command.add_argument("src", nargs="+", help="a data set of ours; or tars that others wrote, or a folder of such")
    command.add_argument("--out", required=True, help="folder to make, or to go on with")
    command.add_argument("--lq-ext", metavar="NAME", help="others' tars: what follows KEY. in lq's names (default: lq)")
    command.add_argument("--gt-ext", metavar="NAME", help="likewise, such as target.png (default: gt)")
    command.add_argument("--split", help="others' tars: part of the data set; default: the last part of --out")
    _add_writing(command)


def _add_writing(command: argparse.ArgumentParser) -> None:
    """What `write` and `reshard` both take."""
    command.add_argument(
        "--kind", choices=["rain", "blur", "noise", "any"],
        help="what is wrong with the lq, for the checks of pairs; default: the layout's",
    )  # fmt: skip
    command.add_argument(
        "--storage",
        help="keep (default): the files as they are; webp, tiles:64, raw: encoded anew without loss, for fast reading",
    )  # fmt: skip
    command.add_argument("--shard-mib", type=_positive, default=256, help="size of a shard, about (default: 256)")
    command.add_argument("--to8", choices=["shift"], help="of pictures of 16 bits, take the upper eight")
    command.add_argument("--gray", choices=["expand"], help="make RGB of pairs that are grey")
    command.add_argument(
        "--max-mpix", type=_positive, default=100, help="refuse larger pictures unread (megapixels, default: 100)"
    )
    command.add_argument("--skip-bad", action="store_true", help="leave bad pairs out, and record them")
    command.add_argument("--allow-suspicious", action="store_true", help="take pairs that do not look like such")
    _add_jobs(command)


def _synth(command: argparse.ArgumentParser) -> None:
    command.description = "degradations, and what --set may change:\n" + "\n".join(
        f"  {name:15} {(one.make.__doc__ or '').splitlines()[0]}\n{'':17} {_settings(one.options)}"
        for name, one in DEGRADATIONS.items()
    )
    command.add_argument("degradation", choices=DEGRADATIONS, metavar="DEGRADATION")
    command.add_argument(
        "--src",
        help="folder of clean photographs (for blur_frames: of a folder of frames for each sequence); default: those "
        "that come inside scikit-image",
    )
    command.add_argument("--out", required=True, help="folder to make train and val in")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--variants", type=_at_least_one, help="degradations of each picture (default: 2; rain_photoshop has 14)"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a number, or a range such as sigma=15,50; blur_frames takes window=7,13 too, frames of a mean",
    )  # fmt: skip
    _add_jobs(command)


def _settings(options: Mapping[str, Any]) -> str:
    told = (
        f"{name}={','.join(f'{end:g}' for end in value)}" if isinstance(value, tuple) else f"{name}={value}"
        for name, value in options.items()
    )
    return " ".join(told) or "nothing"


def _check(command: argparse.ArgumentParser) -> None:
    command.add_argument("dir")
    command.add_argument("--quick", action="store_true", help="only manifest, index and the shards' sizes")
    _add_jobs(command)


def _leaks(command: argparse.ArgumentParser) -> None:
    command.add_argument("dir", help="folder of shards")
    command.add_argument("other", nargs="?", help="another; without it, pictures are looked for that DIR holds twice")


def _ls(command: argparse.ArgumentParser) -> None:
    command.add_argument("dir")


def _masks(command: argparse.ArgumentParser) -> None:
    """Its options are another program's."""


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "write": ("write the pairs of a data set on disk", _write),
    "synth": ("degrade clean photographs; writes OUT/train and OUT/val", _synth),
    "masks": ("write a data set again, with masks; see `python -m shards masks --help`", _masks),
    "check": ("read everything, and compare with manifest, index and webdataset", _check),
    "leaks": ("find clean pictures that are in two data sets", _leaks),
    "reshard": ("write again: a data set of ours in another form, or tars that others wrote", _reshard),
    "ls": ("list data sets, shards and samples", _ls),
}


def _add_jobs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--jobs", type=_at_least_one, default=cores(), help="processes (default: one per core)")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value
