"""Score restored pictures: `python -m launch.evaluate WEIGHTS_OR_RUN SHARDS [--protocol rgb y_uint8 ...]`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.console import add_cache_options, add_net_option, cache_of, run_main, set_up_logging

if TYPE_CHECKING:
    import torch


def main(argv: list[str] | None = None) -> int:
    """Parse and score; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.evaluate",
        description="PSNR and SSIM of the degraded input and of the restored pictures, under named protocols. Works "
        "on one process or under a launcher, which shares the pictures out.",
    )
    parser.add_argument(
        "weights",
        type=Path,
        help="an exported student (.safetensors), a .pth of a net's official release, a run's folder, or a checkpoint",
    )
    parser.add_argument("shards", help="folder of shards to score on, or the URL of one")
    parser.add_argument("--protocol", nargs="+", default=["rgb", "y_uint8"], help="rgb, y_uint8, y_double, gopro")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="also write every picture's numbers to this file")
    add_cache_options(parser)
    add_net_option(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: score(args))


def score(args: argparse.Namespace) -> int:
    """Restore each picture once and print a table of all protocols."""
    from dist_train import ranks
    from dist_train.metrics import PROTOCOLS

    unknown = [name for name in args.protocol if name not in PROTOCOLS]
    if unknown:
        raise ValueError(f"--protocol {' '.join(unknown)}: there are {', '.join(PROTOCOLS)}")
    device = ranks.join_ranks(args.device)
    try:
        return _score(args, device)
    finally:
        ranks.stop_ranks()


def _score(args: argparse.Namespace, device: "torch.device") -> int:
    from dist_train import ranks
    from dist_train.checkpoint import find_agreed
    from dist_train.data.reader import ShardReader
    from dist_train.evaluate import as_records, evaluate, means
    from dist_train.export import load_net, student_of
    from dist_train.nets.fast import prepare_for_inference

    if args.weights.is_dir():
        if args.net:
            raise ValueError("--net is for official files; a run says all of its net")
        checkpoint = find_agreed(args.weights)
        if checkpoint is None:
            raise ValueError(f"{args.weights} holds no checkpoint; give a run's folder or an exported .safetensors")
        net = student_of(checkpoint)
    else:
        net, _ = load_net(args.weights, dict(args.net))
    reader = ShardReader(args.shards, cache_of(args))
    fast = prepare_for_inference(net, device=device)
    rows = evaluate(lambda batch: {"student_out": fast(batch.lq)}, reader, protocols=args.protocol, device=device)
    table = means(rows)
    if ranks.is_main():
        print(f"{args.weights} on {args.shards}, {len(reader)} pictures")
        print(f"{'protocol':10} {'':8} {'PSNR dB':>8} {'SSIM':>8}")
        for protocol in args.protocol:
            for name in ("input", "student"):
                psnr, ssim = (table[f"val/{protocol}/{metric}/{name}"] for metric in ("psnr", "ssim"))
                print(f"{protocol:10} {name:8} {psnr:8.4f} {ssim:8.5f}")
        if args.json:
            args.json.write_text(json.dumps({"means": table, "pictures": as_records(rows)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
