"""Masks of the priors: time and memory of both SAM generators, and what a prior adds to a training step (--step).

The generators take turns over the same photographs. `gain` is the first one's time divided by this one's, the median
over the rounds. Times are CPU seconds over all threads, or the GPU's own, for each picture: on the picture (resizing,
encoder), on its prompts (decoder, scores), and the rest (suppression, and making the masks that are left). `of peak` is
the rate of the multiplications that segment_anything's encoder and the generator's decoder need, over that of a
product of matrices in the same round; `of copy` that of the numbers that its operations read and write, each by itself,
over that of a copy: above 1 where caches, or a compiler, spare the memory some. IoU is that of best partners, `pixels`
the IoU, at each pixel, of the smallest masks around it, `same` how many masks are so to the last bit; all against the
reference, in the first round.

Of a step (task distill) with/without compares with one whose masks are ready; 1+masks/rest is of the same laps alone,
and steadier. Of a remote prior a CPU's seconds are those of the training process, its server's are not among them, nor
its memory; a GPU's are all that it waits.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.config import CachedConfig, NetConfig, RegionsConfig, SamConfig
from dist_train.priors.tiny_vit import build_mobile_sam
from launch.bench.cost import SamCost, Spent, sam_cost
from launch.bench.masking import NUM_COPIED, SQUARE_SIDE, Segment, Step, agreement, prepare_segment, prepare_step
from launch.bench.nets import PRESETS, net_config, size_option, width_and_height
from launch.bench.race import Outcome, Work, add_race_options, describe_machine, progress, race
from launch.bench.table import header, line


def _published(name: str) -> Any:
    from segment_anything import sam_model_registry

    return sam_model_registry[name]()


MODELS: dict[str, Callable[[], Any]] = {name: partial(_published, name) for name in ("vit_b", "vit_l", "vit_h")}
MODELS["tiny_vit"] = partial(build_mobile_sam, None)
PROVIDERS = ("regions", "psp", "batched", "remote_batched", "cached_regions", "cached_batched", "stored")
COLUMNS = {
    "model": "<9", "points": "<7", "generator": "<10", "s/picture": ">10.3f", "gain": ">6.2f", "picture": ">8.3f",
    "prompts": ">8.3f", "rest": ">7.3f", "ms/prompt": ">10.2f", "MiB": ">7.0f", "of peak": ">8.2f", "of copy": ">8.2f",
    "IoU": ">7.3f", "pixels": ">7.3f", "same": ">8",
}  # fmt: skip
STEP_COLUMNS = {
    "net": "<20", "masks": "<16", "step s": ">9.3f", "masks s": ">9.3f", "with/without": ">14.3f",
    "1+masks/rest": ">14.3f", "MiB": ">8.0f",
}  # fmt: skip
"""Titles and formats."""
UNFILTERED = {
    "points_per_side": 4, "num_masks": 48, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["vit_b"], help="of SAM (default: vit_b)")
    parser.add_argument("--checkpoint", metavar="PATH", help="of the one --model; without it weights are random")
    parser.add_argument("--points", nargs="+", type=int, default=[16, 32], help="per side; --step takes the first")
    parser.add_argument("--points-per-batch", type=int, metavar="N", help="as prior.points_per_batch")
    parser.add_argument("--dtype", choices=["auto", "fp32", "fp16", "bf16"], default="auto", help="as prior.dtype")
    parser.add_argument("--compile", action="store_true", help="also `batched` compiled; with --step, only that")
    parser.add_argument("--batch", type=int, default=1, help="pictures (default: 1)")
    parser.add_argument(
        "--size", type=size_option, default="256x256", metavar="WxH", help="with --step: of whole pictures"
    )
    parser.add_argument("--step", nargs="+", metavar="NET", help=f"of {', '.join(PRESETS)}; or a run's YAML")
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, default=PROVIDERS, help="for --step")
    parser.add_argument("--crop", type=int, metavar="PX", help="for --step (default: the shorter side of --size)")
    parser.add_argument("--bf16", action="store_true", help="for --step: autocast of the nets")
    add_race_options(parser, limit_s=300, first_limit_s=900)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if min(args.rounds, args.threads, args.batch, *args.points) < 1:
        raise ValueError("--rounds, --threads, --batch and --points must be at least 1")
    if args.checkpoint and (len(args.model) > 1 or not Path(args.checkpoint).is_file()):
        raise ValueError(f"--checkpoint {args.checkpoint} must be a file, and --model the one it is of")
    nets = {Path(name).stem: net_config(name) for name in args.step or ()}
    args.crop = args.crop or min(width_and_height(args.size))
    if args.crop > min(width_and_height(args.size)):
        raise ValueError(f"--crop {args.crop} is larger than the pictures, --size {args.size}")
    points, weights = f"{args.points[0]}x{args.points[0]} points", args.checkpoint or "RANDOM weights"
    machine = describe_machine(device=args.device, threads=args.threads)
    print("  ".join(f"{key}: {value}" for key, value in machine.items() if key != "load_before"))
    print(f"load before: {machine['load_before']:.2f}\n")
    if args.step:
        print(f"{args.batch} crops of {args.crop} px of pictures of {args.size}; no optimizer, no reading of data")
        print(f"`batched`: {args.model[0]}, {points}, {weights}\n{header(STEP_COLUMNS)}")
        records = [record for name, net in nets.items() for record in measure_step(name, net, args)]
    else:
        print(f"{args.batch} pictures of {args.size}; {weights}")
        if not args.checkpoint:
            print("they let no mask through the filters: IoU, pixels and same are of 4x4 points, nothing filtered")
        width, height = width_and_height(args.size)
        costs = {name: sam_cost(MODELS[name], height=height, width=width) for name in args.model}
        for name, cost in costs.items():
            for generator, once in cost.per_picture.items():
                each = cost.per_prompt[generator]
                macs = f"G MACs {once.macs / 1e9:.1f} + {each.macs / 1e9:.3f} a prompt"
                moved = f"G numbers read and written {once.numbers / 1e9:.2f} + {each.numbers / 1e9:.4f}"
                print(f"{name} {generator}: {macs}, {moved}")
        print(f"\n{header(COLUMNS)}")
        records = [record for name, cost in costs.items() for record in measure_generators(name, cost, args)]
    machine["load_after"] = os.getloadavg()[0]
    print(f"\nload after: {machine['load_after']:.2f}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "cases": records}, indent=1) + "\n")
    return 0


def measure_generators(model: str, cost: SamCost, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one model's generators, few points to many, and print their rows."""
    kinds: dict[str, dict[str, Any]] = {"reference": {"generator": "reference"}, "batched": {"generator": "batched"}}
    if args.compile:
        kinds["compiled"] = {"generator": "batched", "compile": True}
    alike: dict[str, Outcome] = {}
    if not args.checkpoint:
        few = {kind: _segment(args, model, **UNFILTERED, **settings) for kind, settings in kinds.items()}
        alike = _race(prepare_segment, few, args, rounds=0)
    records, known = [], dict[str, tuple[int, float, float]]()
    for points in sorted(args.points):
        why = {kind: _too_long(known.get(kind), points, args.limit) for kind in kinds}
        cases = {kind: _segment(args, model, points_per_side=points, **kinds[kind]) for kind in kinds if not why[kind]}
        if cases:
            one = next(iter(cases.values()))
            for limit in ("matmul", "copy"):
                cases[limit] = one._replace(limit=limit, spent=_spent(args, 3))
        raced = _race(prepare_segment, cases, args, rounds=args.rounds)
        laps = {kind: case.spent[1 : 1 + len(raced[kind].laps)] for kind, case in cases.items()}
        for kind, settings in kinds.items():
            outcome = raced.get(kind, Outcome(left_out=why[kind]))
            row: dict[str, Any] = {"model": model, "points": f"{points}x{points}", "generator": kind}
            row["MiB"] = outcome.peak_mib
            if outcome.seconds is not None:
                kind_of = settings["generator"]
                spent = cost.per_picture[kind_of] + cost.per_prompt[kind_of] * points**2
                row |= _times(kind, laps, spent, points, args)
                known[kind] = points, outcome.seconds, row["prompts"] / row["s/picture"]
            compared = alike or raced
            if kind in compared and "reference" in compared:
                row |= agreement(compared[kind].value, compared["reference"].value)
            print(line(COLUMNS, row))
            if outcome.left_out:
                print(f"  {kind} left out: {outcome.left_out}")
            if kind in alike and alike[kind].left_out:
                print(f"  {kind} not compared: {alike[kind].left_out}")
            records.append(row | _raw(outcome, laps.get(kind)))
        for limit in ("matmul", "copy"):
            if limit in raced:
                records.append({"model": model, "generator": limit} | _raw(raced[limit], laps[limit]))
                if raced[limit].left_out:
                    print(f"  {limit} left out: {raced[limit].left_out}")
    return records


