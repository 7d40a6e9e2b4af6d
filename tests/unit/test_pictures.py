"""Overlays, panels and PNG files."""

import cv2
import numpy as np
import pytest

from dist_train import pictures

pytestmark = pytest.mark.unit


def test_overlay_tints_masks_alone_and_draws_their_borders():
    grey = np.full((8, 9, 3), 100, np.uint8)
    idmap = np.zeros((8, 9), np.int64)
    idmap[:, 3:6], idmap[:, 6:] = 1, 2
    out = pictures.overlay(grey, idmap)
    assert (out[:, :2] == 100).all()  # no mask: as it was
    assert (out[:, [2, 5]] == 255).all()  # one pixel of white where masks meet
    one, two = out[0, 4].tolist(), out[0, 8].tolist()
    assert one != two and [100, 100, 100] not in (one, two)
    np.testing.assert_array_equal(out[:, 3:5], np.broadcast_to(one, (8, 2, 3)))
    # A mask keeps its colour, whatever other masks there are.
    assert pictures.overlay(grey, np.full((8, 9), 2))[0, 0].tolist() == two
    np.testing.assert_array_equal(pictures.overlay(grey, idmap, alpha=0.0)[:, 3:5], grey[:, 3:5])


def test_colours_of_many_masks_differ():
    palette = np.array([pictures._colour(n) for n in range(1, 65)])
    distances = np.abs(palette[:, None] - palette[None]).sum(2) + 1e9 * np.eye(64)
    assert distances.min() > 10


def test_panel_and_grid_keep_pixels_and_put_titles_beside_them():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (40, 200, 3), dtype=np.uint8) for _ in range(2))
    panel = pictures.panel([("degraded 20.31 dB", a), ("clean", b)])
    top = pictures.GAP_PX + pictures.STRIP_PX
    for picture, left in ((a, pictures.GAP_PX), (b, 200 + 2 * pictures.GAP_PX)):
        np.testing.assert_array_equal(panel[top : top + 40, left : left + 200], picture)
        assert panel[pictures.GAP_PX : top, left : left + 200].min() < 120  # ink on the strip
    narrow = pictures.panel([("a long title that would not fit 20.31 dB", a[:, :30])])
    assert narrow.shape[1] == 30 * 7 + 2 * pictures.GAP_PX  # enlarged by the whole factor that reaches 192 px
    assert (narrow[:, -pictures.GAP_PX :] == 255).all()
    both = pictures.grid([panel, narrow])
    np.testing.assert_array_equal(both[: len(panel)], panel)
    assert both.shape == (len(panel) + len(narrow), panel.shape[1], 3)


def test_png_is_rgb_and_whole(tmp_path):
    path = tmp_path / "new" / "a.png"
    picture = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    pictures.write_png(path, picture)
    np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], picture)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
