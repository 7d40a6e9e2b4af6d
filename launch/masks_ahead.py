"""Make masks ahead of training: `python -m shards masks SHARDS --out OUT [--prior NAME --with KEY=VALUE ...]`."""

import argparse
import sys
from pathlib import Path

import numpy as np

from launch.console import add_net_option, device_of, run_main, set_up_logging, setting
from launch.with_masks import named_prior


def main(argv: list[str] | None = None) -> int:
    """Parse and write; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m shards masks",
        description="Write a data set again with masks beside its pictures, for runs with prior.name=stored. The old "
        "one stays as it is.",
        epilog="example: python -m shards masks data/train --out data/train-masks --prior sam --with model=vit_b "
        "checkpoint=sam_vit_b_01ec64.pth num_masks=64",
    )
    parser.add_argument("shards", help="folder of shards")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--prior", default="regions", choices=["regions", "sam", "psp"], help="what makes the masks")
    parser.add_argument(
        "--with", dest="settings", nargs="+", default=[], type=setting, metavar="KEY=VALUE",
        help="settings of the prior, as in a run's section `prior`; of whole pictures more masks than of crops are "
        "worth keeping",
    )  # fmt: skip
    parser.add_argument(
        "--of", default="lq", metavar="lq|gt|WEIGHTS",
        help="what it looks at: the degraded pictures (default), the clean ones, or the degraded ones as a net "
        "restores them (.safetensors of launch.export, or an official .pth)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add_net_option(parser)
    args = parser.parse_args(argv)
    set_up_logging()
    return run_main(lambda: write(args), stopped="stopped; nothing half-written was left")


def write(args: argparse.Namespace) -> int:
    """Build the prior and the net, if one is to restore, and write."""
    import torch

    from dist_train.load import load_net
    from dist_train.priors import build_prior
    from dist_train.restore import restore_image
    from shards.masks import add_masks
    from shards.schema import sha256_of

    device = device_of(args.device)
    prior = build_prior(named_prior(args.prior, args.settings), device)
    net, of = None, args.of
    if of not in ("lq", "gt"):
        weights = Path(of)
        net = load_net(weights, dict(args.net))[0].to(device)
        of = f"lq restored by {weights.name} of sha256 {sha256_of(weights)}"

    def masks_of(lq: np.ndarray, gt: np.ndarray) -> np.ndarray:
        rgb = gt if of == "gt" else lq if net is None else restore_image(net, lq, device=device)
        image = torch.from_numpy(rgb).to(device).permute(2, 0, 1)[None].float() / 255
        found = prior(image)
        return found.masks[0][found.valid[0]].cpu().numpy()

    manifest = add_masks(args.shards, args.out, masks_of, of=of, prior=prior.describe())
    print(f"{args.out}: {manifest.num_samples} samples with masks of {of}; set data.train to it and prior.name=stored")
    return 0


if __name__ == "__main__":
    sys.exit(main())
