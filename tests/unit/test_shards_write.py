"""Writing: the same bytes always, nothing by halves, nothing done twice, nothing bad in silence."""

import errno
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib

import cv2
import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from shards import folder
from shards.__main__ import main
from shards.check import check
from shards.codec import decode_masks, decode_rgb, encode_png
from shards.degrade import rain_light
from shards.index import open_index, read_tar
from shards.layouts import Pair, pairs, rain100l, select
from shards.masks import add_masks
from shards.parallel import in_order
from shards.schema import ShardError, load_manifest, sha256_of
from shards.sources import Recipe, read_picture
from shards.storage import parse
from shards.write import write_shards
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
    manifest = write_pairs(
        src, tmp_path / "out", shard_mib=1 / 8
    )  # some 98 KB a pair: 3.8 shards, so four, so two each
    assert [shard.nsamples for shard in manifest.shardlist] == [2, 2, 1]
    _, rows = open_index(tmp_path / "out")
    wids = json.loads((tmp_path / "out/manifest.json").read_text())  # what it reads of such a file
    assert wids["wids_version"] == 1
    for shard in wids["shardlist"]:
        assert (tmp_path / "out" / shard["url"]).stat().st_size == shard["filesize"] and shard["nsamples"] in (1, 2)
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
        note = json.loads(sample["json"])
        assert (note["h"], note["w"], note["measures"]["identical"]) == (128, 128, False)
        for role in ("lq", "gt"):
            assert note[role] == f"{role}/{sample['__key__']}.png"
            assert note[f"{role}_sha256"] == hashlib.sha256(sample[f"{role}.png"]).hexdigest()


def _hashes(folder):
    """sha256 of every file of a finished folder, by name."""
    assert (folder / "manifest.json").exists()
    return {path.name: sha256_of(path) for path in folder.iterdir()}


def _png(array):
    return cv2.imencode(".png", array)[1].tobytes()


