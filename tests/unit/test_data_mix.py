"""MixUp and RainMix: their formulas, their chance, and what is refused."""

import itertools
from collections import Counter

import cv2
import numpy as np
import pytest

from dist_train.config import DataConfig, changed_method, parse_run
from dist_train.data.mix import mixup, mixup_weight, rainmix, streak_pictures
from dist_train.data.order import MIXUP, RAINMIX, Chance
from shards.codec import encode_png
from shards.degrade import augmix, mixing, screen

pytestmark = pytest.mark.unit


def chance(position, stream=RAINMIX):
    return Chance(0, position, stream)


def pictures(crop_px=24):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (3, crop_px, crop_px), dtype=np.uint8) for _ in range(2)]


def test_mixup_is_a_weighted_mean_and_is_not_rounded():
    mixed = mixup(np.full((3, 1, 1), 10, np.uint8), np.full((3, 1, 1), 255, np.uint8), 0.75)
    assert mixed.dtype == np.float32 and mixed.tolist() == [[[71.25]]] * 3


@pytest.mark.parametrize("alpha", [0.4, 1.2])
def test_mixup_weights_are_beta(alpha):
    weights = np.array([mixup_weight(chance(position, MIXUP), alpha) for position in range(5000)])
    assert abs(weights.mean() - 0.5) < 0.015
    assert abs(weights.var() * 4 * (2 * alpha + 1) - 1) < 0.05
    assert weights.min() >= 0 and weights.max() <= 1


def test_screen_is_i_plus_r_minus_ir_clipped():
    picture, layer = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1), np.array([[0, 0.5, 2]], np.float32)
    result = screen(picture, layer)
    assert result.dtype == np.float32
    assert np.allclose(result[:, 0], [[0, 127.5, 255], [51, 153, 255], [255, 255, 255]])


def test_a_black_layer_leaves_the_rainy_picture_or_four_times_in_eleven_the_clean_one(monkeypatch):
    monkeypatch.setattr(mixing, "light_streaks", lambda shape, rng: np.zeros(shape, np.float32))
    lq, gt = pictures(8)
    found = [rainmix(lq, gt, chance(position), clean=4 / 11) for position in range(2000)]
    clean = sum(np.array_equal(rainy, gt) for rainy in found)
    assert clean + sum(np.array_equal(rainy, lq) for rainy in found) == 2000
    assert abs(clean / 2000 - 4 / 11) < 0.04


def test_drawn_rain_is_grey_only_brightens_and_depends_on_the_position_alone():
    lq, gt = pictures()
    before, black = lq.copy(), np.zeros_like(lq)
    found = [rainmix(lq, gt, chance(position), clean=0) for position in range(12)]
    for position, rainy in enumerate(found):
        assert rainy.dtype == np.float32 and (rainy >= lq).all() and rainy.max() <= 255
        assert np.array_equal(rainy, rainmix(lq, gt, chance(position), clean=0))
        layer = rainmix(black, gt, chance(position), clean=0)[0] / 255
        assert 0.01 < (layer > 0.04).mean() < 0.8
        assert np.allclose(rainy, lq + layer * (255.0 - lq), atol=1e-3)  # one layer for all three colours
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(found, 2))
    assert np.array_equal(lq, before)


def test_a_mixture_is_the_layer_and_its_copy_moved_by_one_operation_after_the_other(monkeypatch):
    """Every chain: three pixels to the right, then a quarter turn; as numpy does it, in that order."""
    layer = np.random.default_rng(0).random((9, 9), np.float32)
    turn = cv2.getRotationMatrix2D((4, 4), -90, 1)  # of where a pixel comes from: the other way round
    operations = itertools.cycle([np.array([[1, 0, -3], [0, 1, 0], [0, 0, 1.0]]), np.vstack([turn, [0, 0, 1]])])
    monkeypatch.setattr(mixing, "_operation", lambda chance, h, w: next(operations))
    monkeypatch.setattr(mixing, "_DEPTHS", (2,))
    moved = np.rot90(np.pad(layer, ((0, 0), (3, 0)))[:, :9])
    factors = []
    for position in range(400):
        mixed = augmix(layer, chance(position), size_px=(9, 9))
        solution, residual, *_ = np.linalg.lstsq(np.stack([layer.ravel(), moved.ravel()], 1), mixed.ravel())
        assert residual[0] < 1e-6 and mixed.dtype == np.float32
        factors.append(solution)
    own, copies = np.array(factors).T
    assert np.isclose(own, 0.7, atol=1e-4).mean() == pytest.approx(0.7, abs=0.08) and own.max() <= 1.0001
    assert 0.4999 < copies.min() < 0.55 and 1 < copies.max() < 1.5001


