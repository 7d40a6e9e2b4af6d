"""Export the student of a training run: `python -m launch.export RUN OUT.safetensors`."""

import argparse
import json
import sys
from pathlib import Path

from dist_train.checkpoint import find
from dist_train.export import export_student
from dist_train.track import read_metrics
from launch.console import run_main, set_up_logging


def main(argv: list[str] | None = None) -> int:
    """Parse and export; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.export",
        description="Write the student alone, as one .safetensors file and a JSON card of what it is. It then runs "
        "without SAM, VGG, the teacher, DeepSpeed and the data.",
    )
    parser.add_argument(
        "run", type=Path, help="a run's folder (its newest whole checkpoint is taken) or one checkpoint"
    )
    parser.add_argument("out", type=Path, help="a .safetensors file; the card is written beside it as .json")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the moving average, or the weights as trained; left out: the average if there is one",
    )
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: export(args.run, args.out, args.ema))


def export(run: Path, out: Path, ema: bool | None) -> int:
    """Export the newest checkpoint and say what it is."""
    checkpoint = find(run)
    if checkpoint is None:
        raise ValueError(f"no checkpoint in {run}; give the folder of a run, runs/NAME, that has saved one")
    export_student(checkpoint, out, ema=ema, scores=_scores(checkpoint, ema))
    card = json.loads(out.with_suffix(".json").read_text())
    print(
        f"{out}: {card['net']['name']}, {card['parameters']:,} parameters, step {card['step']}, commit {card['commit']}"
    )
    for name, value in card["scores"].items():
        print(f"  {name} {value:.4f}")
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
