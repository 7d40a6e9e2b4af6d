"""What restoring is worth to a segmentation net: `python -m launch.segment SEGMENTER --frames DIR --labels DIR`."""

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.command import program
from launch.console import add_net_option, device_of, for_json, run_main, set_up_logging
from shards.codec import decode_rgb
from shards.degrade import DEGRADATIONS
from shards.files import write_whole
from shards.schema import sha256_of

if TYPE_CHECKING:
    import torch

    from dist_train.segmentation.cityscapes import Frame

Picture = np.ndarray
METRICS = {"iou": "IoU", "pa": "PA", "dice": "Dice"}
AVERAGES = {"macro": "macro", "per_image": "image", "micro": "micro"}


def main(argv: list[str] | None = None) -> int:
    """Parse, segment and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("launch.segment"),
        description="Segment frames of Cityscapes as they are, degraded, and restored by a net: IoU, pixel accuracy "
        "and Dice of each, averaged in three ways.",
        epilog="example: %(prog)s espnet_p_2_q_8.pth --frames leftImg8bit/val --labels gtFine/val --degrade rain_heavy "
        "--restored-by derain.safetensors --out segmented",
    )
    parser.add_argument(
        "segmenter", type=Path, help=".pth of ESPNet, or of HRNet-Semantic-Segmentation's HRNetV2 without OCR"
    )
    parser.add_argument("--frames", type=Path, required=True, help="folder of *_leftImg8bit.png, or one above it")
    parser.add_argument(
        "--labels", type=Path, required=True, help="folder of *_gtFine_{labelTrainIds,labelIds,color}.png, or above it"
    )
    degraded = parser.add_mutually_exclusive_group()
    degraded.add_argument(
        "--degrade", choices=sorted(DEGRADATIONS.keys() - {"blur_frames"}), help="degrade each frame so"
    )
    degraded.add_argument("--degraded", type=Path, help="folder of the same frames, degraded, with the same names")
    parser.add_argument("--seed", type=int, default=0, help="decides, with a frame's name, --degrade (default: 0)")
    parser.add_argument(
        "--restored-by", type=Path, metavar="WEIGHTS", help=".safetensors of launch.export, or an official .pth"
    )
    parser.add_argument("--tile", type=int, default=0, metavar="PX", help="restore in tiles so wide (default: whole)")
    parser.add_argument("--out", type=Path, help="folder for segment.json and pictures")
    parser.add_argument("--pictures", type=int, default=4, help="how many frames are drawn (default: 4)")
    parser.add_argument(
        "--align-corners", action=argparse.BooleanOptionalAction, default=True,
        help="of HRNet: what its program does since PyTorch 1.1; older files want --no-align-corners",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add_net_option(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Degrade, restore, segment and score each frame; print a table, write the rest."""
    from tqdm import tqdm

    from dist_train.metrics import psnr
    from dist_train.pictures import write_png
    from dist_train.segmentation import load_segmenter, segment
    from dist_train.segmentation.cityscapes import find_frames, read_labels
    from dist_train.segmentation.draw import draw
    from dist_train.segmentation.scores import confusion, scores

    device = device_of(args.device)
    frames = find_frames(args.frames, args.labels)
    if args.out and (
        same := [one for one in frames if (args.out / f"{one.key}.png").resolve() == one.picture.resolve()]
    ):
        raise ValueError(f"{same[0].picture} is a frame and would be overwritten; choose another --out")
    degrade, restore = _degrader(args), _restorer(args, device)
    segmenter = load_segmenter(args.segmenter, device, align_corners=args.align_corners)

    counts: dict[str, list[np.ndarray]] = {}
    psnrs: dict[str, list[float]] = {}
    for number, frame in enumerate(tqdm(frames, unit="frame", disable=len(frames) == 1)):
        versions = {"clean": _read(frame.picture)}
        if degrade:
            versions["degraded"] = degrade(frame, versions["clean"])
        if restore:
            versions["restored"] = restore(versions.get("degraded", versions["clean"]))
        labels = read_labels(frame.labels)
        if labels.shape != versions["clean"].shape[:2]:
            raise ValueError(f"{frame.labels} and {frame.picture} have two sizes; they do not belong together")
        found = {name: segment(segmenter.net, picture) for name, picture in versions.items()}
        for name, picture in versions.items():
            counts.setdefault(name, []).append(confusion(found[name], labels))
            psnrs.setdefault(name, []).append(psnr(picture, versions["clean"]))
        if args.out and number < args.pictures:
            titles = {name: f"{name} {psnrs[name][-1]:.2f} dB" if name != "clean" else name for name in versions}
            maps = {name: f"{name}: PA {scores(counts[name][-1:])['pa']['micro']:.3f}" for name in versions}
            drawn = draw(
                {titles[name]: picture for name, picture in versions.items()},
                {maps[name]: one for name, one in found.items()},
                labels,
            )
            write_png(args.out / f"{frame.key}.png", drawn)

    rows = {name: {"psnr_rgb": _mean(psnrs[name]), **scores(each)} for name, each in counts.items()}
    print(f"{segmenter.title} on {len(frames)} frames of {args.frames}" + (f", {args.degrade}" if args.degrade else ""))
    print(table(rows))
    if args.out:
        facts = {
            "segmenter": {"file": args.segmenter.name, "title": segmenter.title, "sha256": segmenter.sha256},
            "degraded": args.degrade or (args.degraded and str(args.degraded)),
            "seed": args.seed if args.degrade else None,
            "restored_by": {"file": args.restored_by.name, "sha256": sha256_of(args.restored_by), "tile_px": args.tile}
            if restore
            else None,
            "rows": rows,
            **_details(frames, counts),
        }
        write_whole(args.out / "segment.json", json.dumps(for_json(facts), indent=1, allow_nan=False) + "\n")
        print(f"numbers and pictures: {args.out}")
    return 0


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Rows, each of `dist_train.segmentation.scores` with `psnr_rgb` in dB, as text."""
    lines = [
        f"{'':8} {'PSNR':>6} |" + " |".join(f" {title:26}" for title in METRICS.values()),
        f"{'':8} {'dB':>6} |" + " |".join("".join(f" {title:>8}" for title in AVERAGES.values()) for _ in METRICS),
    ]
    for name, row in rows.items():
        numbers = " |".join("".join(f" {row[metric][average]:8.4f}" for average in AVERAGES) for metric in METRICS)
        lines.append(f"{name:8} {'-' if math.isinf(row['psnr_rgb']) else format(row['psnr_rgb'], '.2f'):>6} |{numbers}")
    return "\n".join(line.rstrip() for line in lines)


def _degrader(args: argparse.Namespace) -> "Callable[[Frame, Picture], Picture] | None":
    """From a frame and its picture to the degraded one."""
    if args.degraded:
        from dist_train.segmentation.cityscapes import by_key

        paths = by_key(args.degraded)

        def read(frame: "Frame", clean: Picture) -> Picture:
            if frame.key not in paths:
                raise ValueError(f"--degraded {args.degraded} has no frame {frame.key}")
            picture = _read(paths[frame.key])
            if picture.shape != clean.shape:
                raise ValueError(f"{paths[frame.key]} and {frame.picture} have two sizes; they are no pair")
            return picture

        return read
    if not args.degrade:
        return None

    def degrade(frame: "Frame", clean: Picture) -> Picture:
        rng = np.random.Generator(np.random.Philox(key=[args.seed, zlib.crc32(frame.key.encode())]))
        made = DEGRADATIONS[args.degrade].make(clean, rng)
        return made[0] if isinstance(made, tuple) else made

    return degrade


def _restorer(args: argparse.Namespace, device: "torch.device") -> Callable[[Picture], Picture] | None:
    if not args.restored_by:
        return None
    import torch

    from dist_train.inference import Inference, restorer
    from dist_train.load import load_net
    from dist_train.metrics import to_u8

    restore = restorer(load_net(args.restored_by, dict(args.net))[0], Inference(tile_px=args.tile), device=device)

    def to_picture(lq_u8: Picture) -> Picture:
        return to_u8(restore(torch.from_numpy(lq_u8).permute(2, 0, 1)[None].float() / 255)[0])

    return to_picture


def _details(frames: "list[Frame]", counts: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Scores of each class over all frames, and of each frame over all classes."""
    from dist_train.segmentation.cityscapes import CLASSES
    from dist_train.segmentation.scores import per_class, scores

    names = [one.name for one in CLASSES]
    classes, pictures = {}, {}
    for name, each in counts.items():
        of_all = per_class(np.sum(each, axis=0))
        classes[name] = {metric: dict(zip(names, values.tolist(), strict=True)) for metric, values in of_all.items()}
        of_each = [scores([one]) for one in each]
        pictures[name] = {
            frame.key: {"iou_macro": one["iou"]["macro"], "pa_micro": one["pa"]["micro"]}
            for frame, one in zip(frames, of_each, strict=True)
        }
    return {"classes": classes, "pictures": pictures}


def _read(path: Path) -> Picture:
    try:
        return decode_rgb(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