def _times(kind: str, laps: dict[str, Tensor], spent: Spent, points: int, args: argparse.Namespace) -> dict[str, Any]:
    """Columns that come of the laps.

    Args:
        laps: kind -> (laps,3), see `Segment.spent`; the first kind that has any is what the others are compared with.
        spent: on a picture.
    """
    mine, device = laps[kind] / args.batch, torch.device(args.device).type
    split = torch.cat([mine, mine[:, :1] - mine[:, 1:].sum(1, keepdim=True)], 1)
    row = dict(zip(("s/picture", "picture", "prompts", "rest"), split.quantile(0.5, 0).tolist(), strict=True))
    base = next(of[:, 0] for of in laps.values() if len(of)) / args.batch
    row |= {"gain": _ratio(base, mine[:, 0]), "ms/prompt": 1000 * row["prompts"] / points**2}
    limits = {
        "of peak": (spent.macs / SQUARE_SIDE[device] ** 3, laps["matmul"][:, 0]),
        "of copy": (spent.numbers / (2 * NUM_COPIED[device]), laps["copy"][:, 0]),
    }
    for title, (times, once) in limits.items():
        if len(once):
            row[title] = times * _ratio(once, mine[:, 0])
    return row


def _segment(args: argparse.Namespace, model: str, **settings: Any) -> Segment:
    width, height = width_and_height(args.size)
    config = _sam_config(args, model, **settings)
    return Segment(MODELS[model], config, "", args.batch, height, width, args.device, _spent(args, 3))


