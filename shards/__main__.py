"""Make, check and list folders of shards: `python -m shards --help`."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from shards.check import check
from shards.fetch import here, locate
from shards.index import load_index
from shards.layouts import LAYOUTS, select
from shards.leaks import find_leaks
from shards.options import LAYOUT_OPTIONS, flag, make_parser
from shards.reshard import adopt, reshard, tars_of
from shards.schema import MANIFEST, ShardError, load_manifest
from shards.sources import Recipe
from shards.storage import parse
from shards.synth import synthesise
from shards.write import write_shards


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0: done; 1: `check` found problems, or `leaks` leaks; 2: an error, told in one message; 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["masks"]:
        _masks(argv[1:])
    args = make_parser(_RUNS).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return args.run(args)
    except (ValueError, ShardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left, and the same command goes on", file=sys.stderr)
        return 130


def _write(args: argparse.Namespace) -> int:
    src, layout = Path(args.src), LAYOUTS[args.layout]
    given = {name: value for name in LAYOUT_OPTIONS if (value := getattr(args, name)) is not None}
    taken = ", ".join(map(flag, layout.options))
    if refused := given.keys() - set(layout.options):
        raise ValueError(f"{args.layout} takes no {flag(min(refused))}; it takes {taken or 'no such option'}")
    split = args.split or Path(args.out).name
    # A name that was not given says where to look only if the layout knows it.
    look = split if args.split or split in layout.counts else None
    out = here(args.out)
    options = layout.settle(src, split=look, **given)
    found = layout.find(src, split=look, **options)
    expected = layout.expected(split, options)
    if args.select:
        found = select(found, args.select)
    elif expected and len(found) not in expected.values() and not args.allow_count:
        told = ", ".join(f"{num} in {part}" for part, num in expected.items())
        raise ValueError(
            f"{src}: {len(found)} pairs found, {args.layout} has {told}; if it is meant to be so, add --allow-count, "
            "or --select some by number"
        )
    write_shards(
        found,
        out,
        src=str(src.resolve()),
        layout=args.layout,
        split=split,
        arguments={**options, "select": args.select, "kind": args.kind},
        kind=args.kind or layout.kind,
        recipe=_recipe(args),
        skip_bad=args.skip_bad,
        allow_suspicious=args.allow_suspicious,
        shard_mib=args.shard_mib,
        jobs=args.jobs,
        verify=args.verify,
    )
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    return Recipe(parse(args.storage or "keep"), args.to8, args.gray, args.max_mpix)


def _reshard(args: argparse.Namespace) -> int:
    src, out = [here(path) for path in args.src], here(args.out)
    sizes = {"shard_mib": args.shard_mib, "jobs": args.jobs}
    if len(src) == 1 and (src[0] / MANIFEST).is_file():
        others = ("lq_ext", "gt_ext", "split", "kind", "to8", "gray", "skip_bad", "allow_suspicious")
        if vain := [flag(name) for name in others if getattr(args, name)]:
            raise ValueError(f"{src[0]} is a data set of ours, of which {vain[0]} changes nothing: leave it out")
        reshard(src[0], out, storage=parse(args.storage) if args.storage else None, **sizes)
        return 0
    adopt(
        tars_of(src),
        out,
        lq_ext=args.lq_ext or "lq",
        gt_ext=args.gt_ext or "gt",
        split=args.split,
        **({"kind": args.kind} if args.kind else {}),
        recipe=_recipe(args),
        skip_bad=args.skip_bad,
        allow_suspicious=args.allow_suspicious,
        **sizes,
    )
    return 0


def _synth(args: argparse.Namespace) -> int:
    settings = {}
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: write it like --set sigma=15,50")
        settings[name] = value
    synthesise(
        args.degradation,
        here(args.out),
        src=args.src,
        seed=args.seed,
        variants=args.variants,
        settings=settings,
        jobs=args.jobs,
    )
    return 0


def _masks(arguments: list[str]) -> NoReturn:
    # What makes masks is the library's, and shards imports nothing of it, nor torch. So the program lies with the other
    # entry points and takes the place of this one; it has options and help of its own.
    os.execv(sys.executable, [sys.executable, "-m", "launch.masks_ahead", *arguments])


def _check(args: argparse.Namespace) -> int:
    report = check(here(args.dir), deep=not args.quick, jobs=args.jobs)
    print(*report.statistics, sep="\n", end="\n" * bool(report.statistics))
    for problem in report.problems:
        print(f"problem: {problem}")
    verdict = f"{len(report.problems)} problems" if report.problems else "all good"
    print(f"{report.folder}: {report.num_samples} pairs in {report.num_shards} shards: {verdict}")
    return 1 if report.problems else 0


def _leaks(args: argparse.Namespace) -> int:
    leaks = find_leaks(here(args.dir), here(args.other) if args.other else None)
    for leak in leaks:
        print(f"{leak.one}  {leak.other}  {'the same pixels' if leak.same else 'a copy'}")
    print(f"{len(leaks)} clean pictures of {args.dir} are in {args.other or 'it once more'}")
    return 1 if leaks else 0


def _ls(args: argparse.Namespace) -> int:
    folder = locate(args.dir)
    folders = [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))] if isinstance(folder, Path) else []
    if folders and not Path(folder, MANIFEST).exists():
        for inner in folders:
            manifest = load_manifest(inner)
            print(f"{inner}  {manifest.layout}, {manifest.split}: {manifest.num_samples} pairs")
        return 0
    manifest, rows = load_index(folder)
    print(f"{folder}  {manifest.layout}, {manifest.split}: {manifest.num_samples} pairs from {manifest.src}")
    if manifest.storage != "keep":
        print(f"stored as {manifest.storage}")
    if manifest.masks:
        print(f"masks of {manifest.masks.of}, by {manifest.masks.prior}")
    print(f"fingerprint {manifest.fingerprint}, {len(manifest.rejected)} rejected, arguments {manifest.arguments}")
    for number, shard in enumerate(manifest.shardlist):
        print(f"{shard.url}  {shard.nsamples} pairs, {shard.filesize} bytes, sha256 {shard.sha256[:16]}")
        for row in rows[rows["shard"] == number]:
            print(f"  {row['key'].decode()}  {row['w']}x{row['h']}")
    return 0


_RUNS = {"write": _write, "synth": _synth, "check": _check, "leaks": _leaks, "reshard": _reshard, "ls": _ls}


if __name__ == "__main__":
    sys.exit(main())
