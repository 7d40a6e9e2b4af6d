"""Score restored pictures under named protocols: `python -m launch.evaluate WEIGHTS_OR_RUN SHARDS [--protocol all]`."""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.protocols import ALIASES, PROTOCOLS_SAY, protocol_name
from launch.command import program
from launch.console import add_cache_options, add_net_option, cache_of, for_json, run_main, set_up_logging
from launch.scores import layout_if_tested, print_scores
from launch.with_masks import add_prior_options, chosen_prior, restorer_with_masks
from shards.files import write_whole

if TYPE_CHECKING:
    import torch

    from dist_train.config import RunConfig
    from dist_train.data.folder import Pictures
    from dist_train.evaluate import Restorer
    from dist_train.fid import InceptionFeatures

DEFAULT = ["rgb", "rain200"]


def main(argv: list[str] | None = None) -> int:
    """Parse and score; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("launch.evaluate"),
        description="PSNR and SSIM of the degraded input and of the restored pictures, under named protocols, and the "
        "share of pictures that restoring ruins (MCR). Works on one process or under a launcher, which shares the "
        "pictures out: every one counts once.",
        epilog="Pictures that any method restored: launch.evaluate --restored DIR --gt DIR [--lq DIR].",
    )
    parser.add_argument(
        "weights",
        type=Path,
        nargs="?",
        help="an exported student (.safetensors), a .pth of a net's official release, a run's folder, or a checkpoint",
    )
    parser.add_argument(
        "data",
        nargs="?",
        metavar="shards",
        help="folder of shards to score on, or the URL of one; with --awgn a folder of clean pictures too",
    )
    parser.add_argument(
        "--protocol",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(PROTOCOLS_SAY)}, or all (default: {' '.join(DEFAULT)}; with --awgn: awgn)",
    )
    parser.add_argument("--protocols", action="store_true", help="say what each protocol is, and do nothing else")
    parser.add_argument(
        "--awgn", type=float, metavar="SIGMA", help="degrade clean pictures by noise, such as 25 (of 255)"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="also write every picture's numbers to this file")
    parser.add_argument(
        "--fid-weights", type=Path, metavar="FILE", help="also FID, by pt_inception-2015-12-05-6726825d.pth"
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        metavar="TABLE/ROW",
        help="published rows to print (configs/published.yaml); default: those on the data set's test split",
    )
    folders = parser.add_argument_group("pictures that are restored already, paired by name without suffix")
    folders.add_argument("--restored", type=Path, metavar="DIR")
    folders.add_argument("--gt", type=Path, metavar="DIR", help="the clean pictures")
    folders.add_argument("--lq", type=Path, metavar="DIR", help="the degraded ones, to score them too")
    how = parser.add_argument_group("how the net is run; part of the protocol's name in what is printed and stored")
    how.add_argument(
        "--tlc", type=int, default=0, metavar="PX", help="NAFNet: pool as over training crops of that side"
    )
    how.add_argument("--ensemble", action="store_true", help="mean over eight flips and turns")
    how.add_argument("--tile", type=int, default=0, metavar="PX", help="in tiles of that side")
    how.add_argument("--overlap", type=int, default=32, metavar="PX", help="of tiles (default: 32)")
    how.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    add_prior_options(parser)
    add_cache_options(parser)
    add_net_option(parser)
    args = parser.parse_args(argv)
    if args.protocols:
        for name, meaning in PROTOCOLS_SAY.items():
            print(f"{name}: {meaning}.")
        print("; ".join(f"{old} is the former name of {name}" for old, name in ALIASES.items()) + ".")
        return 0
    set_up_logging()
    return run_main(lambda: score(args))


def score(args: argparse.Namespace) -> int:
    """Restore each picture once and print a table of all protocols."""
    from dist_train import ranks

    _check(args)
    protocols = _protocols(args)
    device = ranks.join_ranks(args.device)
    try:
        return _score(args, protocols, device)
    finally:
        ranks.stop_ranks()


@dataclass(frozen=True)
class _Subject:
    """What is scored, and on what."""

    title: str
    restore: "Restorer"
    pictures: "Pictures"
    suffix: str
    """Of the protocol's names: noise, and how the net was run."""
    layout: str | None
    """Of the data set, if this is its whole split for testing."""
    net: "dict[str, Any] | None"
    """Its settings: those of NAFNet say whether it has TLC of its own."""


