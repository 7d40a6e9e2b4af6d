"""Exports as folders of the Hugging Face hub: weights, config.json, model card; offline, and pushed only when asked."""

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from dist_train import hub
from dist_train.card import readme, scores_of
from dist_train.config import CustomConfig, NafnetConfig
from dist_train.export import write_export
from dist_train.hub import RestillNet
from dist_train.load import load_net
from dist_train.nets import build_net
from launch import export as export_command
from launch import restore as restore_command

pytestmark = pytest.mark.unit

NET = NafnetConfig(width=2, middle_blk_num=1, enc_blk_nums=(), dec_blk_nums=())
FACTS: dict[str, Any] = {
    "task": "distill",
    "step": 7,
    "samples_seen": 56,
    "ema": True,
    "commit": "c0ffee",
    "data": {"train": "f00d", "val": "beef"},
    "scores": {
        "val/rgb/psnr/input": 20.0, "val/rgb/ssim/input": 0.5, "val/rgb/psnr/student": 31.25,
        "val/rgb/ssim/student": 0.9, "val/y_uint8/psnr/student": 33.0, "val/rgb/psnr/lead": 0.1, "val/fid/student": 3.0,
    },
    "config": {"name": "r", "data": {"train": "set/train", "val": "set/val"}, "init": {"student": "net.pth"}},
}  # fmt: skip


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = build_net(NET).eval().requires_grad_(False)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    write_export(net, tmp_path / "net.safetensors", config=NET, facts=FACTS)
    return tmp_path / "net.safetensors"


def write_picture(path: Path) -> Path:
    cv2.imwrite(str(path), np.zeros((9, 12, 3), np.uint8))
    return path


def test_what_is_saved_loads_offline_and_in_every_command(exported: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    net, folder = RestillNet.from_pretrained(exported), tmp_path / "hub" / "derain"
    net.save_pretrained(folder, licence="mit", pictures=[write_picture(tmp_path / "before.png")])
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"model.safetensors", "config.json", "README.md", "pictures/before.png"}
    again = RestillNet.from_pretrained(folder)
    lq = torch.rand(1, 3, 9, 14)
    assert torch.equal(again(lq), load_net(exported, {})[0](lq))
    assert again.card["scores"] == FACTS["scores"] and not again.net.training
    for weights in (folder, folder / "model.safetensors"):
        written = tmp_path / f"{weights.name}.png"
        assert restore_command.main([str(weights), str(tmp_path / "before.png"), str(written)]) == 0
        assert written.is_file()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sha256": "0"}))
    with pytest.raises(ValueError, match=r"its card config.json do not belong together"):
        RestillNet.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"pip install 'restill\[hub\]', or give a folder"):
        RestillNet.from_pretrained("owner/absent")


def test_the_card_says_what_a_reader_asks(exported: Path) -> None:
    card = load_net(exported, {})[1]
    text = readme(card, title="r", licence=None, pictures=["pictures/a.png"])
    for part in (
        "| rgb | degraded | 20.00 | 0.5000 |", "| rgb | restored | 31.25 | 0.9000 |",
        "| rain200 | restored | 33.00 |  |",
        "- `rain200`: PSNR and SSIM", "set/train, manifest f00d", "set/val, manifest beef", "c0ffee", card["sha256"],
        "step: 7 (56 samples, weights: moving average)", "![pictures/a.png](pictures/a.png)",
        "Weights: not stated", "come from `net.pth`, whose terms", "masks and teacher are needed no more",
    ):  # fmt: skip
        assert part in text, part
    shown = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(shown) == FACTS["config"]
    assert [score.protocol for score in scores_of(card)] == ["rgb", "rgb", "rain200"]
    bare = {key: card[key] for key in ("net", "parameters", "sha256")}  # of an official file
    assert "## Scores" not in readme(bare, title="r", licence="mit", pictures=[])
    model_card = pytest.importorskip("huggingface_hub", reason="needs restill[hub]").ModelCard(text)
    results = model_card.data.eval_results
    assert [(r.metric_type, r.metric_value, r.metric_name) for r in results][:2] == [
        ("psnr", 31.25, "PSNR (rgb)"),
        ("ssim", 0.9, "SSIM (rgb)"),
    ]
    assert "license" not in model_card.data.to_dict() and model_card.data.pipeline_tag == "image-to-image"


def test_the_command_writes_a_folder_and_pushes_it_only_if_asked(
    exported: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs restill[hub]")
    calls: list[tuple[Any, ...]] = []

    class Api:
        def __init__(self, token: Any) -> None:
            assert token is None

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            calls.append((repo_id, private, exist_ok))
            return f"hub:{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
            files = huggingface_hub.utils.filter_repo_objects(
                (str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()),
                allow_patterns=allow_patterns,
            )
            calls.append((repo_id, *sorted(files)))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder, picture = tmp_path / "hub", write_picture(tmp_path / "a.png")
    arguments = [str(exported), str(folder), "--hub", "--pictures", str(picture)]
    assert export_command.main(arguments) == 0 and not calls
    (folder / "secret.txt").touch()
    assert export_command.main([*arguments, "--push", "me/derain"]) == 0
    assert calls == [
        ("me/derain", True, True),
        ("me/derain", "README.md", "config.json", "model.safetensors", "pictures/a.png"),
    ]
    assert "pushed: hub:me/derain" in capsys.readouterr().out
    assert RestillNet.from_pretrained(folder).push_to_hub("me/again", public=True) == "hub:me/again"
    assert calls[2:] == [("me/again", False, True), ("me/again", "README.md", "config.json", "model.safetensors")]

    def refuse(self: Any, repo_id: str, **options: Any) -> str:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(Api, "create_repo", refuse)
    assert export_command.main([*arguments, "--push", "me/derain"]) == 2
    assert "me/derain was not pushed: no route to the hub" in capsys.readouterr().err
    assert export_command.main([*arguments[:-1], str(tmp_path / "absent.png")]) == 2
    assert "absent.png: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export_command.main([str(exported), str(tmp_path / "x.safetensors"), "--push", "me/derain"])
    assert "--push is of --hub" in capsys.readouterr().err


def identity_net() -> torch.nn.Module:
    return torch.nn.Conv2d(3, 3, 1)


def test_a_repository_that_names_code_is_not_trusted(tmp_path: Path, monkeypatch: Any) -> None:
    config = CustomConfig(factory=f"{__name__}:identity_net")
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[identity_net.__module__])
    net = build_net(config).eval()
    write_export(net, tmp_path / "repo" / "model.safetensors", config=config, facts={})
    hub.complete(tmp_path / "repo", licence=None, pictures=[])
    monkeypatch.setattr(hub, "_download", lambda repo_id, revision, token: tmp_path / "repo")
    with pytest.raises(ValueError, match="names code to import, .*identity_net; if you trust it"):
        RestillNet.from_pretrained("stranger/net")
    lq = torch.rand(1, 3, 4, 5)
    assert torch.equal(RestillNet.from_pretrained("stranger/net", trust_code=True)(lq), net(lq))
