"""`none`: no masks, so that a teacher is the plain cascade."""

from typing import Any

from torch import Tensor

from dist_train.priors.masks import MaskSet, Restore, Samples, empty


class NoPrior:
    """Finds no mask in any picture: what semantics add is measured against it."""

    def __call__(self, images: Tensor, batch: Samples | None = None, *, restore: Restore | None = None) -> MaskSet:
        """A MaskSet of K = 0; see `Prior`."""
        return empty(len(images), 0, *images.shape[-2:], device=images.device)

    def describe(self) -> dict[str, Any]:
        """For the run record."""
        return {
            "name": "none",
            "what": "no masks: the teacher is the plain cascade",
            "parameters": {},
            "weights": None,
            "sha256": None,
            "dtype": "bool",
        }
