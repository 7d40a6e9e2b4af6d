"""Restore pictures with an exported student or an official file: `python -m launch.restore WEIGHTS INPUT OUTPUT`."""

import argparse
import sys
from pathlib import Path

from launch.console import add_net_option, run_main, set_up_logging


def main(argv: list[str] | None = None) -> int:
    """Parse and restore; returns the exit code: 1 if some pictures could not be restored, 2 if nothing was tried."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.restore",
        description="Restore a picture, or every picture in a folder and below it. Sizes, grey, alpha, 16 bit and "
        "file formats stay what they are.",
    )
    parser.add_argument(
        "weights",
        type=Path,
        help=".safetensors file that launch.export wrote, its card beside it, or a .pth of a net's official release",
    )
    parser.add_argument("input", type=Path, help="a picture or a folder")
    parser.add_argument("output", type=Path, help="a folder; for one picture a file name too")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--overwrite", action="store_true", help="replace outputs that exist; inputs are never replaced"
    )
    add_net_option(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: restore(args))


def restore(args: argparse.Namespace) -> int:
    """Restore each picture and name those that could not be."""
    import torch

    from dist_train.export import load_net
    from dist_train.nets.fast import prepare_for_inference
    from dist_train.restore import restore_folder

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU; python -m launch.doctor tells why")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    net, _ = load_net(args.weights, dict(args.net))
    result = restore_folder(
        prepare_for_inference(net, device=device), args.input, args.output, device=device, overwrite=args.overwrite
    )
    for picture, reason in result.failed.items():
        print(f"not restored: {picture}: {reason}", file=sys.stderr)
    print(f"restored {len(result.written)} of {len(result.written) + len(result.failed)} pictures to {args.output}")
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
