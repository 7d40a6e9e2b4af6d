"""Rain: the sets of Yang et al. (Rain100, Rain200), DID, DDN, and Cityscapes under synthetic rain."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from shards.layouts.layout import (
    Layout,
    Pair,
    by_name,
    folder,
    home,
    natural,
    one_of,
    partner,
    pictures_in,
    there,
)

# The pairs of Yang et al. go round under three kinds of names: of an lq, and what its gt is called.
VARIANTS = {
    "x2": (r"norain-(\d+)x2", r"norain-\1"),
    "renamed": (r"norain-(\d+)", r"norain-\1"),
    "rain100": (r"rain-(\d+)", r"norain-\1"),
}
DENSITIES = ("Rain_Heavy", "Rain_Medium", "Rain_Light")

_LIGHT = ("rain_data_{split}_Light", "{split}")
_HEAVY = ("rain_data_{split}_Heavy", "{split}")


def rain200l(src: Path, *, split: str | None = None, **options: str) -> list[Pair]:
    """Rain200L: rain_data_{train,test}_Light, in it rain/norain-Nx2.png to norain/norain-N.png.

    The key is the name of the gt. `variant` says which copy it is: `x2`; `renamed`, the same pairs under equal names;
    `rain100`, the older and smaller Rain100L, whose lq are rain-N. Left open, the names decide. A folder rain/X2 goes
    before rain. `lq_dir` and `gt_dir` stand for rain and norain. Counts: certain.
    """
    return _yang(src, split, _LIGHT, **options).pairs()


def rain200h(src: Path, *, split: str | None = None, **options: str) -> list[Pair]:
    """Rain200H: rain_data_{train,test}_Heavy, in it rain/X2/norain-Nx2.png to norain/norain-N.png.

    Variants and options are those of Rain200L. The older Rain100H (`rain100`) has as many pairs to train on and half
    as many to test on, and 546 of the former show what the latter show. Counts: certain.
    """
    return _yang(src, split, _HEAVY, **options).pairs()


def rain100l(src: Path, *, split: str | None = None, **options: str) -> list[Pair]:
    """Rain100L: rain/norain-N.png or rain/rain-N.png to norain/norain-N.png.

    Variants and options are those of Rain200L. Counts: certain.
    """
    return _yang(src, split, _LIGHT, **options).pairs()


def rain100h(src: Path, *, split: str | None = None, **options: str) -> list[Pair]:
    """Rain100H: rain/norain-N.png or rain/rain-N.png to norain/norain-N.png; its training set leaks into its test set.

    546 of its training pairs show what test pictures show. Variants and options are those of Rain200L. Counts: certain.
    """
    return _yang(src, split, _HEAVY, **options).pairs()


def did(src: Path, *, split: str | None = None) -> list[Pair]:
    """DID (Rain1200): one JPEG holds both, rainy on the left; Rain_{Heavy,Medium,Light}/train2018new, and TestA.

    Keys are like Rain_Heavy/12, of the test set 12. Counts: of the test set certain, of the training set likely.
    """
    if one_of(split, ("train", "test"), option="--split") == "test":
        root, vain = home(src, "TestA", "test", "testing")
        found = pictures_in(root)
        if not found:
            nor = f" (nor {', '.join(vain)} in it)" if vain else ""
            raise ValueError(f"no pictures in {root}{nor}; {there(root)}")
    else:
        root, vain = home(src, "DID-MDN-training", "train")
        found = {
            f"{density}/{name}": path
            for density in DENSITIES
            for name, path in pictures_in(folder(root, f"{density}/train2018new", vain=vain)).items()
        }
    return [Pair(key, found[key], found[key], side_by_side=True) for key in sorted(found, key=natural)]


def ddn(src: Path, *, split: str | None = None) -> list[Pair]:
    """DDN (Rain1400): fourteen rainy_image/N_K.jpg to each ground_truth/N.jpg, N 1-900 to train, 901-1000 to test.

    The folders may be called rain and norain as well, those of the splits training and testing. Counts: certain.
    """
    root, vain = home(src, *{"train": ("train", "training"), "test": ("test", "testing")}.get(split or "", ()))
    lq = pictures_in(folder(root, "rainy_image", "rain", vain=vain))
    gt = pictures_in(folder(root, "ground_truth", "norain", vain=vain))
    strange = [name for name in lq if not re.fullmatch(r"\d+_\d+", name)]
    if strange:
        raise ValueError(f"{lq[strange[0]]} is not named like 901_14.jpg; is it a picture of this data set?")
    return partner(lq, gt, gt_of=lambda name: name.split("_")[0], many=True)


def cityscape_syn100(src: Path, *, split: str | None = None, **options: str) -> list[Pair]:
    """Cityscape-syn100: weather_cityscapes/leftImg8bit/{train,val}/rain/100mm/rainy_image to leftImg8bit/{train,val}.

    The first is the rain of Halder et al., the second Cityscapes itself, perhaps in a folder cityscapes; else name them
    by `lq_dir` and `gt_dir`. Files have one name in both, whatever folders of cities there are; the key is that name
    without _leftImg8bit. Counts: likely, and likely that the papers used this release.
    """
    return _cityscape(src, split, 100, **options)


def cityscape_syn200(src: Path, *, split: str | None = None, **options: str) -> list[Pair]:
    """Cityscape-syn200: as cityscape_syn100, with 200mm."""
    return _cityscape(src, split, 200, **options)


class _Yang(NamedTuple):
    variant: str
    lq: dict[str, Path]
    gt: dict[str, Path]

    def pairs(self) -> list[Pair]:
        def gt_of(name: str) -> str:
            return re.sub(*VARIANTS[self.variant], name)

        return partner(self.lq, self.gt, gt_of=gt_of, lq_key=gt_of)


def _yang(
    src: Path,
    split: str | None,
    homes: tuple[str, ...],
    *,
    variant: str | None = None,
    lq_dir: str = "rain",
    gt_dir: str = "norain",
) -> _Yang:
    root, vain = home(src, *(name.format(split=split) for name in homes if split))
    lq_root = folder(root, lq_dir, option="--src or --lq-dir", vain=vain)
    gt_root = folder(root, gt_dir, option="--src or --gt-dir", vain=vain)
    if variant in (None, "x2") and (lq_root / "X2").is_dir():
        if variant is None and pictures_in(lq_root):
            raise ValueError(f"{lq_root} holds pictures and so does its X2: choose --variant x2 or renamed")
        lq_root = lq_root / "X2"
    lq = pictures_in(lq_root)
    if not lq:
        raise ValueError(f"no pictures in {lq_root}; {there(lq_root)}")
    tried = VARIANTS if variant is None else [one_of(variant, VARIANTS, option="--variant")]
    for name in tried:
        if all(re.fullmatch(VARIANTS[name][0], stem) for stem in lq):
            return _Yang(name, lq, pictures_in(gt_root))
    raise ValueError(
        f"the pictures in {lq_root} are not all named as in {' or '.join(tried)} (x2 is norain-1x2, renamed norain-1, "
        f"rain100 rain-1): {', '.join(list(lq)[:4])} ...; for other names take the layout `pairs` with --map"
    )


def _settle(homes: tuple[str, ...]) -> Callable[..., dict[str, str]]:
    def settle(src: Path, *, split: str | None, **options: str) -> dict[str, str]:
        return {**options, "variant": _yang(src, split, homes, **options).variant}

    return settle


def _cityscape(
    src: Path, split: str | None, millimetres: int, *, lq_dir: str | None = None, gt_dir: str | None = None
) -> list[Pair]:
    if not (lq_dir and gt_dir):
        one_of(split, ("train", "val"), option="--split (or --lq-dir and --gt-dir)")
    rain = f"leftImg8bit/{split}/rain/{millimetres}mm/rainy_image"
    lq_names = [lq_dir] if lq_dir else [f"{top}weather_cityscapes/{rain}" for top in ("", "weather_datasets/")]
    gt_names = [gt_dir] if gt_dir else [f"{top}leftImg8bit/{split}" for top in ("", "cityscapes/")]
    lq, gt = (
        by_name(root.rglob("*"), lambda path: path.stem.removesuffix("_leftImg8bit"))
        for root in (
            folder(src, *lq_names, option="--src or --lq-dir"),
            folder(src, *gt_names, option="--src or --gt-dir"),
        )
    )
    return partner(lq, gt)


_YANG = ("variant", "lq_dir", "gt_dir")
_OLD_LIGHT = {"rain100/train": 200, "rain100/test": 100}
_OLD_HEAVY = {"rain100/train": 1800, "rain100/test": 100}
_CITYSCAPE = ({"train": 2975, "val": 500}, ("lq_dir", "gt_dir"))

LAYOUTS = {
    "rain200L": Layout(rain200l, "rain", {"train": 1800, "test": 200, **_OLD_LIGHT}, _YANG, _settle(_LIGHT)),
    "rain200H": Layout(rain200h, "rain", {"train": 1800, "test": 200, **_OLD_HEAVY}, _YANG, _settle(_HEAVY)),
    "rain100L": Layout(rain100l, "rain", {"train": 200, "test": 100}, _YANG, _settle(_LIGHT)),
    "rain100H": Layout(rain100h, "rain", {"train": 1800, "test": 100}, _YANG, _settle(_HEAVY)),
    "did": Layout(did, "rain", {"train": 12000, "test": 1200}),
    "ddn": Layout(ddn, "rain", {"train": 12600, "test": 1400}),
    "cityscape_syn100": Layout(cityscape_syn100, "rain", *_CITYSCAPE),
    "cityscape_syn200": Layout(cityscape_syn200, "rain", *_CITYSCAPE),
}
