"""What `launch.evaluate` says of its scores."""

from collections.abc import Sequence
from typing import Any

from shards.schema import Manifest


def layout_if_tested(manifest: Manifest) -> str | None:
    """The layout of a data set that is a whole split for testing, which published numbers are of; None of any other."""
    from shards.layouts import LAYOUTS

    layout = LAYOUTS.get(manifest.layout)
    known = None if layout is None or manifest.split == "train" else layout.counts.get(manifest.split)
    return manifest.layout if known == manifest.num_samples else None


def print_scores(record: dict[str, Any], *, versions: Sequence[str]) -> None:
    """Print a line for each protocol and version, then what else is known, then what others published.

    Args:
        record: what --json stores: what, num_pictures, protocols, means, fid, published.
        versions: names of what was scored.
    """
    means, num = record["means"], record["num_pictures"]
    print(f"{record['what']}, {num} pictures")
    width = max(10, *(len(name) for name in record["protocols"]))
    print(f"{'protocol':{width}} {'':8} {'PSNR dB':>8} {'SSIM':>8}")
    for protocol in record["protocols"]:
        for name in versions:
            psnr, ssim = (means[f"val/{protocol}/{metric}/{name}"] for metric in ("psnr", "ssim"))
            print(f"{protocol:{width}} {name:8} {psnr:8.4f} {ssim:8.5f}")
    for name in versions:
        if (rate := means.get(f"val/mcr/{name}")) is not None:
            print(f"MCR {name}: {rate:.2f} % ({rate * num / 100:.0f} of {num} lost more than 3 dB of RGB PSNR)")
    for name, value in record["fid"].items():
        from dist_train.fid import title

        print(f"{title(num)} {name}: {value:.4f}")
    for row in record["published"]:
        values = ", ".join(f"{quantity} {value:g}" for quantity, value in row["values"].items())
        protocol = row["protocol"] or "protocol unknown, or none of ours"
        remark = f"; {row['remark']}" if row["remark"] else ""
        print(f"published {row['table']}/{row['row']}: {row['what']} on {row['data']}: {values} ({protocol}{remark})")
