"""From a checkpoint to a restored picture, with everything that only training needs out of reach."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_train import checkpoint
from dist_train.config import RunConfig
from dist_train.export import export_student
from dist_train.load import load_net, load_student, start_from
from dist_train.nets import build_net
from dist_train.nets.official import official_layout
from dist_train.restore import restore_files, restore_image
from dist_train.tasks import build_task
from launch import before_after, doctor
from launch import evaluate as evaluate_command
from launch import export as export_command
from launch import restore as restore_command
from shards.schema import sha256_of
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.unit

RUN = {"name": "r", "data": {"train": "shards"}}
NET = {"name": "nafnet", "width": 4, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}


@pytest.fixture
def trained(tmp_path) -> Path:
    """A run's folder with one checkpoint, whose average differs from its weights."""
    config = RunConfig.model_validate({**RUN, "student": NET})
    torch.manual_seed(0)
    net = build_net(config.student)
    for parameter in net.parameters():  # at initialisation some are zero, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    weights = net.state_dict()
    run_dir = tmp_path / "runs" / "r"
    checkpoint.save(
        run_dir / "checkpoints",
        state={
            "step": 7,
            "samples_seen": 56,
            "data": "f00d",
            "config": config.model_dump(mode="json"),
            "env": {"commit": "c0ffee", "data": {"train": "f00d", "val": None}},
        },
        model={f"student.{k}": v for k, v in weights.items()} | {"teacher.net.intro.bias": torch.zeros(4)},
        ema={k: 0.5 * v for k, v in weights.items()},
        moments={"step": 7, "scaler": None},
        keep=2,
    )
    (run_dir / "metrics.jsonl").write_text(
        '{"step": 6, "val/rgb/psnr/student": 30.1}\n'
        '{"step": 7, "val/rgb/psnr/student": 31.5, "val/rgb/psnr/teacher": 32.0}\n'
    )
    return run_dir


@pytest.fixture
def exported(trained, tmp_path) -> Path:
    out = tmp_path / "out" / "student.safetensors"
    export_student(trained / "checkpoints/step-00000007", out)
    return out


def test_export_carries_the_student_alone_and_says_what_it_is(trained, tmp_path, capsys):
    out = tmp_path / "student.safetensors"
    assert export_command.main([str(trained), str(out)]) == 0
    saved = load_file(trained / "checkpoints/step-00000007/ema.safetensors")
    net, card = load_student(out)
    assert net.state_dict().keys() == load_file(out).keys() == saved.keys()
    assert all(torch.equal(net.state_dict()[key], saved[key]) for key in saved)
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
    assert card["net"] == {**NET, "tlc_train_px": 0, "extra_channels": 0}
    assert (card["step"], card["samples_seen"], card["data"], card["commit"]) == (
        7,
        56,
        {"train": "f00d", "val": None},
        "c0ffee",
    )
    assert card["ema"] and card["scores"] == {"val/rgb/psnr/student": 31.5}
    assert [path.name for path in sorted(tmp_path.glob("*student*"))] == ["student.json", "student.safetensors"]

    assert export_command.main([str(trained), str(out), "--no-ema"]) == 0
    net, card = load_student(out)
    assert torch.equal(net.state_dict()["intro.bias"], 2 * saved["intro.bias"])
    assert not card["ema"] and card["scores"] == {}  # the record's scores are those of the average


def test_export_and_restore_run_without_what_only_training_needs(trained, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((13, 17, 3), np.uint8))
    blocked = (
        "segment_anything",
        "deepspeed",
        "accelerate",
        "wandb",
        "webdataset",
        "torchvision",
        "skimage",
        "pooch",
        "matplotlib",
        "timm",
        "av",
        "torchmetrics",
        "onnx",
        "onnxruntime",
        "huggingface_hub",
        "psutil",
    )
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "from launch import export, restore\n"
        "assert export.main(['runs/r', 's.safetensors']) == 0\n"
        "assert restore.main(['s.safetensors', 'a.png', 'b.png']) == 0\n"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    assert cv2.imread(str(tmp_path / "b.png")).shape == (13, 17, 3)