def _encoded(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def _orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


RGB = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
PICTURE = Image.fromarray(RGB)
OPAQUE = np.dstack([RGB, np.full((24, 32), 255, np.uint8)])
BAD = {
    "missing": (None, "no lq partner"),
    "empty": (b"", "empty file"),
    "html": (b"<html>moved</html>", "not a readable picture"),
    "cut": (_png(RGB)[:-30], "not a readable picture"),
    "flipped": (_png(RGB)[:100] + bytes([_png(RGB)[100] ^ 1]) + _png(RGB)[101:], "not a readable picture"),
    "cut-jpeg": (_encoded(PICTURE, "JPEG")[:-300], "not a readable picture"),
    "deep": (_png(RGB.astype(np.uint16) * 257), "16 bits per channel, 8 are wanted; --to8 shift"),
    "float": (_encoded(Image.fromarray(RGB[..., 0].astype(np.float32)), "TIFF"), "32 bits"),
    "grey": (_png(RGB[..., 0]), "--gray expand"),
    "grey-alpha": (_encoded(PICTURE.convert("LA"), "PNG"), "grey, colour"),
    "alpha": (_png(np.dstack([RGB, RGB[..., 0]])), "transparent"),
    "transparent-colour": (_encoded(PICTURE, "PNG", transparency=tuple(RGB[0, 0].tolist())), "transparent"),
    "cmyk": (_encoded(PICTURE.convert("CMYK"), "JPEG"), "CMYK"),
    "rotated-jpeg": (_encoded(PICTURE, "JPEG", exif=_orientation(6)), "EXIF"),
    "rotated-png": (_encoded(PICTURE, "PNG", exif=_orientation(3)), "EXIF"),
    "rotated-webp": (_encoded(PICTURE, "WEBP", exif=_orientation(8)), "EXIF"),
    "size": (_png(RGB[:, 1:]), "sizes differ"),
    "large": (_png(np.zeros((600, 600, 3), np.uint8)), "600x600 are 0.4 megapixels"),
    "a.b": (_png(RGB), "rename"),
}


def test_bad_pairs_are_named_with_reasons_and_refuse_the_write(tmp_path, capsys):
    src = make_pairs(tmp_path / "src", 2)
    for name, (data, _) in BAD.items():
        shutil.copy(src / "gt/s-1.png", src / "gt" / f"{name}.png")
        if data is not None:
            (src / "lq" / f"{name}.png").write_bytes(data)
    command = ["write", "pairs", "--src", str(src), "--out", str(tmp_path / "out"), "--max-mpix", "0.3", "--jobs", "1"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert f"{len(BAD)} of {len(BAD) + 2} pairs cannot be used" in message and "--skip-bad" in message
    assert len([line for line in message.splitlines() if line.startswith("  ")]) == 11
    assert f"  and {len(BAD) - 10} more" in message and "nothing was written" in message
    assert os.listdir(tmp_path) == ["src"]
    assert main([*command, "--skip-bad"]) == 0
    manifest = load_manifest(tmp_path / "out")
    reasons = {reject.key: reject.reason for reject in manifest.rejected}
    assert manifest.num_samples == 2 and reasons.keys() == BAD.keys()
    for name, (_, reason) in BAD.items():
        assert reason in reasons[name] and (name in ("missing", "a.b") or str(src / "lq" / name) in reasons[name]), name


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(cv2, "imdecode", never)
    for side in (12000, 20000):  # the second is too much for Pillow to open
        header = struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + header
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        (tmp_path / "bomb.png").write_bytes(data + struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT")))
        with pytest.raises(ValueError, match=r"bomb.png: (12000x12000 are 144.0 megapixels|too many pixels)"):
            read_picture(tmp_path / "bomb.png", recipe=Recipe())


KEPT = {
    "as it is": (_png(RGB[..., ::-1]), {}, RGB, True),
    "jpeg": (_encoded(PICTURE, "JPEG", exif=_orientation(1)), {}, None, True),
    "16 bits, shifted": (_png(RGB[..., ::-1].astype(np.uint16) * 256 + 255), {"to8": "shift"}, RGB, False),
    "grey, expanded": (_png(RGB[..., 0]), {"gray": "expand"}, RGB[..., :1].repeat(3, 2), False),
    "opaque": (_encoded(Image.fromarray(OPAQUE), "PNG"), {}, RGB, False),
    "palette": (_encoded(PICTURE.quantize(16), "PNG"), {}, np.array(PICTURE.quantize(16).convert("RGB")), False),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_no_plain_rgb_is_encoded_anew_without_loss_or_not_at_all(case, tmp_path):
    data, options, rgb, as_is = KEPT[case]
    for side, content in (("lq", data), ("gt", _png(255 - RGB[..., 0]) if options.get("gray") else _png(255 - RGB))):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.png").write_bytes(content)
    manifest = write_pairs(tmp_path, tmp_path / "out", recipe=Recipe(**options))
    entry = next(read_tar(tmp_path / "out/000000.tar"))
    assert (entry.lq.data == data) == as_is
    stored = cv2.imdecode(np.frombuffer(entry.lq.data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert rgb is None or np.array_equal(stored[..., ::-1], rgb)
    assert entry.note["lq_sha256"] == hashlib.sha256(data).hexdigest()
    assert manifest.source_sha256 and (manifest.source_sha256 == manifest.content_sha256) == (not options and as_is)
    assert check(tmp_path / "out").problems == ()
    assert write_pairs(tmp_path, tmp_path / "out", recipe=Recipe(**options)) == manifest


def test_grey_on_one_side_alone_is_refused(tmp_path):
    src = make_pairs(tmp_path / "src", 1)
    (src / "gt/s-1.png").write_bytes(_png(RGB[..., 0]))
    with pytest.raises(ValueError, match="gt/s-1.png is grey and its partner is in colour"):
        write_pairs(src, tmp_path / "out", recipe=Recipe(gray="expand"))


def test_halves_of_one_file_are_stored_without_loss(tmp_path):
    whole = tmp_path / "1.jpg"
    whole.write_bytes(_encoded(Image.fromarray(np.hstack([RGB, 255 - RGB])), "JPEG"))
    about = {"src": "x", "layout": "did", "split": "test", "arguments": {}}
    write_shards([Pair("1", whole, whole, side_by_side=True)], tmp_path / "out", **about)
    entry = next(read_tar(tmp_path / "out/000000.tar"))
    halves = np.split(decode_rgb(whole.read_bytes()), 2, axis=1)
    for member, half in zip((entry.lq, entry.gt), halves, strict=True):
        assert member.ending.endswith(".png") and np.array_equal(decode_rgb(member.data), half)
    whole.write_bytes(_encoded(PICTURE.crop((0, 0, 31, 24)), "JPEG"))
    with pytest.raises(ValueError, match="31 px wide, so it is not two halves"):
        write_shards([Pair("1", whole, whole, side_by_side=True)], tmp_path / "odd", **about)


def test_masks_that_come_with_the_data_set_are_stored_beside_the_pictures(tmp_path):
    src, grey = make_pairs(tmp_path / "src", 3), np.zeros((24, 32), np.uint8)
    grey[5:9, 7:20] = 255
    found = []
    for pair, mask in zip(pairs(src), (grey, grey // 255 * 127, grey), strict=True):
        (src / f"{pair.key}.png").write_bytes(_png(mask))
        found.append(pair._replace(masks=src / f"{pair.key}.png"))
    about = {"src": "x", "layout": "reloblur", "split": "test", "arguments": {}}
    manifest = write_shards(found, tmp_path / "out", **about)
    assert check(tmp_path / "out").problems == () and manifest.masks
    stored = [decode_masks(entry.masks.data, (24, 32)) for entry in read_tar(tmp_path / "out/000000.tar")]
    assert np.array_equal(stored[0], grey[None] > 0) and len(stored[1]) == 0
    found[1].masks.write_bytes(_png(grey[1:]))
    found[2] = found[2]._replace(masks=None)
    with pytest.raises(ValueError, match="32x23, masks of 32x24 are wanted\n.*s-3: has no masks, and other pairs have"):
        write_shards(found, tmp_path / "bad", **about)


def test_three_processes_write_what_one_does(tmp_path):
    src = make_pairs(tmp_path / "src", 7)
    for jobs in (1, 3):
        write_pairs(src, tmp_path / str(jobs), jobs=jobs, shard_mib=1 / 100, recipe=Recipe(parse("tiles:16")))
    one = _hashes(tmp_path / "1")
    assert _hashes(tmp_path / "3") == one and len(one) >= 5
    assert check(tmp_path / "3", jobs=2).problems == ()


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_bytes(tmp_path):
    src = make_pairs(tmp_path / "src", 12, h=64, w=64)
    options = ["--src", str(src), "--shard-mib", "0.06", "--split", "train", "--jobs", "2"]  # four shards of three
    halt = src / "lq/s-5.png"  # the eighth by name, in the third shard
    data = halt.read_bytes()
    halt.unlink()
    os.mkfifo(halt)  # who reads it waits for ever
    command = [sys.executable, "-m", "shards", "write", "pairs", "--out", str(tmp_path / "killed"), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "killed/000001.tar.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        with pytest.raises(ValueError, match=f"is being written by process {process.pid} on"):
            write_pairs(src, tmp_path / "killed")
    finally:
        process.kill()
        process.wait()
    assert len(family) > 2 and not psutil.wait_procs(family, timeout=10)[1]
    kept = _inodes(tmp_path / "killed")
    assert len(kept) == 2 and (tmp_path / "killed/000002.tar.tmp").exists()
    with pytest.raises(ShardError, match="not usable"):
        open_index(tmp_path / "killed")
    halt.unlink()
    halt.write_bytes(data)
    for out in ("killed", "whole"):
        assert main(["write", "pairs", "--out", str(tmp_path / out), *options[:-1], "1"]) == 0
    assert _hashes(tmp_path / "killed") == _hashes(tmp_path / "whole")
    assert _inodes(tmp_path / "killed")[:2] == kept


def _inodes(out):
    return [path.stat().st_ino for path in sorted(out.glob("*.tar"))]


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Source and folder of a write that was stopped before its end: three shards of two pairs."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    src, out = make_pairs(tmp_path / "src", 6), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("shards.write.look_over", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_pairs(src, out, shard_mib=1 / 100)
    assert sorted(path.name for path in out.glob("*.tar")) == ["000000.tar", "000001.tar", "000002.tar"]
    return src, out


def test_only_shards_whose_pairs_changed_are_written_anew(interrupted, tmp_path):
    src, out = interrupted
    before = _inodes(out)
    (src / "lq/s-3.png").write_bytes(_png(RGB))
    (out / "000002.tar.json").unlink()  # killed between the two: the shard counts as unfinished
    (out / "000007.tar").write_bytes(b"of an earlier plan")
    write_pairs(src, out, shard_mib=1 / 100, src="x")
    assert [one == other for one, other in zip(before, _inodes(out), strict=True)] == [True, False, False]
    write_pairs(src, tmp_path / "whole", shard_mib=1 / 100, src="x")
    assert _hashes(out) == _hashes(tmp_path / "whole")


def test_no_note_of_a_finished_shard_outlives_it(interrupted, monkeypatch):
    src, out = interrupted
    real = folder.write_file

    def killed(path, data):
        if path.name == "000001.tar.json":
            raise KeyboardInterrupt
        real(path, data)

    (src / "lq/s-3.png").write_bytes(_png(RGB))
    monkeypatch.setattr(folder, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(src, out, shard_mib=1 / 100)
    assert (out / "000001.tar").exists() and not (out / "000001.tar.json").exists()


def test_masks_go_on_where_they_were_interrupted(tmp_path):
    write_pairs(make_pairs(tmp_path / "src", 6), tmp_path / "set", shard_mib=1 / 100)
    seen = []

    def make(lq, gt):
        seen.append(lq)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return lq[None, ..., 0] > 100

    note = {"of": "lq", "prior": {"what": "bright"}}
    with pytest.raises(KeyboardInterrupt):
        add_masks(tmp_path / "set", tmp_path / "out", make, **note)
    add_masks(tmp_path / "set", tmp_path / "out", make, **note)
    assert len(seen) == 4 + 4 and check(tmp_path / "out").problems == ()  # the first of three shards was finished
    add_masks(tmp_path / "set", tmp_path / "whole", make, **note)
    assert _hashes(tmp_path / "out") == _hashes(tmp_path / "whole")


def test_a_bad_pair_costs_its_shard_alone(interrupted, tmp_path):
    src, _ = interrupted
    out, good = tmp_path / "other", (src / "lq/s-3.png").read_bytes()
    (src / "lq/s-3.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 6 pairs cannot .*\n.*s-3: .*empty file\n2 of 3 shards are finished and"):
        write_pairs(src, out, shard_mib=1 / 100)
    kept = _inodes(out)
    assert write_pairs(src, out, shard_mib=1 / 100, skip_bad=True).rejected[0].key == "s-3"
    assert [_inodes(out)[0], _inodes(out)[2]] == kept
    (src / "lq/s-3.png").write_bytes(good)


def test_a_rejection_that_was_allowed_before_is_not_taken_over(interrupted, tmp_path, monkeypatch):
    src, _ = interrupted
    (src / "lq/s-3.png").write_bytes(b"")
    (src / "lq/s-4.png").write_bytes(b"")  # none of the shard is left
    with monkeypatch.context() as patch:
        patch.setattr("shards.write.finish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_pairs(src, tmp_path / "other", shard_mib=1 / 100, skip_bad=True)
    with pytest.raises(ValueError, match="2 of 2 pairs cannot be used"):
        write_pairs(src, tmp_path / "other", shard_mib=1 / 100)
    manifest = write_pairs(src, tmp_path / "other", shard_mib=1 / 100, skip_bad=True)
    assert [shard.url for shard in manifest.shardlist] == ["000000.tar", "000002.tar"]
    assert check(tmp_path / "other").problems == ()


def test_a_finished_shard_that_changed_is_found_and_with_verify_written_anew(interrupted):
    src, out = interrupted
    tar = out / "000001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardError, match="000001.tar: changed since it was written: .*--verify"):
        write_pairs(src, out, shard_mib=1 / 100)
    before = _inodes(out)
    write_pairs(src, out, shard_mib=1 / 100, verify=True)
    assert [one == other for one, other in zip(before, _inodes(out), strict=True)] == [True, False, True]
    assert check(out).problems == ()


def test_the_unfinished_writing_of_something_else_is_not_written_over(interrupted):
    src, out = interrupted
    with pytest.raises(ValueError, match="holds the unfinished writing of pairs, train, not of rain100L, train"):
        write_pairs(src, out, layout="rain100L")
    assert len(_inodes(out)) == 3


def test_a_dead_worker_is_told(tmp_path, monkeypatch):
    with pytest.raises(ShardError, match="a worker process died"):
        list(in_order(os._exit, [1], jobs=2))


def test_pairs_that_are_none_refuse_the_write_unless_allowed(tmp_path, caplog):
    src = make_pairs(tmp_path / "src", 2)
    shutil.copy(src / "lq/s-1.png", src / "gt/s-1.png")
    with pytest.raises(ValueError, match="the same picture.*s-1 [^Z]*--allow-suspicious"):
        write_pairs(src, tmp_path / "out", allow_suspicious=False)
    manifest = write_pairs(src, tmp_path / "out")
    assert "the same picture" in manifest.suspicious[0] and "look at this" in caplog.text


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
    with pytest.raises(ShardError, match="needs some 0 MiB, free are 0"):
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


def test_counts_and_options_of_the_layout_are_held_to(tmp_path, capsys):
    src = make_pairs(tmp_path / "src", 2)
    (src / "lq").rename(src / "rain")
    (src / "gt").rename(src / "norain")
    for path in [*src.glob("*/s-*.png")]:
        path.rename(path.with_name(path.name.replace("s-", "norain-")))
    command = ["write", "rain100L", "--src", str(src), "--out", str(tmp_path / "train"), "--jobs", "1"]
    assert main(command) == 2 and "2 pairs found, rain100L has 200 in train" in capsys.readouterr().err
    assert main([*command, "--blur", "blur"]) == 2
    assert "rain100L takes no --blur; it takes --variant, --lq-dir, --gt-dir" in capsys.readouterr().err
    assert main([*command, "--select", "2"]) == 0
    command[5] = str(tmp_path / "all")
    assert main(command) == 2 and "rain100L has 200 in train, 100 in test;" in capsys.readouterr().err
    assert main([*command, "--split", "train", "--allow-count"]) == 0
    assert load_manifest(tmp_path / "all").arguments["variant"] == "renamed"
    assert main([*command, "--split", "train", "--allow-count"]) == 0


def test_commands_say_what_is_wrong_in_one_message(tmp_path, capsys):
    assert main(["write", "rain100L", "--src", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: no folder {tmp_path}/rain; point --src or --lq-dir at it")
    assert main(["ls", str(tmp_path)]) == 2
    assert "not usable" in capsys.readouterr().err
    assert main(["synth", "rain_light", "--src", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2
    assert f"no folder {tmp_path}/no; point --src at" in capsys.readouterr().err
    for option, value in (("--jobs", "0"), ("--jobs", "two"), ("--shard-mib", "x"), ("--max-mpix", "-1")):
        with pytest.raises(SystemExit):
            main(["write", "pairs", "--out", "out", option, value])
        assert f"argument {option}: {value} is no " in capsys.readouterr().err


def test_a_url_is_read_by_ls_and_by_the_other_commands_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pairs(make_pairs(tmp_path / "src", 2), tmp_path / "set")
    assert main(["check", f"file://{tmp_path}/set"]) == main(["ls", f"pipe:cat {tmp_path}/set/{{}}"]) == 0
    assert "s-2  32x24" in capsys.readouterr().out
    url = "https://host/set"
    for command in (
        ["check", url], ["leaks", url], ["leaks", "set", url], ["reshard", url, "--out", "out"],
        ["reshard", "set", "--out", url],
        ["write", "pairs", "--src", "src", "--out", url], ["synth", "rain_light", "--out", url],
    ):  # fmt: skip
        assert main(command) == 2
        assert f"{url} is a URL, which only a run reads" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is a URL"):
        add_masks("set", url, lambda lq, gt: lq[None, ..., 0] > 9, of="lq", prior={})
    assert sorted(os.listdir()) == ["set", "src"]  # and no folder https:


def test_what_the_pairs_are_said_to_be_is_kept_and_checked(tmp_path, capsys):
    src = make_pairs(tmp_path / "src", 8, h=64, w=64)
    for path in (src / "gt").iterdir():  # the pictures of lq, blurred: swapped, if this is blur
        rgb = cv2.imread(str(src / "lq" / path.name))
        cv2.imwrite(str(path), cv2.GaussianBlur(rgb, (0, 0), 1))
    command = ["write", "pairs", "--src", str(src), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert main([*command, "--kind", "blur"]) == 2
    assert "the folders are swapped" in capsys.readouterr().err
    assert main([*command, "--kind", "blur", "--allow-suspicious"]) == 0
    assert load_manifest(tmp_path / "out").arguments["kind"] == "blur"
    assert main(["check", str(tmp_path / "out")]) == 0 and "the folders are swapped" in capsys.readouterr().out
    assert main(command) == 2 and "holds another data set" in capsys.readouterr().err


def test_what_a_killed_process_was_making_is_removed_by_the_next(tmp_path):
    code = "import os, pathlib, sys; from shards.folder import making\nwith making(pathlib.Path(sys.argv[1]), "
    code += "prefix='.x-') as made: (made / 'a').touch(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    (left,) = tmp_path.glob(".x-*/a")
    with folder.making(tmp_path, prefix=".x-") as mine:
        assert not left.exists()
        with folder.making(tmp_path, prefix=".x-"):
            assert mine.is_dir()  # somebody is at work there
    assert not os.listdir(tmp_path)
