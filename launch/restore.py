"""Restore pictures with an exported student or an official file: `python -m launch.restore WEIGHTS INPUT OUTPUT`."""

import argparse
import sys
from pathlib import Path

from launch.command import program
from launch.console import add_net_option, device_of, run_main, set_up_logging


def main(argv: list[str] | None = None) -> int:
    """Parse and restore; returns the exit code: 1 if some pictures could not be restored, 2 if nothing was tried."""
    parser = argparse.ArgumentParser(
        prog=program("launch.restore"),
        description="Restore pictures, every picture in a folder and below it, or a video. Sizes, grey, alpha, 16 bit, "
        "colour profile and file format stay what they are; outputs that are there are skipped.",
        epilog="example: %(prog)s derain.safetensors rainy/ 'more/**/*.png' restored/",
    )
    parser.add_argument(
        "weights",
        type=Path,
        help=".safetensors file that launch.export wrote, its card beside it, or a .pth of a net's official release",
    )
    parser.add_argument("input", nargs="+", help="a picture, a video, a folder, or a pattern such as 'shots/**/*.png'")
    parser.add_argument("output", type=Path, help="a folder; for one file a file name too")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--overwrite", action="store_true", help="replace outputs that exist; inputs are never replaced"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures or frames of one size at once")
    parser.add_argument(
        "--tile",
        default="auto",
        metavar="PX",
        help="side of the tiles that large pictures go through in; 0: always whole (default: as memory allows); "
        "NAFNet, which pools over all it sees, restores a little differently in tiles",
    )
    parser.add_argument("--overlap", type=int, default=64, metavar="PX", help="what tiles share (default: 64)")
    parser.add_argument(
        "--tlc", type=int, default=0, metavar="PX", help="NAFNet: pool locally, for training crops of this side"
    )
    parser.add_argument("--ensemble", action="store_true", help="mean over 8 flips and turns: 8 times the work")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    add_net_option(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: restore(args), stopped="stopped; the same command goes on where it was")


def restore(args: argparse.Namespace) -> int:
    """Restore each picture and name those that could not be."""

    from dist_train.inference import Inference, fitting_restorer, restorer
    from dist_train.load import load_net
    from dist_train.restore import restore_files

    device = device_of(args.device)
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: at least 1 picture goes through at once")
    if args.tile != "auto" and not args.tile.isdecimal():
        raise ValueError(f"--tile {args.tile!r} is neither a number of px nor auto")
    options = Inference(
        tlc_px=args.tlc,
        ensemble=args.ensemble,
        tile_px=0 if args.tile == "auto" else int(args.tile),
        overlap_px=args.overlap,
        precision=args.precision,
    )
    net, _ = load_net(args.weights, dict(args.net))
    run = (fitting_restorer if args.tile == "auto" else restorer)(net, options, device=device)
    result = restore_files(run, args.input, args.output, device=device, batch=args.batch, overwrite=args.overwrite)
    for source, reason in result.failed.items():
        print(f"not restored: {source}: {reason}", file=sys.stderr)
    total = sum(map(len, result))
    print(f"restored {len(result.written)} of {total} to {args.output}")
    if result.skipped:
        print(f"skipped {len(result.skipped)} that were there already; --overwrite restores them again")
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
