"""Train a run: `python -m launch.train CONFIG [key.sub=value ...]`, alone or under accelerate launch or torchrun."""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from dist_train.config import RunConfig, dump_run, load_run, plan_batch
from launch.command import program
from launch.console import run_main, set_up_logging
from shards.schema import ShardError

STOPPED = 3
"""Exit code of a run that was asked to stop and has saved; 0 is a finished one, 2 an error that a person must mend."""


def main(argv: list[str] | None = None) -> int:
    """Parse, check or train; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("launch.train"),
        description="Train a restoration network, with or without semantic priors. The same command goes on from the "
        "newest checkpoint of the run.",
        epilog="example: accelerate launch --config_file launch/accelerate/cpu_2rank.yaml -m launch.train "
        "configs/derain_rain100l_nafnet.yaml optim.steps=100 name=trial",
    )
    parser.add_argument("config", help="YAML file of the run, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that overrule the file")
    parser.add_argument("--check", action="store_true", help="print the resolved run and exit")
    on = parser.add_argument_group("with --check", "estimate memory and step time on GPUs that need not be here")
    on.add_argument("--gpus", type=int, metavar="N", help="in all, one rank each")
    on.add_argument("--nodes", type=int, default=1, metavar="M", help="that they are spread over (default: 1)")
    on.add_argument("--gpu", default="A100", metavar="NAME", help="for example A100, H100, L40S (default: A100)")
    on.add_argument("--mfu", type=float, metavar="F", help="time/mfu of a short run; without it one is assumed")
    args = parser.parse_intermixed_args(argv)  # --check may stand anywhere
    from dist_train import ranks  # torch takes seconds, for which --help does not wait

    def act() -> int:
        run = load_run(args.config, args.overrides)
        if args.check:
            if ranks.is_main():
                lines = [] if args.gpus is None else _estimate(run, args)
                print("\n".join([describe(run, world=args.gpus), *(f"# {line}" for line in lines)]))
            return 0
        if args.gpus is not None:
            raise ValueError("--gpus is for --check; a launcher says how many ranks train")
        from dist_train.trainer import train

        saved, ended = train(run)
        if ranks.is_main():
            _tell(f"{ended}: {saved}")
        # To a launcher any code but 0 is a failure, which it reports at length, or starts again if it may. Whoever
        # reads the file needs no code.
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        return 0 if ended == "finished" or restarts or "RESTILL_OUTCOME" in os.environ else STOPPED

    def act_and_tell() -> int:
        try:
            return act()
        except (ValueError, ShardError, ranks.TrainingError) as error:  # of any rank: it may be the only one that knows
            far_away = isinstance(error, ShardError) and "://" in error.url  # its server may come back: worth a start
            if not far_away:
                _tell(f"refused: {error}")
            raise

    set_up_logging()
    return run_main(act_and_tell, stopped="stopped; the same command goes on from the last checkpoint")


def _tell(outcome: str) -> None:
    """Write how the run ended to the file that RESTILL_OUTCOME names, for a batch script; without it, to none."""
    if path := os.environ.get("RESTILL_OUTCOME"):
        with contextlib.suppress(OSError):  # it is also in the log
            Path(path).write_text(outcome + "\n")


def _estimate(run: RunConfig, args: argparse.Namespace) -> list[str]:
    from launch.estimate import Cluster, describe_estimate

    return describe_estimate(run, Cluster(args.gpus, args.nodes, args.gpu, args.mfu))


def describe(run: RunConfig, *, world: int | None = None) -> str:
    """The resolved configuration, the batch arithmetic (for `world` ranks, or those here) and the size of the nets."""
    import torch

    from dist_train import ranks
    from dist_train.tasks import build_task, count_parameters

    world = world or ranks.world_size()
    plan = plan_batch(run.optim, world)
    lines = [dump_run(run)]
    lines.append(
        f"# batch: {plan.global_batch} samples a step = {plan.batch_per_rank} a pass x {plan.grad_accum} passes "
        f"x {world} ranks; {run.optim.steps} steps = {run.optim.steps * plan.global_batch} samples"
    )
    with torch.device("meta" if "custom" not in _nets(run) else "cpu"):  # a net from elsewhere may read a file
        task = build_task(run)
    lines += [f"# {part}: {count:,} parameters" for part, count in count_parameters(task).items()]
    lines.append(f"# written to {run.dir}")
    return "\n".join(lines)


def _nets(run: RunConfig) -> set[str]:
    return {run.student.name} | ({run.teacher.net.name} if run.teacher.net else set())


if __name__ == "__main__":
    sys.exit(main())
