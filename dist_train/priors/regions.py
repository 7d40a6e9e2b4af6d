"""`regions`: a classical over-segmentation, for where there are no weights. It sees edges and colours, not objects."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dist_train.config import RegionsConfig
from dist_train.priors.masks import MaskSet, Restore, Samples, finite, from_masks, to_uint8


@dataclass(frozen=True)
class RegionsPrior:
    """Felzenszwalb and Huttenlocher's graph-based segmentation (IJCV 2004), by scikit-image, on the CPU.

    Deterministic, and each picture by itself. The masks are disjoint: SAM's wholes and parts have no counterpart here.
    """

    config: RegionsConfig

    def __call__(self, images: Tensor, batch: Samples | None = None, *, restore: Restore | None = None) -> MaskSet:
        """The `num_masks` largest regions of each picture, none of one that is not finite; see `Prior`."""
        pictures = [self._regions(picture) for picture in to_uint8(images)]
        found = from_masks(pictures, num_masks=self.config.num_masks).to(images.device)
        return MaskSet(found.masks, found.valid & finite(images))

    def describe(self) -> dict[str, Any]:
        """For the run record."""
        return {
            "name": self.config.name,
            "what": "classical over-segmentation (Felzenszwalb); no learned semantics, not SAM",
            "parameters": self.config.model_dump(exclude={"name"}),
            "weights": None,
            "sha256": None,
            "dtype": "float64",
        }

    def _regions(self, picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
        from skimage.segmentation import felzenszwalb

        config = self.config
        labels = felzenszwalb(picture, scale=config.scale, sigma=config.sigma, min_size=config.min_area_px)
        # A picture may have hundreds of regions: only those that will be kept become masks.
        largest = np.argsort(-np.bincount(labels.ravel()), kind="stable")[: config.num_masks]
        return labels == largest[:, None, None]