def test_the_seven_operations_are_drawn_alike_and_keep_to_severity_three():
    source, kinds = chance(0), Counter()
    for _ in range(3500):
        back = mixing._operation(source, 60, 90)
        scale, shift, shear = back[[0, 1], [0, 1]], back[:2, 2], back[[0, 1], [1, 0]]
        if shear.all():
            kinds["rotate"] += 1
            assert np.allclose(back[:2, :2] @ back[:2, :2].T, np.eye(2)) and abs(shear[0]) <= np.sin(np.deg2rad(9.001))
            assert np.allclose(back @ [44.5, 29.5, 1], [44.5, 29.5, 1])
        elif shear.any():
            kinds["shear_x" if shear[0] else "shear_y"] += 1
            assert np.abs(shear).max() <= 0.09 and not shift.any()
        elif (scale != 1).any():
            axis = int(scale[1] != 1)
            kinds["zoom_y" if axis else "zoom_x"] += 1
            assert 0.06 <= 1 / scale[axis] <= 1.8 and scale[1 - axis] == 1 and not shift[1 - axis]
            edge = (90, 60)[axis]
            assert not shift[axis] or np.isclose(edge * scale[axis] + shift[axis], edge)
        else:
            axis = int(shift[1] != 0)
            kinds["translate_y" if axis else "translate_x"] += 1
            assert 0 < abs(shift[axis]) <= (9, 6)[axis] and not shift[1 - axis]
    assert set(kinds) == set(mixing._OPERATIONS) and min(kinds.values()) > 400


def test_streaks_of_a_folder_fall_where_they_lie_in_their_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(mixing, "_operation", lambda chance, h, w: np.eye(3))
    streak = np.zeros((40, 40, 3), np.uint8)
    streak[:, 20] = 100
    for name in ("b.png", "a.png"):
        (tmp_path / name).write_bytes(encode_png(streak))
    paths = streak_pictures(tmp_path, least_px=40)
    assert [path.name for path in paths] == ["a.png", "b.png"]
    black = np.zeros((3, 30, 30), np.uint8)
    columns = set()
    for position in range(40):
        rainy = rainmix(black, black, chance(position), clean=0, streaks=paths)
        lit = np.unique(np.nonzero(rainy)[2])
        assert len(lit) == 1 and (rainy[:, :, lit] == rainy.max()).all() and 100 < rainy.max() <= 250
        columns.add(int(lit[0]))
    assert columns == set(range(10, 21))


def test_a_bad_folder_of_streaks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data.rainmix.streaks=.*nowhere is no folder"):
        streak_pictures(tmp_path / "nowhere", least_px=8)
    with pytest.raises(ValueError, match=r"data.rainmix.streaks=.* holds no pictures"):
        streak_pictures(tmp_path, least_px=8)
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((7, 9, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"a.png is 9x7, smaller than crops of 8 px"):
        streak_pictures(tmp_path, least_px=8)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"data.rainmix.streaks: .*a.png: not a readable picture"):
        streak_pictures(tmp_path, least_px=8)


def test_crops_only_grow():
    data = DataConfig(
        train="x", crop_px=16, progressive=[{"from_step": 2, "crop_px": 20}, {"from_step": 5, "crop_px": 24}]
    )
    assert [data.crop_px_at(step) for step in range(7)] == [16, 16, 20, 20, 20, 24, 24]
    for changes, message in (
        ([(2, 16)], "progressive goes crop_px 16 -> 16;"),
        ([(2, 20), (3, 18)], "progressive goes crop_px 16 -> 20 -> 18;"),
        ([(3, 20), (3, 24)], "progressive goes from_step 0 -> 3 -> 3;"),
        ([(0, 20)], "greater than or equal to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(
                train="x", crop_px=16, progressive=[{"from_step": step, "crop_px": side} for step, side in changes]
            )


@pytest.mark.parametrize(
    ("values", "change"),
    [
        ({"progressive": [{"from_step": 3, "crop_px": 200}]}, "data.progressive=[] is now [{'from_step': 3"),
        ({"mixup": {}}, "data.mixup.alpha=None is now 1.2"),
        ({"rainmix": {"streaks": "garg"}}, "data.rainmix.streaks=None is now garg"),
    ],
)
def test_a_run_keeps_its_augmentations(values, change):
    before, now = (parse_run({"name": "trial", "data": {"train": "x", **data}}, source="test") for data in ({}, values))
    assert any(line.startswith(change) for line in changed_method(before, now))
    assert not changed_method(now, now)
