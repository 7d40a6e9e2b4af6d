"""Writing: the same bytes twice, nothing by halves, nothing bad in silence."""

import errno
import json
import os
import shutil
import socket
import zlib

import cv2
import numpy as np
import pytest
import webdataset

from shards.__main__ import main
from shards.codec import decode_rgb, encode_png
from shards.degrade import rain_light
from shards.index import open_index
from shards.layouts import pairs, rain100l, select
from shards.schema import ShardError, load_manifest
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.unit


def test_written_again_elsewhere_every_byte_is_the_same(tmp_path):
    src = make_pairs(tmp_path / "a", 5)
    shutil.copytree(src, tmp_path / "moved")
    write_pairs(src, tmp_path / "one", src="x")
    write_pairs(tmp_path / "moved", tmp_path / "two", src="x")
    for name in ("000000.tar", "index.npy", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_stock_webdataset_reads_the_source_bytes_and_the_index_points_at_them(tmp_path):
    src = make_pairs(tmp_path / "a", 5, h=128, w=128)
    manifest = write_pairs(src, tmp_path / "out", shard_mib=1 / 8)  # some 50 KB a picture: two pairs do not fit
    assert [shard.nsamples for shard in manifest.shardlist] == [1] * 5
    _, rows = open_index(tmp_path / "out")
    urls = [str(tmp_path / "out" / shard.url) for shard in manifest.shardlist]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"s-{n}" for n in range(1, 6)]
    for sample, row in zip(samples, rows, strict=True):
        for role in ("lq", "gt"):
            data = (src / role / f"{sample['__key__']}.png").read_bytes()
            assert sample[f"{role}.png"] == data
            start = int(row[f"{role}_offset"])
            tar = (tmp_path / "out" / manifest.shardlist[row["shard"]].url).read_bytes()
            assert tar[start : start + int(row[f"{role}_size"])] == data
            assert zlib.crc32(data) == row[f"{role}_crc32"]
        assert json.loads(sample["json"]) == {
            "gt": f"gt/{sample['__key__']}.png",
            "lq": f"lq/{sample['__key__']}.png",
            "h": 128,
            "w": 128,
        }


def _png(array):
    return cv2.imencode(".png", array)[1].tobytes()


def _rotated_jpeg():
    jpeg = cv2.imencode(".jpg", np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3))[1].tobytes()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


BAD = {
    "missing": (None, "no lq partner"),
    "empty": (b"", "empty file"),
    "html": (b"<html>moved</html>", "not a readable picture"),
    "cut": (_png(np.zeros((24, 32, 3), np.uint8))[:-30], "not a readable picture"),
    "deep": (_png(np.zeros((24, 32, 3), np.uint16)), "16 bits"),
    "grey": (_png(np.zeros((24, 32), np.uint8)), "grey"),
    "alpha": (_png(np.full((24, 32, 4), 7, np.uint8)), "transparent"),
    "size": (_png(np.zeros((24, 31, 3), np.uint8)), "sizes differ"),
    "rotated": (_rotated_jpeg(), "EXIF"),
    "a.b": (_png(np.zeros((24, 32, 3), np.uint8)), "rename"),
}


@pytest.fixture
def bad_source(tmp_path):
    """Two good pairs and one of each bad kind."""
    src = make_pairs(tmp_path / "src", 2)
    for name, (data, _) in BAD.items():
        shutil.copy(src / "gt/s-1.png", src / "gt" / f"{name}.png")
        if data is not None:
            (src / "lq" / f"{name}.png").write_bytes(data)
    return src


