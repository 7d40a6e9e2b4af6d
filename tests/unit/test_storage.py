"""Forms of storage: exact whatever the size, a crop reads what it needs and no more, damage is seen and contained."""

import os
import re
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset

from dist_train.data.reader import BadSampleError, ShardReader
from shards.codec import decode_crop, decode_rgb, encode_png
from shards.schema import MANIFEST, ShardError
from shards.sources import Recipe
from shards.storage import Storage, parse
from shards.tiles import RAW, WEBP, Grid, encode_tiles, grid_of
from tests.helpers.pairs import write_pairs

pytestmark = pytest.mark.unit

H, W = 75, 101
FORMS = ("keep", "webp", "webp:0", "tiles:16", "tiles:32:3", "tiles:128", "raw")


def picture(h: int = H, w: int = W, seed: int = 0) -> np.ndarray:
    """Smooth colours and a little noise, so that it compresses, and no two rows or columns are alike."""
    y, x = np.mgrid[:h, :w]
    smooth = np.stack([y * 2 + x, x * 3 - y, 255 - y - x], -1)
    return (smooth + np.random.default_rng(seed).integers(0, 4, (h, w, 3))).astype(np.uint8)


def write_set(folder: Path, storage: str, num: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    """A set of `num` pairs in `folder`, and the pairs."""
    made = [(picture(seed=number), picture(seed=100 + number)) for number in range(num)]
    src = folder.with_name(folder.name + "-src")
    for number, pair in enumerate(made):
        for role, rgb in zip(("lq", "gt"), pair, strict=True):
            (src / role).mkdir(parents=True, exist_ok=True)
            (src / role / f"s-{number}.png").write_bytes(encode_png(rgb))
    write_pairs(src, folder, recipe=Recipe(parse(storage)))
    return made


def boxes(h: int = H, w: int = W) -> list[tuple[int, int, int, int]]:
    """Corners, edges, one pixel, everything, exactly one tile, and some by chance."""
    rng = np.random.default_rng(1)
    corners = [(top, left, 20, 30) for top in (0, h - 20) for left in (0, w - 30)]
    chance = []
    for _ in range(20):
        top, left = int(rng.integers(h)), int(rng.integers(w))
        chance.append((top, left, int(rng.integers(1, h - top + 1)), int(rng.integers(1, w - left + 1))))
    return [*corners, (0, 0, h, w), (0, 0, 1, 1), (h - 1, w - 1, 1, 1), (16, 32, 16, 16), (0, 10, h, 1), *chance]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(H, W), (1, 1), (16, 33), (17, 16), (128, 129)])
def test_every_form_gives_the_pixels_back(form: str, size: tuple[int, int]) -> None:
    rgb = picture(*size)
    suffix, data = parse(form).encode(None, ".any", rgb)
    assert suffix == {"keep": ".png", "webp": ".webp", "tiles": ".tiles", "raw": ".raw"}[form.partition(":")[0]]
    assert np.array_equal(decode_rgb(data), rgb)
    _, of_a_view = parse(form).encode(None, ".any", np.pad(rgb, ((0, 0), (0, 5), (0, 0)))[:, : size[1]])
    assert of_a_view == data


def test_keep_keeps_the_bytes_of_the_file() -> None:
    assert parse("keep").encode(b"whatever", ".jpg", picture()) == (".jpg", b"whatever")


def test_an_encoder_that_changes_pixels_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.storage.encode_webp", lambda rgb, level: cv2.imencode(".png", rgb)[1].tobytes())
    for form in ("webp", "tiles:32"):
        with pytest.raises(ShardError, match=f"the encoder of {form} changes pixels"):
            parse(form).encode(None, "", picture())


@pytest.mark.parametrize("form", ["keep", "webp", "tiles:16", "tiles:32", "tiles:128", "raw"])
def test_a_crop_is_the_cut_of_the_whole(form: str, tmp_path: Path) -> None:
    made = write_set(tmp_path / "set", form)
    reader = ShardReader(tmp_path / "set")
    for number, pair in enumerate(made):
        for whole, found in zip(pair, reader.pair(number), strict=True):
            assert np.array_equal(found, whole)
        for top, left, h, w in boxes():
            for whole, crop in zip(pair, reader.pair(number, (top, left, h, w)), strict=True):
                assert np.array_equal(crop, whole[top : top + h, left : left + w])


