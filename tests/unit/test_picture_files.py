"""Every kind of picture file keeps what it is."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dist_train.picture_files import DEEP_SUFFIXES, SUFFIXES, Picture, read_picture, write_picture

pytestmark = pytest.mark.unit

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
ALPHA = RGB[..., 1].copy()
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["colour", "grey", "alpha", "grey alpha", "deep", "deep grey", "deep alpha"])
def test_what_is_written_is_read(tmp_path, kind, suffix) -> None:
    is_grey, deep, alpha = "grey" in kind, "deep" in kind, ALPHA if "alpha" in kind else None
    rgb = np.repeat(RGB[..., :1], 3, 2) if is_grey else RGB
    if deep:
        rgb, alpha = rgb.astype(np.uint16) * 255, None if alpha is None else alpha.astype(np.uint16) * 253
    picture = Picture(rgb, alpha, is_grey, None if is_grey else ICC)
    path = tmp_path / f"a{suffix}"
    if (alpha is not None and suffix in (".jpg", ".jpeg")) or (deep and suffix not in DEEP_SUFFIXES):
        with pytest.raises(ValueError, match="has no (alpha|16 bit); write one of"):
            write_picture(path, picture)
        assert not list(tmp_path.iterdir())
        return
    write_picture(path, picture)
    found = read_picture(path)
    assert found.rgb.dtype == rgb.dtype and (found.alpha is None) == (alpha is None)
    if suffix in (".jpg", ".jpeg"):
        assert np.abs(found.rgb.astype(int) - rgb).max() <= 20  # noise, at quality 95
    else:
        np.testing.assert_array_equal(found.rgb, rgb)
    if alpha is not None:
        np.testing.assert_array_equal(found.alpha, alpha)
    if suffix != ".bmp":
        assert found.icc == picture.icc == Image.open(path).info.get("icc_profile")
    Image.open(path).load()  # another program reads it, too
    if suffix not in (".webp", ".bmp") or alpha is None:
        assert found.is_grey == (is_grey and suffix != ".webp")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "alpha.png", "alpha.tif", "alpha.webp"])
def test_the_way_up(tmp_path, name) -> None:
    steps = {1: [], 2: ["h"], 3: ["h", "v"], 4: ["v"], 5: ["t"], 6: ["t", "h"], 7: ["t", "h", "v"], 8: ["t", "v"]}
    turn = {"h": lambda a: a[:, ::-1], "v": lambda a: a[::-1], "t": lambda a: a.swapaxes(0, 1)}
    smooth = np.zeros((20, 30, 3), np.uint8)
    smooth[:10, :15] = 200, 100, 50
    smooth[10:, 15:] = 100
    for orientation, names in steps.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = np.dstack([smooth, ALPHA]) if "alpha" in name else smooth
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        Image.fromarray(stored).save(tmp_path / name, exif=exif, **options)
        want, want_alpha = smooth, ALPHA
        for step in names:
            want, want_alpha = turn[step](want), turn[step](want_alpha)
        found = read_picture(tmp_path / name)
        assert found.rgb.shape == want.shape and np.abs(found.rgb.astype(int) - want).mean() < 5
        if "alpha" in name:
            np.testing.assert_array_equal(found.alpha, want_alpha)


def test_profiles_that_no_longer_fit_and_files_that_will_not_do(tmp_path) -> None:
    cmyk = tmp_path / "cmyk.jpg"
    Image.new("CMYK", (8, 8)).save(cmyk, icc_profile=ICC[:16] + b"CMYK" + ICC[20:])
    assert read_picture(cmyk).icc is None
    Image.new("CMYK", (8, 8)).save(tmp_path / "cmyk.tif")
    assert read_picture(tmp_path / "cmyk.tif").alpha is None

    def refusal(data: bytes) -> str:
        path = tmp_path / "bad"
        path.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            read_picture(path)
        return str(caught.value)

    def encoded(suffix: str, **options: object) -> bytes:
        file = io.BytesIO()
        Image.fromarray(RGB).save(file, suffix, **options)
        return file.getvalue()

    assert refusal(b"") == "the file is empty"
    assert "not a readable picture" in refusal(b"GIF, but not one")
    for suffix in ("png", "jpeg", "webp", "tiff", "bmp"):
        data = encoded(suffix)
        assert "not a readable picture" in refusal(data[: len(data) // 2]), suffix
    assert "holds 2 pictures" in refusal(encoded("tiff", save_all=True, append_images=[Image.fromarray(255 - RGB)]))
    floats = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(floats, "tiff")
    assert "samples are float32" in refusal(floats.getvalue())
    assert not Path(tmp_path / ".bad.tmp").exists()
