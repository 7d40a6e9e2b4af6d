"""IoU, pixel accuracy and Dice of class maps, from confusion matrices; each averaged in three ways, which differ.

`macro` is the mean over classes of the matrix of all pictures, Cityscapes' own way and what papers call mIoU.
`per_image` is the mean over pictures of each one's macro. `micro` lets every pixel count the same. Classes that occur
neither in labels nor in what was found are left out of a mean; of accuracy, those that are not in the labels.

Dice of a class is 2 IoU / (1 + IoU), so no average over the same classes makes a macro Dice above 2 mIoU / (1 + mIoU).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dist_train.segmentation.cityscapes import IGNORE, NUM_CLASSES

Confusion = NDArray[np.int64]
"""(19,19): how many pixels of the class of a row were found to be of the class of a column."""
Scores = dict[str, dict[str, float]]
"""`iou`, `pa` and `dice` -> `macro`, `per_image` and `micro`, in [0,1]; NaN of no labels at all."""


def confusion(found: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Confusion:
    """Count the pixels of one picture.

    Args:
        found: (H,W) in 0 ... 18.
        labels: (H,W) in 0 ... 18, or `IGNORE`, which is not counted.

    Raises:
        ValueError: two sizes.
    """
    if found.shape != labels.shape:
        raise ValueError(
            f"the labels are {labels.shape[1]}x{labels.shape[0]}, the frame {found.shape[1]}x{found.shape[0]}"
        )
    counted = labels != IGNORE
    cells = labels[counted].astype(np.int64) * NUM_CLASSES + found[counted]
    return np.bincount(cells, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)


def per_class(counts: Confusion) -> dict[str, NDArray[np.float64]]:
    """`iou`, `pa` (share of the labelled pixels that was found), `dice` of each class; NaN where it does not occur."""
    right, labelled, found = (part.astype(np.float64) for part in (np.diag(counts), counts.sum(1), counts.sum(0)))
    with np.errstate(invalid="ignore"):
        return {
            "iou": right / (labelled + found - right),
            "pa": right / labelled,
            "dice": 2 * right / (labelled + found),
        }


def scores(counts: Sequence[Confusion]) -> Scores:
    """All averages over pictures, from each one's matrix."""
    total = np.sum(counts, axis=0)
    right, num = float(np.trace(total)), float(total.sum())
    # Each wrong pixel is missed in one class and false in another.
    micro = {"iou": right / (2 * num - right), "pa": right / num, "dice": right / num} if num else {}
    of_all, of_each = per_class(total), [per_class(one) for one in counts if one.sum()]
    return {
        name: {
            "macro": _mean(of_all[name]),
            "per_image": _mean(np.array([_mean(one[name]) for one in of_each])),
            "micro": micro.get(name, float("nan")),
        }
        for name in of_all
    }


def _mean(values: NDArray[np.float64]) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")
