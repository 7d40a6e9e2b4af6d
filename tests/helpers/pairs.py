"""Small data sets of noise, made on the fly."""

from pathlib import Path

import numpy as np

from shards.codec import encode_png
from shards.layouts import pairs
from shards.schema import Manifest
from shards.write import write_shards


def make_pairs(root: Path, num: int, *, h: int = 24, w: int = 32) -> Path:
    """Folder with lq/s-N.png and gt/s-N.png, N = 1..num; each gt is its lq with the colours inverted."""
    rng = np.random.default_rng(0)
    for side in ("lq", "gt"):
        (root / side).mkdir(parents=True)
    for number in range(1, num + 1):
        lq = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        (root / "lq" / f"s-{number}.png").write_bytes(encode_png(lq))
        (root / "gt" / f"s-{number}.png").write_bytes(encode_png(255 - lq))
    return root


def write_pairs(src: Path, out: Path, /, **options: object) -> Manifest:
    """Write a folder made by `make_pairs` as shards, though its pictures look like no pairs."""
    defaults = {"src": str(src), "layout": "pairs", "split": "train", "arguments": {}, "allow_suspicious": True}
    return write_shards(pairs(src), out, **{**defaults, **options})  # type: ignore[arg-type]
