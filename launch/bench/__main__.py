"""What does it cost, here? `python -m launch.bench SUBCOMMAND`."""

import argparse
import sys

from launch.bench import checkpoint, loader, nets, pooling, prior, scaling
from launch.bench.race import preload
from launch.command import program
from launch.console import run_main

SUBCOMMANDS = {
    "checkpoint": checkpoint,
    "loader": loader,
    "nets": nets,
    "pooling": pooling,
    "prior": prior,
    "scaling": scaling,
}
"""Each a module with `add_arguments(parser)` and `run(args) -> exit code`; the first line of its docstring is shown."""


def main(argv: list[str] | None = None) -> int:
    """Parse and measure; returns the exit code."""
    parser = argparse.ArgumentParser(prog=program("launch.bench"), description="Measure, in turns and more than once.")
    subparsers = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for name, module in SUBCOMMANDS.items():
        assert module.__doc__
        summary = module.__doc__.splitlines()[0]
        sub = subparsers.add_parser(name, help=summary, description=summary)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return run_main(lambda: int(args.run(args)))


if __name__ == "__main__":
    preload("launch.bench.feeding", "launch.bench.passes", "launch.bench.masking", "segment_anything")
    sys.exit(main())
