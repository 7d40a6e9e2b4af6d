"""What a prior sees in pictures, what each object gained by restoring, and the command that draws both."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dist_train.config import RunConfig
from dist_train.export import write_export
from dist_train.mask_views import Gain, extents, gains, paint_gains
from dist_train.metrics import to_u8
from dist_train.nets import build_net
from launch import masks as command
from shards.codec import decode_rgb, encode_png
from tests.helpers.nets import TINY_NETS

pytestmark = pytest.mark.unit


def three_masks() -> np.ndarray:
    """In a picture of 20x30: its left half, a square in there, and a column at the right edge."""
    masks = np.zeros((3, 20, 30), bool)
    masks[0, :, :15] = masks[1, 5:10, 5:12] = masks[2, :, -1:] = True
    return masks


def test_extents_are_area_and_box():
    found = extents(three_masks())
    assert [tuple(one) for one in found] == [
        (1, 300, 0.5, 0, 0, 15, 20),
        (2, 35, 35 / 600, 5, 5, 12, 10),
        (3, 20, 20 / 600, 29, 0, 30, 20),
    ]
    assert extents(three_masks()[:0]) == []


def test_gain_of_an_object_is_of_its_pixels_alone():
    masks = three_masks()
    gt = np.full((20, 30, 3), 100, np.uint8)
    degraded, restored = gt + 10, gt + 5
    restored[masks[1]] = 120  # worse in the square, and so in the half around it, but nowhere else
    restored[masks[2]] = 100  # perfect
    by_mask = {one.mask: one for one in gains(degraded, restored, gt, masks)}
    assert [by_mask[k].area_px for k in (0, 1, 2, 3)] == [280, 300, 35, 20]
    six = 20 * np.log10(2)
    assert by_mask[0].gain_db == pytest.approx(six) and by_mask[2].gain_db == pytest.approx(-six)
    mean = (265 * 25 + 35 * 400) / 300
    assert by_mask[1].gain_db == pytest.approx(10 * np.log10(100 / mean))
    assert by_mask[1].degraded_db == pytest.approx(10 * np.log10(255**2 / 100))
    assert by_mask[3].restored_db == pytest.approx(58.92, abs=0.01)  # finite
    whole = np.ones((1, 20, 30), bool)
    assert [one.mask for one in gains(degraded, restored, gt, whole)] == [1]  # nothing lies in no mask


def test_better_is_blue_and_worse_is_red():
    idmap = np.zeros((60, 90), np.int64)
    idmap[:, 30:60], idmap[:, 60:] = 1, 2
    grey = np.full((60, 90, 3), 128, np.uint8)
    of = [Gain(0, 1800, 20, 20, 0.0), Gain(1, 1800, 20, 23, 3.0), Gain(2, 1800, 20, 11, -9.0)]
    painted = paint_gains(grey, idmap, of).astype(int)
    same, better, worse = painted[5, 5], painted[5, 35], painted[5, 75]
    assert same.max() - same.min() == 0 and better[2] > better[0] + 40 and worse[0] > worse[2] + 40
    assert painted[25:36, 62:].min() < 50  # the number is written on it


def write(path: Path, picture: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(picture))
    return path


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_the_command_draws_and_lists_masks_and_gains(tmp_path, capsys):
    config = RunConfig.model_validate({"name": "r", "data": {"train": "-"}, "student": TINY_NETS["nafnet"]}).student
    torch.manual_seed(0)
    net = build_net(config).eval()
    write_export(net, tmp_path / "net.safetensors", config=config, facts={"scores": {}})
    clean = np.full((64, 96, 3), 40, np.uint8)
    clean[16:48, 16:48], clean[:, 64:] = (200, 30, 30), (30, 30, 200)
    noise = np.random.default_rng(0).normal(0, 25, clean.shape)
    for name in ("a", "town/b"):
        write(tmp_path / "in" / f"{name}.png", np.clip(clean + noise, 0, 255).astype(np.uint8))
        write(tmp_path / "gt" / f"{name}.png", clean)
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    write(tmp_path / "gt" / "broken.png", clean)

    out = tmp_path / "in" / "drawn"
    call = [str(tmp_path / "in"), str(out), "--with", "num_masks=8", "sigma=0"]
    more = ["--restored-by", str(tmp_path / "net.safetensors"), "--gt", str(tmp_path / "gt")]
    for _ in range(2):  # the second time its own pictures lie in a folder of the input
        assert command.main([*call, *more]) == 1
        said = capsys.readouterr()
        assert "not drawn" in said.err and "broken.png" in said.err
        assert (
            "6 masks in 2 of 3 pictures" in said.out and "not SAM" in said.out and "of 6 objects got better" in said.out
        )
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png")) == ["a.png", "town/b.png"]
    masks = [row for row in rows(out / "masks.csv") if row["picture"] == "town/b"]
    assert [int(row["area_px"]) for row in masks] == [64 * 64 - 32 * 32, 64 * 32, 32 * 32]  # seen in the clean picture
    assert [masks[2][f"{side}_px"] for side in ("left", "top", "right", "bottom")] == ["16", "16", "48", "48"]
    objects = rows(out / "objects.csv")
    assert len(objects) == 6 and objects[0].keys() == {"picture", *Gain._fields}
    noisy = decode_rgb((tmp_path / "in" / "a.png").read_bytes())
    with torch.inference_mode():
        restored = to_u8(net(torch.from_numpy(noisy).permute(2, 0, 1)[None].float() / 255)[0])
    blue = np.zeros((1, 64, 96), bool)
    blue[0, :, 64:] = True
    wanted = gains(noisy, restored, clean, blue)[-1]
    assert [float(objects[1][name]) for name in ("degraded_db", "restored_db")] == pytest.approx(wanted[2:4], abs=0.01)
    panel = decode_rgb((out / "a.png").read_bytes())
    assert panel.shape[1] > 5 * 2 * 96  # input, restored, clean, masks, gains, each enlarged twice

    assert command.main([str(tmp_path / "in" / "a.png"), str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "a.png").is_file() and not (tmp_path / "one" / "objects.csv").exists()


def test_how_many_masks_there_are_and_what_fewer_would_keep():
    areas = [[100], [], [10] * 9 + [90]]  # the surest or the last found need not be the largest
    assert command.how_many(areas) == [
        "masks a picture: 1 in the middle, 8.2 at 90 %, 10 at most",
        "num_masks=8, if the largest: all masks of 67% of the pictures, 82% of all masks, 93% of their area",
    ]
    assert command.how_many([[], []]) == command.how_many([]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["IN", "IN"], "would be overwritten"),
        (["IN", "OUT", "--gt", "IN"], "wants --restored-by WEIGHTS too"),
        (["IN", "OUT", "--of", "restored"], "--of restored wants --restored-by"),
        (["nothing", "OUT"], "no such picture"),
        (["IN", "OUT", "--with", "num_mask=3"], "num_mask"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, capsys, options, message):
    picture = write(tmp_path / "in" / "a.png", np.zeros((32, 32, 3), np.uint8))
    before = picture.read_bytes()
    places = {"IN": str(tmp_path / "in"), "OUT": str(tmp_path / "out")}
    assert command.main([places.get(option, option) for option in options]) == 2
    assert message in capsys.readouterr().err and picture.read_bytes() == before
    assert cv2.imread(str(picture)) is not None