def _sam_config(args: argparse.Namespace, model: str, **settings: Any) -> SamConfig:
    given = {name: getattr(args, name) for name in ("checkpoint", "points_per_batch", "dtype")}
    return SamConfig.model_validate({"model": model, "num_masks": RegionsConfig().num_masks, **given, **settings})


def _spent(args: argparse.Namespace, num: int) -> Tensor:
    """Where a case, in its own process, leaves what the parts of its laps take."""
    return torch.zeros(args.rounds + 1, num, dtype=torch.float64).share_memory_()


def _race(
    prepare: Callable[[Any], Work], cases: dict[str, Any], args: argparse.Namespace, *, rounds: int
) -> dict[str, Outcome]:
    progress(", ".join(cases))
    raced = race(
        prepare,
        cases,
        device=args.device,
        threads=args.threads,
        rounds=rounds,
        limit_s=args.limit,
        first_limit_s=args.first_limit,
    )
    progress("")
    return raced


def _too_long(known: tuple[int, float, float] | None, points: int, limit_s: float) -> str:
    """Why a grid is not tried, going by a smaller one: its points, seconds, and the share of them that grows."""
    if known is None:
        return ""
    before, seconds, share = known
    seconds *= 1 - share + share * (points / before) ** 2
    return f"about {seconds:.0f} s a turn, and --limit is {limit_s:.0f} s" if seconds > limit_s else ""


def _ratio(over: Tensor, under: Tensor) -> float:
    """Median over the rounds that both have."""
    return statistics.median([a / b for a, b in zip(over.tolist(), under.tolist(), strict=False)])


def _raw(outcome: Outcome, parts: Tensor | None) -> dict[str, Any]:
    laps = [lap._asdict() for lap in outcome.laps]
    parts_s = [] if parts is None else parts.tolist()
    return {"first_s": outcome.first_s, "laps": laps, "parts_s": parts_s, "left_out": outcome.left_out}


def measure_step(name: str, net: NetConfig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time training steps with masks of each provider, and with masks that cost nothing; print their rows."""
    width, height = width_and_height(args.size)
    sam = _sam_config(args, args.model[0], points_per_side=args.points[0], compile=args.compile)
    refresh = CachedConfig(of=RegionsConfig()).refresh
    needs = {"fixed": ("fixed",)} | {
        provider: (provider.replace("cached", "made"), "read") if "cached" in provider else (provider,)
        for provider in args.provider
    }
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            part: Step(
                net=net,
                provider=part,
                build=MODELS[args.model[0]],
                sam=sam,
                batch=args.batch,
                crop_px=args.crop,
                height=height,
                width=width,
                device=args.device,
                bf16=args.bf16,
                folder=Path(folder),
                spent=_spent(args, 2),
            )
            for part in dict.fromkeys(part for parts in needs.values() for part in parts)
        }
        raced = _race(prepare_step, cases, args, rounds=args.rounds)
    laps = {part: case.spent[1 : 1 + len(raced[part].laps)] for part, case in cases.items()}
    records = []
    for provider, parts in needs.items():
        row: dict[str, Any] = {"net": name, "masks": provider}
        row["MiB"] = max((raced[part].peak_mib or 0 for part in parts), default=0) or None
        num = min(len(laps[part]) for part in (*parts, "fixed"))
        if num:
            with_, read, without = (laps[part][:num] for part in (parts[0], parts[-1], "fixed"))
            with_ = (with_ + (refresh - 1) * read) / refresh  # of others than `cached` the two are one
            row |= dict(zip(("step s", "masks s"), with_.quantile(0.5, 0).tolist(), strict=True))
            row["with/without"] = _ratio(with_[:, 0], without[:, 0])
            row["1+masks/rest"] = _ratio(with_[:, 0], with_[:, 0] - with_[:, 1])
        print(line(STEP_COLUMNS, row))
        for part in parts:
            if raced[part].left_out:
                print(f"  {part} left out: {raced[part].left_out}")
        records.append(row | {"cases": {part: _raw(raced[part], laps[part]) for part in parts}})
    print(f"  cached: one step in {refresh} makes masks of whole pictures, the others read them")
    return records
