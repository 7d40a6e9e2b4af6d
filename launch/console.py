"""What all entry points share: logging with the rank in front, and errors as one line a person can act on."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

import yaml

from dist_train import ranks
from dist_train.ranks import TrainingError
from shards.cache import ShardCache
from shards.schema import ShardError


def set_up_logging() -> None:
    """Log to stderr; every line names its rank, and ranks other than the main one speak up only with warnings."""
    logging.basicConfig(
        level=logging.INFO if ranks.is_main() else logging.WARNING,
        format=f"%(asctime)s [rank {ranks.rank()}] %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )


def add_net_option(parser: argparse.ArgumentParser) -> None:
    """The option --net, a list of (key, value), for `dist_train.export.load_net`."""
    parser.add_argument(
        "--net",
        nargs="+",
        default=[],
        type=setting,
        metavar="KEY=VALUE",
        help="what an official file cannot say of its net, for example img_size=128; launch.doctor lists it",
    )


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options --cache-dir and --cache-gib, for `cache_of`."""
    parser.add_argument("--cache-dir", help="where shards of a URL are kept (default: ~/.cache/restill/shards)")
    parser.add_argument("--cache-gib", type=float, default=50, help="the most it may hold (default: 50)")


def cache_of(args: argparse.Namespace) -> ShardCache:
    """The cache that the options name."""
    return ShardCache(args.cache_dir, limit_gib=args.cache_gib)


def setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE of a command line, the value read as YAML; a `type` for argparse."""
    key, equals, value = text.partition("=")
    try:
        if equals:
            return key, yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")


def run_main(main: Callable[[], int], *, stopped: str = "stopped") -> int:
    """Call `main`; what a user can mend is printed without a traceback and gives exit code 2, Ctrl-C gives 130.

    Errors of the configuration are met by all ranks alike, so every rank that fails says so and names itself.

    Args:
        main: the program; returns the exit code.
        stopped: what to say at Ctrl-C.
    """
    try:
        return main()
    except (ValueError, OSError, ShardError, TrainingError) as error:
        where = f" [rank {ranks.rank()}]" if ranks.world_size() > 1 else ""
        print(f"error{where}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
