"""Scaling: steps of 1, 2, 4 gloo ranks here, a cost model fitted to them, and what it foretells to 1,024 ranks.

The real engine runs on as many ranks as there are cores. For more, and to test the model, ranks sleep instead of
computing, with a spread that is drawn; engine and all-reduce stay real. The model (launch/step_time.py) is fitted to
the two smallest worlds alone and then foretells all of them. Worlds take turns, so that what else the machine does
meets all alike; `ratio` is the mean step over the one foretold.

What is foretold for more ranks is an ESTIMATE from the FLOPs of the run's nets and from assumptions, all printed.
"""

import argparse
import json
import os
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.config import RunConfig, load_run, parse_run
from launch.bench.race import add_race_options, describe_machine, preload, progress
from launch.bench.stepping import Case, Told, peak_mib, prepare
from launch.bench.table import header, line
from launch.bench.world import World
from launch.estimate import BETWEEN_NODES, SPREAD, Cluster, sample_work, step_cost
from launch.memory import rank_bytes
from launch.step_time import AllReduce, Link, Scaled, StepCost, Steps, fit_link, fit_step, strong_scaling, weak_scaling

TINY = {
    "name": "scaling",
    "data": {"train": "-", "crop_px": 64},
    "student": {"name": "nafnet", "width": 16, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    "prior": {"name": "regions"},
    "features": {"arch": "vgg19_16x", "weights": "random"},
    "loss": {"sgr": {"weight": 1.0, "normalize": True}},
    "optim": {"global_batch": 2},
}
"""What is measured where no CONFIG is named; global_batch is each rank's."""
MEASURED = {
    "what": "<22", "ranks": ">6", "step ms": ">9.1f", "own ms": ">9.1f", "foretold": ">10.1f", "ratio": ">7.2f",
    "efficiency": ">11.2f", "foretold eff.": ">14.2f", "fitted": ">8",
}  # fmt: skip
FORETOLD = {
    "ranks": ">6", "weak: batch": ">12", "step ms": ">9.1f", "waiting": ">9.1f", "all-reduce": ">11.1f",
    "eff.": ">6.2f", "strong: batch": ">15", "ms": ">9.1f", "of waiting": ">11.1f", "of all-red.": ">12.1f",
    "eff. ": ">6.2f",
}  # fmt: skip
"""Titles and formats."""
SIZES = (2**16, 2**20, 2**22)
"""Bytes of the all-reduces that the link is fitted to."""
FITTED = 2
"""Of the worlds, smallest first, so many are fitted to."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("config", nargs="?", help="a run's YAML; its global batch becomes each rank's (default: tiny)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that overrule the file")
    parser.add_argument("--ranks", type=_ranks_option, default=[1, 2, 4], metavar="N,N...", help="(default: 1,2,4)")
    parser.add_argument("--steps", type=int, default=4, help="of a world in its turn (default: 4)")
    parser.add_argument("--sleep-ms", type=float, default=200.0, help="instead of computing (default: 200)")
    parser.add_argument(
        "--spread", nargs="+", type=float, default=[0.0, 0.3], metavar="CV", help="of the sleep (default: 0 0.3)"
    )
    parser.add_argument("--parameters", type=int, default=10**6, help="of what is trained asleep (default: 1000000)")
    parser.add_argument("--gpu", default="A100", help="to foretell for (default: A100)")
    parser.add_argument("--mfu", type=float, help="time/mfu of a run; without it one is assumed")
    parser.add_argument("--bandwidth", type=float, default=BETWEEN_NODES.bytes_per_s / 1e9, metavar="GB/S")
    parser.add_argument("--latency", type=float, default=BETWEEN_NODES.latency_s * 1e6, metavar="US", help="of a hop")
    parser.add_argument("--cv", type=float, default=SPREAD, help=f"spread between pictures (default: {SPREAD:g})")
    parser.add_argument("--global-batch", type=int, default=1024, help="for strong scaling (default: 1024)")
    add_race_options(parser, limit_s=120, first_limit_s=120)


def _ranks_option(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not N,N,... such as 1,2,4")
    return sorted({int(part) for part in parts})


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    if min(args.steps, args.rounds, args.parameters, args.global_batch) < 1:
        raise ValueError("--steps, --rounds, --parameters and --global-batch must be at least 1")
    if args.ranks[0] != 1 or len(args.ranks) < FITTED:
        raise ValueError(
            f"--ranks {','.join(map(str, args.ranks))} must hold 1 and another: the model is fitted to two"
        )
    machine = describe_machine(device="cpu", threads=1)
    print("  ".join(f"{key}: {value}" for key, value in machine.items() if key != "load_before"))
    print(f"load before: {machine['load_before']:.2f}\n")
    config = _read(args)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it says on stdout that it found no other
    preload("deepspeed", "launch.bench.stepping")
    records = measure(config, args, cores=machine["cores"])
    machine["load_after"] = os.getloadavg()[0]
    print(f"\nload after: {machine['load_after']:.2f}\n")
    foretold = foretell(config, args)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "cases": records, "foretold": foretold}, indent=1) + "\n")
    return 0


def _read(args: argparse.Namespace) -> RunConfig:
    run = load_run(Path(args.config), args.overrides) if args.config else parse_run(TINY, source="launch.bench.scaling")
    tree = run.model_dump(mode="json")
    tree["optim"] |= {"batch_per_rank": None, "ema_decay": 0.0}
    tree["engine"] |= {"device": "cpu"}
    return parse_run(tree, source=args.config or "launch.bench.scaling")


def of_world(run: RunConfig, ranks: int) -> RunConfig:
    """The run with as much for each of so many ranks as it has in all."""
    tree = run.model_dump(mode="json")
    tree["optim"]["global_batch"] *= ranks
    return parse_run(tree, source="launch.bench.scaling")


def measure(run: RunConfig, args: argparse.Namespace, *, cores: int) -> list[dict[str, Any]]:
    """Run all worlds, fit the model to the smallest, print and return what both say of each."""
    real = [n for n in args.ranks if n <= cores]
    if real != args.ranks:
        print(f"{cores} cores: the engine computes on up to {cores} ranks; on more, ranks sleep instead of computing")
    cases: dict[str, dict[int, Case]] = {}
    if len(real) >= FITTED:
        cases["computing"] = {n: Case(of_world(run, n)) for n in real}
    for spread in args.spread:
        cases[f"sleeping, cv {spread:g}"] = {
            n: Case(of_world(run, n), args.sleep_ms / 1e3, spread, args.parameters) for n in args.ranks
        }
    lines, records = [], []
    for what, worlds in cases.items():
        steps, link, num_bytes, told = _measured(what, worlds, args)
        cost = fit_step([steps[n] for n in args.ranks[:FITTED]], link, num_bytes=num_bytes)
        print(f"{what}: {_say_fit(cost, link)}")
        for n in worlds:
            lines.append(_row(what, steps, n, cost, link, fitted=n in args.ranks[:FITTED]))
            records.append(lines[-1] | {"wall_s": steps[n].wall_s.tolist(), "own_s": steps[n].own_s.tolist()})
        if what == "computing":
            _say_slowdown(steps)
            _say_memory(worlds, told)
    print(f"\n{header(MEASURED)}")
    for row in lines:
        print(line(MEASURED, row))
    return records


def _measured(
    what: str, cases: dict[int, Case], args: argparse.Namespace
) -> tuple[dict[int, Steps], Link, int, dict[int, list[Told]]]:
    told: dict[int, list[list[Told]]] = {n: [] for n in cases}
    sent: list[AllReduce] = []
    with ExitStack() as stack:
        worlds = {n: stack.enter_context(World(n, prepare, case, limit_s=args.limit)) for n, case in cases.items()}
        for n, world in worlds.items():
            progress(f"{what}: {n} ranks")
            world.ask(("steps", 2))  # which allocate, and fill caches
        for _ in range(args.rounds):
            for n, world in worlds.items():
                told[n].append(world.ask(("steps", args.steps)))
                sent += _sent(world, n) if n in args.ranks[1:FITTED] else []
        num_bytes = 4 * worlds[1].ask(("parameters", 0))[0]
    progress("")
    return (
        {n: _steps(rounds) for n, rounds in told.items()},
        fit_link(sent),
        num_bytes,
        {n: t[-1] for n, t in told.items()},
    )


def _sent(world: World, ranks: int) -> list[AllReduce]:
    median = {size: statistics.median(world.ask(("all_reduce", size))[0]) for size in SIZES}
    return [AllReduce(ranks, size, seconds) for size, seconds in median.items()]


def _steps(rounds: list[list[Told]]) -> Steps:
    """Of the rounds of one world."""
    wall_s = np.concatenate([np.mean([rank.wall_s for rank in told], axis=0) for told in rounds])
    own_s = np.concatenate([np.transpose([rank.own_s for rank in told]) for told in rounds])
    return Steps(wall_s, own_s, calls=rounds[-1][0].calls)


def _say_fit(cost: StepCost, link: Link) -> str:
    return (
        f"T {cost.compute_s * 1e3:.1f} ms, cv {cost.spread:.3f}, f {cost.fixed_s * 1e3:.1f} ms, gradients "
        f"{cost.num_bytes / 1e6:.2f} MB in {cost.calls:g} calls, {link.bytes_per_s / 1e9:.2f} GB/s, "
        f"{link.latency_s * 1e6:.0f} us"
    )


def _row(what: str, steps: dict[int, Steps], n: int, cost: StepCost, link: Link, *, fitted: bool) -> dict[str, Any]:
    wall_s, foretold_s = float(steps[n].wall_s.mean()), cost.seconds(n, link)
    return {
        "what": what,
        "ranks": n,
        "step ms": wall_s * 1e3,
        "own ms": float(steps[n].own_s.mean()) * 1e3,
        "foretold": foretold_s * 1e3,
        "ratio": wall_s / foretold_s,
        "efficiency": float(steps[1].wall_s.mean()) / wall_s,
        "foretold eff.": cost.efficiency(n, link),
        "fitted": "yes" if fitted else "no",
    }


def _say_slowdown(steps: dict[int, Steps]) -> None:
    """On a GPU each, ranks do not slow each other down; here they share memory, caches and what others leave."""
    alone_s = float(steps[1].own_s.mean())
    for n, of_world in steps.items():
        factor = float(of_world.own_s.mean()) / alone_s
        if factor > 1.1:
            print(
                f"  {n} ranks side by side compute {factor:.2f} times as slowly as one, which the model does not know"
            )


def _say_memory(worlds: dict[int, Case], told: dict[int, list[Told]]) -> None:
    """Beside what `--check` estimates; on a CPU a bucket is there only as far as gradients fill it."""
    for n, case in worlds.items():
        parts, _ = rank_bytes(case.run, world=n)
        parts["bucket"] = min(parts.get("bucket", 0), parts["gradients"] * n)
        parts.pop("vgg", None)  # loaded before what is measured
        measured, estimated = peak_mib(told[n]), sum(parts.values()) / 2**20
        if measured is not None:
            print(
                f"  memory of a rank of {n}: grown by {measured:.0f} MiB; {estimated:.0f} estimated, without libraries"
            )


def foretell(run: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Print and return weak and strong scaling to 1,024 ranks."""
    cluster = Cluster(1, 1, args.gpu, args.mfu)
    cluster.check()
    link = Link(args.bandwidth * 1e9, args.latency / 1e6)
    batch, ranks = run.optim.global_batch, [2**power for power in range(11)]
    cost = step_cost(run, cluster, sample_work(run))._replace(spread=args.cv / batch**0.5)
    print(f"ESTIMATE for {args.gpu}, the same link between all, nothing overlaps:\n  {_say_fit(cost, link)}")
    print(f"weak: {batch} a rank; strong: {args.global_batch} in all, compared with one rank that does them all")
    weak = weak_scaling(cost, link, ranks, batch_per_rank=batch)
    strong = strong_scaling(cost, link, ranks, batch_per_rank=batch, global_batch=args.global_batch)
    print(header(FORETOLD))
    at = {row.ranks: row for row in strong}
    for row in weak:
        print(line(FORETOLD, _foretold(row, at.get(row.ranks))))
    return {
        "cost": cost._asdict(),
        "link": link._asdict(),
        "weak": [row._asdict() for row in weak],
        "strong": [row._asdict() for row in strong],
    }


def _foretold(weak: Scaled, strong: Scaled | None) -> dict[str, Any]:
    row = dict(zip(FORETOLD, (weak.ranks, *_cells(weak)), strict=False))
    return row | (dict(zip(list(FORETOLD)[6:], _cells(strong), strict=True)) if strong else {})


def _cells(row: Scaled) -> tuple[Any, ...]:
    return row.batch_per_rank, row.seconds * 1e3, row.waiting_s * 1e3, row.communication_s * 1e3, row.efficiency
