"""Pairs that are none, sequences that are shifted, and clean pictures that are in two data sets."""

import cv2
import numpy as np
import pytest

from shards.__main__ import main
from shards.codec import decode_rgb, encode_png
from shards.leaks import Leak, find_leaks
from shards.pairing import Measures, measure, problems, runs, shifts
from tests.helpers.pairs import write_pairs
from tests.helpers.shared import shared

pytestmark = pytest.mark.unit


def _scene(seed, *, h=96, w=128):
    """A picture with large and small things in it, unlike that of any other seed."""
    rng = np.random.default_rng(seed)
    large = cv2.resize(rng.integers(30, 200, (5, 7, 3), np.uint8), (w, h), interpolation=cv2.INTER_CUBIC)
    return cv2.add(large, rng.integers(0, 40, (h, w, 3), np.uint8))


def _rain(gt):
    streaks = np.random.default_rng(1).random(gt.shape[:2]) < 0.03
    return cv2.add(gt, np.repeat(streaks[..., None] * np.uint8(90), 3, axis=2))


def _noise(gt):
    return np.clip(gt + np.random.default_rng(1).normal(0, 20, gt.shape), 0, 255).astype(np.uint8)


DEGRADE = {"rain": _rain, "blur": lambda gt: cv2.blur(gt, (9, 1)), "noise": _noise}


def _measured(kind, num):
    return {str(seed): measure(DEGRADE[kind](_scene(seed)), _scene(seed)) for seed in range(num)}


def test_what_is_measured():
    gt = np.zeros((64, 64, 3), np.uint8)
    gt[:, 32:] = (30, 60, 90)
    pair = measure(cv2.add(gt, (10, 10, 10, 0)), gt)
    assert pair.psnr_db == pytest.approx(20 * np.log10(255 / 10))
    assert (pair.lq_mean, pair.gt_mean) == (40, 30)
    assert pair.gt_detail == pytest.approx(
        2 * 54**2 / 64, rel=0.1
    )  # two columns of 64 meet the edge, a step of 54 grey
    assert pair.likeness == pytest.approx(1)
    assert not pair.identical
    assert measure(gt, gt) == Measures(100, True, 30, 30, pair.gt_detail, pair.gt_detail, pytest.approx(1))


@pytest.mark.parametrize("kind", DEGRADE)
def test_true_pairs_give_no_alarm_and_swapped_folders_do(kind):
    measured = _measured(kind, 12)
    assert problems(measured, kind) == []
    swapped = {key: measure(_scene(int(key)), DEGRADE[kind](_scene(int(key)))) for key in measured}
    (problem,) = problems(swapped, kind)
    assert problem.certain
    assert "are swapped: exchange lq and gt" in str(problem)
    assert problems(swapped, "any") == []
    (problem,) = problems({key: swapped[key] for key in list(swapped)[:3]}, kind)
    assert not problem.certain  # of so few


def test_some_swapped_pairs_are_a_suspicion():
    measured = _measured("blur", 10)
    measured["0"] = measure(_scene(0), DEGRADE["blur"](_scene(0)))
    (problem,) = problems(measured, "blur")
    assert not problem.certain
    assert "gt has more fine detail than lq in 9" in str(problem)


def test_one_pair_of_identical_pictures_is_certain():
    measured = {**_measured("rain", 10), "x": measure(_scene(3), _scene(3))}
    (problem,) = problems(measured, "rain")
    assert problem.certain
    assert problem.keys == ("x",)
    assert "1 of 11 pairs: lq and gt are the same picture" in str(problem)


def test_strangers_are_named_and_certain_if_they_are_most():
    measured = {**_measured("noise", 10), "x": measure(DEGRADE["noise"](_scene(3)), _scene(4))}
    (problem,) = problems(measured, "noise")
    assert (problem.certain, problem.keys) == (False, ("x",))
    assert "different scenes" in str(problem)
    moved = {str(seed): measure(DEGRADE["noise"](_scene(seed)), _scene(seed + 1)) for seed in range(10)}
    assert problems(moved, "noise")[0].certain
    assert not problems(moved, "any")[0].certain


def test_a_psnr_far_from_the_others_is_named():
    measured = _measured("noise", 12)
    lq = np.clip(_scene(3) + np.random.default_rng(1).normal(0, 60, _scene(3).shape), 0, 255).astype(np.uint8)
    (problem,) = problems({**measured, "x": measure(lq, _scene(3))}, "noise")
    assert (problem.certain, problem.keys) == (False, ("x",))
    assert "PSNR is outside" in str(problem)
    assert problems({"x": measured["0"]._replace(psnr_db=62.0)}, "noise")[0].keys == ("x",)  # the band of the kind


