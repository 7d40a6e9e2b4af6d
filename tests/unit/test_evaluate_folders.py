"""Folders of pictures are scored: restored by anybody, or clean ones under noise."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_train.config import NafnetConfig
from dist_train.data.batch import Batch
from dist_train.data.folder import PairFolder, WithNoise
from dist_train.evaluate import evaluate, means
from dist_train.export import write_export
from dist_train.nets import build_net
from launch.evaluate import main
from tests.helpers.pairs import make_pairs, write_pairs
from tests.helpers.shared import shared

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
# launch.evaluate's own answers; over all twelve pictures it gives 30.4316 dB, where DnCNN's authors print 30.436.
SET12_DB = {"04": 29.3584, "06": 29.0749}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """gt, lq, and what a method restored, one picture in a format of its own."""
    rng = np.random.default_rng(0)
    for name, h, w in (("a", 24, 31), ("b/c", 16, 20)):
        gt = rng.integers(60, 200, (h, w, 3), dtype=np.uint8)
        suffix = ".bmp" if name == "a" else ".png"
        for folder, picture, ending in (("gt", gt, ".png"), ("lq", gt + 40, ".png"), ("out", gt - 4, suffix)):
            path = tmp_path / folder / f"{name}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(path), picture)
    return tmp_path


def test_pictures_of_any_method_are_scored_by_their_names(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--restored", str(folders / "out"), "--gt", str(folders / "gt")]
    assert main([*where, "--lq", str(folders / "lq"), "--protocol", "all", "--json", str(folders / "s.json")]) == 0
    scores = json.loads((folders / "s.json").read_text())
    want = {4: 20 * np.log10(255 / 4), 40: 20 * np.log10(255 / 40)}
    assert scores["means"]["val/rgb/psnr/restored"] == pytest.approx(want[4])
    assert scores["means"]["val/rgb/psnr/input"] == pytest.approx(want[40])
    assert scores["means"]["val/mcr/restored"] == 0 and len(scores["pictures"]) == 2 * 2 * 4
    assert scores["protocols"].keys() == {"rgb", "rain200", "did_ddn", "gopro"} and "colour" in str(scores["protocols"])
    assert main([*where, "--protocol", "y_uint8", "--json", str(folders / "new/s.json")]) == 0
    alone = json.loads((folders / "new/s.json").read_text())
    assert alone["means"].keys() == {"val/rain200/psnr/restored", "val/rain200/ssim/restored"}
    assert not any(row["collapsed"] for row in alone["pictures"]) and len(alone["pictures"]) == 2
    # The worse half of the restored pictures collapses.
    cv2.imwrite(str(folders / "out/a.bmp"), 0 * cv2.imread(str(folders / "gt/a.png")))
    assert main([*where, "--lq", str(folders / "lq")]) == 0
    assert "MCR restored: 50.00 % (1 of 2 lost more than 3 dB" in capsys.readouterr().out


def test_of_equal_pictures_the_json_says_null_and_not_infinity(folders: Path) -> None:
    where = ["--restored", str(folders / "gt"), "--gt", str(folders / "gt")]
    assert main([*where, "--json", str(folders / "s.json")]) == 0
    text = (folders / "s.json").read_text()
    scores = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert scores["means"]["val/rgb/psnr/restored"] is None and scores["means"]["val/rgb/ssim/restored"] == 1


def test_what_does_not_fit_is_named(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--restored", str(folders / "out"), "--gt", str(folders / "gt")]

    def said(*argv: str) -> str:
        assert main([*argv]) == 2
        return capsys.readouterr().err

    assert "give WEIGHTS and SHARDS, or --restored DIR" in said()
    assert "wants --gt DIR" in said(*where[:2])
    assert "leave out ensemble" in said(*where, "--ensemble")
    assert "go with --restored" in said("w.safetensors", "shards", "--gt", "gt")
    assert "say how much: --awgn 25" in said("w.safetensors", "shards", "--protocol", "awgn")
    assert "no protocol 'psnr'; there are rgb" in said(*where, "--protocol", "psnr")
    assert "is a folder; name a file" in said(*where, "--json", str(folders))
    picture = folders / "out/b/c.png"
    for content, problem in (
        (np.zeros((16, 21, 3), np.uint8), "c.png is 21x16, its clean picture 20x16"),
        (np.zeros((16, 20, 3), np.uint16), "c.png has samples of uint16"),
        (np.zeros((16, 20, 4), np.uint8), "c.png has 4 channels; write it without alpha"),
    ):
        cv2.imwrite(str(picture), content)
        assert problem in said(*where)
    picture.write_bytes(picture.read_bytes()[:50])
    assert "c.png: " in said(*where)
    picture.unlink()
    assert "has no picture for b/c; it has a and others" in said(*where)


def test_any_method_is_scored_with_the_base_package_alone(folders: Path) -> None:
    missing = ("torchvision", "segment_anything", "deepspeed", "accelerate", "wandb", "webdataset", "skimage", "pooch")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({(*missing, 'matplotlib', 'torch_fidelity', 'timm')}))\n"
        "from launch.evaluate import main\n"
        f"sys.exit(main(['--restored', {str(folders / 'out')!r}, '--gt', {str(folders / 'gt')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "rain200    restored" in done.stdout, done.stderr


def test_noise_is_drawn_for_each_picture_from_seed_0_and_not_clipped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colour, grey = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((13, 17, 3), (13, 17)))
    cv2.imwrite(str(tmp_path / "colour.png"), colour[..., ::-1])
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    noisy = WithNoise(PairFolder(tmp_path), sigma=25)
    np.random.seed(0)
    want = colour / 255.0 + np.random.normal(0, 25 / 255.0, colour.shape)
    lq, gt = noisy.pair(0)
    assert lq.dtype == np.float32 and lq.min() < 0 and lq.max() > 1 and np.array_equal(gt, colour)
    np.testing.assert_allclose(lq, want, atol=1e-6)
    np.random.seed(0)
    one = grey / 255.0 + np.random.normal(0, 25 / 255.0, grey.shape)
    for _ in range(2):  # not the next numbers of one stream
        np.testing.assert_allclose(noisy.pair(1)[0], one[..., None].repeat(3, 2), atol=1e-6)


def test_dncnn_denoises_set12_as_published(tmp_path: Path) -> None:
    weights = torch.load(shared("weights", "kair_dncnn_25.pth"), weights_only=True)
    layers: list[nn.Module] = []
    for key in (key for key in weights if key.endswith("weight")):
        layers += [nn.Conv2d(weights[key].shape[1], weights[key].shape[0], 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    net.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    for name in SET12_DB:
        (tmp_path / f"{name}.png").symlink_to(shared("data", "set12", f"{name}.png"))

    def restore(batch: Batch) -> dict[str, Tensor]:
        grey = batch.lq[:, :1]
        return {"student_out": (grey - net(grey)).expand(-1, 3, -1, -1)}

    noisy = WithNoise(PairFolder(tmp_path), sigma=25)
    rows = evaluate(restore, noisy, protocols=["awgn"], device=CPU)
    assert {row.key: row.psnr for row in rows if row.name == "student"} == pytest.approx(SET12_DB, abs=1e-3)
    assert means(rows)["val/awgn/psnr/input"] == pytest.approx(20.3, abs=0.2)  # 20 log10(255 / 25), clipped


def test_how_a_net_was_run_is_part_of_the_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = NafnetConfig(width=4, enc_blk_nums=(1,), middle_blk_num=1, dec_blk_nums=(1,))
    torch.manual_seed(0)
    net = build_net(config).eval()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    write_export(net, tmp_path / "w.safetensors", config=config, facts={"scores": {}})
    write_pairs(make_pairs(tmp_path / "src", 2, h=24, w=40), tmp_path / "shards")

    def scored(*options: str) -> dict[str, float]:
        argv = [str(tmp_path / "w.safetensors"), str(tmp_path / "shards"), *options, "--json", str(tmp_path / "s.json")]
        assert main([*argv, "--device", "cpu", "--protocol", "rgb"]) == 0
        return json.loads((tmp_path / "s.json").read_text())["means"]

    plain = scored()
    eight = scored("--ensemble", "--tlc", "16", "--beside", "distill-5/sgr")
    assert "published distill-5/sgr" in capsys.readouterr().out
    assert plain.keys() == {"val/rgb/psnr/input", "val/rgb/ssim/input", "val/rgb/psnr/student", "val/rgb/ssim/student",
                            "val/mcr/student"}  # fmt: skip
    assert eight["val/rgb+tlc16+x8/psnr/student"] != plain["val/rgb/psnr/student"]
    noisy = scored("--awgn", "50")
    assert noisy["val/rgb+sigma50/psnr/input"] == pytest.approx(15.4, abs=0.3)  # 14.2, and clipped
