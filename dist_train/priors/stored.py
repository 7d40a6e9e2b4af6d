"""`stored`: masks that lie beside the pictures in the shards, made ahead by `python -m shards masks`."""

from typing import Any

from torch import Tensor

from dist_train.config import StoredConfig
from dist_train.priors.masks import MaskSet, Restore, Samples, largest_first
from shards.schema import Masks


class StoredPrior:
    """The masks that come with a batch: the same at each visit, whatever the student does.

    Args:
        config: see there.
        note: of the training set, for the record.
    """

    def __init__(self, config: StoredConfig, note: Masks | None = None):
        self._config, self._note = config, note

    def __call__(self, images: Tensor, batch: Samples | None = None, *, restore: Restore | None = None) -> MaskSet:
        """The `num_masks` largest of each picture; see `Prior`.

        Raises:
            ValueError: the pictures come without masks.
        """
        if batch is None or batch.masks is None:
            raise ValueError(f"prior.name=stored, but these pictures have no masks beside them; {how_to_store('DIR')}")
        return largest_first(batch.masks, num_masks=self._config.num_masks)

    def describe(self) -> dict[str, Any]:
        """For the run record; the sha256 is of the masks themselves."""
        note = self._note
        return {
            "name": self._config.name,
            "what": f"masks in the shards, made ahead of {note.of} by: {note.prior['what']}" if note else "none",
            "parameters": self._config.model_dump(exclude={"name"}) | {"of": note and note.prior},
            "weights": note and note.prior["weights"],
            "sha256": note and note.sha256,
            "dtype": "bool",
        }


def how_to_store(folder: object) -> str:
    """What to tell a user whose shards in `folder` have no masks."""
    return f"`python -m shards masks {folder} --out {folder}-masks` writes the set again, with masks"
