"""Draw degraded, restored, clean and masks: `python -m launch.before_after WEIGHTS SHARDS OUT.png`."""

import argparse
import sys
from pathlib import Path

from launch.console import add_cache_options, cache_of, run_main, set_up_logging


def main(argv: list[str] | None = None) -> int:
    """Parse and draw; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.before_after",
        description="One picture of what an exported student does to pictures of a data set, with PSNR on each, "
        "beside the masks that the prior of its training sees in the restored picture.",
    )
    parser.add_argument("weights", type=Path, help=".safetensors file that launch.export wrote")
    parser.add_argument("shards", help="folder of shards, or the URL of one")
    parser.add_argument("out", type=Path, help="PNG file")
    parser.add_argument("--keys", nargs="+", help="which pictures, by key (default: the first four)")
    add_cache_options(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: draw(args))


def draw(args: argparse.Namespace) -> int:
    """Restore, segment, draw."""
    import torch
    from torch import Tensor

    from dist_train.config import parse_run
    from dist_train.data.batch import Batch
    from dist_train.data.reader import ShardReader
    from dist_train.evaluate import draw_panels
    from dist_train.export import load_student
    from dist_train.pictures import grid, write_png
    from dist_train.priors import build_prior

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, card = load_student(args.weights)
    net = net.to(device)
    # What was made of an official file has no run.
    run = parse_run(card["config"], source=str(args.weights.with_suffix(".json"))) if "config" in card else None
    prior = None
    if run and run.task == "distill":  # servers are not waited for
        prior = build_prior(run.prior.of if run.prior.name == "remote" else run.prior, device)

    def restore(batch: Batch) -> dict[str, Tensor]:
        student_out = net(batch.lq)
        return {"student_out": student_out} | ({"idmap": prior(student_out, batch).idmap()} if prior else {})

    reader = ShardReader(args.shards, cache_of(args))
    keys = args.keys or reader.keys[:4]
    if absent := [key for key in keys if key not in reader.keys]:
        raise ValueError(f"--keys {' '.join(absent)}: {args.shards} holds {', '.join(reader.keys[:20])} ...")
    indices = [reader.keys.index(key) for key in keys]
    panels = draw_panels(restore, reader, indices=indices, device=device, student_title="restored")
    write_png(args.out, grid(list(panels.values())))
    print(f"drew {len(panels)} pictures: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
