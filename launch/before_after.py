"""Draw degraded, restored, clean and masks: `python -m launch.before_after WEIGHTS SHARDS OUT.png`."""

import argparse
import sys
from pathlib import Path

from launch.command import program
from launch.console import add_cache_options, cache_of, device_of, run_main, set_up_logging
from launch.with_masks import add_prior_options, chosen_prior, restorer_with_masks


def main(argv: list[str] | None = None) -> int:
    """Parse and draw; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("launch.before_after"),
        description="One picture of what an exported student does to pictures of a data set, with PSNR on each, "
        "beside the masks that the prior of its training sees in the restored picture (in the degraded one if the net "
        "wants masks).",
    )
    parser.add_argument("weights", type=Path, help=".safetensors file that launch.export wrote")
    parser.add_argument("shards", help="folder of shards, or the URL of one")
    parser.add_argument("out", type=Path, help="PNG file")
    parser.add_argument("--keys", nargs="+", help="which pictures, by key (default: the first four)")
    add_prior_options(parser)
    add_cache_options(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: draw(args))


def draw(args: argparse.Namespace) -> int:
    """Restore, segment, draw."""
    from torch import Tensor

    from dist_train.data.batch import Batch
    from dist_train.data.reader import ShardReader
    from dist_train.evaluate import draw_panels
    from dist_train.load import load_student, run_of
    from dist_train.pictures import grid, write_png
    from dist_train.priors import prior_for

    device = device_of("auto")
    net, card = load_student(args.weights)
    net, run = net.to(device), run_of(card, source=args.weights.with_suffix(".json"))
    reader = ShardReader(args.shards, cache_of(args))
    wants_masks = getattr(net, "wants_masks", False)
    prior = None
    if wants_masks or args.prior or (run and run.uses_masks):
        prior = prior_for(chosen_prior(args, run), reader.masks_note, device, where=args.shards)
    if wants_masks and prior:
        restore = restorer_with_masks(net, prior, device)
    else:

        def restore(batch: Batch) -> dict[str, Tensor]:
            student_out = net(batch.lq)
            return {"student_out": student_out} | ({"idmap": prior(student_out, batch).idmap()} if prior else {})

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
