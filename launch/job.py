"""The first thing a batch job does: `python -m launch.job CONFIG [key.sub=value ...] --start NAME --world N`."""

import argparse
import sys

from dist_train.config import dump_run, load_run, plan_batch

# No torch up here: it takes seconds, on a node where as many GPUs wait as on all others.


def main(argv: list[str] | None = None) -> int:
    """Check the run, make RUN/jobs/NAME with its resolved configuration, print that folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.job",
        description="Check the configuration of a run for a number of ranks, before any is started, and make the "
        "folder in which this start of the job keeps what it was. Called by slurm/train.sh.",
    )
    parser.add_argument("config", help="YAML file of the run, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that overrule the file")
    parser.add_argument("--start", required=True, metavar="NAME", help="of this start of the job")
    parser.add_argument("--world", type=int, required=True, metavar="N", help="number of ranks")
    args = parser.parse_intermixed_args(argv)
    try:
        run = load_run(args.config, args.overrides)
        plan_batch(run.optim, args.world)
        folder = run.dir / "jobs" / args.start
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_run(run))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder.absolute())
    return 0


if __name__ == "__main__":
    sys.exit(main())