def _score(args: argparse.Namespace, protocols: list[str], device: "torch.device") -> int:
    from dist_train import ranks
    from dist_train.evaluate import as_records, evaluate, means
    from dist_train.published import find_published, published

    beside = [find_published(name) for name in args.beside or ()]
    features = _features(args, device)
    subject = _folders(args) if args.restored else _restored_by_net(args, device)
    rows = evaluate(
        subject.restore,
        subject.pictures,
        protocols=protocols,
        device=device,
        see=features.see if features else None,
    )
    fid = features.distances() if features else {}
    if args.restored and not args.lq:  # clean pictures stood for the degraded ones
        rows = [replace(row, collapsed=False) for row in rows if row.name != "input"]
        fid.pop("input", None)
    rows = [replace(row, protocol=row.protocol + subject.suffix) for row in rows]
    if not args.beside and subject.layout:
        beside = published(layout=subject.layout)
    record = {
        "what": subject.title,
        "net": subject.net,
        "num_pictures": len(subject.pictures),
        "protocols": {name + subject.suffix: PROTOCOLS_SAY[name] for name in protocols},
        "means": means(rows),
        "fid": fid,
        "published": [row.model_dump() for row in beside],
    }
    if ranks.is_main():
        print_scores(record, versions=list(dict.fromkeys(row.name for row in rows)))
        if args.json:
            told = for_json(record | {"pictures": as_records(rows)})
            write_whole(args.json, json.dumps(told, indent=1, allow_nan=False) + "\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not belong together."""
    net_options = [
        name
        for name in ("weights", "data", "net", "awgn", "tlc", "ensemble", "tile", "prior", "settings")
        if getattr(args, name)
    ]
    if args.restored:
        if net_options or args.precision != "fp32":
            raise ValueError(
                f"--restored scores pictures without a net; leave out {', '.join(net_options) or 'precision'}"
            )
        if not args.gt:
            raise ValueError("--restored DIR wants --gt DIR, the clean pictures of the same names")
    elif args.gt or args.lq:
        raise ValueError("--gt and --lq go with --restored DIR; a net is scored on shards")
    elif not (args.weights and args.data):
        raise ValueError("give WEIGHTS and SHARDS, or --restored DIR --gt DIR; --help says more")
    if args.awgn is not None and args.awgn <= 0:
        raise ValueError(f"--awgn {args.awgn:g}: sigma is above 0, such as 25")
    if args.json:  # now, not after hours of work
        if args.json.is_dir():
            raise ValueError(f"--json {args.json} is a folder; name a file")
        args.json.parent.mkdir(parents=True, exist_ok=True)


def _protocols(args: argparse.Namespace) -> list[str]:
    names = args.protocol or (["awgn"] if args.awgn else DEFAULT)
    if "all" in names:
        return [name for name in PROTOCOLS_SAY if name != "awgn" or args.awgn]
    names = list(dict.fromkeys(protocol_name(name) for name in names))
    if "awgn" in names and not args.awgn:
        raise ValueError("--protocol awgn is of noise that is made here; say how much: --awgn 25")
    return names


def _folders(args: argparse.Namespace) -> _Subject:
    """Pictures that are restored already."""
    import torch

    from dist_train.data.batch import Batch
    from dist_train.data.folder import PairFolder, by_stem, read_picture

    pictures = PairFolder(args.gt, args.lq)
    restored = by_stem(args.restored, wanted=pictures.keys)

    def read(batch: Batch) -> dict[str, torch.Tensor]:
        (key,) = batch.keys
        picture = read_picture(restored[key], like=batch.gt[0].permute(1, 2, 0).numpy(force=True))
        return {"restored_out": torch.from_numpy(picture).permute(2, 0, 1)[None] / 255}

    return _Subject(f"{args.restored} against {args.gt}", read, pictures, suffix="", layout=None, net=None)


def _restored_by_net(args: argparse.Namespace, device: "torch.device") -> _Subject:
    """Pictures that a net restores now."""
    from dist_train.inference import Inference, restorer
    from dist_train.priors import prior_for

    how = Inference(
        tlc_px=args.tlc,
        ensemble=args.ensemble,
        tile_px=args.tile,
        overlap_px=args.overlap,
        precision=args.precision,
    )
    net, config, run = _load(args)
    pictures, noise, layout = _pictures(args)
    restore: Restorer
    if getattr(net, "wants_masks", False):
        if how != Inference():
            raise ValueError(f"{args.weights} wants masks beside the picture, and runs on whole pictures as it is only")
        prior = prior_for(chosen_prior(args, run), pictures.masks_note, device, where=args.data)
        restore = restorer_with_masks(net, prior, device)
    elif args.prior or args.settings:
        raise ValueError(f"--prior is for nets that want masks, and {args.weights} restores pictures alone")
    else:
        plain = restorer(net, how, device=device)
        restore = lambda batch: {"student_out": plain(batch.lq)}  # noqa: E731
    return _Subject(f"{args.weights} on {args.data}", restore, pictures, noise + how.suffix, layout, config)


def _pictures(args: argparse.Namespace) -> "tuple[Pictures, str, str | None]":
    """What is restored; what protocols' names say of noise on it; the layout of a whole split for testing."""
    from dist_train.data.folder import PairFolder, WithNoise
    from dist_train.data.reader import ShardReader
    from shards.schema import MANIFEST

    folder = Path(args.data)
    is_plain_folder = folder.is_dir() and not (folder / MANIFEST).exists()
    if args.awgn:
        clean = PairFolder(folder) if is_plain_folder else ShardReader(args.data, cache_of(args))
        return WithNoise(clean, sigma=args.awgn), f"+sigma{args.awgn:g}", None
    reader = ShardReader(args.data, cache_of(args))
    return reader, "", layout_if_tested(reader.manifest)


def _load(args: argparse.Namespace) -> "tuple[torch.nn.Module, dict[str, Any], RunConfig | None]":
    """The net that `weights` names, its settings, and the run it is of."""
    from dist_train.checkpoint import find_agreed
    from dist_train.load import load_net, run_of, run_of_checkpoint, student_of

    if not args.weights.is_dir():
        net, card = load_net(args.weights, dict(args.net), masks=True)
        return net, card["net"], run_of(card, source=args.weights)
    if args.net:
        raise ValueError("--net is for official files; a run says all of its net")
    checkpoint = find_agreed(args.weights)
    if checkpoint is None:
        raise ValueError(f"{args.weights} holds no checkpoint; give a run's folder or an exported .safetensors")
    run = run_of_checkpoint(checkpoint)
    return student_of(checkpoint), run.student.model_dump(mode="json"), run


def _features(args: argparse.Namespace, device: "torch.device") -> "InceptionFeatures | None":
    """What FID is taken of, if it is."""
    if args.fid_weights is None:
        return None
    from dist_train.fid import InceptionFeatures

    return InceptionFeatures(args.fid_weights, device=device)


if __name__ == "__main__":
    sys.exit(main())
