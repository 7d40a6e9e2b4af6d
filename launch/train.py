"""Train a run: `python -m launch.train CONFIG [key.sub=value ...]`, alone or under accelerate launch or torchrun."""

import argparse
import sys

from dist_train import ranks
from dist_train.config import RunConfig, dump_run, load_run, plan_batch
from launch.console import run_main, set_up_logging


def main(argv: list[str] | None = None) -> int:
    """Parse, check or train; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.train",
        description="Train a restoration network, with or without semantic priors. The same command goes on from the "
        "newest checkpoint of the run.",
        epilog="example: accelerate launch --config_file launch/accelerate/cpu_2rank.yaml -m launch.train "
        "configs/derain_rain100l_nafnet.yaml optim.steps=100 name=trial",
    )
    parser.add_argument("config", help="YAML file of the run, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that overrule the file")
    parser.add_argument("--check", action="store_true", help="print the resolved run and exit")
    args = parser.parse_intermixed_args(argv)  # --check may stand anywhere

    def act() -> int:
        run = load_run(args.config, args.overrides)
        if args.check:
            if ranks.is_main():
                print(describe(run))
            return 0
        from dist_train.trainer import train

        train(run)
        return 0

    set_up_logging()
    return run_main(act, stopped="stopped; the same command goes on from the last checkpoint")


def describe(run: RunConfig) -> str:
    """The resolved configuration, the batch arithmetic and the size of the nets."""
    import torch

    from dist_train.tasks import build_task, count_parameters

    world = ranks.world_size()
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
