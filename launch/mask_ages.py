"""How fast cached masks go stale: `python -m launch.mask_ages RUN`."""

import argparse
import sys
from pathlib import Path

import numpy as np

from launch.console import run_main, set_up_logging


def main(argv: list[str] | None = None) -> int:
    """Parse and compare; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.mask_ages",
        description="Compare the masks of each sample that a run with prior.name=cached left, version with version: "
        "the mean IoU of best partners, by age. A run keeps every version if it remakes them at each visit, and a "
        "checkpoint lies in each epoch and stays: prior.refresh=1 checkpoint.every=HALF_THE_STEPS_OF_AN_EPOCH "
        "checkpoint.keep=1000. Checkpoints at the ends of epochs alone lose version 0.",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: compare(args.run))


def compare(folder: Path) -> int:
    """Print one line for each age: pairs, and IoU, over the whole run and its first and last third."""
    from dist_train.config import load_run
    from dist_train.data.mixture import open_training
    from dist_train.priors.mask_files import iou_by_age
    from shards.cache import ShardCache

    data = load_run(folder / "config.yaml").data
    reader = open_training(data, ShardCache(data.cache_dir, limit_gib=data.cache_gib))
    sizes_px = {key: reader.size_px(number) for number, key in enumerate(reader.keys)}
    ages = iou_by_age(folder / "masks", sizes_px)
    if not ages:
        raise ValueError(f"{folder / 'masks'} holds no two versions of any sample; --help says how to keep them")
    last = max(epoch + age for age, pairs in ages.items() for epoch, _ in pairs)
    print(
        f"{'age':>4} {'pairs':>6} {'IoU':>6} {'early':>6} {'late':>6}   early: made in the first third, late: the last"
    )
    for age, pairs in ages.items():
        early = [iou for epoch, iou in pairs if epoch < last / 3]
        late = [iou for epoch, iou in pairs if epoch >= last * 2 / 3]
        means = [f"{np.mean(some):6.3f}" if some else "     -" for some in ([iou for _, iou in pairs], early, late)]
        print(f"{age:4} {len(pairs):6} {' '.join(means)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
