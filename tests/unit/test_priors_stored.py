"""`stored`: masks go into shards beside their pictures and come out on the same pixels of every crop."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import webdataset

from dist_train.config import BatchPlan, DataConfig, RegionsConfig, StoredConfig
from dist_train.data.batch import Batch
from dist_train.data.loader import training_batches
from dist_train.data.reader import BadSampleError, ShardReader
from dist_train.evaluate import whole_picture
from dist_train.priors import build_prior, build_priors
from dist_train.priors.stored import StoredPrior
from launch import masks_ahead
from shards.check import check
from shards.codec import decode_masks, encode_masks
from shards.index import index_of, read_tar, row
from shards.masks import add_masks
from shards.schema import ShardError, load_manifest
from tests.helpers.pairs import make_pairs, write_pairs
from tests.helpers.rectangles import ColourPrior, assert_same_masks, colour_masks, make_rectangles
from tests.helpers.tasks import tiny_run

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
NUM = 5
NOTE: dict[str, Any] = {"of": "lq", "prior": ColourPrior().describe()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_pairs(make_rectangles(folder / "src", NUM), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def masked(plain: Path) -> Path:
    add_masks(plain, plain.with_name("masked"), lambda lq, gt: colour_masks(lq), **NOTE)
    return plain.with_name("masked")


@pytest.mark.parametrize("shape", [(3, 5, 13), (1, 4, 8), (40, 7, 1), (2, 33, 64)])
def test_masks_come_back_bit_by_bit_and_any_program_opens_them(shape: tuple[int, int, int]) -> None:
    masks = np.random.default_rng(0).random(shape) < 0.4
    masks[0, 0, 0] = True
    data = encode_masks(masks)
    assert np.array_equal(decode_masks(data, shape[1:]), masks)
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture is not None and np.array_equal(picture > 0, masks.reshape(-1, shape[2]))
    for cut in (0, 20, 45, len(data) - 20):
        with pytest.raises(ValueError, match="masks"):
            decode_masks(data[:cut], shape[1:])
    for other in ((shape[1] + 1, shape[2]), (shape[1], shape[2] + 1)):
        if shape[0] * shape[1] % other[0] or other[1] != shape[2]:
            with pytest.raises(ValueError, match="not masks of"):
                decode_masks(data, other)
    with pytest.raises(ValueError, match="not masks"):
        decode_masks(cv2.imencode(".png", picture)[1].tobytes(), shape[1:])


def test_no_masks_at_all_are_no_masks() -> None:
    nothing = np.zeros((0, 6, 9), bool)
    assert decode_masks(encode_masks(nothing), (6, 9)).shape == nothing.shape


@pytest.mark.parametrize("workers", [0, 1])
def test_they_lie_on_the_same_pixels_of_every_crop(masked: Path, workers: int) -> None:
    data = DataConfig(train="-", crop_px=24, flips="all", workers=workers)
    stream = training_batches(ShardReader(masked), data, seed=3, plan=BatchPlan(4, 4, 1), masks=True)
    prior, geometries = StoredPrior(StoredConfig(num_masks=6)), set()
    for _ in range(12):
        batch = next(stream)
        assert_same_masks(prior(batch.lq, batch), ColourPrior(6)(batch.lq))
        geometries |= {tuple(row[2:].tolist()) for row in batch.geometry}
    assert len(geometries) == 8
    few = StoredPrior(StoredConfig(num_masks=2))(batch.lq, batch)
    assert torch.equal(few.masks, prior(batch.lq, batch).masks[:, :2])
    stream.close()


def test_mixed_pictures_have_those_of_the_first_and_other_priors_are_not_troubled(masked: Path) -> None:
    def first(**data: Any) -> Batch:
        config = DataConfig(**{"train": "-", "crop_px": 24, "workers": 0, **data})
        return next(training_batches(ShardReader(masked), config, seed=3, plan=BatchPlan(4, 4, 1), masks=True))

    mixed, unmixed = first(mixup={}), first()
    assert mixed.masks and unmixed.masks and not torch.equal(mixed.lq, unmixed.lq)
    assert all(map(torch.equal, mixed.masks, unmixed.masks))
    config = DataConfig(train="-", crop_px=24, workers=0)
    without = next(training_batches(ShardReader(masked), config, seed=3, plan=BatchPlan(4, 4, 1)))
    assert without.masks is None and torch.equal(without.lq, unmixed.lq)


def test_whole_pictures_in_evaluation_have_theirs(masked: Path, plain: Path) -> None:
    batch, _, _ = whole_picture(ShardReader(masked), 2, CPU)
    assert_same_masks(build_prior(StoredConfig(num_masks=6), CPU)(batch.lq, batch), ColourPrior(6)(batch.lq))
    batch, _, _ = whole_picture(ShardReader(plain), 2, CPU)
    with pytest.raises(ValueError, match="python -m shards masks DIR"):
        build_prior(StoredConfig(), CPU)(batch.lq, batch)


def test_shards_without_masks_are_an_error_that_names_the_command(masked: Path, plain: Path) -> None:
    with_, without = ShardReader(masked), ShardReader(plain)
    run = tiny_run(prior={"name": "stored", "num_masks": 6})
    with pytest.raises(ValueError, match=f"data.train={plain} .*`python -m shards masks {plain} --out {plain}-masks`"):
        build_priors(run, CPU, train=without, val=None, checkpoints=tuple)
    with pytest.raises(ValueError, match=f"data.val={plain}"):
        build_priors(run, CPU, train=with_, val=without, checkpoints=tuple)
    unseen = tiny_run(prior={"name": "stored", "num_masks": 6}, track={"pictures_every": 0})
    said = build_priors(unseen, CPU, train=with_, val=without, checkpoints=tuple).describe()["masks"]
    assert said["what"] == "masks in the shards, made ahead of lq by: colours" and len(said["sha256"]) == 64


def test_the_set_is_the_same_but_for_its_masks(masked: Path, plain: Path) -> None:
    one, other = ShardReader(plain), ShardReader(masked)
    assert one.fingerprint == other.fingerprint and one.keys == other.keys
    assert check(masked).problems == check(plain).problems == ()
    urls = [str(masked / shard.url) for shard in load_manifest(masked).shardlist]
    for number, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False)):
        lq, gt = other.pair(number)
        assert sample["__key__"] == other.keys[number]
        assert np.array_equal(decode_masks(sample["masks.png"], lq.shape[:2]), other.masks(number))
        assert all(map(np.array_equal, (lq, gt), one.pair(number)))


def test_written_again_all_stays_and_other_masks_are_refused(
    masked: Path, plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def never(lq: np.ndarray, gt: np.ndarray) -> np.ndarray:
        raise AssertionError("all is there")

    with caplog.at_level("INFO"):
        add_masks(plain, masked, never, **NOTE)
        moved = NOTE["prior"] | {"weights": "elsewhere.pth"}
        add_masks(plain, masked, never, **NOTE | {"prior": moved})
    assert caplog.text.count("already there") == 2
    for note in (NOTE | {"of": "gt"}, NOTE | {"prior": {"name": "other"}}):
        with pytest.raises(ValueError, match="other masks"):
            add_masks(plain, masked, never, **note)
    with pytest.raises(AssertionError):
        add_masks(plain, plain.with_name("half"), never, **NOTE)
    assert not list(plain.parent.glob("half*"))


def _rewritten(masked: Path, out: Path, change: Any) -> Path:
    """The set with one member after the other handed to `change(name, data)`; index and manifest stay."""
    out.mkdir()
    for name in ("index.npy", "manifest.json"):
        (out / name).write_bytes((masked / name).read_bytes())
    with tarfile.open(masked / "000000.tar") as source, tarfile.open(out / "000000.tar", "w") as target:
        for info in source:
            data = change(info.name, source.extractfile(info).read())  # type: ignore[union-attr]
            if data is not None:
                info.size = len(data)
                target.addfile(info, io.BytesIO(data))
    return out


def test_check_finds_masks_that_are_damaged_too_few_or_of_another_size(masked: Path, tmp_path: Path) -> None:
    def one_less(name: str, data: bytes) -> bytes:
        return encode_masks(decode_masks(data, (40, 56))[1:]) if name == "r-1.masks.png" else data

    def smaller(name: str, data: bytes) -> bytes:
        return encode_masks(decode_masks(data, (40, 56))[:, 1:]) if name == "r-1.masks.png" else data

    said = "\n".join(check(_rewritten(masked, tmp_path / "less", one_less)).problems)
    assert "r-1.masks.png: holds 4 masks, and r-1.json tells of 5" in said
    said = "\n".join(check(_rewritten(masked, tmp_path / "smaller", smaller)).problems)
    assert "r-1.masks.png: not masks of 56x40: a picture of 56x195" in said


def test_damage_is_a_bad_sample_and_masks_of_some_samples_alone_are_refused(masked: Path, tmp_path: Path) -> None:
    def flipped(name: str, data: bytes) -> bytes:
        return data[:60] + bytes([data[60] ^ 1]) + data[61:] if name == "r-1.masks.png" else data

    out = _rewritten(masked, tmp_path / "flipped", flipped)
    reader = ShardReader(out)
    with pytest.raises(BadSampleError, match="r-1.masks: crc32 differs"):
        reader.masks(1)
    reader.pair(1)
    some = _rewritten(masked, tmp_path / "some", lambda name, data: None if name == "r-1.masks.png" else data)
    with pytest.raises(ShardError, match="some samples have masks and some have none"):
        index_of([row(entry, 0) for entry in read_tar(some / "000000.tar")])


def test_ctrl_c_is_told_in_a_line_that_is_true(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(masks_ahead, "write", interrupted)
    assert masks_ahead.main(["set", "--out", "out"]) == 130
    assert capsys.readouterr().err == "stopped; nothing half-written was left\n"


def test_the_command_writes_what_the_prior_finds(tmp_path: Path) -> None:
    write_pairs(make_pairs(tmp_path / "src", 3), tmp_path / "set")

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, "-m", "shards", "masks", str(tmp_path / "set"), *arguments]
        return subprocess.run(whole, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])

    settings = ("--with", "scale=50", "min_area_px=16", "num_masks=9")
    done = command("--out", str(tmp_path / "gt"), "--of", "gt", *settings)
    assert done.returncode == 0, done.stderr
    assert check(tmp_path / "gt").problems == ()
    reader = ShardReader(tmp_path / "gt")
    prior = build_prior(RegionsConfig(scale=50, min_area_px=16, num_masks=9), CPU)
    for number in range(3):
        gt = torch.from_numpy(reader.pair(number)[1]).permute(2, 0, 1)[None].float() / 255
        found = prior(gt)
        assert np.array_equal(reader.masks(number), found.masks[0][found.valid[0]].numpy())
    note = reader.masks_note
    assert note is not None and note.of == "gt" and note.prior["parameters"]["num_masks"] == 9
    done = command("--out", str(tmp_path / "x"), "--with", "scael=50")
    assert done.returncode == 2 and "did you mean scale?" in done.stderr and not (tmp_path / "x").exists()
