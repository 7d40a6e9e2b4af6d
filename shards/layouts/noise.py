"""Noise: SenseNoise, PolyU."""

from pathlib import Path

from shards.layouts.generic import globs, legal
from shards.layouts.layout import Layout, Pair, home, partner, pictures_in, there


def sensenoise(
    src: Path, *, split: str | None = None, lq: str | None = None, gt: str | None = None, map: str | None = None
) -> list[Pair]:
    """SenseNoise: its folders are not documented, so say where the pictures are: --lq GLOB --gt GLOB --map RULE.

    As `globs`. 500 scenes in all (certain), but neither names nor splits are known, so nothing is counted.
    """
    return globs(src, lq=lq, gt=gt, map=map)


def polyu(src: Path, *, split: str | None = None) -> list[Pair]:
    """PolyU: NAME_real.JPG to NAME_mean.JPG, the mean of many shots, in one folder (CroppedImages).

    The key is NAME. It has no splits; all of it, 100 cropped regions, counts as `test`. Counts: likely.
    """
    root, _ = home(src, "CroppedImages")
    found = pictures_in(root)
    lq, gt = (
        {name[: -len(end)]: path for name, path in found.items() if name.lower().endswith(end)}
        for end in ("_real", "_mean")
    )
    if not lq and not gt:
        raise ValueError(f"no NAME_real.JPG in {root}; point --src at the folder of the pictures; {there(root)}")
    return partner(lq, gt, lq_key=legal, gt_key=legal)


LAYOUTS = {
    "sensenoise": Layout(sensenoise, "noise", {}, ("lq", "gt", "map")),
    "polyu": Layout(polyu, "noise", {"test": 100}),
}
