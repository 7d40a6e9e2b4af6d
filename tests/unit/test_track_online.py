"""track.wandb=online: the real client against a W&B server on loopback."""

import logging
import os

import cv2
import numpy as np
import pytest

from dist_train import track
from dist_train.config import RegionsConfig, RunConfig
from dist_train.priors.regions import RegionsPrior
from dist_train.track import Tracker, read_metrics
from tests.helpers.wandb_server import KEY, serving

pytestmark = [pytest.mark.unit, pytest.mark.timeout(30)]  # a client that waits for a server can wait for hours

PRIOR = RegionsPrior(RegionsConfig()).describe()


@pytest.fixture
def server(tmp_path, monkeypatch):
    import wandb

    wandb.teardown()  # a client service that another test left would keep that test's address and key
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with serving() as server:
        monkeypatch.setenv("HOME", str(tmp_path))  # no login, no settings, no cache of the developer's own
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        monkeypatch.setenv("WANDB_CONSOLE", "off")
        monkeypatch.setenv("WANDB_SILENT", "true")
        yield server
        server.refuse = set()  # or the client of a test that failed would go on trying
        wandb.teardown()  # waits until the service process has ended
    assert not server.unknown


@pytest.fixture
def run(tmp_path) -> RunConfig:
    tree = {"name": "r", "out": str(tmp_path), "data": {"train": "shards"}, "optim": {"steps": 6, "global_batch": 8}}
    return RunConfig.model_validate({**tree, "track": {"progress": False, "wandb": "online", "project": "p"}})


def record(run: RunConfig, steps: range, resume_step: int = 0) -> None:
    env = {"start_step": resume_step, "data": {"train": "fingerprint"}, "priors": {"masks": PRIOR}}
    with Tracker(run, resume_step=resume_step, extra=env) as tracker:
        for step in steps:
            tracker.log(step, {"loss/total": 1.0 / step, "lr": 0.1})
            tracker.log(step, {"val/psnr": 30.0 + step})


def streamed(server) -> list[tuple[int, float]]:
    (stored,) = server.runs.values()
    assert all(row["_step"] == row["train/step"] for row in stored.history)
    return [(row["train/step"], row["loss/total"]) for row in stored.history]


def losses(steps: range) -> list[tuple[int, float]]:
    return [(step, pytest.approx(1.0 / step)) for step in steps]


def test_a_run_is_seen_online(server, run):
    with Tracker(run, extra={"data": {"train": "fingerprint"}, "priors": {"masks": PRIOR}}) as tracker:
        for step in (10, 20):
            tracker.log(step, {"loss/total": 1.0 / step, "loss/spd": 2.0})
            tracker.log(step, {"val/psnr": 30.0 + step})
        tracker.pictures(20, lambda: {"panel": np.full((12, 16, 3), (255, 0, 0), np.uint8)})

    assert list(server.runs) == [(run.dir / "wandb_id").read_text()]
    (stored,) = server.runs.values()
    assert streamed(server) == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))]
    assert [(row["loss/spd"], row["val/psnr"]) for row in stored.history] == [(2.0, 40.0), (2.0, 50.0)]
    assert stored.starts == ["new"] and stored.exit_codes == [0]

    assert stored.config["optim"]["steps"] == 6
    assert stored.config["data"]["train"] == "shards"  # what was configured, not what was found of the same name
    assert stored.config["env"] == {"data": {"train": "fingerprint"}, "priors": {"masks": PRIOR}}

    shown = stored.history[-1]["pictures/panel"]
    assert (shown["_type"], shown["width"], shown["height"]) == ("image-file", 16, 12)
    bgr = cv2.imdecode(np.frombuffer(stored.files[shown["path"]], np.uint8), cv2.IMREAD_COLOR)
    assert bgr.shape == (12, 16, 3) and (bgr == (0, 0, 255)).all()


def test_a_resumed_run_goes_on_online(server, run):
    record(run, range(1, 5))  # ends at 4, while its last checkpoint is of step 2
    assert streamed(server) == losses(range(1, 5))
    record(run, range(3, 7), resume_step=2)
    assert streamed(server) == losses(range(1, 7))
    (stored,) = server.runs.values()
    assert stored.starts == ["new", "resumed"] and stored.exit_codes == [0, 0]
    assert stored.config["env"]["start_step"] == 2


def test_a_run_outlives_its_server_and_tells_the_next_one_what_was_lost(server, run, monkeypatch, caplog):
    monkeypatch.setattr(track, "WANDB_WAIT_S", 1.0)
    server.refuse = {"file_stream"}
    with caplog.at_level(logging.WARNING):
        record(run, range(1, 5))
    assert "wandb stopped: Timed out" in caplog.text and "metrics.jsonl" in caplog.text
    assert [line["step"] for line in read_metrics(run.dir)] == [1, 2, 3, 4]
    assert streamed(server) == []
    server.refuse = set()
    record(run, range(3, 7), resume_step=2)  # 1 and 2 are in metrics.jsonl alone
    assert streamed(server) == losses(range(3, 7))


@pytest.mark.parametrize(("key", "refuse", "said"), [("x" * 40, set(), "401"), (KEY, {"RunResumeStatus"}, "500")])
def test_a_run_that_is_not_let_in_goes_on(server, run, monkeypatch, caplog, key, refuse, said):
    monkeypatch.setattr(track, "WANDB_WAIT_S", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", key)
    server.refuse = refuse
    with caplog.at_level(logging.WARNING):
        record(run, range(1, 3))
    assert "wandb stopped: Failed to get resume status" in caplog.text and said in caplog.text
    assert [line["step"] for line in read_metrics(run.dir)] == [1, 2]
    assert not any(stored.history for stored in server.runs.values())
