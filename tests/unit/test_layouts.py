"""Each data set on a miniature of the form in which it is distributed, with the traps of each."""

import inspect
from pathlib import Path

import pytest

from shards.layouts import LAYOUTS, Pair
from shards.schema import key_problem
from tests.helpers.shared import shared

pytestmark = pytest.mark.unit

REALBLUR = "RealBlur-J_ECC_IMCORR_centroid_itensity_ref"


def grow(root: Path, tree: str) -> Path:
    """Make empty files; `{a,b}` stands for each, once in a path for each level that wants it."""
    for path in tree.split():
        for name in expand(path):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    return root


def expand(path: str) -> list[str]:
    if "{" not in path:
        return [path]
    head, rest = path.split("{", 1)
    choices, tail = rest.split("}", 1)
    return [name for choice in choices.split(",") for name in expand(head + choice + tail)]


def found(layout: str, src: Path, split: str | None = None, **options: str) -> list[Pair]:
    """As the command finds pairs."""
    made = LAYOUTS[layout]
    pairs = made.find(src, split=split, **made.settle(src, split=split, **options))
    assert [pair.key for pair in pairs if key_problem(pair.key)] == []
    return pairs


def told(layout: str, src: Path, split: str | None = None, **options: str) -> list[str]:
    """The pairs as `KEY: LQ -> GT`, paths from `src` on."""

    def short(path: Path | None) -> str:
        return str(path.relative_to(src)) if path else "nothing"

    return [f"{pair.key}: {short(pair.lq)} -> {short(pair.gt)}" for pair in found(layout, src, split, **options)]