@pytest.mark.parametrize("form", ["tiles:16", "tiles:32", "raw"])
def test_a_crop_reads_the_header_and_the_tiles_it_touches(form: str) -> None:
    rgb = picture()
    storage = parse(form)
    data = storage.encode(None, "", rgb)[1]
    grid = storage.grid((H, W))
    assert grid is not None and grid == grid_of(data)
    reads: list[tuple[int, int]] = []

    def read(start: int, size: int) -> bytes:
        reads.append((start, size))
        return data[start : start + size]

    for box in boxes():
        reads.clear()
        decode_crop(read, grid, size=len(data), box=box)
        top, left, h, w = box
        rows = range(top // grid.tile_h, (top + h - 1) // grid.tile_h + 1)
        columns = range(left // grid.tile_w, (left + w - 1) // grid.tile_w + 1)
        whole_rows = len(columns) == grid.columns
        assert reads[0] == (0, grid.header_bytes)
        assert len(reads) == 1 + (1 if whole_rows else len(rows))
        if form == "raw":
            assert sum(size for _, size in reads[1:]) <= min((h + 30) * W * 3, len(data))
        else:
            touched = {grid.box(row, column) for row in rows for column in columns}
            sizes = {
                grid.box(r, c): _tile_size(data, grid, r, c) for r in range(grid.rows) for c in range(grid.columns)
            }
            assert sum(size for _, size in reads[1:]) == sum(sizes[tile] for tile in touched)


def _starts(data: bytes, grid: Grid) -> list[int]:
    return np.frombuffer(data, "<u4", count=grid.rows * grid.columns + 1, offset=28).tolist()


def _tile_size(data: bytes, grid: Grid, row: int, column: int) -> int:
    number = row * grid.columns + column
    starts = _starts(data, grid)
    return starts[number + 1] - starts[number]


@pytest.mark.parametrize(("form", "tile"), [("tiles:32", (1, 2)), ("raw", (2, 0))])
def test_a_damaged_tile_hurts_the_crops_that_need_it_alone(form: str, tile: tuple[int, int], tmp_path: Path) -> None:
    made = write_set(tmp_path / "set", form)
    reader = ShardReader(tmp_path / "set")
    grid = parse(form).grid((H, W))
    assert grid is not None
    row = reader._rows[1]
    offset, size = int(row["gt_offset"]), int(row["gt_size"])
    tar = tmp_path / "set" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[offset + _starts(bytes(data[offset : offset + size]), grid)[tile[0] * grid.columns + tile[1]] + 20] ^= 1
    tar.write_bytes(data)
    tile_top, tile_left, tile_h, tile_w = grid.box(*tile)
    hurt = 0
    for top, left, h, w in boxes():
        apart = top + h <= tile_top or tile_top + tile_h <= top or left + w <= tile_left or tile_left + tile_w <= left
        if apart:
            assert np.array_equal(reader.pair(1, (top, left, h, w))[1], made[1][1][top : top + h, left : left + w])
        else:
            hurt += 1
            where = re.escape(f"the tile at {(tile_top, tile_left)} is damaged")
            with pytest.raises(BadSampleError, match=f"000000.tar, s-1.gt: {where}.*python -m shards check"):
                reader.pair(1, (top, left, h, w))
    assert 0 < hurt < len(boxes())
    assert np.array_equal(reader.lq(1, (0, 0, H, W)), made[1][0])
    with pytest.raises(BadSampleError, match="s-1.gt: crc32 differs"):
        reader.pair(1)


def with_header(data: bytes, grid: Grid, at: int, value: int) -> bytes:
    """With one byte of the header changed, and the header's own crc32 made good again."""
    header = bytearray(data[: grid.header_bytes - 4])
    header[at] = value
    return bytes(header) + zlib.crc32(header).to_bytes(4, "little") + data[grid.header_bytes :]


def test_a_bad_header_is_refused_with_its_reason() -> None:
    rgb = picture()
    data = parse("tiles:32").encode(None, "", rgb)[1]
    grid = grid_of(data)
    changed = bytearray(data)
    changed[40] ^= 1  # in the table
    for bad, reason in (
        (bytes(changed), "damaged header of tiles"),
        (data[:20], "empty, truncated, or of another kind"),
        (data[: grid.header_bytes - 1], "damaged header of tiles"),
        (data[:-1], f"tiles of {len(data)} bytes in a file of {len(data) - 1}"),
        (data + b"x", f"tiles of {len(data)} bytes in a file of {len(data) + 1}"),
        (with_header(data, grid, 8, 2), "tiles of version 2; this program reads version 1"),
        (with_header(data, grid, 9, 7), "damaged header of tiles"),
        (data[:12] + bytes(16) + data[28:], "damaged header of tiles"),
    ):
        with pytest.raises(ValueError, match=reason):
            decode_rgb(bad)
    with pytest.raises(ValueError, match="wanted are .*tile_h=16"):
        decode_crop(lambda start, size: data[start : start + size], Grid(H, W, 16, 16, WEBP), size=len(data))
    png = cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes()
    with pytest.raises(ValueError, match=re.escape("the tile at (0, 0) is (9, 9), not (32, 32)")):
        decode_rgb(encode_tiles(rgb, grid, lambda tile: png))


def test_names_are_parsed_and_others_refused_with_what_there_is() -> None:
    for name in FORMS:
        assert str(parse(name)) == name and parse(str(parse(name))) == parse(name)
    assert parse("tiles:64:1") == parse("tiles:64") == Storage("tiles", 64)
    assert parse("keep").grid((H, W)) is None and parse("webp").grid((H, W)) is None
    assert parse("raw").grid((H, W)) == Grid(H, W, 16, W, RAW)
    wrong = ("", "png", "Keep", "keep:1", "raw:16", "webp:10", "webp:", "webp:-1", "tiles", "tiles:8", "tiles:9999")
    for name in (*wrong, "tiles:128:", "tiles:128:1:1", "tiles: 128", "tiles:\u0661\u0662\u0668"):
        with pytest.raises(ValueError, match="is none of keep, raw, webp, .* like tiles:64"):
            parse(name)
    with pytest.raises(ValueError, match="20000x1 is more than WebP can hold"):
        parse("webp").encode(None, "", np.zeros((1, 20000, 3), np.uint8))


def test_a_set_in_an_unknown_form_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "set", "raw")
    path = tmp_path / "set" / MANIFEST
    path.write_text(path.read_text().replace('"storage": "raw"', '"storage": "zstd"'))
    with pytest.raises(ShardError, match="storage 'zstd' is none of"):
        ShardReader(tmp_path / "set")


def test_members_of_another_form_than_the_manifest_tells_are_bad_samples(tmp_path: Path) -> None:
    write_set(tmp_path / "set", "keep")
    path = tmp_path / "set" / MANIFEST
    path.write_text(path.read_text().replace('"storage": "keep"', '"storage": "tiles:32"'))
    with pytest.raises(BadSampleError, match="s-0.lq: not tiles"):
        ShardReader(tmp_path / "set").pair(0, (0, 0, 16, 16))


@pytest.mark.parametrize("form", ["webp", "tiles:32", "raw"])
def test_stock_webdataset_reads_the_pixels_with_one_handler(form: str, tmp_path: Path) -> None:
    made = write_set(tmp_path / "set", form)

    def handler(name: str, data: bytes) -> np.ndarray | None:
        return decode_rgb(data) if name.endswith((".webp", ".tiles", ".raw")) else None

    url = os.fspath(tmp_path / "set" / "000000.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False, empty_check=False).decode(handler))
    suffix = form.partition(":")[0]
    assert [sample["__key__"] for sample in samples] == ["s-0", "s-1", "s-2"]
    for sample, (lq, gt) in zip(samples, made, strict=True):
        assert np.array_equal(sample[f"lq.{suffix}"], lq) and np.array_equal(sample[f"gt.{suffix}"], gt)
