"""What a run trains on: one data set, or several with fixed shares, read alike."""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from dist_train import ranks
from dist_train.config import DataConfig
from dist_train.data.order import Order
from dist_train.data.reader import Box, ShardReader
from shards.cache import ShardCache
from shards.schema import Masks

log = logging.getLogger(__name__)


class Mixture:
    """Several data sets as one, with the interface of `ShardReader`.

    Samples are numbered through the sets in turn; before each key stands the name of its set.

    Args:
        parts: the sets.
        names: one for each.
        shares: one for each; see `dist_train.data.order.Order`.
    """

    def __init__(self, parts: Sequence[ShardReader], *, names: Sequence[str], shares: Sequence[int]) -> None:
        self.parts = tuple(parts)
        self.keys: tuple[str, ...] = tuple(
            f"{name}/{key}" for name, part in zip(names, parts, strict=True) for key in part.keys
        )
        lines = [f"{name} {share} {part.fingerprint}\n" for name, share, part in zip(names, shares, parts, strict=True)]
        self.fingerprint = hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
        """Changes if that of a set does, or its name or share."""
        self._first = (0, *accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return len(self.keys)

    def size_px(self, number: int) -> tuple[int, int]:
        """See `ShardReader`."""
        part, number = self._find(number)
        return part.size_px(number)

    def pair(self, number: int, box: Box | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `ShardReader`."""
        part, number = self._find(number)
        return part.pair(number, box)

    def lq(self, number: int, box: Box | None = None) -> np.ndarray:
        """See `ShardReader`."""
        part, number = self._find(number)
        return part.lq(number, box)

    @property
    def masks_note(self) -> Masks | None:
        """Where the masks come from; None: not every set has them.

        Raises:
            ValueError: the masks of one set were made otherwise than those of another.
        """
        notes = [part.masks_note for part in self.parts if part.masks_note]
        if len(notes) < len(self.parts):
            return None
        if any((note.of, note.prior) != (notes[0].of, notes[0].prior) for note in notes):
            folders = ", ".join(str(part.folder) for part in self.parts)
            raise ValueError(
                f"data.train: the masks in {folders} were not made alike; make all by the same `python -m shards masks`"
            )
        return notes[0].model_copy(
            update={
                field: hashlib.sha256("".join(getattr(note, field) for note in notes).encode()).hexdigest()
                for field in ("source", "sha256")
            }
        )

    def masks(self, number: int, box: Box | None = None) -> np.ndarray:
        """See `ShardReader`."""
        part, number = self._find(number)
        return part.masks(number, box)

    def prefetch(self, number: int) -> None:
        """See `ShardReader`."""
        part, number = self._find(number)
        part.prefetch(number)

    def close(self) -> None:
        """See `ShardReader`."""
        for part in self.parts:
            part.close()

    def _find(self, number: int) -> tuple[ShardReader, int]:
        which = bisect_right(self._first, number) - 1
        return self.parts[which], number - self._first[which]


Pairs = ShardReader | Mixture


def open_training(data: DataConfig, cache: ShardCache | None = None) -> Pairs:
    """Open what `data.train` names. All ranks call.

    Raises:
        ShardError: as `ShardReader`.
        ValueError: not all ranks found the same.
    """
    parts = [ShardReader(part.path, cache) for part in data.sets]
    found = parts[0] if len(parts) == 1 else Mixture(parts, names=data.names, shares=data.shares)
    if len(prints := set(ranks.gather_objects(found.fingerprint))) > 1:
        raise ValueError(
            f"data.train holds other shards on one node than on another (fingerprints {', '.join(sorted(prints))}); "
            "copy the same to all"
        )
    far = sum(shard.filesize for part in parts if isinstance(part.folder, str) for shard in part.manifest.shardlist)
    if data.order == "full" and far > data.cache_gib * 2**30 and ranks.is_main():
        log.warning(
            "data.order=full reads all shards of an epoch at once, and %.0f GiB that are far away do not fit into "
            "data.cache_gib=%g: most samples will fetch a shard. Set data.order=windowed, or a larger cache",
            far / 2**30, data.cache_gib,
        )  # fmt: skip
    return found


def order_of(reader: Pairs, data: DataConfig, *, seed: int, global_batch: int, start: int = 0) -> Order:
    """The stream of samples as the configuration wants it; `start` is the position at which it begins."""
    return Order(
        [[shard.nsamples for shard in part.manifest.shardlist] for part in reader.parts],
        seed=seed,
        shares=data.shares,
        window=data.window if data.order == "windowed" else None,
        lanes=data.lanes or global_batch,
        start=start,
    )
