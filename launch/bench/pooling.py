"""Mask average pooling (MAP): a loop over pictures and masks, as the official code has it, against sums of all at once.

Forwards and backwards over the same features and the same groups, which are ready. `gain` is the loop's time divided by
this one's, the median over the rounds; `differs` is the largest difference of any value from the loop's.
"""

import argparse
import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_train.nets.conditioned import Groups, group_average, mask_average
from launch.bench.race import Work, add_race_options, describe_machine, race
from launch.bench.table import header, line

COLUMNS = {
    "masks": ">6", "way": ">8", "ms": ">10.2f", "gain": ">8.1f", "MiB": ">8.0f", "differs": ">10.1e",
}  # fmt: skip
"""Titles and formats."""
WAYS = ("loop", "product", "groups")
"""product: of dense masks and features, which serves masks that overlap. groups: one sum and one look-up."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--masks", nargs="+", type=int, default=[8, 32, 128], help="of each picture (8 32 128)")
    parser.add_argument("--batch", type=int, default=8, help="pictures (default: 8)")
    parser.add_argument("--px", type=int, default=256, help="their side (default: 256)")
    parser.add_argument("--channels", type=int, default=2, help="of the features (default: 2, the published S)")
    add_race_options(parser, limit_s=60, first_limit_s=120)


class Pooling(NamedTuple):
    """Forward and backward of one way."""

    way: str
    num_masks: int
    batch: int
    px: int
    channels: int
    device: str


def prepare(case: Pooling) -> Work:
    """A case as work that returns the MAP."""
    torch.manual_seed(0)
    shape = (case.batch, case.channels, case.px, case.px)
    features = torch.randn(shape, device=case.device, requires_grad=True)
    upstream = torch.randn(shape, device=case.device)
    ids = torch.randint(0, case.num_masks + 1, (case.batch, case.px // 8, case.px // 8), device=case.device)
    ids = ids.repeat_interleave(8, 1).repeat_interleave(8, 2)  # regions, not noise
    number = torch.arange(1, case.num_masks + 1, device=case.device)[:, None, None]
    masks = (ids[:, None] == number).float()

    def step() -> Tensor:
        if case.way == "loop":
            pooled = torch.stack([_one_by_one(*pair) for pair in zip(features, masks, strict=True)])
        elif case.way == "product":
            pooled = mask_average(features, masks)
        else:
            pooled = group_average(features, Groups(ids, case.num_masks))
        (gradient,) = torch.autograd.grad(pooled, features, upstream)
        return torch.stack([pooled.detach(), gradient])

    return Work(step, held_bytes=ids.nbytes if case.way == "groups" else masks.nbytes)


def _one_by_one(features: Tensor, masks: Tensor) -> Tensor:
    out = torch.zeros_like(features)
    for mask in (*masks, 1 - masks.sum(0).clamp(0, 1)):
        out = out + (features * mask).sum((1, 2), keepdim=True) / (mask.sum() + 1e-8) * mask
    return out


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if min(args.rounds, args.threads, args.batch, args.channels, *args.masks) < 1 or args.px < 8 or args.px % 8:
        raise ValueError("--px must be a multiple of 8, and all other numbers at least 1")
    machine = describe_machine(device=args.device, threads=args.threads)
    print("  ".join(f"{key}: {value}" for key, value in machine.items()))
    print(f"{args.batch} pictures of {args.px} px, {args.channels} channels\n\n{header(COLUMNS)}")
    records = []
    for num_masks in args.masks:
        cases = {way: Pooling(way, num_masks, args.batch, args.px, args.channels, args.device) for way in WAYS}
        outcomes = race(
            prepare,
            cases,
            device=args.device,
            threads=args.threads,
            rounds=args.rounds,
            limit_s=args.limit,
            first_limit_s=args.first_limit,
        )
        loop = outcomes["loop"]
        for way, outcome in outcomes.items():
            row: dict[str, Any] = {"masks": num_masks, "way": way, "MiB": outcome.peak_mib, "gain": outcome.gain(loop)}
            row["ms"] = None if outcome.seconds is None else 1000 * outcome.seconds
            if outcome.value is not None and loop.value is not None:
                row["differs"] = (outcome.value - loop.value).abs().max().item()
            print(line(COLUMNS, row))
            if outcome.left_out:
                print(f"  {way} left out: {outcome.left_out}")
            records.append(row | {"seconds": [lap.seconds for lap in outcome.laps]})
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "cases": records}, indent=1) + "\n")
    return 0
