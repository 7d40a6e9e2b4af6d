"""The bench of the loader: its table for tiny pictures, and that a lap counts what workers do."""

import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch.bench import feeding
from launch.bench.__main__ import main
from launch.bench.feeding import LOADERS, Feed, prepare
from launch.bench.loader import COLUMNS
from launch.bench.race import preload
from launch.bench.table import header

pytestmark = pytest.mark.unit

OPTIONS = ["--crop", "16", "--batch", "2", "--pairs", "4", "--rounds", "2", "--seconds", "0.01", "--workers", "1"]


@pytest.fixture(autouse=True, scope="module")
def _processes_start_with_torch() -> None:
    preload("launch.bench.feeding", "launch.bench.passes", "launch.bench.masking", "segment_anything")


def test_the_table_holds_every_form_and_loader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    more = ["--size", "40x48", "24x24", "--storage", "tiles:16", "--loader", "ours", "litdata", "--json", str(out)]
    assert main(["loader", *OPTIONS, *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120 and any(line.startswith("40x48: 4 pairs, ") for line in lines)
    rows = [line.split() for line in lines[lines.index(header(COLUMNS)) + 1 :] if line.startswith(("40x48", "24x24"))]
    kinds = [("limit", "0"), ("ours", "1")]
    sets = [("40x48", "keep"), ("40x48", "tiles:16"), ("24x24", "keep")]  # 24 px are no more than twice the crop
    found = [(*row[:2], *row[3:5]) for row in rows if row[3] != "litdata"]
    assert found == [(*of, *kind) for of in sets for kind in kinds]
    for row in rows:
        _, storage, size, loader, _, ms, per_s, of_limit, gain = row
        assert float(ms) == pytest.approx(1000 / float(per_s), abs=0.006) and float(size) > 0  # as printed
        assert loader != "limit" or float(of_limit) == 1
        assert storage != "keep" or (float(gain) == 1 and float(size) == 1)
    record = json.loads(out.read_text())
    assert record["machine"].keys() >= {"cpu", "threads", "load_before", "load_after"}
    for case in record["cases"]:
        assert len(case["laps"]) == 2 and all(num % 4 == 0 and num for _, _, num in case["laps"])


def _busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def _works_on(asked: "multiprocessing.SimpleQueue[float]") -> None:
    while True:
        _busy(asked.get())


def _with_a_worker(feed: Feed) -> Iterator[tuple[torch.Tensor, ...]]:
    asked: multiprocessing.SimpleQueue[float] = multiprocessing.SimpleQueue()
    multiprocessing.Process(target=_works_on, args=(asked,), daemon=True).start()
    for _ in itertools.count():
        asked.put(0.1)
        yield torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)


def test_a_lap_waits_for_workers_and_counts_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOADERS, "busy", _with_a_worker)
    monkeypatch.setattr(feeding.multiprocessing, "set_start_method", lambda *args, **kwargs: None)  # of the tests
    spent = torch.zeros(2, 3, dtype=torch.float64)
    work = prepare(Feed("busy", Path(), 4, 1, 2, 4, 0.0, "cpu", spent))
    work.lap()
    work.lap()
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    for seconds, cpu_s, num in spent.tolist():
        assert num == 4 and 0.2 < cpu_s < 0.25 and seconds > 0.19


def test_sets_that_batches_do_not_divide_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loader", "--batch", "3", "--pairs", "8"]) == 2
    assert "--pairs 8 must be a multiple of --batch 3" in capsys.readouterr().err
    assert main(["loader", "--storage", "zip"]) == 2
    assert "storage 'zip' is none of" in capsys.readouterr().err
