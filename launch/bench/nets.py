"""Parameters, MACs, time and memory of the nets, plain and in their faster variants.

For every net and size its variants run in turns. `gain` is the plain net's time divided by the variant's, the median
over the rounds; `diff` is the largest difference of their restored pictures over the plain one's largest value. Weights
are random. The backward pass is that of the mean square of the restored picture.
"""

import argparse
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch

from dist_train.config import EfficientDerainConfig, NafnetConfig, NetConfig, RcdnetConfig, UformerConfig, load_run
from dist_train.nets import RestorationNet, build_net
from dist_train.nets.fast import rewrites
from launch.bench.cost import net_cost, spf_cost
from launch.bench.passes import MARGIN_PX, VARIANTS, Case, prepare
from launch.bench.race import MIB, Outcome, add_race_options, describe_machine, progress, race

TWO_EACH = (2,) * 9
SIDD = {"enc_blk_nums": (2, 2, 4, 8), "middle_blk_num": 12, "dec_blk_nums": (2, 2, 2, 2)}
PRESETS: dict[str, NetConfig] = {
    "nafnet_gopro_w32": NafnetConfig(),
    "nafnet_gopro_w64": NafnetConfig(width=64),
    "nafnet_sidd_w32": NafnetConfig.model_validate(SIDD),
    "nafnet_sidd_w64": NafnetConfig.model_validate({"width": 64, **SIDD}),
    "rcdnet": RcdnetConfig(),
    "efficientderain": EfficientDerainConfig(),
    "uformer_t": UformerConfig(embed_dim=16, depths=TWO_EACH),
    "uformer_s": UformerConfig(depths=TWO_EACH),
    "uformer_b": UformerConfig(),
}
"""The published configurations."""
HEADER = (
    f"{'net':17}{'size':>10} {'variant':14}{'forward s':>10}{'gain':>6}{'backward s':>12}{'gain':>6}"
    f"{'fwd MiB':>9}{'bwd MiB':>9}{'first s':>9}{'diff':>9}"
)
DEFAULT_NETS = ("nafnet_gopro_w32", "rcdnet", "efficientderain", "uformer_b")
MODES = ("forward", "backward")
DEFAULT_VARIANTS = ("plain", "channels_last", "fast", "compile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--net", nargs="+", default=DEFAULT_NETS, metavar="NAME", help=f"of {', '.join(PRESETS)}; or a run's YAML"
    )
    parser.add_argument("--size", nargs="+", type=size_option, default=["256x256", "1280x720"], metavar="WxH")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=DEFAULT_VARIANTS, help="beside `plain`")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    add_race_options(parser, limit_s=120, first_limit_s=600)
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="above this a picture is tiled (default: 60 %% free)"
    )