@pytest.mark.parametrize(
    ("kind", "lq", "gt"),
    [
        ("rain", "data/rain100L_train/rain/norain-{}.png", "data/rain100L_train/norain/norain-{}.png"),
        ("rain", "data/rain100H/{}_rain.png", "data/rain100H/{}_gt.png"),
        ("noise", "data/noise_polyu/{}_real.JPG", "data/noise_polyu/{}_mean.JPG"),
        ("blur", "data/blur_gopro/{}_blur1.png", "data/blur_gopro/{}_sharp1.png"),
    ],
)
def test_real_sets_give_no_alarm_and_swapped_they_do(kind, lq, gt):
    folder, _, pattern = lq.rpartition("/")
    before, _, after = pattern.partition("{}")
    names = [path.name[len(before) : -len(after)] for path in sorted(shared(folder).glob(pattern.replace("{}", "*")))]
    assert names
    pairs = [[decode_rgb(shared(side.format(name)).read_bytes()) for side in (lq, gt)] for name in names[:40]]
    assert problems({name: measure(*pair) for name, pair in zip(names, pairs, strict=False)}, kind) == []
    (problem,) = problems({name: measure(*pair[::-1]) for name, pair in zip(names, pairs, strict=False)}, kind)
    assert "swapped" in str(problem)
    assert problem.certain == (len(pairs) >= 8)


def test_runs_are_frames_that_follow_each_other():
    keys = ["b/0009", "a/0001", "a/0002", "b/0010", "a/0004", "c", "a/0003x"]
    assert runs(keys) == [["a/0001", "a/0002"], ["b/0009", "b/0010"]]


@pytest.mark.parametrize(("shift", "told"), [(0, None), (1, "one frame later"), (-1, "one frame earlier")])
def test_sequences_shifted_by_a_frame_are_told(shift, told):
    def read(key):
        scene, frame = _scene(int(key[4]), w=400), int(key[-2:])
        film = [scene[:, 2 * x : 2 * x + 128] for x in range(130)]  # the camera pans; seven of its frames make one
        moment = 10 * (frame + 1)
        sharp = film[moment + 10 * -shift]
        return np.mean(film[moment - 3 : moment + 4], axis=0).astype(np.uint8), sharp

    keys = [f"film{film}-{frame:02}" for film in range(3) for frame in range(1, 11)]
    found = shifts(keys, read)
    assert [told in str(problem) and problem.certain for problem in found] == ([True] if told else [])
    assert shifts(["a1", "a2", "b1"], read) == []  # no three frames in a row


def _data_set(root, clean):
    """Shards of these clean pictures, by key, with a little noise each as lq."""
    for side in ("lq", "gt"):
        (root / "src" / side).mkdir(parents=True)
    for number, (key, gt) in enumerate(clean.items()):
        noise = np.random.default_rng(number).integers(0, 9, gt.shape, np.uint8)
        (root / "src" / "lq" / f"{key}.png").write_bytes(encode_png(cv2.add(gt, noise)))
        (root / "src" / "gt" / f"{key}.png").write_bytes(encode_png(gt))
    write_pairs(root / "src", root / "shards")
    return root / "shards"


def _jpeg(rgb):
    return cv2.imdecode(cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)


def test_leaks_are_copies_however_they_were_stored(tmp_path, capsys):
    scenes = [cv2.resize(_scene(seed), (256, 192), interpolation=cv2.INTER_CUBIC) for seed in range(8)]
    train = _data_set(tmp_path / "train", {f"t{seed}": scene for seed, scene in enumerate(scenes[:6])})
    copies = {"same": scenes[1], "jpeg": _jpeg(scenes[2]), "small": cv2.resize(scenes[3], (128, 96)), "new": scenes[6]}
    cut = {"cut": scenes[4][2:, 3:], "flat": np.full((192, 256, 3), 128, np.uint8), "same-again": scenes[1]}
    test = _data_set(tmp_path / "test", copies | cut)
    assert find_leaks(train, test) == [
        Leak("t1", "same", True),
        Leak("t1", "same-again", True),
        Leak("t2", "jpeg", False),
        Leak("t3", "small", False),
        Leak("t4", "cut", False),
    ]
    assert find_leaks(train) == []
    assert find_leaks(test) == [Leak("same", "same-again", True)]

    assert main(["leaks", str(train), str(test)]) == 1
    told = capsys.readouterr().out
    assert "t1  same-again  the same pixels" in told
    assert "t2  jpeg  a copy" in told
    assert main(["leaks", str(train)]) == 0
