"""Export the student of a training run, or a file of an official release: `python -m launch.export RUN OUT`."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.checkpoint import find
from dist_train.export import OFFICIAL_SUFFIXES, export_again, export_student
from dist_train.nets.official import UNSAID
from dist_train.track import read_metrics
from launch.console import add_net_option, run_main, set_up_logging


def main(argv: list[str] | None = None) -> int:
    """Parse and export; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.export",
        description="Write the student alone, as one .safetensors file and a JSON card of what it is. It then runs "
        "without SAM, VGG, the teacher, DeepSpeed and the data. Or as .pth, which the net's official program loads.",
    )
    parser.add_argument(
        "source",
        type=Path,
        help="a run's folder (its newest whole checkpoint is taken), one checkpoint, a .pth of a net's official "
        "release, or an export",
    )
    parser.add_argument(
        "out", type=Path, help="a .safetensors file, whose card is written beside it as .json; or a .pth file"
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the moving average, or the weights as trained; left out: the average if there is one",
    )
    add_net_option(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: export(args.source, args.out, ema=args.ema, fields=dict(args.net)))


def export(source: Path, out: Path, *, ema: bool | None, fields: Mapping[str, Any]) -> int:
    """Export, and say what it is."""
    if source.suffix in (".safetensors", *OFFICIAL_SUFFIXES):
        if ema is not None:
            raise ValueError(f"--ema and --no-ema choose between the weights of a run; {source} has one set")
        card = export_again(source, out, fields=fields)
        origin = f"from {source}"
    else:
        if fields:
            raise ValueError(f"--net is for official files; the run {source} says all of its net")
        checkpoint = find(source)
        if checkpoint is None:
            raise ValueError(f"no checkpoint in {source}; give the folder of a run, runs/NAME, that has saved one")
        card = export_student(checkpoint, out, ema=ema, scores=_scores(checkpoint, ema))
        origin = f"step {card['step']}, commit {card['commit']}"
    print(f"{out}: {card['net']['name']}, {card['parameters']:,} parameters, {origin}")
    for name, value in card["scores"].items():
        print(f"  {name} {value:.4f}")
    if out.suffix == ".pth":
        for key in UNSAID[card["net"]["name"]]:
            print(f"  this file cannot say that {key}={card['net'][key]}")
    return 0


def _scores(checkpoint: Path, ema: bool | None) -> dict[str, float]:
    """Validation of these very weights, if the run's record has it; validated is the average, if there is one."""
    if ema is False and (checkpoint / "ema.safetensors").exists():
        return {}
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    record = next((line for line in read_metrics(checkpoint.parent.parent) if line["step"] == step), {})
    return {name: value for name, value in record.items() if name.startswith("val/") and not name.endswith("/teacher")}


if __name__ == "__main__":
    sys.exit(main())
