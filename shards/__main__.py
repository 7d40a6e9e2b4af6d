"""Make, check and list folders of shards: `python -m shards --help`."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from shards.check import check
from shards.degrade import DEGRADATIONS
from shards.index import load_index
from shards.layouts import LAYOUTS, select
from shards.schema import MANIFEST, ShardError, load_manifest
from shards.synth import synthesise
from shards.write import write_shards


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0: done; 1: `check` found problems; 2: an error, told in one message; 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["masks"]:
        _masks(argv[1:])
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return args.run(args)
    except (ValueError, ShardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        return 130


def _write(args: argparse.Namespace) -> int:
    src = Path(args.src)
    found = LAYOUTS[args.layout](src, lq_dir=args.lq_dir, gt_dir=args.gt_dir)
    write_shards(
        select(found, args.select) if args.select else found,
        args.out,
        src=str(src.resolve()),
        layout=args.layout,
        split=args.split or Path(args.out).name,
        arguments={"lq_dir": args.lq_dir, "gt_dir": args.gt_dir, "select": args.select},
        skip_bad=args.skip_bad,
        shard_mib=args.shard_mib,
    )
    return 0


def _synth(args: argparse.Namespace) -> int:
    synthesise(args.degradation, args.out, src=args.src, seed=args.seed, variants=args.variants)
    return 0


def _masks(arguments: list[str]) -> NoReturn:
    # What makes masks is the library's, and shards imports nothing of it, nor torch. So the program lies with the other
    # entry points and takes the place of this one; it has options and help of its own.
    os.execv(sys.executable, [sys.executable, "-m", "launch.masks_ahead", *arguments])


def _check(args: argparse.Namespace) -> int:
    report = check(args.dir, deep=not args.quick)
    for problem in report.problems:
        print(f"problem: {problem}")
    verdict = f"{len(report.problems)} problems" if report.problems else "all good"
    print(f"{report.folder}: {report.num_samples} pairs in {report.num_shards} shards: {verdict}")
    return 1 if report.problems else 0


def _ls(args: argparse.Namespace) -> int:
    folder = Path(args.dir)
    folders = [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    if folders and not (folder / MANIFEST).exists():
        for inner in folders:
            manifest = load_manifest(inner)
            print(f"{inner}  {manifest.layout}, {manifest.split}: {manifest.num_samples} pairs")
        return 0
    manifest, rows = load_index(folder)
    print(f"{folder}  {manifest.layout}, {manifest.split}: {manifest.num_samples} pairs from {manifest.src}")
    if manifest.masks:
        print(f"masks of {manifest.masks.of}, by {manifest.masks.prior}")
    print(f"fingerprint {manifest.fingerprint}, {len(manifest.rejected)} rejected, arguments {manifest.arguments}")
    for number, shard in enumerate(manifest.shardlist):
        print(f"{shard.url}  {shard.nsamples} pairs, {shard.filesize} bytes, sha256 {shard.sha256[:16]}")
        for row in rows[rows["shard"] == number]:
            print(f"  {row['key'].decode()}  {row['w']}x{row['h']}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards", description="Pairs of pictures -> WebDataset shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    write = commands.add_parser("write", help="write the pairs of a data set on disk", description=_write_help())
    write.add_argument("layout", choices=LAYOUTS, help="how the data set lies on disk")
    write.add_argument("--src", default=".", help="folder of the data set")
    write.add_argument("--lq-dir", help="folder of the degraded pictures, below --src or absolute")
    write.add_argument("--gt-dir", help="folder of the clean pictures, likewise")
    write.add_argument("--out", required=True, help="folder to make")
    write.add_argument("--split", help="name of the part, for the manifest; default: the last part of --out")
    write.add_argument("--select", metavar="NUMBERS", help="only pairs with these numbers, such as 1-120 or 1-10,15")
    write.add_argument(
        "--skip-bad", action="store_true", help="leave bad pairs out, and record them, instead of refusing"
    )
    write.add_argument("--shard-mib", type=_at_least_one, default=256, help="size of a shard (default: 256)")
    write.set_defaults(run=_write)

    synth = commands.add_parser("synth", help="degrade clean photographs; writes OUT/train and OUT/val")
    synth.add_argument("degradation", choices=DEGRADATIONS)
    synth.add_argument("--src", help="folder of clean photographs; default: those that come inside scikit-image")
    synth.add_argument("--out", required=True, help="folder to make train and val in")
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--variants", type=_at_least_one, default=2, help="degradations of each picture (default: 2)")
    synth.set_defaults(run=_synth)

    commands.add_parser("masks", help="write a data set again, with masks; see `python -m shards masks --help`")

    checker = commands.add_parser("check", help="read everything, and compare with manifest, index and webdataset")
    checker.add_argument("dir")
    checker.add_argument("--quick", action="store_true", help="only manifest, index and the shards' sizes")
    checker.set_defaults(run=_check)

    ls = commands.add_parser("ls", help="list data sets, shards and samples")
    ls.add_argument("dir")
    ls.set_defaults(run=_ls)
    return parser


def _write_help() -> str:
    layouts = " ".join(
        f"{name}: {function.__doc__.splitlines()[0]}" for name, function in LAYOUTS.items() if function.__doc__
    )
    return f"Layouts. {layouts}"


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
