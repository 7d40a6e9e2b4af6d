"""Export the student of a training run, or a file of an official release: `python -m launch.export RUN OUT`.

OUT.safetensors     the weights, with OUT.json beside
OUT.pth             the weights, for the net's official program
OUT.onnx            a graph for onnxruntime
OUT.pt2             a graph for PyTorch alone; OUT.aoti.pt2: compiled
OUT --hub           a folder with a model card, for the Hugging Face hub
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.checkpoint import find
from dist_train.export import export_again, export_student
from dist_train.load import OFFICIAL_SUFFIXES, WEIGHTS
from dist_train.nets.official import UNSAID, UNSAID_OF_MASKS
from dist_train.track import read_metrics
from launch.command import program
from launch.console import add_net_option, run_main, set_up_logging


def main(argv: list[str] | None = None) -> int:
    """Parse and export; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("launch.export"),
        description="Write the student alone, as one .safetensors file and a JSON card of what it is. It then runs "
        "without SAM, VGG, the teacher, DeepSpeed and the data. Or as .pth, which the net's official program loads; or "
        "as a graph that runs without this program, for pictures of any size: .onnx, .pt2 (torch.export), .aoti.pt2 "
        "(compiled for --device). Whatever it writes is read back and compared with the net before it says so.",
    )
    parser.add_argument(
        "source",
        type=Path,
        help="a run's folder (its newest whole checkpoint is taken), one checkpoint, a .pth of a net's official "
        "release, or an export",
    )
    parser.add_argument(
        "out",
        type=Path,
        help="a .safetensors file, whose card is written beside it as .json; or a .pth, .onnx, .pt2 or .aoti.pt2 file; "
        "with --hub, a folder",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the moving average, or the weights as trained; left out: the average if there is one",
    )
    parser.add_argument("--device", default="cpu", help="what an .aoti.pt2 is compiled for, for example cuda")
    hub = parser.add_argument_group("a folder as the Hugging Face hub keeps it: weights, config.json, model card")
    hub.add_argument("--hub", action="store_true", help="write OUT as such a folder")
    hub.add_argument("--licence", metavar="ID", help="of the weights, as the hub spells it, for example mit")
    hub.add_argument(
        "--pictures", nargs="+", type=Path, metavar="PNG", help="to show (default: those the run drew of these weights)"
    )
    hub.add_argument("--push", metavar="OWNER/NAME", help="upload it there; private, unless it is there already")
    hub.add_argument("--public", action="store_true", help="let all see what --push makes")
    add_net_option(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    if args.hub:
        return run_main(lambda: export_folder(args))
    for name in ("licence", "pictures", "push", "public"):
        if getattr(args, name):
            parser.error(f"--{name} is of --hub")
    return run_main(lambda: export(args.source, args.out, ema=args.ema, fields=dict(args.net), device=args.device))


def export_folder(args: argparse.Namespace) -> int:
    """Export as a folder of the hub, and push it if asked to."""
    from dist_train.hub import complete, push

    pictures = args.pictures
    if pictures is None:
        pictures = [] if args.source.is_file() else _pictures(_checkpoint(args.source), args.ema)
    if absent := [str(path) for path in pictures if not path.is_file()]:
        raise ValueError(f"--pictures {' '.join(absent)}: no such file")
    code = export(args.source, args.out / WEIGHTS, ema=args.ema, fields=dict(args.net))
    complete(args.out, licence=args.licence, pictures=pictures)
    print(f"{args.out}: for the hub, with {len(pictures)} pictures")
    if args.push:
        print(f"pushed: {push(args.out, args.push, public=args.public)}")
    return code


def export(source: Path, out: Path, *, ema: bool | None, fields: Mapping[str, Any], device: str = "cpu") -> int:
    """Export, and say what it is."""
    if source.suffix in (".safetensors", *OFFICIAL_SUFFIXES):
        if ema is not None:
            raise ValueError(f"--ema and --no-ema choose between the weights of a run; {source} has one set")
        card = export_again(source, out, fields=fields, device=device)
        origin = f"from {source}"
    else:
        if fields:
            raise ValueError(f"--net is for official files; the run {source} says all of its net")
        checkpoint = _checkpoint(source)
        card = export_student(checkpoint, out, ema=ema, scores=_scores(checkpoint, ema), device=device)
        origin = f"step {card['step']}, commit {card['commit']}"
    print(f"{out}: {card['net']['name']}, {card['parameters']:,} parameters, {origin}")
    for name, value in card["scores"].items():
        print(f"  {name} {value:.4f}")
    if graph := card.get("graph"):
        print(f"  differs from the net by {graph['max_difference']:.1e} at most, at {len(graph['compared_at'])} sizes")
    if out.suffix == ".pth":
        said = card["net"] | card.get("conditioning", {})
        for key in (*UNSAID[card["net"]["name"]], *(UNSAID_OF_MASKS if "conditioning" in card else ())):
            print(f"  this file cannot say that {key}={said[key]}")
    return 0


def _checkpoint(source: Path) -> Path:
    found = find(source)
    if found is None:
        raise ValueError(f"no checkpoint in {source}; give the folder of a run, runs/NAME, that has saved one")
    return found


def _validated_step(checkpoint: Path, ema: bool | None) -> int | None:
    """The step at which the run's record speaks of these very weights: what is validated is the average, if any."""
    if ema is False and (checkpoint / "ema.safetensors").exists():
        return None
    step: int = json.loads((checkpoint / "state.json").read_text())["step"]
    return step


def _pictures(checkpoint: Path, ema: bool | None) -> list[Path]:
    """What the run drew of these weights."""
    step = _validated_step(checkpoint, ema)
    return [] if step is None else sorted((checkpoint.parent.parent / "pictures").glob(f"**/*-{step:08d}.png"))


def _scores(checkpoint: Path, ema: bool | None) -> dict[str, float]:
    """Validation of these weights, if the run's record has it."""
    step = _validated_step(checkpoint, ema)
    record = next((line for line in read_metrics(checkpoint.parent.parent) if line["step"] == step), {})
    return {
        name: value
        for name, value in record.items()
        if name.startswith("val/") and not name.endswith(("/teacher", "/lead"))
    }


if __name__ == "__main__":
    sys.exit(main())
