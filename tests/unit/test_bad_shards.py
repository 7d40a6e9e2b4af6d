"""Every kind of bad shard is refused when it is indexed, with the member named; every good one is taken.

The column `stock` is what webdataset itself makes of the same bytes, told to raise every error: the number of samples
that it delivers, or None where it does raise.
"""

import io
import json
import tarfile
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import pytest
import webdataset

from shards.check import check
from shards.codec import encode_png
from shards.index import index_of, open_index, read_tar, row
from shards.schema import ShardError
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.unit

_PICTURE = encode_png(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
_NOTE = json.dumps({"h": 16, "w": 24}).encode()
_ENDINGS = ("gt.png", "json", "lq.png")


def _member(name, data=None, **header):
    info = tarfile.TarInfo(name)
    for field, value in header.items():
        setattr(info, field, value)
    data = (_NOTE if name.endswith("json") else _PICTURE) if data is None else data
    info.size = len(data)
    return info, data


def _samples(*keys):
    return [_member(f"{key}.{ending}") for key in keys for ending in _ENDINGS]


def _tar(members, kind=tarfile.USTAR_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _link(kind):
    return _tar([*_samples("a")[:2], _member("a.lq.png", b"", type=kind, linkname="a.gt.png")])


def _size(field):
    """The first header of the good shard with this size, and the right checksum."""
    header = bytearray(_GOOD[:512])
    header[124:136], header[148:156] = field, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + _GOOD[512:]


def _note(text):
    return _tar([_member("a.gt.png"), _member("a.json", text), _member("a.lq.png")])


_GOOD = _tar(_samples("a", "b", "c", "d"))
with tarfile.open(fileobj=io.BytesIO(_GOOD)) as _archive:
    _STARTS = [info.offset for info in _archive]
_C = _STARTS[6]  # of c.gt.png
_END = len(_GOOD.rstrip(b"\0")) + -len(_GOOD.rstrip(b"\0")) % 512


class Bad(NamedTuple):
    kind: str
    data: bytes
    message: str
    stock: int | None


BAD = [
    Bad("a member twice", _tar([*_samples("a"), _member("a.lq.png")]), "a.lq.png: comes twice", None),
    Bad("a sample twice", _tar(_samples("a", "b", "a")), "a.gt.png: comes twice", 3),
    Bad("dots in keys, merged into one", _tar(_samples("a.1", "a.2")), r"a\.1\.gt\.png: is neither", 1),
    Bad("two dots up", _tar(_samples("../a")), r"\.\./a\.gt\.png: is neither", 1),
    Bad("two dots inside", _tar(_samples("x/../a")), r"x/\.\./a\.gt\.png: is neither", 1),
    Bad("absolute path", _tar(_samples("/a")), "/a.gt.png: the key '/a'", 1),
    Bad("symbolic link, a half pair", _link(tarfile.SYMTYPE), "a.lq.png: is no plain file", 1),
    Bad("hard link, a half pair", _link(tarfile.LNKTYPE), "a.lq.png: is no plain file", 1),
    Bad("half pair", _tar([*_samples("a")[:2], *_samples("b")]), "a: has no lq", 2),
    Bad("no sizes", _tar([m for m in _samples("a") if m[0].name != "a.json"]), "a: has no json", 1),
    Bad("split pair", _tar([*_samples("a")[:2], *_samples("b"), _member("a.lq.png")]), "a: has no lq", 3),
    Bad("header overwritten", _GOOD[:_C] + b"\x5a" * 512 + _GOOD[_C + 512 :], "damaged header after b.lq.png", 2),
    Bad("one bit of a header", _GOOD[:_C] + b"b" + _GOOD[_C + 1 :], "damaged header after b.lq.png", 2),
    Bad("header zeroed", _GOOD[:_C] + bytes(512) + _GOOD[_C + 512 :], "mark after b.lq.png is broken", 2),
    Bad("cut between samples", _GOOD[:_C], "cut off after b.lq.png", 2),
    Bad("cut between members", _GOOD[: _STARTS[7]], "cut off after c.gt.png", 3),
    Bad("cut in a header", _GOOD[: _C + 100], "cut off after b.lq.png", 2),
    Bad("cut in a member", _GOOD[: _C + 700], "c.gt.png: is empty or cut off", None),
    Bad("no end mark", _GOOD[:_END], "cut off after d.lq.png", 4),
    Bad("half an end mark", _GOOD[: _END + 512], "mark after d.lq.png is broken", 4),
    Bad("data after the end", _GOOD + b"x" * 512, "mark after d.lq.png is broken", 4),
    Bad("a shard after the end", _GOOD + _tar(_samples("e")), "mark after d.lq.png is broken", 4),
    Bad("long name of GNU", _tar(_samples("k" * 120), tarfile.GNU_FORMAT), "@LongLink: is no plain file", 1),
    Bad("pax header", _tar(_samples("k" * 120), tarfile.PAX_FORMAT), "@PaxHeader: is no plain file", 1),
    Bad("folder", _tar([_member("a", b"", type=tarfile.DIRTYPE), *_samples("a/b")]), ", a: is no plain file", 1),
    Bad("pipe", _tar([_member("a.lq.png", b"", type=tarfile.FIFOTYPE)]), "a.lq.png: is no plain file", 0),
    Bad("negative size", _size(b"\xff" * 11 + b"\0"), r"a\.gt\.png: is empty or cut off \(-256", 1),
    Bad("size beyond all", _size(b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7), "a.gt.png: is empty or cut off", None),
    Bad("empty member", _tar([_member("a.gt.png", b""), *_samples("a")[1:]]), "a.gt.png: is empty", 1),
    Bad("other members", _tar([*_samples("a"), _member("a.txt")]), "a.txt: is neither", 1),
    Bad("endings like ours", _tar([_member("a.json.bak"), *_samples("a")]), "a.json.bak: is neither", 1),
    Bad("height below nothing", _note(b'{"h": -4, "w": 24}'), "a.json: does not tell h and w", 1),
    Bad("width without end", _note(b'{"h": 4, "w": Infinity}'), "a.json: does not tell h and w", 1),
    Bad("no bytes", b"", "cut off after its start", None),
    Bad("no members", bytes(10240), "holds no sample", 0),
    Bad("a web page", b"<html>" * 500, "damaged header after its start, at byte 0", None),
]

GOOD = {
    "ours": _GOOD,
    "the shortest end mark": _GOOD[: _END + 1024],
    "folders in keys": _tar(_samples("x/y/a", "x/z/a")),
    "the longest key": _tar(_samples("k" * 88)),
    "a name in two fields": _tar(_samples("x" * 40 + "/" + "k" * 40)),
    "the other order": _tar(_samples("a")[::-1]),
    "GNU headers": _tar(_samples("a"), tarfile.GNU_FORMAT),
}


def index(*paths):
    return index_of([row(entry, shard) for shard, path in enumerate(paths) for entry in read_tar(path)])


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.kind)
def test_a_bad_shard_is_refused_with_the_member_named(tmp_path, bad):
    path = tmp_path / "000007.tar"
    path.write_bytes(bad.data)
    with pytest.raises(ShardError, match=f"000007.tar.*{bad.message}"):
        index(path)


@pytest.mark.skipif(version("webdataset") != "1.0.2", reason="measured with webdataset 1.0.2")
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.kind)
def test_what_stock_webdataset_makes_of_it(tmp_path, bad):
    (tmp_path / "000007.tar").write_bytes(bad.data)
    stock = webdataset.WebDataset(
        str(tmp_path / "000007.tar"), shardshuffle=False, handler=webdataset.reraise_exception, empty_check=False
    )
    if bad.stock is None:
        with pytest.raises((ValueError, tarfile.ReadError)):
            list(stock)
    else:
        assert len(list(stock)) == bad.stock


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_shard_is_taken(tmp_path, kind):
    path = tmp_path / "000007.tar"
    path.write_bytes(GOOD[kind])
    for found in index(path):
        assert path.read_bytes()[found["lq_offset"] :][: found["lq_size"]] == _PICTURE


