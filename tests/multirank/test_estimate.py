"""The estimates against the real thing: bytes that DeepSpeed holds, and the bench of scaling on 1 and 2 ranks."""

import json
from pathlib import Path

import pytest

from launch.bench.__main__ import main
from launch.bench.scaling import FORETOLD, MEASURED
from launch.bench.table import header
from launch.memory import state_bytes
from tests.helpers.spawn import run_ranks
from tests.helpers.tasks import tiny_run
from tests.multirank.ranks_of_estimate import bytes_in_stages

pytestmark = pytest.mark.multirank


def test_the_states_are_what_deepspeed_holds() -> None:
    for stage, (student, trained, held) in run_ranks(bytes_in_stages, 2, [0, 1, 2, 3])[0].items():
        parts = state_bytes(tiny_run(engine={"zero_stage": stage}), student=student, trained=trained, world=2)
        whole = parts.pop("gathered", 0)  # while they are used; the small ones always
        if 0 < stage < 3:
            parts.pop("bucket")  # only in the backward pass
        if stage < 3:
            parts.pop("gradients")  # none after the update; stage 3 keeps the buffer
        scalars = 1000  # Adam's steps, the log's sums
        assert sum(parts.values()) <= held <= sum(parts.values()) + whole + scalars, stage


def test_the_bench_of_scaling_measures_fits_and_foretells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    options = ["--ranks", "1,2", "--rounds", "2", "--steps", "3", "--sleep-ms", "100", "--spread", "0.1"]
    assert main(["scaling", *options, "--json", str(out)]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert max(map(len, lines)) <= 120 and "ESTIMATE" in said
    rows = [row for row in lines[lines.index(header(MEASURED)) + 1 :] if row.startswith("sleeping")]
    assert [row.split()[3] for row in rows] == ["1", "2"]
    record = json.loads(out.read_text())
    one, two = [case for case in record["cases"] if case["what"].startswith("sleeping")]
    assert len(one["wall_s"]) == 6 and [len(own) for own in two["own_s"]] == [2] * 6
    assert 90 < one["own ms"] < one["step ms"] and two["step ms"] > two["own ms"]
    assert 0.5 < two["ratio"] < 2  # it was fitted to this
    assert len(record["foretold"]["weak"]) == 11 and len(lines[-11:]) == 11
    assert header(FORETOLD) in lines


def test_ranks_that_cannot_be_fitted_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "--ranks", "2,4"]) == 2
    assert "must hold 1 and another" in capsys.readouterr().err
