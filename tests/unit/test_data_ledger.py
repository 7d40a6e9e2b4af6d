"""What is written down of a run's samples, and when bad ones stop it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config import RunConfig
from dist_train.data import ledger as module
from dist_train.data.batch import BadSample, Batch
from dist_train.data.ledger import Ledger
from tests.helpers.tasks import tiny_run

pytestmark = pytest.mark.unit


def run_of(tmp: Path, *, samples: bool = True, **data: Any) -> RunConfig:
    run = tiny_run(tmp, track={"samples": samples}, data={"train": "-", **data})
    run.dir.mkdir(parents=True, exist_ok=True)
    return run


def batch(*positions: int, bad: tuple[BadSample, ...] = ()) -> Batch:
    pictures = torch.stack([torch.full((3, 2, 2), float(position)) for position in positions])
    num = len(positions)
    keys = tuple(f"k{position}" for position in positions)
    return Batch(pictures, pictures + 1, keys, torch.tensor(positions), torch.zeros(num, 4, dtype=torch.int64), bad)


def bad(key: str, position: int) -> BadSample:
    return BadSample(key, position, "data/train/000001.tar", f"{key} is torn")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_each_rank_saw_can_be_audited(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    with Ledger(run, num_samples=9, start_step=0) as ledger:
        for positions in ((0, 1), (2, 3), (4, 5)):
            ledger.note(batch(*positions))
        found = lines(run.dir / "samples-rank0.jsonl")  # flushed line by line
    assert [(line["step"], line["positions"], line["keys"]) for line in found] == [
        (1, [0, 1], ["k0", "k1"]), (1, [2, 3], ["k2", "k3"]), (2, [4, 5], ["k4", "k5"]),
    ]  # fmt: skip
    assert len({sha1 for line in found for sha1 in line["sha1"]}) == 6
    assert found[0]["sha1"] == module.pixels_sha1(batch(0, 1))
    silent = run_of(tmp_path / "silent", samples=False)
    with Ledger(silent, num_samples=9, start_step=0) as ledger:
        ledger.note(batch(0, 1))
        ledger.settle()
    assert not list(silent.dir.iterdir())


def test_a_resumed_run_strikes_what_it_will_see_again_of_every_rank(tmp_path: Path) -> None:
    run = run_of(tmp_path, max_bad_samples=9)
    for name in ("samples-rank0.jsonl", "samples-rank3.jsonl", "bad_samples.jsonl"):
        (run.dir / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 2')
    with Ledger(run, num_samples=9, start_step=2) as ledger:
        ledger.note(batch(8, 9, bad=(bad("a", 9),)))
        ledger.settle()
    found = {path.name: [line["step"] for line in lines(path)] for path in run.dir.iterdir()}
    assert found == {"samples-rank0.jsonl": [1, 2, 3], "samples-rank3.jsonl": [1, 2], "bad_samples.jsonl": [1, 2, 3]}


def test_bad_samples_are_written_down_counted_once_and_fatal_above_the_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path, max_bad_samples=1)
    with Ledger(run, num_samples=9, start_step=0) as ledger:
        for position in (2, 6):
            ledger.note(batch(position, bad=(bad("a", position),)))
            ledger.settle()
        assert ledger.num_bad == 1 and caplog.text.count("a is torn") == 1
        ledger.note(batch(11, bad=(bad("b", 11),)))
        with pytest.raises(ValueError, match="2 samples could not be read and data.max_bad_samples is 1:\n  a is torn"):
            ledger.settle()
    expected = {"data_set": "data/train", "shard": "000001.tar", "rank": 0}
    assert lines(run.dir / "bad_samples.jsonl") == [
        {"step": step, "position": position, "key": key, "reason": f"{key} is torn", **expected}
        for step, position, key in ((1, 2, "a"), (2, 6, "a"), (3, 11, "b"))
    ]


def test_all_ranks_count_the_bad_samples_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ranks, "any_rank", lambda flag: True)
    monkeypatch.setattr(module.ranks, "gather_objects", lambda mine: [mine, [bad("there", 3)], [bad("there", 2)]])
    with Ledger(run_of(tmp_path, max_bad_samples=2), num_samples=9, start_step=0) as ledger:
        ledger.note(batch(0, bad=(bad("here", 0),)))
        ledger.settle()
        assert ledger.num_bad == 2
    assert [line["rank"] for line in lines(tmp_path / "tiny/bad_samples.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize(("num_samples", "limit"), [(999, 0), (2500, 2)])
def test_one_in_a_thousand_may_be_bad_unless_said_otherwise(tmp_path: Path, num_samples: int, limit: int) -> None:
    with Ledger(run_of(tmp_path), num_samples=num_samples, start_step=0) as ledger:
        for number in range(limit):
            ledger.note(batch(number, bad=(bad(str(number), number),)))
            ledger.settle()
        ledger.note(batch(8, bad=(bad("last", 8),)))
        with pytest.raises(ValueError, match=f"max_bad_samples is {limit}"):
            ledger.settle()


def test_a_hundred_in_a_row_are_fatal_whatever_is_allowed(tmp_path: Path) -> None:
    with Ledger(run_of(tmp_path, max_bad_samples=999), num_samples=9999, start_step=0) as ledger:
        rows = (*range(98), *range(99, 199))  # a good one between
        for position in rows[:-1]:
            ledger.note(batch(position, bad=(bad(str(position), position),)))
            if position % 4 == 3:
                ledger.settle()
        ledger.note(batch(198, bad=(bad("last", 198),)))
        with pytest.raises(ValueError, match="100 samples in a row, up to position 198, .* last is torn\\nSee whether"):
            ledger.settle()
