"""Every picture counts once, and every rank passes equally often."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_train import evaluate as module
from dist_train.data.batch import Batch
from dist_train.data.reader import ShardReader
from dist_train.evaluate import Row, evaluate, means
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    folder = tmp_path_factory.mktemp("val")
    write_pairs(make_pairs(folder / "src", 5), folder / "out")
    return ShardReader(folder / "out")


def scores(reader: ShardReader, world: int, patch: pytest.MonkeyPatch, *, lazy: int | None = None) -> Any:
    """Rows that each rank gets, and how often each passed; the rank `lazy` loses its last part on the way."""
    passes = [0] * world

    def restore(batch: Batch) -> dict[str, Tensor]:
        passes[module.ranks.rank()] += 1
        return {"student_out": (batch.lq + 0.1).clamp(0, 1)}

    def run(rank: int, gather: Any) -> list[Row]:
        patch.setattr(module.ranks, "rank", lambda: rank)
        patch.setattr(module.ranks, "gather_objects", gather)
        return evaluate(restore, reader, protocols=["rgb"], device=torch.device("cpu"))

    class SentError(Exception):
        pass

    def send(part: Any) -> Any:
        sent.append(part)
        raise SentError

    sent: list[Any] = []
    patch.setattr(module.ranks, "world_size", lambda: world)
    for rank in range(world):
        with pytest.raises(SentError):
            run(rank, send)
    if lazy is not None:
        sent[lazy] = (sent[lazy][0], sent[lazy][1] - 1, None)
    counted = list(passes)
    return [run(rank, lambda _: sent) for rank in range(world)], counted


def test_scores_are_the_same_for_any_world_and_passes_for_any_rank(
    reader: ShardReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((alone,), passes) = scores(reader, 1, monkeypatch)
    assert passes == [5] and [row.key for row in alone] == [key for key in reader.keys for _ in range(2)]
    for world in (2, 3, 4, 5, 7, 12):
        rows, passes = scores(reader, world, monkeypatch)
        assert all(of_rank == alone for of_rank in rows) and means(rows[0]) == means(alone)
        assert passes == [-(-5 // world)] * world


def test_a_rank_that_passes_less_often_is_noticed(reader: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="equally often"):
        scores(reader, 3, monkeypatch, lazy=2)


def test_a_picture_that_one_rank_cannot_read_is_an_error_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(make_pairs(tmp_path / "src", 4), tmp_path / "out")
    broken = ShardReader(tmp_path / "out")
    (tar,) = (tmp_path / "out").glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:600] + b"spoilt" + tar.read_bytes()[606:])
    with pytest.raises(Exception, match=broken.keys[0]):
        scores(broken, 2, monkeypatch)
