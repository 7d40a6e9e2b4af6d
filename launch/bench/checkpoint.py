"""What a checkpoint costs on a disk: to write, to verify, to load; and of the time between two saves.

`write` is all that a run waits for, but for the gathering: files, hashes, syncing to the disk, renaming. Weights and
moments are random, and as large as the run's; of a real save the run's own time/checkpoint_s tells.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from dist_train import checkpoint
from dist_train.config import RunConfig, load_run, parse_run
from dist_train.tasks import build_task, count_parameters
from launch.bench.table import header, line

T = TypeVar("T")

COLUMNS = {"what": "<10", "seconds": ">10.3f", "MB/s": ">10.0f", "share": ">10.3%"}
"""Titles and formats."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("config", nargs="?", help="YAML file of the run (default: distill with two NAFNets, width 32)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that overrule the file")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="on the disk to be measured (default: runs)")
    parser.add_argument("--rounds", type=int, default=3, help="times; the median is printed (default: 3)")
    parser.add_argument("--minutes", type=float, default=10, help="between two saves, for `share` (default: 10)")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    config = load_run(args.config, args.overrides) if args.config else _two_nafnets()
    if args.rounds < 1 or args.minutes <= 0:
        raise ValueError("--rounds must be at least 1, --minutes above 0")
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        content = _content(config)
        seconds: dict[str, list[float]] = {"write": [], "verify": [], "load": []}
        for step in range(1, args.rounds + 1):
            content["state"]["step"] = step
            saved = _timed(seconds["write"], checkpoint.save, Path(folder), **content, keep=2)
            assert _timed(seconds["verify"], checkpoint.verify, saved) is None
            _timed(seconds["load"], checkpoint.load, saved)
        size_mb = sum(file.stat().st_size for file in saved.iterdir()) / 1e6
    parts = ", ".join(f"{part} {count:,}" for part, count in count_parameters(build_task(config)).items())
    print(f"parameters: {parts}\n{size_mb:.0f} MB, share of {args.minutes:g} minutes\n{header(COLUMNS)}")
    for what, laps in seconds.items():
        median = statistics.median(laps)
        share = median / (60 * args.minutes) if what == "write" else None
        print(line(COLUMNS, {"what": what, "seconds": median, "MB/s": size_mb / median, "share": share}))
    return 0


def _two_nafnets() -> RunConfig:
    return parse_run({"name": "bench", "data": {"train": "unused"}}, source="the default run")


def _content(config: RunConfig) -> dict[str, Any]:
    """Arguments of `checkpoint.save` for a run of this configuration."""
    task = build_task(config)
    model = task.state_dict()
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    moments = {key: {name: torch.rand_like(p) for name, p in trained.items()} for key in ("exp_avg", "exp_avg_sq")}
    return {
        "state": {"config": config.model_dump(mode="json")},
        "model": model,
        "ema": task.get_submodule("student").state_dict() if config.optim.ema_decay else None,
        "moments": {"step": 1, "scaler": None, **moments},
    }


def _timed(laps: list[float], act: Callable[..., T], *args: Any, **options: Any) -> T:
    begun = time.perf_counter()
    result = act(*args, **options)
    laps.append(time.perf_counter() - begun)
    return result