# layout, split, options, what lies on the disk, what is found
CASES = {
    "Rain200L": (
        "rain200L test",
        "rain_data_{train,test}_Light/rain/norain-{2,10}x2.png rain_data_test_Light/norain/norain-{2,10}.png",
        "norain-2: rain_data_test_Light/rain/norain-2x2.png -> rain_data_test_Light/norain/norain-2.png",
        "norain-10: rain_data_test_Light/rain/norain-10x2.png -> rain_data_test_Light/norain/norain-10.png",
    ),
    "Rain200H with X2": (
        "rain200H train",
        "rain_data_train_Heavy/rain/X2/norain-7x2.png rain_data_train_Heavy/norain/norain-7.png",
        "norain-7: rain_data_train_Heavy/rain/X2/norain-7x2.png -> rain_data_train_Heavy/norain/norain-7.png",
    ),
    "Rain200H renamed": (
        "rain200H train",
        "train/{rain,norain}/norain-7.png",
        "norain-7: train/rain/norain-7.png -> train/norain/norain-7.png",
    ),
    "Rain200H that is Rain100H": (
        "rain200H test",
        "rain/rain-007.png norain/norain-007.png",
        "norain-007: rain/rain-007.png -> norain/norain-007.png",
    ),
    "Rain100H with --gt-dir": (
        "rain100H test gt_dir=clean",
        "rain/rain-007.png clean/norain-{007,008}.png",
        "norain-007: rain/rain-007.png -> clean/norain-007.png",
        "norain-008: nothing -> clean/norain-008.png",
    ),
    "DID train": (
        "did train",
        "DID-MDN-training/Rain_{Heavy,Medium,Light}/train2018new/1.jpg",
        *(
            f"Rain_{name}/1: {path} -> {path}"
            for name in ("Heavy", "Light", "Medium")
            for path in [f"DID-MDN-training/Rain_{name}/train2018new/1.jpg"]
        ),
    ),
    "DID test": (
        "did test",
        "TestA/9.jpg TestA/10.jpg",
        "9: TestA/9.jpg -> TestA/9.jpg",
        "10: TestA/10.jpg -> TestA/10.jpg",
    ),
    "DDN": (
        "ddn test",
        "test/rainy_image/{901_2,901_14,902_1}.jpg test/ground_truth/{901,902,903}.jpg",
        "901_2: test/rainy_image/901_2.jpg -> test/ground_truth/901.jpg",
        "901_14: test/rainy_image/901_14.jpg -> test/ground_truth/901.jpg",
        "902_1: test/rainy_image/902_1.jpg -> test/ground_truth/902.jpg",
        "903: nothing -> test/ground_truth/903.jpg",
    ),
    "DDN in other words": ("ddn train", "rain/1_1.png norain/1.png", "1_1: rain/1_1.png -> norain/1.png"),
    "Cityscape": (
        "cityscape_syn200 val",
        "weather_cityscapes/leftImg8bit/{train,val}/rain/{100mm,200mm}/rainy_image/bonn_1_2_leftImg8bit.png "
        "leftImg8bit/{train,val}/bonn/bonn_1_2_leftImg8bit.png",
        "bonn_1_2: weather_cityscapes/leftImg8bit/val/rain/200mm/rainy_image/bonn_1_2_leftImg8bit.png "
        "-> leftImg8bit/val/bonn/bonn_1_2_leftImg8bit.png",
    ),
    "Cityscape with named folders": (
        "cityscape_syn100 - lq_dir=wet gt_dir=dry",
        "{wet/bonn,dry}/bonn_1_2.png",
        "bonn_1_2: wet/bonn/bonn_1_2.png -> dry/bonn_1_2.png",
    ),
    "GoPro": (
        "gopro train",
        "{train,test}/GOPR0372_07_00/{blur,blur_gamma,sharp}/000047.png train/GOPR0372_07_01/{blur,sharp}/000047.png",
        "GOPR0372_07_00/000047: train/GOPR0372_07_00/blur/000047.png -> train/GOPR0372_07_00/sharp/000047.png",
        "GOPR0372_07_01/000047: train/GOPR0372_07_01/blur/000047.png -> train/GOPR0372_07_01/sharp/000047.png",
    ),
    "GoPro's other blur, missing once": (
        "gopro - blur=blur_gamma",
        "S1/{blur,blur_gamma,sharp}/1.png S2/{blur,sharp}/1.png",
        "S1/1: S1/blur_gamma/1.png -> S1/sharp/1.png",
        "S2/1: nothing -> S2/sharp/1.png",
    ),
    "GoPro flat": (
        "gopro test",
        "test/{input,target}/GOPR0384_11_00-000001.png",
        "GOPR0384_11_00-000001: test/input/GOPR0384_11_00-000001.png -> test/target/GOPR0384_11_00-000001.png",
    ),
    "REDS": (
        "reds val",
        "val/val_{sharp,blur,blur_jpeg}/000/0000000{0,9}.png",
        "000/00000000: val/val_blur/000/00000000.png -> val/val_sharp/000/00000000.png",
        "000/00000009: val/val_blur/000/00000009.png -> val/val_sharp/000/00000009.png",
    ),
    "REDS, a tenth, jpeg": (
        "reds val300 blur=blur_jpeg",
        "val_sharp/000/000000{08,09}.png val_blur_jpeg/000/000000{08,09}.jpg",
        "000/00000009: val_blur_jpeg/000/00000009.jpg -> val_sharp/000/00000009.png",
    ),
    "ReLoBlur with a scene named sharp": (
        "reloblur train",
        "dataset/train/the_sharp/00/{00,01}_{blur,sharp}.png dataset/test/s/00/00_{blur,sharp}.png",
        "the_sharp/00/00: dataset/train/the_sharp/00/00_blur.png -> dataset/train/the_sharp/00/00_sharp.png",
        "the_sharp/00/01: dataset/train/the_sharp/00/01_blur.png -> dataset/train/the_sharp/00/01_sharp.png",
    ),
    "SenseNoise": (
        "sensenoise - lq=*/noisy*.png gt=*/clean.png map=s/noisy[0-9]+/clean/n",
        "7/{noisy1,noisy2,clean}.png",
        "7/noisy1: 7/noisy1.png -> 7/clean.png",
        "7/noisy2: 7/noisy2.png -> 7/clean.png",
    ),
    "PolyU": (
        "polyu -",
        "CroppedImages/Sony_{1_real,1_mean,2_Real,3_mean}.JPG",
        "Sony_1: CroppedImages/Sony_1_real.JPG -> CroppedImages/Sony_1_mean.JPG",
        "Sony_2: CroppedImages/Sony_2_Real.JPG -> nothing",
        "Sony_3: nothing -> CroppedImages/Sony_3_mean.JPG",
    ),
    "pairs by globs": (
        r"pairs - lq=**/*.jpg gt=clean/*.png map=s|^in/(.*)|clean/\1|",
        "in/{a,b.c}.jpg clean/{a,b.c,d}.png other.png",
        "clean/d: nothing -> clean/d.png",
        "in/a: in/a.jpg -> clean/a.png",
        "in/b-c: in/b.c.jpg -> clean/b.c.png",
    ),
    "pairs of equal names": ("pairs - lq=*.jpg gt=*.png", "a.jpg a.png", "a: a.jpg -> a.png"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_layout_finds_its_pairs_by_name(case, tmp_path):
    call, tree, *expected = CASES[case]
    layout, split, *options = call.split()
    grow(tmp_path, tree)
    given = dict(option.split("=", 1) for option in options)
    assert told(layout, tmp_path, None if split == "-" else split, **given) == expected


def test_every_layout_is_tried_here_and_takes_the_options_it_says():
    assert {call.split()[0] for call, *_ in CASES.values()} | {"rain100L", "realblur_j"} == LAYOUTS.keys()
    for name, layout in LAYOUTS.items():
        parameters = inspect.signature(layout.find).parameters
        if "options" not in parameters:
            assert parameters.keys() == {"src", "split", *layout.options}, name


@pytest.mark.parametrize(
    "layout, inside, tree",
    [
        ("rain200H", "train", "train/rain/norain-7x2.png train/norain/norain-7.png"),
        ("ddn", "train", "train/rain/1_1.png train/norain/1.png"),
        ("gopro", "train", "train/S/{blur,sharp}/1.png"),
        ("reloblur", "dataset/train", "dataset/train/s/00/00_{blur,sharp}.png masks/train/s/00/00.png"),
    ],
)
def test_the_folder_of_the_split_gives_what_that_of_the_set_gives(layout, inside, tree, tmp_path):
    grow(tmp_path, tree)
    whole = found(layout, tmp_path, "train")
    assert found(layout, tmp_path / inside, "train") == found(layout, tmp_path / inside) == whole
    assert len(whole) == 1


def test_rain_tells_which_copy_it_found_and_what_is_expected_of_that(tmp_path):
    rain200h, src = LAYOUTS["rain200H"], tmp_path / "rain"
    for names, variant, expected in (
        ("x2/rain/X2/norain-7x2.png", "x2", 200),
        ("plain/rain/norain-7x2.png", "x2", 200),
        ("renamed/rain/norain-7.png", "renamed", 200),
        ("old/rain/rain-7.png", "rain100", 100),
    ):
        src = grow(tmp_path, f"{names} {names.split('/')[0]}/norain/norain-7.png") / names.split("/")[0]
        options = rain200h.settle(src, split="test")
        assert options == rain200h.settle(src, split="test", variant=variant) == {"variant": variant}
        assert rain200h.expected("test", options) == {"test": expected}
        assert rain200h.expected("val", options) == {"train": 1800, "test": expected}  # one of these, then
        assert [pair.key for pair in rain200h.find(src, split="test", **options)] == ["norain-7"]
    with pytest.raises(ValueError, match="not all named as in renamed .*: rain-7 "):
        found("rain200H", src, "test", variant="renamed")
    grow(tmp_path / "x2", "rain/norain-7.png")
    with pytest.raises(ValueError, match="choose --variant x2 or renamed"):
        found("rain200H", tmp_path / "x2")
    assert told("rain200H", tmp_path / "x2", variant="renamed") == [
        "norain-7: rain/norain-7.png -> norain/norain-7.png"
    ]


def test_counts_are_those_of_the_papers():
    pairs_of = {
        "rain200L": (1800, 200), "rain200H": (1800, 200), "rain100L": (200, 100), "rain100H": (1800, 100),
        "did": (12000, 1200), "ddn": (12600, 1400), "cityscape_syn100": (2975, 500), "cityscape_syn200": (2975, 500),
        "gopro": (2103, 1111), "realblur_j": (3758, 980), "reds": (24000, 3000, 300), "reloblur": (2010, 395),
        "polyu": (100,), "pairs": (), "sensenoise": (),
    }  # fmt: skip
    assert {name: tuple(layout.expected(None, {}).values()) for name, layout in LAYOUTS.items()} == pairs_of
    old = {name: LAYOUTS[name].expected(None, {"variant": "rain100"}) for name in ("rain200L", "rain200H")}
    assert old == {"rain200L": {"train": 200, "test": 100}, "rain200H": {"train": 1800, "test": 100}}


def test_did_is_one_file_for_both_sides(tmp_path):
    pairs = found("did", grow(tmp_path, "Rain_{Heavy,Medium,Light}/train2018new/{1,2}.jpg"), "train")
    assert len(pairs) == 6 and all(pair.side_by_side and pair.lq == pair.gt for pair in pairs)
    (tmp_path / "Rain_Light/train2018new").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="no folder .*Rain_Light/train2018new"):
        found("did", tmp_path, "train")


def test_gopro_records_its_blur(tmp_path):
    grow(tmp_path, "S/{blur,sharp}/1.png flat/{input,target}/1.png")
    assert LAYOUTS["gopro"].settle(tmp_path, split=None) == {"blur": "blur"}
    assert LAYOUTS["gopro"].settle(tmp_path / "flat", split=None) == {"blur": "unknown"}
    with pytest.raises(ValueError, match="no S[^ ]*/blur_gamma .* holds S/, flat/; .* are blur, input, sharp, target"):
        found("gopro", tmp_path, blur="blur_gamma")
    with pytest.raises(ValueError, match="does not tell its blur"):
        found("gopro", tmp_path / "flat", blur="blur_gamma")


def test_realblur_goes_by_the_list_gt_first(tmp_path):
    def listed(*lines: str) -> list[str]:
        (tmp_path / "RealBlur_J_test_list.txt").write_text("".join(f"{line}\n" for line in lines))
        return told("realblur_j", tmp_path, "test")

    grow(tmp_path, f"{REALBLUR}/scene{{1,2}}/{{gt/gt,blur/blur}}_{{2,10}}.png")
    ten, two = (f"{REALBLUR}/scene1/gt/gt_{n}.png  {REALBLUR}/scene1/blur/blur_{n}.png " for n in (10, 2))
    gone = f"{REALBLUR}/scene2/gt/gt_3.png {REALBLUR}/scene2/blur/blur_2.png"
    assert listed(ten, two, "", gone) == [
        f"scene1/blur_2: {REALBLUR}/scene1/blur/blur_2.png -> {REALBLUR}/scene1/gt/gt_2.png",
        f"scene1/blur_10: {REALBLUR}/scene1/blur/blur_10.png -> {REALBLUR}/scene1/gt/gt_10.png",
        f"scene2/blur_2: {REALBLUR}/scene2/blur/blur_2.png -> nothing",
    ]
    assert found("realblur_j", tmp_path / REALBLUR, "test") == found("realblur_j", tmp_path, "test")
    for lines, message in (
        ([ten, " ".join(reversed(two.split()))], "line 2: swapped"),
        ([ten.replace("J", "R")], "of RealBlur-R, not RealBlur-J"),
        ([ten.split()[0]], "line 1: not like"),
        ([ten.replace("scene1/gt", "scene2/gt")], "line 1: not like"),
        ([ten, two, ten], "line 3: scene1/blur_10 or its gt is in the list before"),
        ([ten.replace("scene1", "scene3")], "1 lines of .* name files that are not there"),
    ):
        with pytest.raises(ValueError, match=message):
            listed(*lines)
    with pytest.raises(
        ValueError, match="no RealBlur_J_train_list.txt in .* holds RealBlur-J.*/, RealBlur_J_test_list"
    ):
        found("realblur_j", tmp_path, "train")


def test_reloblur_gives_masks_to_all_or_none(tmp_path):
    grow(tmp_path, "dataset/test/s/00/{00,01}_{blur,sharp}.png")
    assert [pair.masks for pair in found("reloblur", tmp_path, "test")] == [None, None]
    grow(tmp_path, "masks/test/s/00/00.png")  # the writer reports that the other is not there
    masks = [pair.masks for pair in found("reloblur", tmp_path, "test")]
    assert masks == [tmp_path / f"masks/test/s/00/{name}.png" for name in ("00", "01")]


@pytest.mark.parametrize(
    "call, tree, message",
    [
        ("rain200L train", "rain_data_test_Light/norain/a.png", "no folder .*/rain .nor rain_data_train_Light, train.; "
         "point --src or --lq-dir at it; .* holds rain_data_test_Light/$"),
        ("rain100L -", "rain/norain-1.png rain/rain-2.png norain/norain-1.png", "not all named as in x2 or renamed or"),
        ("rain200L - variant=x3", "rain/norain-1.png norain/norain-1.png", "--variant x3: choose one of x2, renamed"),
        ("did -", "1.jpg", "--split is needed: choose one of train, test"),
        ("did test", "b/1.jpg", "no pictures in .* .nor TestA, test, testing in it.; .* holds b/"),
        ("ddn -", "rainy_image/x.jpg ground_truth/x.jpg", "x.jpg is not named like 901_14.jpg"),
        ("cityscape_syn100 val", "weather_cityscapes/leftImg8bit/val/rain/200mm/rainy_image/a.png",
         "no folder .*val/rain/100mm/rainy_image .*--lq-dir"),
        ("cityscape_syn100 - lq_dir=a gt_dir=b", "a/{x,y}/1.png b/1.png", "a/x/1.png and .*a/y/1.png would both be"),
        ("gopro - blur=sharp", "S/{blur,sharp}/1.png", "--blur sharp: choose one of blur, blur_gamma"),
        ("gopro -", "train/S/{blur,sharp}/1.png", "no SEQUENCE/blur .*choose --split"),
        ("reds test", "test/test_blur/0/0.png", "--split test: choose one of train, val, val300"),
        ("reds val", "val/val_blur/0/0.png", "no folder .*val_sharp"),
        ("reloblur -", "dataset/train/s/00/00_{blur,sharp}.png", "no SCENE/N/N_blur.png .*choose --split.* dataset/$"),
        ("polyu -", "x/1_real.JPG", "no NAME_real.JPG .* holds x/"),
        ("sensenoise -", "x.png", "give both --lq GLOB and --gt GLOB"),
        ("pairs - lq=a/* gt=b/* lq_dir=a", "a/1.png b/1.png", "give the ones or the others"),
        ("pairs - lq=a/* gt=b/*", "a/1.png c/1.png", r"--gt b/\* matches no picture below .* holds a/, c/"),
        ("pairs - lq=../a/* gt=b/*", "a/1.png b/1.png", "--lq ../a.*: write it from --src on"),
        ("pairs - lq=*.jpg gt=*.png map=_a/_b", "1_a.jpg 1_b.png", "--map _a/_b: write it like"),
        ("pairs - lq=*.jpg gt=*.png map=s/(_a/_b/", "1_a.jpg 1_b.png", "no regular expression of Python's"),
        (r"pairs - lq=*.jpg gt=*.png map=s/_a/\1/", "1_a.jpg 1_b.png", "no regular expression of Python's"),
        ("pairs - lq=*.jpg gt=*.png map=s/_a$/_b/", "1_a.jpg 2.jpg 1_b.png", "does not match '2'"),
        ("pairs - lq=*.jpg gt=*.png map=s/_.$//", "1_a.jpg 1_b.jpg 1.png", "1_a.jpg and .*1_b.jpg .* have the gt '1'"),
        ("pairs - lq=*.jpg gt=*.jpg", "1.jpg", "1.jpg would be its own gt"),
        ("pairs - lq=*.* gt=b/*", "1.jpg 1.png b/1.png", "1.jpg and .*1.png would both be sample '1'"),
        ("pairs - lq=*.jpg gt=*.png", "a.b.jpg a-b.jpg a.b.png a-b.png", "would both be sample 'a-b'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_what_was_expected(call, tree, message, tmp_path):
    layout, split, *options = call.split()
    grow(tmp_path, tree)
    with pytest.raises(ValueError, match=message):
        found(layout, tmp_path, None if split == "-" else split, **dict(option.split("=", 1) for option in options))


def test_a_folder_that_is_not_there_is_told_by_each_layout(tmp_path):
    globs = {"lq": "*.png", "gt": "*.jpg"}
    for name, layout in LAYOUTS.items():
        given = globs if name == "sensenoise" else {}
        with pytest.raises(ValueError, match="nowhere"):
            found(name, tmp_path / "nowhere", next(iter(layout.counts), None), **given)


def test_polyu_real_photographs():
    src = shared("data", "noise_polyu")
    pairs = found("polyu", src)
    assert len(pairs) == len(list(src.iterdir())) // 2 == 60
    assert all(f"{p.key}_real.JPG" == p.lq.name and f"{p.key}_mean.JPG" == p.gt.name for p in pairs if p.lq and p.gt)
    by_rule = found("pairs", src, lq="*_real.JPG", gt="*_mean.JPG", map="s/_real$/_mean/")
    assert [pair[1:] for pair in by_rule] == [pair[1:] for pair in pairs]


def test_rain100l_real_pictures():
    src = shared("data", "rain100L_train")
    assert LAYOUTS["rain100L"].settle(src, split="train") == {"variant": "renamed"}
    pairs = found("rain100L", src, "train")
    assert [pair.key for pair in pairs] == [f"norain-{number}" for number in range(1, 141)]
    assert all((src / "rain" / f"{p.key}.png", src / "norain" / f"{p.key}.png") == (p.lq, p.gt) for p in pairs)
