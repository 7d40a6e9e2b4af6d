"""Write one HTML page about runs: `python -m launch.report RUN... [--out report.html]`."""

import argparse
import sys
from pathlib import Path

from launch.command import program
from launch.console import add_cache_options, cache_of, device_of, run_main, set_up_logging
from shards.files import write_whole


def main(argv: list[str] | None = None) -> int:
    """Parse and write; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("launch.report"),
        description="Write one HTML page that needs no network: what the runs are, their scores under every protocol, "
        "validation pictures restored by their newest checkpoints with sliders, error maps and masks, curves of all "
        "that was logged, configurations. Several runs stand side by side.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument("--out", type=Path, help="HTML file (default: report.html in the first run's folder)")
    parser.add_argument("--pictures", type=int, default=4, metavar="N", help="how many to show (default: the first 4)")
    parser.add_argument("--keys", nargs="+", default=[], help="which pictures to show instead, by key")
    parser.add_argument("--data", metavar="SHARDS", help="pictures from this folder or URL (default: each data.val)")
    parser.add_argument("--all", action="store_true", help="score all pictures, not only those shown")
    parser.add_argument(
        "--teacher",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show teacher and masks; with SAM on a CPU each picture takes minutes",
    )
    parser.add_argument(
        "--crop-px", type=int, default=512, metavar="PX", help="show the middle of larger pictures; 0: all of them"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add_cache_options(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: report(args))


def report(args: argparse.Namespace) -> int:
    """Read, restore, write."""
    from datetime import datetime

    import torch

    from dist_train.record import commit
    from dist_train.report.page import render
    from dist_train.report.runs import read_runs, restore_pictures

    device = device_of(args.device)
    records = read_runs(args.runs)
    pictures = restore_pictures(
        records,
        num=args.pictures,
        keys=args.keys,
        data=args.data,
        score_all=args.all,
        teacher=args.teacher,
        crop_px=args.crop_px,
        device=torch.device(device),
        cache=cache_of(args),
    )
    made = f"Made by restill {commit()[:12]} on {datetime.now().astimezone():%Y-%m-%d %H:%M %z}."
    out = args.out or records[0].folder / "report.html"
    write_whole(out, render(records, pictures, made=made))
    for record in records:
        for note in record.notes:
            print(f"{record.label}: {note}", file=sys.stderr)
    print(f"{out}: {len(records)} runs, {len(pictures)} pictures, {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