def size_option(text: str) -> str:
    """WIDTHxHEIGHT, checked."""
    width, x, height = text.partition("x")
    if not (x and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT")
    return text


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    if args.rounds < 1 or args.threads < 1:
        raise ValueError("--rounds and --threads must be at least 1")
    nets = {Path(name).stem: net_config(name) for name in args.net}
    machine = describe_machine(device=args.device, threads=args.threads)
    print("  ".join(f"{key}: {value}" for key, value in machine.items() if key != "load_before"))
    print(f"load before: {machine['load_before']:.2f}\n")
    costs = print_costs(nets, args.size)
    print(HEADER)
    records = []
    for name, config in nets.items():
        records += measure_net(name, config, args)
    machine["load_after"] = os.getloadavg()[0]
    print(f"\nload after: {machine['load_after']:.2f}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "costs": costs, "cases": records}, indent=1) + "\n")
    return 0


def net_config(name: str) -> NetConfig:
    """A preset by name, or the student of a run's YAML."""
    if name.endswith((".yaml", ".yml")):
        return load_run(Path(name)).student
    if name not in PRESETS:
        raise ValueError(f"--net {name}: there are {', '.join(PRESETS)}; or name a run's YAML for its student")
    return PRESETS[name]


def print_costs(nets: dict[str, NetConfig], sizes: list[str]) -> list[dict[str, Any]]:
    """Table of what is counted, not timed: the nets, and the SPF units that a teacher of their kind has beside them."""
    titles = "".join(f"{'G MACs ' + size:>20}" for size in sizes)
    print(f"{'net':32}{'M parameters':>14}{titles}")
    records = []
    for name, config in nets.items():
        costs = {name: [net_cost(config, width=width, height=height) for width, height in map(width_and_height, sizes)]}
        for every in _spf_choices(config):
            costs[f"  + SPF units, every={every}"] = [
                spf_cost(config, width=width, height=height, every=every)
                for width, height in map(width_and_height, sizes)
            ]
        for title, of_sizes in costs.items():
            macs = [cost.macs for cost in of_sizes]
            parameters = of_sizes[0].parameters
            print(f"{title:32}{parameters / 1e6:14.3f}" + "".join(f"{count / 1e9:20.2f}" for count in macs))
            records.append(
                {
                    "net": name,
                    "of": title.strip(),
                    "parameters": parameters,
                    "macs": dict(zip(sizes, macs, strict=True)),
                }
            )
    print()
    return records


def _spf_choices(config: NetConfig) -> list[int]:
    """Values of spf.every worth a look: a unit after each stage, and fewer of them where there are many stages."""
    with torch.device("meta"):
        num_stages = len(build_net(config).stages)
    return [every for every in (1, 2, 4, 8) if num_stages and (every == 1 or 9 < num_stages)]


def width_and_height(size: str) -> tuple[int, int]:
    """The two numbers of a `size_option`."""
    width, height = map(int, size.split("x"))
    return width, height


def measure_net(name: str, config: NetConfig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one net's variants at all sizes, small to large, and print their rows.

    What the plain net takes at the first size foretells what it takes at the others: too much memory, and the picture
    is tiled; too much time, and nothing is tried.
    """
    with torch.device("meta"):
        shape = build_net(config)  # to ask, not to run
    variants = list(dict.fromkeys(["plain", *args.variant]))
    budget_mib = args.memory * 1024 if args.memory else 0.6 * _free_mib(args.device)
    known: dict[str, tuple[int, Outcome]] = {}  # mode -> pixels, the plain net
    records = []
    for size in sorted(args.size, key=lambda size: math.prod(width_and_height(size))):
        width, height = width_and_height(size)
        left, right, top, bottom = shape.padding(height, width)
        pixels = (left + width + right) * (top + height + bottom)
        outcomes: dict[str, dict[str, Outcome]] = {}
        tiles: dict[str, int | None] = {}
        for mode in args.mode:
            tiles[mode], why_none = plan(known.get(mode), pixels, budget_mib, args.limit)
            why = {variant: why_none or _why_not(variant, mode, shape, args.device) for variant in variants}
            tried = [variant for variant in variants if not why[variant]]
            if tried:
                progress(f"{name} {size} {mode}: {', '.join(tried)}")
            raced = race(
                prepare,
                {v: Case(config, v, mode, height, width, tiles[mode], args.device) for v in tried},
                device=args.device,
                threads=args.threads,
                rounds=args.rounds,
                limit_s=args.limit,
                first_limit_s=args.first_limit,
            )
            outcomes[mode] = {variant: raced.get(variant, Outcome(left_out=why[variant])) for variant in variants}
            if outcomes[mode]["plain"].laps:
                known.setdefault(mode, (pixels, outcomes[mode]["plain"]))
        progress("")
        print_rows(name, size, outcomes, tiles)
        records += [
            _record(name, size, variant, mode, tiles[mode], outcome, outcomes[mode]["plain"])
            for mode in args.mode
            for variant, outcome in outcomes[mode].items()
        ]
    return records


def _why_not(variant: str, mode: str, net: RestorationNet, device: str) -> str:
    if mode == "backward" and variant.startswith("fast"):
        return "for restoring alone"
    if variant == "fast" and not rewrites(net, device):
        return "is the plain net here"
    return ""


def plan(known: tuple[int, Outcome] | None, pixels: int, budget_mib: float, limit_s: float) -> tuple[int | None, str]:
    """How to take a picture, going by one that was taken.

    Args:
        known: its pixels, padding counted, and what the plain net took for it.
        pixels: of this picture, padding counted.

    Returns:
        Largest side of the tiles, in px, or None for none; and why nothing should be tried, or nothing.
    """
    if known is None:
        return None, ""
    known_pixels, plain = known
    assert plain.seconds is not None
    seconds = plain.seconds * pixels / known_pixels
    if seconds > limit_s:
        return None, f"about {seconds:.0f} s a pass, and --limit is {limit_s:.0f} s"
    if plain.peak_mib is None or plain.peak_mib * pixels / known_pixels <= budget_mib:
        return None, ""
    side = math.isqrt(int(budget_mib / plain.peak_mib * known_pixels)) - 2 * MARGIN_PX
    return max(side // 64 * 64, 64), ""


def _free_mib(device: str) -> float:
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MIB
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        match = None
    return int(match[1]) / 1024 if match else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB


def print_rows(name: str, size: str, outcomes: dict[str, dict[str, Outcome]], tiles: dict[str, int | None]) -> None:
    """A row per variant, then what is to be said about them.

    Args:
        outcomes: mode -> variant -> what became of it.
        tiles: mode -> largest side of the tiles, in px.
    """
    for variant in next(iter(outcomes.values())):
        forward, backward = (outcomes[mode][variant] if mode in outcomes else Outcome() for mode in MODES)
        plain, plain_backward = (outcomes[mode]["plain"] if mode in outcomes else Outcome() for mode in MODES)
        diff = difference(forward, plain)
        cells = [
            _cell(forward.seconds, 10, 3),
            _cell(forward.gain(plain), 6, 2),
            _cell(backward.seconds, 12, 3),
            _cell(backward.gain(plain_backward), 6, 2),
            _cell(forward.peak_mib, 9, 0),
            _cell(backward.peak_mib, 9, 0),
            _cell(forward.first_s, 9, 2),
            f"{'-':>9}" if diff is None else f"{diff:9.1e}",
        ]
        print(f"{name:17}{size:>10} {variant:14}" + "".join(cells))
    for mode, tile_px in tiles.items():
        if tile_px:
            print(f"  {mode}: in tiles of at most {tile_px} px and {MARGIN_PX} px around them, one after the other")
    for mode, of in outcomes.items():
        reasons: dict[str, list[str]] = {}
        for variant, outcome in of.items():
            if outcome.left_out:
                reasons.setdefault(outcome.left_out, []).append(variant)
        for reason, left_out in reasons.items():
            print(f"  {mode}, {', '.join(left_out)} left out: {reason}")
    print(flush=True)


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def difference(outcome: Outcome, plain: Outcome) -> float | None:
    """Largest difference of what they restored, over the plain one's largest value."""
    if outcome.value is None or plain.value is None:
        return None
    return float((outcome.value - plain.value).abs().max() / plain.value.abs().max())


def _record(
    name: str, size: str, variant: str, mode: str, tile_px: int | None, outcome: Outcome, plain: Outcome
) -> dict[str, Any]:
    return {
        "net": name,
        "size": size,
        "variant": variant,
        "mode": mode,
        "tile_px": tile_px,
        "first_s": outcome.first_s,
        "laps": [lap._asdict() for lap in outcome.laps],
        "gain": outcome.gain(plain),
        "difference": difference(outcome, plain),
        "left_out": outcome.left_out,
    }
