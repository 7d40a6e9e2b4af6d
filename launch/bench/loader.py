"""What feeding costs: our loader against decoding alone and against other loaders, in every form of storage.

All take turns in one race. ms/pair is CPU time of the process and its workers for a pair of crops, the median over the
rounds; pairs/s are those of one core that does nothing else. The limit decodes the same files from memory, crops, turns
and stacks them, and nothing more; `of limit` is its time divided by this one's in the same round. `gain` is the time
that `keep` takes in the same loader, divided by this form's; `bytes` are those of keep's.

Pictures are mosaics of scikit-image's photographs, softened until they take as many bits as frames of GoPro and REDS
do, 3 to 4 a sub-pixel, as PNGs of zlib's level 6; or those of --src.
"""

import argparse
import importlib.resources
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_train.data.reader import ShardReader
from launch.bench.feeding import LOADERS, PACKAGES, Feed, prepare
from launch.bench.nets import size_option, width_and_height
from launch.bench.race import add_race_options, describe_machine, progress, race
from launch.bench.table import header, line
from shards.codec import decode_rgb
from shards.layouts import pairs
from shards.sources import Recipe
from shards.storage import parse
from shards.write import write_shards

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
COLUMNS = {
    "pictures": "<12", "storage": "<12", "bytes": "<8.2f", "loader": "<12", "workers": ">7", "ms/pair": ">10.2f",
    "pairs/s": ">9.1f", "of limit": ">10.3f", "gain": ">8.2f",
}  # fmt: skip
"""Titles and formats."""
SIZES = ("512x512", "1280x720")
STORAGES = ("keep", "webp", "tiles:128", "tiles:64", "raw")
PATCH_PX = 300  # no photograph is smaller
PNG_LEVEL = 6  # of zlib: what most programs write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--src", type=Path, metavar="DIR", help="pictures, lq/NAME.png and gt/NAME.png")
    pictures.add_argument("--size", nargs="+", type=size_option, default=SIZES, metavar="WxH", help="of mosaics")
    parser.add_argument(
        "--storage",
        nargs="+",
        default=STORAGES,
        metavar="FORM",
        help=f"of pictures of more than twice the crop (default: {' '.join(STORAGES)}); others are only kept",
    )
    parser.add_argument("--loader", nargs="+", choices=LOADERS, default=tuple(LOADERS), help="beside `limit`")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1], help="0: this process loads (default: 0 1)")
    parser.add_argument("--crop", type=int, default=256, metavar="PX")
    parser.add_argument("--batch", type=int, default=8, help="pairs (default: 8)")
    parser.add_argument("--pairs", type=int, default=8, help="in a set, a multiple of --batch (default: 8)")
    parser.add_argument("--seconds", type=float, default=0.5, help="a turn takes at least (default: 0.5)")
    add_race_options(parser, limit_s=60, first_limit_s=120)
    parser.set_defaults(threads=1)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if min(args.rounds, args.threads, args.batch, args.crop) < 1 or min(args.workers) < 0:
        raise ValueError("--rounds, --threads, --batch and --crop must be at least 1, --workers at least 0")
    if args.pairs < 1 or args.pairs % args.batch:
        raise ValueError(f"--pairs {args.pairs} must be a multiple of --batch {args.batch}")
    forms = [str(parse(name)) for name in dict.fromkeys(["keep", *args.storage])]
    machine = describe_machine(device=args.device, threads=args.threads)
    print("  ".join(f"{key}: {value}" for key, value in machine.items() if key != "load_before"))
    print(f"load before: {machine['load_before']:.2f}\n")
    with tempfile.TemporaryDirectory() as scratch:
        sources = {args.src.name: args.src} if args.src else _mosaics(Path(scratch), args.size, args.pairs)
        sets = [made for name, src in sources.items() for made in _write_sets(name, src, Path(scratch), forms, args)]
        print(f"\n{args.batch} crops of {args.crop} px\n{header(COLUMNS)}")
        records = _measure(sets, args)
    machine["load_after"] = os.getloadavg()[0]
    print(f"\nload after: {machine['load_after']:.2f}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "cases": records}, indent=1) + "\n")
    return 0


class Set(NamedTuple):
    """The same pictures in one form."""

    pictures: str
    storage: str
    folder: Path
    relative_bytes: float


def _mosaics(scratch: Path, sizes: list[str], num: int) -> dict[str, Path]:
    """Folders of pairs that take about as many bits as photographs do, by size."""
    folder = Path(str(importlib.resources.files("skimage"))) / "data"
    photographs = [decode_rgb((folder / name).read_bytes()) for name in PHOTOGRAPHS]
    for size in sizes:
        progress(f"mosaics of {size}")
        width, height = width_and_height(size)
        for number in range(num):
            rng = np.random.default_rng(number)
            mosaic = _mosaic(photographs, height, width, rng)
            gt, blurred = (cv2.GaussianBlur(mosaic, (0, 0), sigma) for sigma in (0.5, 1.0))
            lq = (blurred + rng.normal(0, 0.3, gt.shape)).round().clip(0, 255).astype(np.uint8)
            for role, rgb in (("lq", lq), ("gt", gt)):
                path = scratch / "pairs" / size / role / f"m-{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rgb).save(path, compress_level=PNG_LEVEL)
    progress("")
    return {size: scratch / "pairs" / size for size in sizes}


def _mosaic(photographs: list[np.ndarray], height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    mosaic = np.empty((height, width, 3), np.uint8)
    for top, left in itertools.product(range(0, height, PATCH_PX), range(0, width, PATCH_PX)):
        into = mosaic[top : top + PATCH_PX, left : left + PATCH_PX]
        h, w, _ = into.shape
        photograph = photographs[rng.integers(len(photographs))]
        y, x = (rng.integers(side - part + 1) for side, part in zip(photograph.shape, (h, w), strict=False))
        into[:] = photograph[y : y + h, x : x + w]
    return mosaic


def _write_sets(name: str, src: Path, scratch: Path, forms: list[str], args: argparse.Namespace) -> list[Set]:
    """The first pairs of a folder as shards, in each form; says what the pictures take."""
    found = pairs(src)[: args.pairs]
    if len(found) < args.pairs:
        raise ValueError(f"{src} holds {len(found)} pairs; --pairs {args.pairs} are wanted")
    sets, kept = [], 0
    for form in forms:
        progress(f"{name} as {form}")
        out = scratch / "sets" / f"{name}-{form.replace(':', '-')}"
        write_shards(found, out, src=str(src), layout="pairs", split="train", arguments={}, recipe=Recipe(parse(form)))
        reader = ShardReader(out)
        smallest = min(min(reader.size_px(number)) for number in range(len(reader)))
        stored = sum(tar.stat().st_size for tar in out.glob("*.tar"))
        kept = kept or stored
        sets.append(Set(name, form, out, stored / kept))
        if form == "keep":
            subpixels = sum(6 * h * w for h, w in map(reader.size_px, range(len(reader))))
            progress("")
            print(f"{name}: {len(reader)} pairs, {8 * stored / subpixels:.2f} bits a sub-pixel as they are")
            if smallest <= 2 * args.crop:
                break
    progress("")
    return sets


def _measure(sets: list[Set], args: argparse.Namespace) -> list[dict[str, Any]]:
    absent = [name for name in args.loader if name in PACKAGES and not importlib.util.find_spec(PACKAGES[name])]
    loaders = [name for name in args.loader if name != "limit" and name not in absent]
    kinds = [("limit", 0), *itertools.product(loaders, args.workers)]
    cases = {
        (*made[:2], loader, workers): Feed(
            loader=loader,
            folder=made.folder,
            num_pairs=args.pairs,
            workers=workers,
            batch=args.batch,
            crop_px=args.crop,
            lap_s=args.seconds,
            device=args.device,
            spent=torch.zeros(args.rounds + 1, 3, dtype=torch.float64).share_memory_(),
        )
        for made in sets
        for loader, workers in kinds
        if made.storage == "keep" or loader not in PACKAGES  # those decode all of a picture, whatever its form
    }
    progress(f"{len(cases)} cases, {args.rounds} rounds")
    raced = race(
        prepare,
        {" ".join(map(str, case)): feed for case, feed in cases.items()},
        device=args.device,
        threads=args.threads,
        rounds=args.rounds,
        limit_s=args.limit,
        first_limit_s=args.first_limit,
    )
    progress("")
    laps, left_out = {}, {}
    for case, feed in cases.items():
        outcome = raced[" ".join(map(str, case))]
        laps[case] = feed.spent[1 : 1 + len(outcome.laps)]
        left_out[case] = outcome.left_out
    bytes_of = {made[:2]: made.relative_bytes for made in sets}
    records = []
    for case, of_rounds in laps.items():
        pictures, storage, loader, workers = case
        row: dict[str, Any] = {"pictures": pictures, "storage": storage, "bytes": bytes_of[pictures, storage]}
        row |= {"loader": loader, "workers": workers}
        if len(of_rounds):
            row["ms/pair"] = 1000 * statistics.median(_cpu_s(of_rounds))
            row["pairs/s"] = 1000 / row["ms/pair"]
            row["of limit"] = _ratio(laps[pictures, storage, "limit", 0], of_rounds)
            row["gain"] = _ratio(laps[pictures, "keep", loader, workers], of_rounds)
        print(line(COLUMNS, row))
        if left_out[case]:
            print(f"  left out: {left_out[case]}")
        records.append(row | {"laps": of_rounds.tolist(), "left_out": left_out[case]})
    for name in absent:
        print(f"{name}: not installed")
    return records


def _cpu_s(laps: Tensor) -> list[float]:
    """CPU seconds a pair, of each lap."""
    return (laps[:, 1] / laps[:, 2]).tolist()


def _ratio(over: Tensor, under: Tensor) -> float | None:
    """Median over the rounds that both have."""
    found = [a / b for a, b in zip(_cpu_s(over), _cpu_s(under), strict=False)]
    return statistics.median(found) if found else None