def test_the_same_key_in_two_shards_is_refused(tmp_path):
    paths = [tmp_path / "0.tar", tmp_path / "1.tar"]
    for path in paths:
        path.write_bytes(_tar(_samples("a")))
    with pytest.raises(ShardError, match="a: lies in two shards"):
        index(*paths)


@pytest.fixture
def folder(tmp_path):
    write_pairs(make_pairs(tmp_path / "src", 3), tmp_path / "out")
    return tmp_path / "out"


def test_a_shard_of_another_size_than_the_manifest_says_is_refused(folder):
    with open(folder / "000000.tar", "ab") as file:
        file.write(bytes(512))  # the archive itself stays good
    with pytest.raises(ShardError, match=r"000000.tar has \d+ bytes instead of"):
        open_index(folder)


def test_a_shard_of_other_bytes_than_the_manifest_says_is_a_problem(folder):
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"gt/s-1.png", b"gt/s-9.png"))  # what a note says; no picture
    assert "sha256 differs" in check(folder).problems[0]


def test_the_index_of_another_manifest_is_refused(folder, tmp_path):
    write_pairs(make_pairs(tmp_path / "other", 3, h=40), tmp_path / "elsewhere")
    (folder / "index.npy").write_bytes((tmp_path / "elsewhere/index.npy").read_bytes())
    with pytest.raises(ShardError, match="index.npy: is not the one the manifest names"):
        open_index(folder)