def test_weights_that_will_not_do_are_refused_with_the_way_out(trained, exported, tmp_path, capsys):
    def refusal(path: Path) -> str:
        with pytest.raises(ValueError) as caught:
            load_student(path)
        return str(caught.value)

    assert "no weights" in refusal(exported.with_name("other.safetensors"))
    assert "there are student.safetensors" in refusal(exported.with_name("other.safetensors"))
    assert f"python -m launch.export {trained} OUT" in refusal(trained)
    assert "python -m launch.export" in refusal(trained / "checkpoints/step-00000007/model.safetensors")

    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(exported.read_bytes())
    assert "no card lone.json beside it" in refusal(lone)
    lone.write_bytes(exported.read_bytes()[:-100])
    assert "not a whole .safetensors file" in refusal(lone)

    card_path = exported.with_suffix(".json")
    card = json.loads(card_path.read_text())
    card_path.write_text(json.dumps(card | {"format": "restill-student-99"}))
    assert "this version reads 'restill-student-1'" in refusal(exported)
    card_path.write_text(json.dumps(card | {"net": NET | {"width": 8}}))
    assert "does not fit the net of its card" in refusal(exported)
    card_path.write_text(json.dumps(card | {"net": NET | {"name": "unknown"}}))
    assert "does not fit the net of its card" in refusal(exported)
    card_path.write_text(json.dumps(card))
    save_file({k: v + 1 for k, v in load_file(exported).items()}, exported)
    assert "do not belong together" in refusal(exported)

    assert restore_command.main([str(lone), "a", "b"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert export_command.main([str(tmp_path / "nowhere"), str(lone)]) == 2
    assert "no checkpoint in" in capsys.readouterr().err


def test_official_files_go_in_and_come_out(trained, tmp_path, capsys):
    official, back, again = tmp_path / "net.pth", tmp_path / "back.safetensors", tmp_path / "again.pth"
    assert export_command.main([str(trained), str(official)]) == 0
    assert "cannot say that tlc_train_px=0" in capsys.readouterr().out
    saved = load_file(trained / "checkpoints/step-00000007/ema.safetensors")
    assert official.read_bytes()[:2] != b"PK"  # no zip archive, which the PyTorch of RCDNet's program cannot read
    held = torch.load(official, weights_only=True)
    assert held.keys() == {"params"} and all(torch.equal(held["params"][key], saved[key]) for key in saved)

    assert export_command.main([str(official), str(back), "--net", "tlc_train_px=16"]) == 0
    net, card = load_net(back, {})
    assert card["official"] == {"file": "net.pth", "sha256": sha256_of(official)}
    assert card["net"] == {**NET, "tlc_train_px": 16, "extra_channels": 0} == load_student(back)[1]["net"]
    assert all(torch.equal(net.state_dict()[key], saved[key]) for key in saved)
    assert export_command.main([str(back), str(again)]) == 0
    assert "cannot say that tlc_train_px=16" in capsys.readouterr().out

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((13, 17, 3), np.uint8))
    restore = [str(official), str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--net", "tlc_train_px=16"]
    assert restore_command.main(restore) == 0
    assert restore_command.main([*restore[:-1], "width=8"]) == 2
    assert "width=4 is in it" in capsys.readouterr().err
    assert evaluate_command.main([str(official), "nowhere", "--device", "cpu", "--net", "width=8"]) == 2
    assert "width=4 is in it" in capsys.readouterr().err
    found = [finding.detail for finding in doctor.check_path(official)]
    assert found[0].startswith("NAFNet width 4") and "--net tlc_train_px=" in found[1]
    assert "from net.pth" in next(iter(doctor.check_path(back))).detail

    for arguments, words in [
        ([back, again, "--net", "tlc_train_px=16"], "has a card that says all"),
        ([official, again, "--no-ema"], "has one set"),
        ([trained, again, "--net", "tlc_train_px=16"], "is for official files"),
        ([official, tmp_path / "x.bin"], "ends in .safetensors"),
        ([tmp_path / "x.pth", back], "no weights"),
    ]:
        assert export_command.main(list(map(str, arguments))) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob(".*.tmp"))


class Add(torch.nn.Module):
    """Adds to each channel, so that orders, ranges and roundings show."""

    def __init__(self, red: float, green: float, blue: float):
        super().__init__()
        self.shift = torch.tensor([red, green, blue])[:, None, None]

    def forward(self, lq):
        assert lq.dtype == torch.float32 and 0 <= lq.min() and lq.max() <= 1
        return lq + self.shift


def test_restored_values(exported):
    rgb = np.full((5, 7, 3), 100, np.uint8)
    assert restore_image(Add(10 / 255, 0.4 / 255, 1.0), rgb)[2, 3].tolist() == [110, 100, 255]
    assert restore_image(Add(1 / 65535, -1.0, 0), rgb.astype(np.uint16))[0, 0].tolist() == [101, 0, 100]
    net, _ = load_student(exported)
    picture = np.random.default_rng(0).integers(0, 256, (13, 10, 3), dtype=np.uint8)
    want = net(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255).clamp(0, 1)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(restore_image(net, picture) - want).max() <= 0.501


def test_a_folder_of_every_kind(tmp_path):
    src, dst = tmp_path / "in", tmp_path / "out"
    (src / "deep").mkdir(parents=True)
    bgr = np.random.default_rng(0).integers(60, 90, (20, 30, 3), dtype=np.uint8)
    files = {
        "colour.png": bgr,
        "grey.png": bgr[..., 0],
        "alpha.png": np.dstack([bgr, bgr[..., 0]]),
        "deep/sixteen.tif": bgr.astype(np.uint16) * 257,
    }
    for name, picture in files.items():
        assert cv2.imwrite(str(src / name), picture)
    (src / "notes.txt").write_text("not a picture")
    (src / "broken.png").write_bytes((src / "colour.png").read_bytes()[:300])
    (src / "empty.jpg").touch()
    whole = cv2.imencode(".jpg", bgr)[1].tobytes()
    (src / "cut.jpg").write_bytes(whole[:-50])  # imread would fill it up with grey
    orientation = b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)  # 6: turn by 90 degrees
    app1 = b"\xff\xe1" + struct.pack(">H", len(orientation) + 2) + orientation
    (src / "turned.jpg").write_bytes(whole[:2] + app1 + whole[2:])

    result = restore_files(Add(10 / 255, 0, 0), [src], dst)

    assert {path.name for path in result.failed} == {"broken.png", "empty.jpg", "cut.jpg"}
    assert {str(path.relative_to(dst)) for path in result.written} == {*files, "turned.jpg"}
    out = {path.name: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in result.written}
    np.testing.assert_array_equal(out["colour.png"], bgr + np.array([0, 0, 10], np.uint8))
    assert out["grey.png"].shape == (20, 30) and (out["grey.png"] - bgr[..., 0] == 3).all()  # 0.299 of 10
    np.testing.assert_array_equal(out["alpha.png"], files["alpha.png"] + np.array([0, 0, 10, 0], np.uint8))
    assert out["sixteen.tif"].dtype == np.uint16
    np.testing.assert_array_equal(out["sixteen.tif"], files["deep/sixteen.tif"] + np.array([0, 0, 2570], np.uint16))
    assert out["turned.jpg"].shape == (30, 20, 3)


