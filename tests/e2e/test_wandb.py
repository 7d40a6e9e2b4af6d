"""One run in wandb, whatever happens to its starts: no step twice, none renumbered; and no key in what a run leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from dist_train.track import read_metrics
from tests.helpers.starts import SAVES, STEPS, TinyRun
from tests.helpers.wandb_server import KEY, WandbServer, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

WANDB = str(Path(sys.executable).with_name("wandb"))
SECRETS = {
    "WANDB_API_KEY": "5ec4e70123456789abcdef0123456789abcdef01",
    "HF_TOKEN": "hf_5ec4e7CanaryOfTheHub",
    "AWS_SECRET_ACCESS_KEY": "5ec4e7/CanaryOfTheBucket",
    "AWS_SESSION_TOKEN": "5ec4e7CanaryOfTheSession",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    TinyRun.prepare(folder)
    return folder


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a machine where nobody has used wandb before."""
    mine = {name: "" for name in os.environ if name.startswith("WANDB_")}
    return mine | {"HOME": str(home), "WANDB_ERROR_REPORTING": "false", **more}


def interrupt_thrice_and_finish(run: TinyRun, env: dict[str, str]) -> range:
    """Asked to stop; then killed; then refused a save, so that the steps since the one before are told again.

    Returns:
        The steps of the start that was killed, of which nothing may have come through.
    """
    saves = run.folder / "checkpoints"
    with run.start(env=env) as start:
        start.until(lambda: run.step >= SAVES + 1, "a step after the first save")
        start.signal(signal.SIGUSR1, 0)
        assert start.wait() == [3, 3], start.said
    stopped = run.step
    with run.start(env=env) as start:
        start.until(lambda: run.step >= 2 * SAVES + 1, "a step after the second save")
        everyone = [process for pid in start.pids for process in psutil.Process(pid).children(recursive=True)]
        start.kill()
        assert not psutil.wait_procs(everyone, timeout=120)[1]
    killed = range(stopped + 1, run.step + 1)
    with run.start(env=env) as start:
        start.until(lambda: (saves / f"step-{3 * SAVES:08d}").exists(), "the third save")
        (saves / ".tmp-in-the-way").touch()
        assert start.wait() == [2, 2] and "was not written" in start.said, start.said
    (saves / ".tmp-in-the-way").unlink()
    assert run.step == 4 * SAVES
    with run.start(env=env) as start:
        assert start.wait() == [0, 0], start.said
    assert run.resumed == [stopped, 2 * SAVES, 3 * SAVES]
    return killed


def records(run: TinyRun) -> list[dict[str, Any]]:
    """All parts of an offline run, as wandb's own reader gives them."""
    found = []
    for part in sorted(run.folder.glob("wandb/offline-run-*/*.wandb")):
        command = [WANDB, "leet", "inspect", "--json", str(part)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        found += map(json.loads, lines)
    return found


def check(rows: list[dict[str, Any]], run: TinyRun) -> list[int]:
    """Each step once, in order, under its own number, with the value on record; returns the steps."""
    steps = [row["train/step"] for row in rows]
    assert steps == [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    record = {line["step"]: line["loss/total"] for line in read_metrics(run.folder)}
    assert list(record) == list(range(1, STEPS + 1))
    assert [row["loss/total"] for row in rows] == pytest.approx([record[step] for step in steps], rel=1e-6)
    return steps


class Offline(NamedTuple):
    """A run that was interrupted, and what it has told wandb."""

    run: TinyRun
    killed: range
    ids: set[str]
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def offline(work: Path) -> Offline:
    run = TinyRun(work, "offline", "track.wandb=offline")
    killed = interrupt_thrice_and_finish(run, environment(work, **SECRETS))
    told = records(run)
    ids = {item["run"]["run_id"] for item in told if item["type"] == "run"}
    return Offline(run, killed, ids, [item["history"]["item"] for item in told if item["type"] == "history"])


def test_parts_of_an_offline_run_repeat_nothing(offline: Offline) -> None:
    run = offline.run
    assert len(list(run.folder.glob("wandb/offline-run-*"))) == 4
    assert offline.ids == {(run.folder / "wandb_id").read_text()}
    steps = check(offline.rows, run)
    assert set(range(1, STEPS + 1)) - set(steps) <= set(offline.killed)


def test_parts_of_an_offline_run_join_when_they_are_synced(offline: Offline, work: Path) -> None:
    """One after the other: `wandb sync` of all at once does nothing if one cannot be read, such as a killed start's."""
    with serving() as server:
        env = os.environ | environment(work, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        for part in sorted(offline.run.folder.glob("wandb/offline-run-*")):
            subprocess.run([WANDB, "sync", str(part)], cwd=work, env=env, check=True, capture_output=True, timeout=120)
        assert set(server.runs) == offline.ids and not server.unknown
        assert check(stored(server), offline.run) == [row["train/step"] for row in offline.rows]


def test_no_key_is_in_anything_that_a_run_leaves(offline: Offline) -> None:
    left = files_of(offline.run)
    kinds = {"config.yaml", "env.json", "metrics.jsonl", "state.json", "wandb-metadata.json", "output.log"}
    assert kinds <= {path.name for path in left}
    for path in left:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def files_of(run: TinyRun) -> list[Path]:
    return [run.log, *(path for path in run.folder.rglob("*") if path.is_file())]


def stored(server: WandbServer) -> list[dict[str, Any]]:
    (run,) = server.runs.values()
    return run.history


def test_an_online_run_goes_on_whatever_ends_its_starts(work: Path) -> None:
    run = TinyRun(work, "online", "track.wandb=online")
    with serving() as server:
        env = environment(work, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        killed = interrupt_thrice_and_finish(run, env)
        steps = check(stored(server), run)
        assert not server.unknown
        assert list(server.runs) == [(run.folder / "wandb_id").read_text()]
        (told,) = server.runs.values()
        assert told.starts[0] == "new" and set(told.starts[1:]) == {"resumed"}
    assert not [path for path in files_of(run) if KEY.encode() in path.read_bytes()]
    assert set(range(1, STEPS + 1)) - set(steps) <= set(killed)
