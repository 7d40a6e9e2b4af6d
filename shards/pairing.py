"""Are these pairs pairs? Figures of each, and what they say of all: swapped folders, strangers, shifted frames.

What is certain should refuse a data set; a suspicion is for people to look at.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np

Kind = Literal["rain", "blur", "noise", "any"]

_BANDS_DB = {"rain": (6.0, 60.0), "blur": (12.0, 60.0), "noise": (6.0, 60.0), "any": (4.0, 80.0)}
_MAX_DB = 100.0  # stands for infinity, which JSON has not
_FEW = 8  # fewer pairs than this prove nothing
_MOST = 0.95
_THUMB_PX = 32
_FLAT = 4.0  # a thumbnail of less contrast (of 255) shows too little to be recognised
_STRANGER = 0.6  # likeness: true pairs have 0.85 in the heaviest rain, others nearly always below 0.5
_MAD_IN_SIGMA = 1.4826
_LEAST_SPREAD_DB = 0.5
_SHIFT_DB = 0.5


class Measures(NamedTuple):
    """Figures of one pair; plain numbers, so `_asdict()` goes into JSON."""

    psnr_db: float
    """Of lq against gt, at most 100."""
    identical: bool
    lq_mean: float
    gt_mean: float
    lq_detail: float
    """Laplacian energy: mean square of the Laplacian of the grey picture."""
    gt_detail: float
    likeness: float
    """Correlation of both, grey and 32x32 pixels small; 1 where gt has too little contrast to tell."""


class Problem(NamedTuple):
    """What is wrong with a set of pairs, and how to mend it."""

    certain: bool
    """True: no good data set looks like this. False: look at it."""
    text: str
    keys: tuple[str, ...] = ()
    """The samples concerned; empty if all are."""

    def __str__(self) -> str:
        return self.text


class _Sign(NamedTuple):
    """Something that nearly every pair of a kind shows, unless lq and gt are swapped."""

    says: str
    holds: Callable[[Measures], bool]


_LQ_BRIGHTER = _Sign("lq is brighter than gt", lambda pair: pair.lq_mean >= pair.gt_mean)
_LQ_BUSIER = _Sign("lq has more fine detail than gt", lambda pair: pair.lq_detail > pair.gt_detail)
_GT_BUSIER = _Sign("gt has more fine detail than lq", lambda pair: pair.gt_detail > pair.lq_detail)
# Rain needs two: fog around it takes detail away, and rain against a bright sky takes brightness.
_SIGNS = {"rain": (_LQ_BRIGHTER, _LQ_BUSIER), "blur": (_GT_BUSIER,), "noise": (_LQ_BUSIER,)}


def measure(lq: np.ndarray, gt: np.ndarray) -> Measures:
    """Figures of a pair, both (H,W,3) uint8 RGB of one size."""
    lq_grey, gt_grey = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (lq, gt))
    return Measures(
        psnr_db=min(cv2.PSNR(lq, gt), _MAX_DB),
        identical=np.array_equal(lq, gt),
        lq_mean=float(np.mean(cv2.mean(lq)[:3])),
        gt_mean=float(np.mean(cv2.mean(gt)[:3])),
        lq_detail=_detail(lq_grey),
        gt_detail=_detail(gt_grey),
        likeness=_likeness(lq_grey, gt_grey),
    )


def problems(measured: Mapping[str, Measures], kind: Kind) -> list[Problem]:
    """What the figures of a data set say against it, certain problems first.

    Certain are identical pictures; folders swapped, if every sign of it is there in 95 % of at least 8 pairs; and
    strangers, if they are more than half of at least 8 pairs. Suspicions are the same things in smaller number, and a
    PSNR outside of what the kind may have, or further than 3 median absolute deviations from the median.

    Args:
        measured: by key.
        kind: what the pairs are; of `any`, where lq and gt may relate in any way, only identity is certain.
    """
    identical = {key: pair for key, pair in measured.items() if pair.identical}
    strangers = {key: pair for key, pair in measured.items() if pair.likeness < _STRANGER}
    rest = {key: pair for key, pair in measured.items() if key not in identical and key not in strangers}
    found = [*_swapped(rest, kind), *_outliers(rest, kind)]
    if identical:
        what = "lq and gt are the same picture; find the degraded pictures, or leave these pairs out"
        found.append(_told(True, what, identical, measured))
    if strangers:
        certain = kind != "any" and len(measured) >= _FEW and len(strangers) > len(measured) / 2
        what = "lq and gt show different scenes; pair them by their names again, or leave these pairs out"
        found.append(_told(certain, what, strangers, measured))
    return sorted(found, key=lambda problem: not problem.certain)


def runs(keys: Sequence[str]) -> list[list[str]]:
    """Frames that follow each other: keys alike but for their last number, which grows by 1; single ones left out."""
    numbered = []
    for key in keys:
        match = re.fullmatch(r"(.*?)(\d+)(\D*)", key, re.DOTALL)
        if match:
            numbered.append(((match[1], match[3]), int(match[2]), key))
    found: list[list[str]] = []
    last: tuple[tuple[str, str], int] | None = None
    for name, number, key in sorted(numbered):
        if last != (name, number - 1):
            found.append([])
        found[-1].append(key)
        last = (name, number)
    return [run for run in found if len(run) > 1]


def shifts(
    keys: Sequence[str], read: Callable[[str], tuple[np.ndarray, np.ndarray]], *, num_runs: int = 8, length: int = 5
) -> list[Problem]:
    """Is each lq closer to the gt of the frame before or after than to its own?

    Told is a neighbour that wins by 0.5 dB in more than half of the frames looked at; with 8 frames it is certain.

    Args:
        keys: of the whole data set.
        read: from a key to lq and gt, (H,W,3) uint8 RGB.
        num_runs: sequences looked at, spread over all.
        length: frames read of each, from its middle.
    """
    whole = [run for run in runs(keys) if len(run) >= 3]
    wins = {-1: 0, 0: 0, 1: 0}
    for number in np.unique(np.linspace(0, len(whole) - 1, num_runs).round().astype(int)) if whole else ():
        run = whole[number]
        start = max((len(run) - length) // 2, 0)
        pictures = [read(key) for key in run[start : start + length]]
        for before, (lq, gt), after in zip(pictures, pictures[1:], pictures[2:], strict=False):
            if lq.shape == gt.shape == before[1].shape == after[1].shape:
                psnr_db = {-1: cv2.PSNR(lq, before[1]), 0: cv2.PSNR(lq, gt) + _SHIFT_DB, 1: cv2.PSNR(lq, after[1])}
                wins[max(psnr_db, key=psnr_db.__getitem__)] += 1
    num_frames = sum(wins.values())
    step, won = max(wins.items(), key=lambda item: item[1])
    if step == 0 or won <= num_frames / 2:
        return []
    what = f"in {won} of {num_frames} frames lq is closest to the gt one frame {'later' if step > 0 else 'earlier'}"
    mend = "lq and gt are numbered differently: number both alike, from the same first frame"
    return [Problem(num_frames >= _FEW, f"{what}; {mend}")]


def _detail(grey: np.ndarray) -> float:
    return float(cv2.norm(cv2.Laplacian(grey, cv2.CV_16S), cv2.NORM_L2) ** 2 / grey.size)


def _likeness(lq: np.ndarray, gt: np.ndarray) -> float:
    small = [cv2.resize(grey, (_THUMB_PX, _THUMB_PX), interpolation=cv2.INTER_AREA) for grey in (lq, gt)]
    a, b = (thumb - thumb.mean(dtype=float) for thumb in small)
    if b.std() < _FLAT:
        return 1.0
    return float((a * b).mean() / max(a.std() * b.std(), 1e-9))


def _swapped(measured: Mapping[str, Measures], kind: Kind) -> list[Problem]:
    signs, num = _SIGNS.get(kind, ()), len(measured)
    held = [sum(map(sign.holds, measured.values())) for sign in signs]
    if not held or held[0] >= _MOST * num:
        return []
    certain = num >= _FEW and max(held) <= (1 - _MOST) * num
    found = " and ".join(f"{sign.says} in {count}" for sign, count in zip(signs, held, strict=True))
    verdict = "are swapped" if certain else "may be swapped"
    mend = f"the folders {verdict}: exchange lq and gt (--lq-dir and --gt-dir)"
    return [Problem(certain, f"of {num} pairs of {kind}, {found}, where nearly all should be so; {mend}")]


def _outliers(measured: Mapping[str, Measures], kind: Kind) -> list[Problem]:
    low, high = _BANDS_DB[kind]
    if len(measured) >= _FEW:
        psnr_db = np.array([pair.psnr_db for pair in measured.values()])
        median = np.median(psnr_db)
        reach = 3 * max(_MAD_IN_SIGMA * np.median(np.abs(psnr_db - median)), _LEAST_SPREAD_DB)
        low, high = max(low, median - reach), min(high, median + reach)
    odd = [key for key, pair in measured.items() if not low <= pair.psnr_db <= high]
    what = f"the PSNR is outside of {low:.1f} to {high:.1f} dB, where the others are; look at these pairs"
    return [_told(False, what, odd, measured)] if odd else []


def _told(certain: bool, what: str, keys: Iterable[str], measured: Mapping[str, Measures]) -> Problem:
    keys = tuple(keys)
    named = ", ".join(f"{key} ({measured[key].psnr_db:.1f} dB)" for key in keys[:10])
    more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
    return Problem(certain, f"{len(keys)} of {len(measured)} pairs: {what}: {named}{more}", keys)