def test_nothing_is_overwritten_unasked(tmp_path, exported, capsys):
    picture = tmp_path / "in" / "a.png"
    picture.parent.mkdir()
    cv2.imwrite(str(picture), np.zeros((8, 8, 3), np.uint8))
    for dst in (picture, picture.parent):
        with pytest.raises(ValueError, match="is an input"):
            restore_files(Add(0, 0, 0), [picture.parent if dst == picture.parent else picture], dst, overwrite=True)
    inside = picture.parent / "restored"
    assert restore_files(Add(0, 0, 0), [picture.parent], inside).written == [inside / "a.png"]
    (inside / "a.png").write_text("left as it is")
    done = restore_files(Add(0, 0, 0), [picture.parent], inside)
    assert (done.written, done.skipped) == ([], [inside / "a.png"])
    assert (inside / "a.png").read_text() == "left as it is"
    again = restore_files(Add(0, 0, 0), [picture.parent], inside, overwrite=True)
    assert again.written == [inside / "a.png"]  # its own earlier output is no input

    with pytest.raises(ValueError, match="no pictures to restore"):
        restore_files(Add(0, 0, 0), [tmp_path / "nowhere"], inside)
    (picture.parent / "b.png").touch()
    arguments = [str(exported), str(picture.parent), str(tmp_path / "out"), "--device", "cpu"]
    assert restore_command.main(arguments) == 1
    captured = capsys.readouterr()
    assert "restored 2 of 3 to" in captured.out and "b.png: the file is empty" in captured.err


def test_masks_are_drawn_without_the_servers_of_the_run(exported, tmp_path):
    write_pairs(make_pairs(tmp_path / "src", 1), tmp_path / "set")
    card = json.loads(exported.with_suffix(".json").read_text())
    of = {"name": "regions", "scale": 50.0, "min_area_px": 16}
    card["config"]["prior"] = {"name": "remote", "of": of, "servers": ["127.0.0.1:1"], "timeout_s": 1.0}
    exported.with_suffix(".json").write_text(json.dumps(card))
    assert before_after.main([str(exported), str(tmp_path / "set"), str(tmp_path / "drawn.png")]) == 0


def test_formats_that_cannot_hold_the_picture_are_refused(tmp_path):
    deep = tmp_path / "deep.png"
    cv2.imwrite(str(deep), np.zeros((8, 8, 3), np.uint16))
    result = restore_files(Add(0, 0, 0), [deep], tmp_path / "out.jpg")
    assert "no 16 bit" in result.failed[deep] and not (tmp_path / "out.jpg").exists()


def test_a_run_starts_from_an_official_file_and_from_an_export(exported, tmp_path):
    run = RunConfig.model_validate({**RUN, "student": NET, "init": {"student": str(exported)}})
    torch.manual_seed(1)
    task = build_task(run)
    official = tmp_path / "net.pth"
    torch.save(official_layout(run.student, build_net(run.student).state_dict()), official)
    start_from(task, run.init.model_copy(update={"teacher": str(official)}))
    assert all(torch.equal(task.student.state_dict()[name], held) for name, held in load_file(exported).items())
    held = torch.load(official, weights_only=True)["params"]
    assert all(torch.equal(task.teacher.net.state_dict()[name], tensor) for name, tensor in held.items())
    wide = RunConfig.model_validate({**RUN, "student": {**NET, "width": 8}, "init": {"student": str(official)}})
    with pytest.raises(ValueError, match="init.student=.* holds NAFNet width 4.*set student to that net and size"):
        start_from(build_task(wide), wide.init)
    alone = run.model_copy(update={"task": "plain", "init": run.init.model_copy(update={"teacher": str(official)})})
    with pytest.raises(ValueError, match="task has no teacher"):
        start_from(build_task(alone), alone.init)
