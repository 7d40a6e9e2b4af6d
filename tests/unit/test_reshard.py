"""Others' tars become a data set of ours if nothing is lost by it; ours are written again in another form."""

import io
import tarfile

import numpy as np
import pytest

from shards.__main__ import main
from shards.check import check
from shards.codec import decode_rgb, encode_png
from shards.foreign import find_samples, our_key
from shards.index import open_index, read_tar
from shards.masks import add_masks
from shards.reshard import adopt, reshard
from shards.schema import ShardError, key_problem
from shards.storage import parse
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.unit


def _picture(seed):
    return encode_png(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8))


def _tar(path, members, *, kind=tarfile.GNU_FORMAT):
    """A tar of (name, bytes); instead of bytes, `dir`, or (`sym` or `hard`, target)."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
            elif data == "dir":
                info.type = tarfile.DIRTYPE
            else:
                info.type = {"sym": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}[data[0]]
                info.linkname = data[1]
            tar.addfile(info, io.BytesIO(data if isinstance(data, bytes) else b""))
    return path


def _pair(key, seed, lq="lq.png", gt="gt.png"):
    return [(f"{key}.{lq}", _picture(seed)), (f"{key}.{gt}", _picture(seed + 100))]


def _read(out):
    return {entry.key: (entry.lq.data, entry.gt.data) for tar in sorted(out.glob("*.tar")) for entry in read_tar(tar)}


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_the_index_refuses_is_mended_where_nothing_is_lost(tmp_path, caplog, kind):
    long = "x" * 150
    one = [
        ("train", "dir"),
        ("train/b.1.input.png", _picture(1)),  # apart from its partner, and a dot in its key
        *_pair("./train/a", 2, "input.png", "target.png"),
        ("train/b.1.target.png", _picture(101)),
        ("train/b.1.target.png", _picture(101)),  # twice, and equal
        *_pair(long, 3, "input.png", "target.png"),
        ("train/a.cls", b"7"),
        ("c.target.png", ("hard", "./train/a.target.png")),
        ("train/d.target.png", ("sym", "b.1.target.png")),
    ]
    tars = [_tar(tmp_path / "1.tar", one, kind=kind)]
    tars += [_tar(tmp_path / "2.tar", [("c.input.png", _picture(4)), ("train/d.input.png", _picture(5))])]
    with open(tars[1], "ab") as file:  # as `cat` joins tars
        file.write(_tar(tmp_path / "3", _pair("../e", 6, "input.png", "target.png")).read_bytes())
    out = tmp_path / "out"
    command = ["reshard", str(tmp_path), "--out", str(out), "--lq-ext", "input", "--gt-ext", "target.png"]
    assert main([*command, "--jobs", "1"]) == 0
    assert _read(out) == {
        "train/b_1": (_picture(1), _picture(101)),
        "train/a": (_picture(2), _picture(102)),
        our_key(long): (_picture(3), _picture(103)),
        "c": (_picture(4), _picture(102)),
        "train/d": (_picture(5), _picture(101)),
        "e": (_picture(6), _picture(106)),
    }
    assert check(out).problems == ()
    assert open_index(out)[0].split == "out"
    assert "left out: 1 of KEY.cls" in caplog.text
    assert "1 members came twice" in caplog.text
    assert "3 keys are no keys of ours and change" in caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]  # nothing stays behind


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*_pair("a", 1), ("a.gt.png", _picture(2))], "a.gt.png: comes twice, with other bytes"),
        ([*_pair("a.1", 1), *_pair("a_1", 2)], "a_1.lq.png: and a.1 would both be sample 'a_1'"),
        ([("a.lq.png", ("sym", "/etc/passwd"))], "a.lq.png: links to /etc/passwd, which is not in it"),
        (_pair("a", 1, "x.png", "y.png"), "no KEY.lq and KEY.gt in .*; there are 1 of KEY.x.png, 1 of KEY.y.png"),
        ([*_pair("a", 1), ("b.lq.png", _picture(1))], "1 of 2 pairs cannot be used:\n  b: no gt partner"),
    ],
)
def test_what_may_lose_something_is_refused(tmp_path, members, message):
    with pytest.raises((ShardError, ValueError), match=message):
        adopt([_tar(tmp_path / "1.tar", members)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _starts(path):
    with tarfile.open(path) as tar:
        return [info.offset for info in tar]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, start: data[:start], "cut off after a.gt.png"),
        (lambda data, start: data[: start + 700], "damaged after b.lq.png"),
        (lambda data, start: data[:start] + bytes(512) + data[start + 512 :], "damaged header after a.gt.png"),
        (lambda data, start: data[:start] + b"\x5a" * 512 + data[start + 512 :], "damaged header after a.gt.png"),
        (lambda data, start: data + b"<html>" * 100, "damaged header after b.gt.png"),
        (lambda data, start: b"<html>" * 100, "damaged after its start"),
    ],
)
def test_damaged_tars_are_refused(tmp_path, damage, message):
    tar = _tar(tmp_path / "1.tar", [*_pair("a", 1), *_pair("b", 2)])
    tar.write_bytes(damage(tar.read_bytes(), _starts(tar)[2]))
    with pytest.raises(ShardError, match=f"1.tar.*{message}"):
        find_samples([tar], lq_ext="lq", gt_ext="gt")


def test_every_key_becomes_one_of_ours():
    for key in ("a", "a/b-1_2", "/a//b/../c", "..", "Größe 1.5", "k" * 200, "k/" * 100, "."):
        assert key_problem(our_key(key)) is None
    assert our_key("a/b-1_2") == "a/b-1_2"
    assert our_key("k" * 200) != our_key("k" * 201)


def _half(lq, gt):
    return np.arange(lq[..., 0].size).reshape(1, *lq.shape[:2]) < lq[..., 0].size // 2


@pytest.fixture
def ours(tmp_path):
    write_pairs(make_pairs(tmp_path / "src", 7), tmp_path / "plain", shard_mib=0.01)
    add_masks(tmp_path / "plain", tmp_path / "ours", _half, of="gt", prior={"name": "half"})
    return tmp_path / "ours"


@pytest.mark.parametrize("storage", ["webp", "tiles:16", "raw"])
def test_ours_are_written_again_in_another_form_and_back(tmp_path, ours, storage):
    before, _ = open_index(ours)
    other = reshard(ours, tmp_path / "other", storage=parse(storage))
    assert (other.storage, other.source_sha256, other.masks) == (storage, before.source_sha256, before.masks)
    assert len(other.shardlist) == 1 < len(before.shardlist)
    assert check(tmp_path / "other").problems == ()
    old, new = ([e for tar in sorted(path.glob("*.tar")) for e in read_tar(tar)] for path in (ours, tmp_path / "other"))
    assert [(entry.key, entry.note, entry.masks.data) for entry in new] == [
        (entry.key, entry.note, entry.masks.data) for entry in old
    ]
    for one, two in zip(old, new, strict=True):
        assert one.lq.ending != two.lq.ending
        assert np.array_equal(decode_rgb(one.gt.data), decode_rgb(two.gt.data))
    back = reshard(tmp_path / "other", tmp_path / "back", storage=parse("keep"))
    assert check(tmp_path / "back").problems == ()
    assert back.fingerprint == before.fingerprint  # all of them were PNGs that our own encoder had made


def test_other_shard_sizes_leave_the_fingerprint_and_an_interruption_goes_on(tmp_path, ours, monkeypatch):
    before, _ = open_index(ours)
    out, drafted = tmp_path / "out", []
    from shards import reshard as module

    def draft(tar, samples):
        drafted.append(tar.name)
        if len(drafted) == 3:
            raise KeyboardInterrupt
        return real(tar, samples)

    real = module.draft
    monkeypatch.setattr(module, "draft", draft)
    with pytest.raises(KeyboardInterrupt):
        reshard(ours, out, shard_mib=0.008)
    again = reshard(ours, out, shard_mib=0.008)
    assert drafted == sorted(drafted)
    assert drafted.count("000000.tar") == 1
    assert len(again.shardlist) > 3
    assert (again.fingerprint, again.masks) == (before.fingerprint, before.masks)
    assert check(out).problems == ()
    assert reshard(ours, out, shard_mib=0.008) == again  # and does nothing
    with pytest.raises(ValueError, match="holds another data set"):
        reshard(ours, out, shard_mib=1)


def test_options_that_change_nothing_are_refused(tmp_path, ours, capsys):
    assert main(["reshard", str(ours), "--out", str(tmp_path / "out"), "--lq-ext", "input"]) == 2
    assert "is a data set of ours, of which --lq-ext changes nothing" in capsys.readouterr().err
    assert main(["reshard", str(tmp_path / "src"), "--out", str(tmp_path / "out")]) == 2
    assert "is no tar, and no folder with tars in it" in capsys.readouterr().err
