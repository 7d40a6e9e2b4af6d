"""Draw what a prior sees, and what restoring does to each object: `python -m launch.masks INPUT OUTPUT`."""

import argparse
import csv
import io
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launch.command import program
from launch.console import add_net_option, device_of, run_main, set_up_logging, setting
from launch.with_masks import named_prior
from shards.codec import decode_rgb
from shards.files import write_whole
from shards.layouts import pictures_below

if TYPE_CHECKING:
    import torch

    from dist_train.mask_views import Gain
    from dist_train.priors.masks import MaskSet

Picture = np.ndarray


def main(argv: list[str] | None = None) -> int:
    """Parse and draw; returns the exit code: 1 if some pictures could not be drawn, 2 if nothing was tried."""
    parser = argparse.ArgumentParser(
        prog=program("launch.masks"),
        description="Draw the masks that a prior sees in pictures, and list their places and sizes in masks.csv. With "
        "--restored-by and --gt also how much each object gained by restoring, in objects.csv.",
        epilog="example: %(prog)s rainy out --restored-by derain.safetensors --gt clean --prior sam --with model=vit_b "
        "checkpoint=sam_vit_b_01ec64.pth",
    )
    parser.add_argument("input", type=Path, help="a picture, or a folder of pictures and those below it")
    parser.add_argument("output", type=Path, help="folder for PNG and CSV files; those of one name are replaced")
    parser.add_argument("--prior", default="regions", choices=["regions", "sam", "psp"], help="what makes the masks")
    parser.add_argument(
        "--with", dest="settings", nargs="+", default=[], type=setting, metavar="KEY=VALUE",
        help="settings of the prior, as in a run's section `prior`",
    )  # fmt: skip
    parser.add_argument(
        "--restored-by", type=Path, metavar="WEIGHTS", help=".safetensors of launch.export, or an official .pth"
    )
    parser.add_argument("--gt", type=Path, help="the clean picture, or the folder of them, with the input's names")
    parser.add_argument(
        "--of", choices=["input", "restored", "gt"],
        help="what the prior looks at (default: the clean picture if there is one, which shows the objects best, else "
        "the input; training looks at the restored one)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add_net_option(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: draw(args))


def draw(args: argparse.Namespace) -> int:
    """Segment and draw each picture; those that cannot be are named, and the others go on."""
    from tqdm import tqdm

    from dist_train.inference import Inference, restorer
    from dist_train.load import load_net
    from dist_train.mask_views import Extent, Gain, extents, gains
    from dist_train.metrics import to_u8
    from dist_train.pictures import write_png
    from dist_train.priors import build_prior

    if args.gt and not args.restored_by:
        raise ValueError("--gt is for what restoring gains, which wants --restored-by WEIGHTS too")
    of = args.of or ("gt" if args.gt else "input")
    if (of == "gt" and not args.gt) or (of == "restored" and not args.restored_by):
        raise ValueError(f"--of {of} wants {'--gt' if of == 'gt' else '--restored-by'}")
    device = device_of(args.device)
    out = args.output.resolve()
    pictures = _named(args.input, option="INPUT")
    if args.input.resolve() != out:  # what an earlier call drew, into a folder of the input, is no input
        pictures = {name: path for name, path in pictures.items() if not path.resolve().is_relative_to(out)}
    if same := [path for name, path in pictures.items() if (out / f"{name}.png") == path.resolve()]:
        raise ValueError(f"{same[0]} is an input and would be overwritten; choose another output")
    clean = _partners(pictures, args.gt) if args.gt else {}
    prior = build_prior(named_prior(args.prior, args.settings), device)
    restore = None
    if args.restored_by:
        restore = restorer(load_net(args.restored_by, dict(args.net))[0], Inference(), device=device)

    sizes: list[tuple] = []
    areas: list[list[int]] = []
    gained: list[tuple] = []
    failed: dict[Path, str] = {}
    for name, path in tqdm(pictures.items(), unit="picture", disable=len(pictures) == 1):
        try:
            versions = {"input": decode_rgb(path.read_bytes())}
            if restore:
                versions["restored"] = to_u8(restore(_tensor(versions["input"]))[0])
            if clean:
                versions["gt"] = decode_rgb(clean[name].read_bytes())
                if versions["gt"].shape != versions["input"].shape:
                    raise ValueError(f"{clean[name]} has another size")
        except (ValueError, OSError) as error:
            failed[path] = str(error)
            continue
        began = time.perf_counter()
        found = prior(_tensor(versions[of]).to(device)).to("cpu")
        taken_s = time.perf_counter() - began
        masks = found.masks[0][found.valid[0]].numpy()
        areas.append(masks.sum((1, 2)).tolist())
        sizes += [(name, *extent, f"{taken_s:.3f}") for extent in extents(masks)]
        objects = gains(versions["input"], versions["restored"], versions["gt"], masks) if clean else []
        gained += [(name, *gain) for gain in objects]
        write_png(args.output / f"{name}.png", _panel(versions, of, found, objects, taken_s))
    _write_csv(args.output / "masks.csv", ("picture", *Extent._fields, "seconds"), sizes)
    drawn = len(pictures) - len(failed)
    print(f"{len(sizes)} masks in {drawn} of {len(pictures)} pictures, by {prior.describe()['what']}: {args.output}")
    for line in how_many(areas):
        print(line)
    if clean:
        _write_csv(args.output / "objects.csv", ("picture", *Gain._fields), gained)
        _sum_up([Gain(*row[1:]) for row in gained if row[1]])
    for path, reason in failed.items():
        print(f"not drawn: {path}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _panel(
    versions: dict[str, Picture], of: str, found: "MaskSet", objects: "Sequence[Gain]", taken_s: float
) -> Picture:
    """The versions, the one that was looked at tinted by its masks, and the gains."""
    from dist_train.mask_views import FULL_DB, paint_gains
    from dist_train.metrics import psnr
    from dist_train.pictures import overlay, panel

    idmap = found.idmap()[0].numpy()
    titles = {name: name if name != "gt" else "clean" for name in versions}
    if "gt" in versions:
        for name in versions.keys() - {"gt"}:
            titles[name] += f" {psnr(versions[name], versions['gt']):.2f} dB"
    columns = [(titles[name], picture) for name, picture in versions.items()]
    share = 100 * float(found.coverage()[0])
    columns.append((f"{int(found.counts()[0])} masks, {share:.0f} %, {taken_s:.2f} s", overlay(versions[of], idmap)))
    if objects:
        columns.append((f"gain: blue +{FULL_DB:g} dB, red -{FULL_DB:g}", paint_gains(versions["gt"], idmap, objects)))
    return panel(columns)


def how_many(areas: Sequence[Sequence[int]]) -> list[str]:
    """Lines that tell how many masks pictures have, and what smaller values of `num_masks` would keep of them.

    Of SAM's the surest are kept, so that what is said of the area is the most that may be left.

    Args:
        areas: of the masks of each picture, in px.
    """
    found = np.array([len(some) for some in areas])
    if not found.any():
        return []
    many = np.quantile(found, 0.9)
    lines = [f"masks a picture: {np.median(found):g} in the middle, {many:g} at 90 %, {found.max()} at most"]
    for num in [num for num in (8, 16, 32, 64, 128) if num < found.max()]:
        largest = sum(sum(sorted(some, reverse=True)[:num]) for some in areas) / sum(map(sum, areas))
        lines.append(
            f"num_masks={num}, if the largest: all masks of {(found <= num).mean():.0%} of the pictures, "
            f"{found.clip(max=num).sum() / found.sum():.0%} of all masks, {largest:.0%} of their area"
        )
    return lines


def _sum_up(objects: "Sequence[Gain]") -> None:
    """Which objects got better, and the worst."""
    if not objects:
        return
    better = sum(one.gain_db > 0 for one in objects)
    mean = sum(one.gain_db for one in objects) / len(objects)
    print(f"{better} of {len(objects)} objects got better, {len(objects) - better} did not; mean gain {mean:+.2f} dB")


def _named(given: Path, *, option: str) -> dict[str, Path]:
    """Pictures by their path in the folder, without suffix."""
    if given.is_file():
        return {given.stem: given}
    found = pictures_below(given) if given.is_dir() else {}
    if not found:
        raise ValueError(f"{option} {given}: no such picture, or no pictures in it")
    return found


def _partners(pictures: dict[str, Path], gt: Path) -> dict[str, Path]:
    """The clean picture of each; of one single picture whatever its name is."""
    clean = _named(gt, option="--gt")
    if gt.is_file() and len(pictures) == 1:
        return dict.fromkeys(pictures, gt)
    if missing := sorted(pictures.keys() - clean.keys()):
        raise ValueError(f"--gt {gt} lacks {len(missing)} of {len(pictures)} pictures, such as {missing[0]}")
    return clean


def _tensor(rgb_u8: Picture) -> "torch.Tensor":
    import torch

    return torch.from_numpy(rgb_u8).permute(2, 0, 1)[None].float() / 255


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows])
    write_whole(path, text.getvalue())


if __name__ == "__main__":
    sys.exit(main())