def test_bad_pairs_are_named_with_reasons_and_refuse_the_write(bad_source, tmp_path, capsys):
    command = ["write", "pairs", "--src", str(bad_source), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert f"{len(BAD)} of {len(BAD) + 2} pairs cannot be used" in message and "--skip-bad" in message
    for name, (_, reason) in BAD.items():
        assert any(line.startswith(f"  {name}: ") and reason in line for line in message.splitlines()), name
    assert os.listdir(tmp_path) == ["src"]
    assert main([*command, "--skip-bad"]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest.num_samples == 2 and {reject.key for reject in manifest.rejected} == set(BAD)


def test_a_finished_write_is_recognised_and_another_data_set_is_not_overwritten(tmp_path, caplog):
    src, out = make_pairs(tmp_path / "src", 3), tmp_path / "out"
    first = write_pairs(src, out)
    before = (out / "000000.tar").stat()
    with caplog.at_level("INFO"):
        assert write_pairs(src, out) == first
    assert "already there" in caplog.text and (out / "000000.tar").stat() == before
    (src / "lq/s-1.png").write_bytes((src / "lq/s-2.png").read_bytes())
    with pytest.raises(ValueError, match="holds another data set"):
        write_pairs(src, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="in the way"):
        write_pairs(src, tmp_path / "mine")


def test_an_interrupted_write_leaves_nothing_and_a_killed_one_is_cleaned_up(tmp_path, monkeypatch):
    src, out = make_pairs(tmp_path / "src", 3), tmp_path / "out"
    killed = tmp_path / f"out.tmp.{socket.gethostname()}.{2**22 + 1}"  # beyond Linux's largest process id
    alive = tmp_path / f"out.tmp.{socket.gethostname()}.{os.getppid()}"
    for folder in (killed, alive):
        folder.mkdir()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shards.write.build_index", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(src, out)
    assert sorted(os.listdir(tmp_path)) == sorted(["src", alive.name])
    monkeypatch.undo()
    assert write_pairs(src, out).num_samples == 3
    (out / "manifest.json").unlink()
    with pytest.raises(ShardError, match="not usable"):
        open_index(out)


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission"), (errno.EROFS, "read-only")]
)
def test_a_failing_disk_is_told_and_leaves_nothing(code, message, tmp_path, monkeypatch):
    src = make_pairs(tmp_path / "src", 3)

    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ShardError, match=message):
        write_pairs(src, tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


def test_too_little_space_is_told_before_the_start(tmp_path, monkeypatch):
    src = make_pairs(tmp_path / "src", 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ShardError, match="needs 0 MiB, free are 0"):
        write_pairs(src, tmp_path / "out")


def test_rain100l_pairs_by_name_and_selects_by_number(tmp_path):
    for number in (1, 2, 10, 11):
        for side in ("rain", "norain"):
            (tmp_path / side).mkdir(exist_ok=True)
            (tmp_path / side / f"norain-{number}.png").touch()
    (tmp_path / "rain/norain-2.png").unlink()  # one missing file must not shift the others
    found = rain100l(tmp_path)
    assert [pair.key for pair in found] == ["norain-1", "norain-2", "norain-10", "norain-11"]
    assert found[1].lq is None and all(pair.lq.name == pair.gt.name for pair in found if pair.lq)
    assert [pair.key for pair in select(found, "2,10-11")] == ["norain-2", "norain-10", "norain-11"]
    with pytest.raises(ValueError, match="8 of these are not there, the first is 3"):
        select(found, "2-11,20")
    with pytest.raises(ValueError, match="is no number or range"):
        select(found, "1-")


def test_pairs_keep_folders_in_the_key_and_refuse_two_claims_to_it(tmp_path):
    for side, suffix in (("lq", ".JPG"), ("gt", ".png")):
        (tmp_path / side / "scene").mkdir(parents=True)
        (tmp_path / side / f"scene/1{suffix}").touch()
    assert [(pair.key, pair.lq.suffix) for pair in pairs(tmp_path)] == [("scene/1", ".JPG")]
    (tmp_path / "gt/scene/1.jpg").touch()
    with pytest.raises(ValueError, match="both be sample 'scene/1'"):
        pairs(tmp_path)


def test_pictures_are_rgb():
    red = np.zeros((4, 5, 3), np.uint8)
    red[..., 0] = 200
    data = encode_png(red)
    assert (decode_rgb(data) == red).all()
    assert (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., 2] == 200).all()


def test_rain_is_grey_additive_seeded_and_as_strong_as_rain100l():
    gt = np.full((160, 240, 3), (30, 90, 150), np.uint8)
    layers = []
    for seed in range(20):
        lq = rain_light(gt, np.random.Generator(np.random.Philox(seed)))
        layer = lq.astype(int) - gt
        assert (layer == layer[..., :1]).all() and layer.min() == 0
        layers.append(layer[..., 0])
    rain = np.stack(layers)
    assert (rain_light(gt, np.random.Generator(np.random.Philox(19))) == lq).all()
    assert 0.12 < (rain > 10).mean() < 0.19 and 27 < rain[rain > 10].mean() < 38  # Rain100L: 0.15 and 32


def test_synth_holds_out_whole_photographs_rains_anew_and_repeats_itself(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("shards.synth.TRAIN_PHOTOS", ("astronaut.png", "rocket.jpg"))
    command = ["synth", "rain_light", "--out", str(tmp_path / "demo")]
    with caplog.at_level("INFO"):
        assert main(command) == main(command) == 0
    assert caplog.text.count("already there") == 2
    train, val = (open_index(tmp_path / "demo" / split)[1] for split in ("train", "val"))
    assert {key.decode().split("-")[0] for key in train["key"]} == {"astronaut", "rocket"}
    assert val["key"].tolist() == [b"chelsea-0", b"chelsea-1", b"coffee-0", b"coffee-1"]
    assert val["gt_crc32"][0] == val["gt_crc32"][1] and val["lq_crc32"][0] != val["lq_crc32"][1]
    assert set(train["h"].tolist() + train["w"].tolist()) == {256} and max(val["h"].max(), val["w"].max()) <= 480
    assert main([*command, "--seed", "7"]) == 2


def test_commands_say_what_is_wrong_in_one_message(tmp_path, capsys):
    assert main(["write", "rain100L", "--src", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: no folder {tmp_path}/rain; point --src or --lq-dir at it")
    assert main(["ls", str(tmp_path)]) == 2
    assert "not usable" in capsys.readouterr().err
