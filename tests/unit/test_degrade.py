"""Degradations: their formulas, and that what they make measures like the real sets; and whole folders of them."""

import inspect

import cv2
import numpy as np
import pytest

from shards.__main__ import main
from shards.codec import decode_rgb, encode_png
from shards.degrade import (
    DEGRADATIONS,
    blur,
    blur_camera,
    blur_frames,
    blur_local,
    noise_gaussian,
    noise_poisson,
    noise_raw,
    rain_heavy,
    rain_light,
    rain_photoshop,
    rainmix,
)
from shards.schema import load_manifest
from tests.helpers.shared import shared

pytestmark = pytest.mark.unit

OF_ONE_PICTURE = {name: one for name, one in DEGRADATIONS.items() if name != "blur_frames"}


def rng(seed):
    return np.random.Generator(np.random.Philox(seed))


def photograph(h=128, w=160, seed=0):
    """Noise at all scales, coloured: something to blur."""
    chance = rng(seed)
    total = np.zeros((h, w, 3), np.float32)
    for scale in (1, 4, 16):
        small = chance.random((-(-h // scale), -(-w // scale), 3), np.float32)
        total += scale * cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)
    return np.clip(255 * total / 21, 0, 255).astype(np.uint8)


def read(path):
    return decode_rgb(path.read_bytes())


def within(value, low, high):
    assert low <= value <= high, f"{value} is not within {low} ... {high}"


@pytest.mark.parametrize("name", OF_ONE_PICTURE)
def test_a_degradation_is_a_pure_function_of_picture_and_chance(name):
    for h, w in ((1, 1), (5, 90), (64, 48)):
        gt = photograph(h, w)
        before = gt.copy()
        lq, again, other = (
            made if isinstance(made, np.ndarray) else made[0]
            for made in (OF_ONE_PICTURE[name].make(gt, rng(seed)) for seed in (1, 1, 2))
        )
        assert lq.dtype == np.uint8 and lq.shape == gt.shape
        assert np.array_equal(gt, before) and np.array_equal(lq, again)
    assert not np.array_equal(lq, other) and not np.array_equal(lq, gt)


def test_options_have_defaults_in_their_own_ranges_and_bad_ones_are_named():
    for one in OF_ONE_PICTURE.values():
        for name, default in one.options.items():
            assert default[0] < default[1]
            with pytest.raises(ValueError, match=f"^{name}=9,3 is no range; write {name}=number"):
                one.make(photograph(16, 16), rng(0), **{name: (9, 3)})


# Rain


def layers(degrade, backgrounds):
    """What rain adds."""
    return [(degrade(gt, rng(seed)).astype(int) - gt)[..., 0] for seed, gt in enumerate(backgrounds)]


def statistics(some):
    """Part covered, mean where covered, 99th percentile; means over layers."""
    found = [((layer > 10).mean(), layer[layer > 10].mean(), np.percentile(layer, 99)) for layer in some]
    return np.mean(found, axis=0)


def test_heavy_rain_is_as_much_as_rain100h_has():
    ramp = np.linspace(0, 220, 160).astype(np.uint8)[None, :, None] + np.zeros((120, 1, 3), np.uint8)
    cover, level, bright = statistics(layers(rain_heavy, [ramp] * 25))
    within(cover, 0.74, 0.88)  # Rain100H: 0.83
    within(level, 56, 72)  # 67
    within(bright, 142, 172)  # 157


def test_light_rain_is_as_much_as_in_real_pairs():
    folder = shared("data", "rain100L_train")
    pairs = [
        (read(folder / "rain" / f"norain-{n}.png"), read(folder / "norain" / f"norain-{n}.png")) for n in range(1, 21)
    ]
    real = statistics([lq.astype(int)[..., 1] - gt[..., 1] for lq, gt in pairs])
    ours = statistics(layers(rain_light, [gt for _, gt in pairs]))
    within(ours[0] / real[0], 0.8, 1.25)
    within(ours[1] / real[1], 0.8, 1.2)
    decibels = np.mean([cv2.PSNR(lq, gt) for lq, gt in pairs])
    within(np.mean([cv2.PSNR(rain_light(gt, rng(n)), gt) for n, (_, gt) in enumerate(pairs)]) - decibels, -1.5, 2)


def test_photoshop_rain_has_fourteen_variants_seven_directions_by_two_magnitudes():
    dark = np.zeros((200, 200, 3), np.uint8)
    covers = []
    for variant in range(14):
        layer = rain_photoshop(dark, rng(variant), variant=variant)[..., 0].astype(np.float32)
        covers.append((layer > 10).mean())
        dx, dy = (cv2.Sobel(cv2.GaussianBlur(layer, (0, 0), 1), cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1)))
        across = np.rad2deg(np.arctan2(2 * (dx * dy).mean(), (dx * dx - dy * dy).mean()) / 2)
        assert abs(across - (45 - variant // 2 * 15)) < 4  # 0 is a vertical streak's
        within(layer.max(), 160, 205)  # an opacity of 0.7 to 0.8
    within(np.mean(covers[::2]), 0.07, 0.14)
    within(np.mean(covers[1::2]), 0.24, 0.36)
    same = rain_photoshop(dark, rng(3), variant=3)
    assert np.array_equal(same, rain_photoshop(dark, rng(3), variant=17))


@pytest.mark.parametrize("degrade", [rain_photoshop, rainmix])
def test_screened_rain_dims_with_what_it_falls_on(degrade):
    dark, middle, white = (degrade(np.full((90, 70, 3), level, np.uint8), rng(4)) for level in (0, 102, 255))
    assert (white == 255).all() and (dark == dark[..., :1]).all() and dark.max() > 20
    assert np.abs(middle - (102 + dark * (1 - 102 / 255))).max() <= 1


# Blur


def test_frames_are_averaged_as_grey_levels_or_as_light():
    frames = [np.full((4, 5, 3), level, np.uint8) for level in (0, 0, 240)]
    assert (blur_frames(frames, crf="linear") == 80).all()
    assert (blur_frames(frames) == round(240 * (1 / 3) ** (1 / 2.2))).all()
    assert (blur_frames(frames) == blur_frames(frames[::-1])).all()
    with pytest.raises(ValueError, match="frames of one size are wanted, these are 5x4, 6x4"):
        blur_frames([*frames, np.zeros((4, 6, 3), np.uint8)])
    with pytest.raises(ValueError, match="crf=raw is none of gamma, linear"):
        blur_frames(frames, crf="raw")


@pytest.mark.parametrize("path_px", [0, 4, 25])
def test_a_shake_is_as_long_as_asked_and_gt_is_seen_in_its_middle(path_px):
    poses = blur._shake((90, 120), rng(path_px), path_px)
    assert len(poses) % 2 and np.allclose(poses[len(poses) // 2], np.eye(3))
    middle = np.array([np.array([59.5, 44.5, 1]) @ pose.T for pose in poses])
    steps = np.linalg.norm(np.diff(middle[:, :2] / middle[:, 2:], axis=0), axis=1)
    assert steps.sum() == pytest.approx(path_px, rel=0.06) and (steps < 2).all()
    if path_px == 25:  # not all alike: it turns
        corner = np.array([np.array([0, 0, 1]) @ pose.T for pose in poses])
        assert np.abs(np.ptp(corner[:, :2] / corner[:, 2:], axis=0) - np.ptp(middle[:, :2], axis=0)).max() > 1


def test_camera_blur_averages_light():
    gt = np.zeros((80, 80, 3), np.uint8)
    gt[36:44, 36:44] = 255
    lq = blur_camera(gt, rng(0), path_px=20)
    assert ((lq / 255.0) ** 2.2).sum() == pytest.approx(192, rel=0.05) and lq.max() < 250
    assert (blur_camera(np.full_like(gt, 77), rng(0)) == 77).all()


def test_camera_blur_is_as_strong_as_gopro():
    folder = shared("data", "blur_gopro")
    lq, gt = (read(folder / f"Istanbul_{name}1.png")[200:560, 300:940] for name in ("blur", "sharp"))

    def figures(blurred):
        detail = [
            np.abs(np.diff(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY).astype(int), axis=1)).mean() for x in (blurred, gt)
        ]
        return cv2.PSNR(blurred, gt), detail[0] / detail[1]

    ours = np.mean([figures(blur_camera(gt, rng(seed))) for seed in range(12)], axis=0)
    real = figures(lq)
    assert abs(ours[0] - real[0]) < 2.5 and abs(ours[1] - real[1]) < 0.12


def test_local_blur_leaves_all_else_as_it_was_and_tells_where_it_is():
    parts = []
    for seed in range(12):
        gt = photograph(seed=seed)
        lq, mask = blur_local(gt, rng(seed), path_px=16)
        assert mask.dtype == bool and np.array_equal(lq[~mask], gt[~mask])
        sharpness = [np.abs(cv2.Laplacian(x, cv2.CV_32F))[mask].mean() for x in (lq, gt)]
        assert sharpness[0] < 0.7 * sharpness[1]
        parts.append(mask.mean())
    within(np.mean(parts), 0.12, 0.3) and within(min(parts), 0.03, 0.2)
    region = np.zeros((128, 160), bool)
    region[40:80, 50:100] = True
    _, mask = blur_local(gt, rng(0), path_px=6, region=region)
    assert mask[42:78, 52:98].all() and not mask[:25].any() and not mask[:, :35].any()


# Noise


def test_gaussian_noise_is_white_and_of_the_sigma_asked_for():
    gt = np.full((256, 256, 3), 128, np.uint8)
    noise = noise_gaussian(gt, rng(0), sigma=25) - 128.0
    assert noise.std() == pytest.approx(25, rel=0.01) and abs(noise.mean()) < 0.3
    assert abs((noise[1:] * noise[:-1]).mean()) < 6 and abs((noise[..., 0] * noise[..., 1]).mean()) < 6
    drawn = [(noise_gaussian(gt, rng(seed)) - 128.0).std() for seed in range(40)]
    assert 4.9 < min(drawn) < 12 and 43 < max(drawn) < 50.5


def test_poisson_noise_grows_with_the_square_root_of_brightness():
    for level in (20, 80, 160):
        noise = noise_poisson(np.full((256, 256, 3), level, np.uint8), rng(level), photons=400) - float(level)
        assert noise.std() == pytest.approx(np.sqrt(255 * level / 400), rel=0.02) and abs(noise.mean()) < 0.2


def by_brightness(pairs):
    """Mean over pairs of the noise's standard deviation, in even parts, for each 25 grey levels."""
    found = np.full((len(pairs), 10), np.nan)
    for number, (lq, gt) in enumerate(pairs):
        grey = gt.mean(axis=2)
        rough = cv2.GaussianBlur(np.abs(cv2.Laplacian(grey, cv2.CV_64F)), (0, 0), 2)
        for level in range(10):
            part = (rough <= np.percentile(rough, 60)) & (grey // 25 == level)
            if part.sum() > 400:
                found[number, level] = (lq[part] - gt[part].astype(float)).std()
    return np.nanmean(found, axis=0)


def test_raw_noise_is_as_strong_at_each_brightness_as_in_real_pairs():
    folder = shared("data", "noise_polyu")
    names = sorted(folder.glob("*_real.JPG"))[::6]
    files = [(name, name.with_name(name.name.replace("_real", "_mean"))) for name in names]
    pairs = [(read(real)[128:384, 128:384], read(mean)[128:384, 128:384]) for real, mean in files]
    ours = [(noise_raw(gt, rng(seed)), gt) for seed, (_, gt) in enumerate(pairs)]
    ratios = by_brightness(ours) / by_brightness(pairs)
    within(ratios.min(), 0.7, 1.2)
    within(ratios.max(), 0.9, 1.6)
    within(ratios.mean(), 0.85, 1.25)
    assert abs(np.mean([cv2.PSNR(*pair) for pair in ours]) - np.mean([cv2.PSNR(*pair) for pair in pairs])) < 3


def test_raw_noise_is_strongest_in_the_lower_middle_and_smeared_over_pixels_and_colours():
    gt = np.repeat(np.array([12, 87, 137, 212, 240], np.uint8), 64)[None, :, None] + np.zeros((64, 1, 3), np.uint8)
    noise = np.stack([noise_raw(gt, rng(seed)) - gt.astype(float) for seed in range(30)])
    stds = noise.reshape(30, 64, 5, 64, 3).std(axis=(1, 3, 4)).mean(axis=0)
    for std, low, high in zip(stds, (2.5, 3.0, 2.9, 2.0, 1.3), (3.9, 4.6, 4.5, 3.2, 2.3), strict=True):
        within(std, low, high)  # PolyU: 2.7, 3.8, 3.4, 2.2, 1.7
    green = noise[:, :, 64:128, 1]
    within((green[:, 1:] * green[:, :-1]).mean() / green.var(), 0.55, 0.78)  # PolyU: 0.66
    within(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1], 0.55, 0.85)  # 0.68
    assert abs(noise.mean()) < 0.2


# Folders


def write_pictures(folder, num, *, h=300, w=280):
    folder.mkdir(parents=True)
    for number in range(num):
        (folder / f"{number:04d}.png").write_bytes(encode_png(photograph(h, w, seed=number)))


def members(folder):
    """Bytes of all files of a data set, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def samples(folder):
    import webdataset

    return list(webdataset.WebDataset(str(folder / "000000.tar"), shardshuffle=False))


def test_any_number_of_processes_writes_the_same_bytes_and_nothing_else(tmp_path):
    write_pictures(tmp_path / "src", 3, h=60, w=50)
    for jobs in ("1", "2"):
        command = ["synth", "blur_local", "--src", str(tmp_path / "src"), "--out", str(tmp_path / jobs), "--jobs", jobs]
        assert main([*command, "--variants", "1", "--set", "path_px=6,9"]) == 0
    assert members(tmp_path / "1") == members(tmp_path / "2")
    assert load_manifest(tmp_path / "1" / "train").arguments["settings"] == {"path_px": "6,9"}
    assert {path.name for path in (tmp_path / "1").iterdir()} == {"train", "val"}
    for sample in samples(tmp_path / "1" / "train"):
        lq, gt = decode_rgb(sample["lq.png"]), decode_rgb(sample["gt.png"])
        mask = cv2.imdecode(np.frombuffer(sample["masks.png"], np.uint8), cv2.IMREAD_GRAYSCALE) > 0
        assert mask.shape == gt.shape[:2] and mask.any() and np.array_equal(lq[~mask], gt[~mask])


def test_a_tile_sees_what_moves_into_it(tmp_path, monkeypatch):
    seen = []

    def still(gt, rng):
        """Leave it."""
        seen.append(gt.shape)
        return gt

    monkeypatch.setitem(DEGRADATIONS, "blur_camera", DEGRADATIONS["blur_camera"]._replace(make=still))
    write_pictures(tmp_path / "src", 2, h=400, w=260)
    assert (
        main(["synth", "blur_camera", "--src", str(tmp_path / "src"), "--out", str(tmp_path / "out"), "--jobs", "1"])
        == 0
    )
    assert {(288, 260, 3)} == set(seen[:-2])  # 256 of 400, and 32 more on one side; 260 wide leaves 4 more
    for sample in samples(tmp_path / "out" / "train"):
        assert np.array_equal(decode_rgb(sample["lq.png"]), decode_rgb(sample["gt.png"]))


def test_photoshop_rain_makes_all_fourteen_and_same_names_in_two_folders_are_two(tmp_path):
    write_pictures(tmp_path / "src" / "a", 1, h=64, w=64)
    write_pictures(tmp_path / "src" / "b", 1, h=64, w=64)
    assert main(["synth", "rain_photoshop", "--src", str(tmp_path / "src"), "--out", str(tmp_path / "out")]) == 0
    assert sorted(sample["__key__"] for sample in samples(tmp_path / "out" / "train")) == sorted(
        f"a/0000-0-00-{variant}" for variant in range(14)
    )
    assert {sample["__key__"] for sample in samples(tmp_path / "out" / "val")} >= {"b/0000-0", "b/0000-13"}


def test_frames_are_cut_into_odd_windows_within_their_sequence(tmp_path):
    for sequence, num in (("one", 31), ("three", 9), ("two", 9)):
        write_pictures(tmp_path / "src" / sequence, num, h=20, w=30)
    (tmp_path / "src" / "one" / "0014.png").unlink()  # no window reaches over a gap
    command = ["synth", "blur_frames", "--src", str(tmp_path / "src"), "--out", str(tmp_path / "out")]
    assert main([*command, "--set", "window=3,5", "--set", "crf=linear", "--jobs", "1"]) == 0
    assert load_manifest(tmp_path / "out" / "val").arguments["sequences"] == ["two"]
    train = samples(tmp_path / "out" / "train")
    assert {sample["__key__"].split("/")[0] for sample in train} == {"one", "three"}
    lengths = set()
    for sample in train:
        sequence, number = sample["__key__"].split("/")
        frames = {
            n: read(tmp_path / "src" / sequence / f"{n:04d}.png")
            for n in range(31)
            if n != 14 and (sequence == "one" or n < 9)
        }
        assert np.array_equal(decode_rgb(sample["gt.png"]), frames[int(number)])
        fits = [
            reach
            for reach in (1, 2)
            if all(n in frames for n in range(int(number) - reach, int(number) + reach + 1))
            and np.array_equal(
                decode_rgb(sample["lq.png"]),
                blur_frames([frames[n] for n in range(int(number) - reach, int(number) + reach + 1)], crf="linear"),
            )
        ]
        assert len(fits) == 1
        lengths.update(fits)
    assert lengths == {1, 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rain_light", "--set", "sigma=3"], "--set sigma=3: rain_light takes amplitude"),
        (["rainmix", "--set", "sigma=3"], "--set sigma=3: rainmix takes no settings"),
        (["noise_raw", "--set", "shot=many"], "--set shot=many: a number is wanted, or two such as low,high"),
        (["noise_raw", "--set", "shot"], "--set shot: write it like --set sigma=15,50"),
        (["noise_gaussian", "--set", "sigma=9,3"], "sigma=9,3 is no range; write sigma=number"),
        (["blur_frames", "--set", "window=4"], "--set window=4,4: windows have an odd number of frames, 3 at least"),
        (["blur_frames", "--variants", "2"], "--variants 2: there is but one mean of the same frames"),
        (["blur_frames"], "holds 1 folders of 7 or more numbered frames; two are the least"),
    ],
)
def test_wrong_settings_are_named(tmp_path, capsys, arguments, message):
    write_pictures(tmp_path / "src" / "a", 9, h=16, w=16)
    assert (
        main(["synth", *arguments, "--src", str(tmp_path / "src"), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 2
    )
    assert message in capsys.readouterr().err


def test_every_degradation_says_in_its_first_line_what_it_does():
    for name, one in DEGRADATIONS.items():
        assert one.make.__name__ == name and (inspect.getdoc(one.make) or "").splitlines()[0].endswith((".", ")"))
