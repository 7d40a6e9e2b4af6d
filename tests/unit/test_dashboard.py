"""Panels for what runs have logged, and the workspace as wandb's library sends it to a server."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.dashboard import DASHBOARD, Panel, fill, main, save
from tests.helpers import wandb_server
from tests.helpers.wandb_server import KEY, WandbServer

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def test_panels_are_of_the_protocols_and_pictures_that_runs_have_and_of_nothing_else() -> None:
    logged = {"loss/total", "val/rgb/psnr/student", "val/rain200/psnr/student", "val/mcr/student", "pictures/val/a-1"}
    wanted = {
        "one": (Panel("total", ("loss/total", "loss/spd")), Panel("{protocol}", ("val/{protocol}/psnr/student",))),
        "two": (Panel("SPD", ("loss/spd",)),),
        "three": (Panel("pictures", ("pictures/val/{picture}",), kind="pictures"), Panel("host", ("system/cpu",))),
    }
    sections, left_out = fill(wanted, logged)
    assert {title: [(panel.title, panel.keys) for panel in panels] for title, panels in sections.items()} == {
        "one": [
            ("total", ("loss/total",)),
            ("rain200", ("val/rain200/psnr/student",)),
            ("rgb", ("val/rgb/psnr/student",)),
        ],
        "three": [("pictures", ("pictures/val/a-1",)), ("host", ("system/cpu",))],
    }
    assert left_out == ["loss/spd"]  # named once
    assert fill(wanted, set(), keep_all=True)[0]["two"] == [Panel("SPD", ("loss/spd",))]


class Server(WandbServer):
    """Also takes workspaces."""

    def __init__(self) -> None:
        super().__init__()
        self.views: list[dict[str, Any]] = []

    def answer(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        sent = json.loads(body)
        if "upsertView(" not in sent.get("query", ""):
            return super().answer(method, path, body)
        self.views.append(sent["variables"])
        return {"data": {"upsertView": {"view": {"id": "1", "name": sent["variables"]["name"]}, "inserted": True}}}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import wandb

    wandb.teardown()  # a client service that another test left would keep that test's address and key
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(wandb_server, "WandbServer", Server)
    with wandb_server.serving() as server:
        told = {"HOME": str(tmp_path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_SILENT": "true"}
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        yield server
        wandb.teardown()


def test_the_workspace_is_sent_to_wandb(server: Server) -> None:
    sections, _ = fill(DASHBOARD, {"pictures/val/a"}, keep_all=True)
    url = save(sections, entity="team", project="restill", name="Mine")
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("team", "restill", "Mine")
    assert url.startswith(f"{server.url}/team/restill?nw=")
    bank = json.loads(view["spec"])["section"]["panelBankConfig"]
    assert [section["name"] for section in bank["sections"]] == list(DASHBOARD)
    panels = {panel["config"]["chartTitle"]: panel for section in bank["sections"] for panel in section["panels"]}
    assert panels["total"]["config"]["metrics"] == ["loss/total"]
    assert panels["where a step goes"]["config"]["plotType"] == "pct-area"
    assert panels["SPD, unweighted"]["config"]["yLogScale"] is True
    assert panels["validation pictures"]["config"]["mediaKeys"] == ["pictures/val/a"]
    assert panels["memory of the main machine (%)"]["config"]["xAxis"] == "_runtime"
    assert not server.unknown


def test_what_wandb_refuses_ends_with_what_to_do(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss/total": 1.0}\n')
    (run / "config.yaml").write_text("track: {project: mine}\n")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert main([str(run), "--entity", "team"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: wandb did not make the workspace: ") and "wrong key" in said and "wandb login" in said
    )
    assert main([str(run / "nowhere"), "--list"]) == 2
    assert "nowhere holds no metrics.jsonl" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main([str(run), "--entity", "team"]) == 2
    assert "pip install 'restill[dashboard]'" in capsys.readouterr().err
