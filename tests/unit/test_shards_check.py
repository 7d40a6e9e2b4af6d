"""Damage is found, wherever it lies: python's tarfile and webdataset let most of these through."""

import io
import tarfile

import pytest

from shards.__main__ import main
from shards.check import check
from shards.index import load_index, read_tar
from shards.schema import ShardError
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path):
    write_pairs(make_pairs(tmp_path / "src", 4), tmp_path / "out")
    return tmp_path / "out"


def _starts(tar):
    with tarfile.open(tar) as archive:
        return [member.offset for member in archive]


def _cut_between_members(data, starts):
    return data[: starts[6]]


def _cut_in_member(data, starts):
    return data[: starts[6] + 700]


def _cut_end_mark(data, starts):
    return data[: len(data.rstrip(b"\0")) // 512 * 512 + 512]


def _zero_header(data, starts):
    return data[: starts[6]] + bytes(512) + data[starts[6] + 512 :]


def _garbage_header(data, starts):
    return data[: starts[6]] + b"\x5a" * 512 + data[starts[6] + 512 :]


def _flip_bit_in_picture(data, starts):
    place = starts[6] + 512 + 100
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE = [_cut_between_members, _cut_in_member, _cut_end_mark, _zero_header, _garbage_header, _flip_bit_in_picture]


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_is_a_problem_that_names_the_shard(folder, damage, capsys):
    assert check(folder).problems == ()
    tar = folder / "000000.tar"
    tar.write_bytes(damage(tar.read_bytes(), _starts(tar)))
    problems = check(folder).problems
    assert problems and all("000000.tar" in problem for problem in problems)
    assert main(["check", str(folder)]) == 1
    assert "problem: " in capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGE[:-1])
def test_the_strict_reader_alone_refuses_a_broken_archive(folder, damage):
    tar = folder / "000000.tar"
    tar.write_bytes(damage(tar.read_bytes(), _starts(tar)))
    with pytest.raises(ShardError, match="000000.tar"):
        list(read_tar(tar))


def test_missing_shards_and_foreign_indexes_are_problems(folder, tmp_path):
    write_pairs(make_pairs(tmp_path / "other", 4, h=40), tmp_path / "elsewhere")
    index = (folder / "index.npy").read_bytes()
    (folder / "index.npy").write_bytes((tmp_path / "elsewhere/index.npy").read_bytes())
    assert "not the one the manifest names" in check(folder).problems[0]
    (folder / "index.npy").write_bytes(index)
    (folder / "000000.tar").unlink()
    assert "000000.tar is missing" in check(folder, deep=False).problems[0]


def _tar(path, names, *, link=False):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in names:
            data = b'{"h": 1, "w": 1}'
            info = tarfile.TarInfo(name)
            if link:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.lq.png", "a.json"], "a: has no gt"),
        (["a.lq.png", "a.gt.png", "a.json", "a.gt.jpg"], "a.gt.jpg: comes twice"),
        (["a.lq.png", "a.gt.png", "a.json", "b.lq.png", "b.gt.png", "b.json", "a.lq.png"], "a.lq.png: comes twice"),
        (["../a.lq.png", "../a.gt.png", "../a.json"], "neither"),
        (["/a.lq.png"], "the key '/a'"),
        (["a.1.lq.png"], "neither"),
        (["a b.lq.png"], "the key 'a b'"),
    ],
)
def test_members_that_cannot_be_samples_are_refused_by_name(tmp_path, names, message):
    _tar(tmp_path / "x.tar", names)
    with pytest.raises(ShardError, match=message):
        list(read_tar(tmp_path / "x.tar"))


def test_links_are_refused(tmp_path):
    _tar(tmp_path / "x.tar", ["a.lq.png"], link=True)
    with pytest.raises(ShardError, match="a.lq.png: is no plain file"):
        list(read_tar(tmp_path / "x.tar"))


def test_the_stock_reading_takes_part(folder, monkeypatch):
    monkeypatch.setattr("shards.check._stock_reading", lambda *_: iter([("s-1", 0, 0)]))
    assert "stock webdataset reads other samples" in check(folder).problems[0]


def test_index_and_manifest_are_compared_with_the_tar(folder, monkeypatch):
    manifest, rows = load_index(folder)
    other = manifest.model_copy(update={"content_sha256": "0" * 64})
    monkeypatch.setattr("shards.check.load_index", lambda _: (other, rows))
    assert "the manifest is of other contents" in check(folder).problems[0]
    rows["w"][2] += 1
    monkeypatch.setattr("shards.check.load_index", lambda _: (manifest, rows))
    assert "the index tells of other samples" in check(folder).problems[0]
