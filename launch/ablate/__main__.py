"""Train and compare variants: `python -m launch.ablate CONFIG --ladder [--seeds 0 1 2] [--sweep ...]`."""

import argparse
import logging
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_train.config import load_run
from launch.ablate.plan import CONTROLS, RUNGS, Trial, Variant, make_trials, make_variants, unique
from launch.command import program
from launch.console import run_main, set_up_logging

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Parse, train, compare; returns the exit code, 1 if a run failed."""
    parser = argparse.ArgumentParser(
        prog=program("launch.ablate"),
        description="What does each part of the method add? Trains the rungs of the ladder (student alone, + teacher, "
        "+ SPF, + SPD, + SGR), other priors, and settings one by one, from the same seeds and on the same samples; "
        "then writes OUT/table.md, table.json, ladder.png and crops.png. The same command goes on where it was "
        "stopped.",
        epilog="example: python -m launch.ablate configs/derain_rain100l_nafnet.yaml optim.steps=2000 --ladder "
        "--seeds 0 1 2 --sweep loss.spd.weight=0.005,0.05,0.5",
    )
    parser.add_argument("config", help="YAML file of the full method, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings for all runs")
    what = parser.add_argument_group("what is compared")
    what.add_argument("--ladder", action="store_true", help=f"all rungs: {', '.join(RUNGS)}")
    extra = f"only these; also {', '.join(CONTROLS)}, where nothing is distilled"
    what.add_argument("--rungs", nargs="+", default=[], metavar="RUNG", help=extra)
    priors_help = "the full method with each: a name, or a section such as '{name: psp, weights: FILE}'"
    what.add_argument("--priors", nargs="+", default=[], metavar="PRIOR", help=priors_help)
    sweep_help = "the full method with each value, key by key"
    what.add_argument("--sweep", nargs="+", default=[], metavar="KEY=VALUE,VALUE", help=sweep_help)
    what.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of each variant (default: 0)")
    how = parser.add_argument_group("how")
    how.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder of the runs (default: runs/ablate)")
    how.add_argument("--launcher", metavar="COMMAND", help="for example 'accelerate launch --config_file FILE'")
    how.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    how.add_argument("--list", action="store_true", help="print the list for slurm/ablate.sh, and train nothing")
    how.add_argument("--table", action="store_true", help="compare what is finished, and train nothing")
    args = parser.parse_intermixed_args(argv)
    set_up_logging()
    return run_main(lambda: ablate(args), stopped="stopped; the same command goes on")


def ablate(args: argparse.Namespace) -> int:
    """Plan, train, compare."""
    # The base is checked as the full method, which a rung turns parts of off.
    base = load_run(args.config, args.overrides)
    rungs = args.rungs or (list(RUNGS) if args.ladder else [])
    variants = make_variants(base, rungs=rungs, priors=args.priors, sweeps=args.sweep)
    trials = make_trials(args.config, args.overrides, variants, seeds=args.seeds, out=args.out)
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: one run at a time is the least")
    if args.list:
        print("\n".join(shlex.join(trial.arguments) for trial in unique(trials)))
        return 0
    from launch.ablate.running import check_same, train_all

    check_same(unique(trials))
    failed = {}
    if not args.table:
        launcher = _launcher(args.launcher)
        failed = train_all(unique(trials), launcher=launcher, jobs=args.jobs, logs=args.out / "logs")
    _compare(variants, trials, args.out)
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def _compare(variants: Sequence[Variant], trials: Sequence[Trial], out: Path) -> None:
    from dist_train.published import published
    from launch.ablate.draw import draw_crops, draw_ladder
    from launch.ablate.running import is_finished
    from launch.ablate.scores import read_scores
    from launch.ablate.table import as_json, make_rows, markdown

    finished = [trial for trial in trials if is_finished(trial)]
    scores = read_scores(finished)
    rows = make_rows(variants, scores)
    if not rows:
        raise ValueError(f"{out}: no run is finished yet, so that there is nothing to compare")
    protocol, data = scores[0].protocol, str(finished[0].run.data.val)
    paper = published("distill-5") if any(row.group == "ladder" for row in rows) else []
    text = markdown(rows, protocol=protocol, data=data, published=paper)
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text)
    (out / "table.json").write_text(as_json(rows, protocol=protocol, data=data, published=paper))
    draw_ladder(rows, out / "ladder.png", protocol=protocol, data=data)
    first: dict[str, Trial] = {}
    for trial in finished:
        if trial.variant.group in ("ladder", "priors"):
            first.setdefault(trial.variant.name, trial)
    draw_crops(list(first.values()) or finished[:1], out / "crops.png")
    print(f"{out}: table.md, table.json, ladder.png, crops.png")
    if absent := [trial.run.name for trial in unique(trials) if trial not in finished]:
        print(f"not finished, and left out: {', '.join(absent)}")


def _launcher(command: str | None) -> list[str]:
    if command is None:
        return [sys.executable]
    first, *rest = shlex.split(command)
    beside = Path(sys.executable).with_name(first)  # of this environment, which need not be activated
    if not shutil.which(first) and not beside.exists():
        raise ValueError(f"--launcher {command}: there is no command {first}")
    return [str(beside) if beside.exists() else first, *rest]


if __name__ == "__main__":
    sys.exit(main())
