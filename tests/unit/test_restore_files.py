"""What is restored, under which name, how many at once; and the command."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from dist_train.config import NafnetConfig
from dist_train.nets import build_net
from dist_train.nets.official import official_layout
from dist_train.restore import restore_files
from launch import restore as restore_command

pytestmark = pytest.mark.unit


def write(path: Path, height: int = 8, width: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((height, width, 3), 100, np.uint8))
    return path


class Net:
    """Adds 10/255; notes how many went through at once; has no room for more than `limit` px."""

    def __init__(self, limit: int = 10**9):
        self.limit, self.sizes = limit, []

    def __call__(self, lq: torch.Tensor) -> torch.Tensor:
        if lq.shape.numel() / 3 > self.limit:
            raise RuntimeError("out of memory")
        self.sizes.append(tuple(lq.shape))
        return lq + 10 / 255


def test_patterns_and_several_inputs(tmp_path, monkeypatch) -> None:
    for name in ("shots/a/1.png", "shots/a/2.jpg", "shots/b/1.png", "shots/b/notes.png.txt", "other/3.png"):
        write(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def names(inputs: list[str], dst: str) -> list[str]:
        return sorted(str(path) for path in restore_files(Net(), inputs, Path(dst)).written)

    assert names(["shots/*/1.png"], "out") == ["out/a/1.png", "out/b/1.png"]
    assert names(["shots/**/*.*"], "all") == ["all/a/1.png", "all/a/2.jpg", "all/b/1.png"]
    assert names(["other/3.png", "shots/a"], "two") == ["two/1.png", "two/2.jpg", "two/3.png"]
    assert names(["other/3.png"], "one.tif") == ["one.tif"]
    write(Path("odd [1].png"))  # a file's own name comes before what it would mean as a pattern
    assert names(["odd [1].png"], "out") == ["out/odd [1].png"]
    for inputs, words in [
        (["shots/a", "shots/b"], "shots/a/1.png and shots/b/1.png would both become"),
        (["shots/*.gif"], "no picture or video is called so"),
        (["nowhere"], "no such file or folder"),
    ]:
        with pytest.raises(ValueError, match=words):
            names(inputs, "new")
    assert not Path("new").exists()


def test_a_name_of_one_file_is_no_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = [str(write(Path(name))) for name in ("in/1.png", "in/2.png", "in/3.png")]
    net = Net()
    for inputs, dst in [(files[:2], "in/3.png"), (files[:2], "both.jpg"), (["in"], "all.webp"), (files, "all.gif")]:
        with pytest.raises(ValueError, match="only a single file can become"):  # the first: an output was forgotten
            restore_files(net, inputs, Path(dst))
    assert restore_files(net, files[:1], Path("1.gif")).failed
    assert net.sizes == []  # before any work
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_batches_are_of_one_size_and_come_down_where_there_is_no_room(tmp_path) -> None:
    for number, size in enumerate([(8, 8), (8, 8), (8, 8), (8, 6), (30, 30), (8, 8)]):
        write(tmp_path / "in" / f"{number}.png", *size)
    (tmp_path / "in" / "1b.png").write_bytes(b"broken")
    net = Net(limit=200)
    result = restore_files(net, [tmp_path / "in"], tmp_path / "out", batch=2)
    assert net.sizes == [(2, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 6), (1, 3, 8, 8)]
    assert {path.name: why for path, why in result.failed.items()}["4.png"] == "out of memory"
    assert {path.name for path in result.failed} == {"1b.png", "4.png"} and len(result.written) == 5
    assert (cv2.imread(str(tmp_path / "out" / "2.png")) == 110).all()

    net = Net(limit=100)  # not for two, but for each
    result = restore_files(net, [tmp_path / "in"], tmp_path / "again", batch=3)
    assert len(result.written) == 5 and set(net.sizes) == {(1, 3, 8, 8), (1, 3, 8, 6)}


def test_the_command(tmp_path, capsys) -> None:
    config = NafnetConfig(width=2, enc_blk_nums=(1,), dec_blk_nums=(1,))
    net = build_net(config)
    torch.save(official_layout(config, net.state_dict()), tmp_path / "net.pth")
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    src = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(src).save(tmp_path / "a.png", icc_profile=icc)

    def run(*arguments: str) -> int:
        return restore_command.main([str(tmp_path / "net.pth"), str(tmp_path / "a.png"), *arguments, "--device", "cpu"])

    options = ["--tile", "48", "--overlap", "16", "--ensemble", "--precision", "bf16", "--tlc", "32", "--batch", "2"]
    out = tmp_path / "out"
    assert run(str(out), *options) == 0
    assert "restored 1 of 1 to" in capsys.readouterr().out
    # A new net adds nothing but the last convolution's small values.
    restored = Image.open(out / "a.png")
    assert restored.info["icc_profile"] == icc
    want = net(torch.from_numpy(src).permute(2, 0, 1)[None] / 255).detach()[0].permute(1, 2, 0).clamp(0, 1) * 255
    assert np.abs(np.asarray(restored) - want.numpy()).mean() < 30
    assert run(str(out)) == 0
    assert "restored 0 of 1" in (said := capsys.readouterr().out) and "skipped 1 that were there already" in said
    for arguments, words in [
        (["--tile", "large"], "--tile 'large' is neither a number of px nor auto"),
        (["--tile", "64"], "tiles of 64 px overlap by 64 px; make the overlap smaller"),
        (["--batch", "0"], "at least 1 picture"),
    ]:
        assert run(str(out), *arguments) == 2
        assert words in capsys.readouterr().err
