"""Every order gives the same bits on every topology, whatever was interrupted where, and whatever cannot be read."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import BatchPlan, DataConfig
from dist_train.data.ledger import pixels_sha1
from dist_train.data.loader import training_batches
from dist_train.data.mixture import open_training
from dist_train.data.reader import ShardReader
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.unit

GLOBAL, STEPS = 24, 3  # of 25 samples, or 36 of two sets: steps straddle epochs
TOPOLOGIES = [  # world, accumulation, workers
    (1, 2, 0), (1, 24, 1), (1, 1, 2), (2, 1, 0), (2, 3, 1), (3, 1, 0), (3, 2, 0), (4, 1, 0), (4, 6, 0), (6, 2, 0),
    (8, 1, 0), (8, 3, 0), (12, 1, 0), (12, 2, 0), (24, 1, 0),
]  # fmt: skip
WINDOWED = {"order": "windowed", "window": 3, "lanes": GLOBAL}
ORDERS = ("full", "windowed", "mixture", "windowed mixture")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sets")
    for name, num in (("one", 25), ("two", 11)):
        write_pairs(make_pairs(folder / f"{name}_src", num), folder / name, shard_mib=0.01)
        assert len(list((folder / name).glob("*.tar"))) > 2
    return folder / "one", folder / "two"


def config(order: str, sets: tuple[Path, Path], **values: Any) -> DataConfig:
    parts = [{"path": str(path), "share": share} for path, share in zip(sets, (5, 1), strict=True)]
    train = parts if "mixture" in order else str(sets[0])
    return DataConfig(**{"train": train, "crop_px": 16, **(WINDOWED if "windowed" in order else {}), **values})


Seen = dict[int, tuple[str, str]]


def seen(
    data: DataConfig, world: int, accum: int, workers: int, *, steps: range = range(STEPS), global_batch: int = GLOBAL
) -> tuple[Seen, set[int]]:
    """Position -> key and hash of pixels, of all ranks together; and the positions of stand-ins."""
    plan = BatchPlan(global_batch, global_batch // world // accum, accum)
    found: Seen = {}
    bad: set[int] = set()
    reader, with_workers = open_training(data), data.model_copy(update={"workers": workers})
    for rank in range(world):
        with closing(
            training_batches(reader, with_workers, seed=9, plan=plan, rank=rank, world=world, start_step=steps[0])
        ) as stream:
            for batch in first(stream, len(steps) * accum):
                visits = zip(batch.positions.tolist(), batch.keys, pixels_sha1(batch), strict=True)
                for position, key, sha1 in visits:
                    assert position not in found
                    found[position] = key, sha1
                bad |= {sample.position for sample in batch.bad}
    assert sorted(found) == list(range(steps[0] * global_batch, (steps[-1] + 1) * global_batch))
    return found, bad


def first(stream: Iterator[Any], num: int) -> Iterator[Any]:
    for _ in range(num):
        yield next(stream)


@pytest.mark.parametrize("order", ORDERS)
def test_every_topology_sees_the_same_bits(order: str, sets: tuple[Path, Path]) -> None:
    data = config(order, sets)
    expected = seen(data, 1, 1, 0)
    assert len({sha1 for _, sha1 in expected[0].values()}) > STEPS * GLOBAL * 0.9
    for topology in TOPOLOGIES:
        assert seen(data, *topology) == expected, topology


@pytest.mark.parametrize("order", ORDERS)
def test_resuming_on_other_topologies_and_batches_goes_on_in_the_same_stream(
    order: str, sets: tuple[Path, Path]
) -> None:
    data = config(order, sets)
    expected, _ = seen(data, 1, 1, 0, steps=range(8))
    course: Seen = {}
    for world, accum, workers, steps, global_batch in (
        (2, 1, 1, range(1), 24),
        (24, 1, 0, range(1, 2), 24),
        (3, 4, 0, range(2, 4), 24),
        (4, 2, 0, range(6, 9), 16),  # 96 samples of batches of 24 are 6 of batches of 16
        (1, 1, 2, range(9, 10), 16),
        (1, 1, 0, range(20, 22), 8),
        (8, 2, 0, range(11, 12), 16),
    ):
        part, _ = seen(data, world, accum, workers, steps=steps, global_batch=global_batch)
        assert not course.keys() & part.keys()
        course |= part
    assert course == expected


@pytest.mark.parametrize("order", ORDERS)
def test_what_cannot_be_read_leaves_all_other_positions_alone_everywhere(
    order: str, sets: tuple[Path, Path], tmp_path: Path
) -> None:
    data = config(order, sets)
    before, none = seen(data, 1, 1, 0)
    keys = {"0/s-3", "0/s-11", "1/s-7"} if "mixture" in order else {"s-3", "s-11"}
    with spoilt(sets[0], "s-3"), spoilt(sets[0], "s-11"), spoilt(sets[1], "s-7"):
        after, bad = seen(data, 1, 1, 0)
        for topology in TOPOLOGIES[::3]:
            assert seen(data, *topology) == (after, bad), topology
    assert not none and bad == {position for position, (key, _) in before.items() if key in keys} != set()
    assert all((before[position] == after[position]) == (position not in bad) for position in before)
    assert not keys & {key for key, _ in after.values()}


class spoilt:  # noqa: N801
    """Some bytes of a sample are others, for a while."""

    def __init__(self, folder: Path, key: str) -> None:
        reader = ShardReader(folder)
        row = reader._rows[reader.keys.index(key)]
        self.tar, self.at = folder / reader.manifest.shardlist[row["shard"]].url, int(row["gt_offset"]) + 60

    def __enter__(self) -> None:
        self.content = self.tar.read_bytes()
        self.tar.write_bytes(self.content[: self.at] + b"spoilt" + self.content[self.at + 6 :])

    def __exit__(self, *_: object) -> None:
        self.tar.write_bytes(self.content)
