"""`cached`: the right masks on the right pixels, of the right age, whatever the world and the disk do."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_train.config import BatchPlan, CachedConfig, DataConfig, RegionsConfig, SamConfig
from dist_train.data.batch import Batch
from dist_train.data.loader import training_batches
from dist_train.data.reader import ShardReader
from dist_train.priors import build_inner, build_priors
from dist_train.priors.cached import CachedPrior, version_at
from dist_train.priors.mask_files import MaskFiles, iou_by_age
from dist_train.priors.masks import MaskSet, largest_first, matched_iou
from shards.schema import ShardError
from tests.helpers.pairs import make_pairs, write_pairs
from tests.helpers.rectangles import ColourPrior, assert_same_masks, make_rectangles
from tests.helpers.tasks import tiny_priors, tiny_run, tiny_task

pytestmark = pytest.mark.unit

NUM, GLOBAL = 5, 4  # batches straddle epochs


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    folder = tmp_path_factory.mktemp("shards")
    write_pairs(make_rectangles(folder / "src", NUM), folder / "out")
    return ShardReader(folder / "out")


def batches(reader: ShardReader, *, rank: int = 0, world: int = 1, start_step: int = 0, **data: Any) -> Any:
    config = DataConfig(**{"train": "-", "crop_px": 24, "workers": 0, **data})
    plan = BatchPlan(GLOBAL, GLOBAL // world, 1)
    return training_batches(reader, config, seed=3, plan=plan, rank=rank, world=world, start_step=start_step)


def cached(
    inner: Any, reader: ShardReader, folder: Path, *, refresh: int, checkpoints: Callable[[], Iterable[int]] = tuple
) -> CachedPrior:
    config = CachedConfig(of=RegionsConfig(), num_masks=6, refresh=refresh)
    files = MaskFiles(folder, memory_mib=1)
    return CachedPrior(inner, config, pictures=reader, files=files, global_batch=GLOBAL, checkpoints=checkpoints)


def identity(lq: Tensor) -> Tensor:
    return lq


def test_carried_masks_lie_on_the_same_pixels_and_are_made_once_in_refresh_epochs(
    reader: ShardReader, tmp_path: Path
) -> None:
    inner, stream = ColourPrior(), batches(reader, flips="all")
    prior = cached(inner, reader, tmp_path, refresh=3)
    geometries = set()
    for _ in range(4 * NUM):  # 16 epochs
        batch = next(stream)
        assert_same_masks(prior(batch.lq, batch, restore=identity), ColourPrior()(batch.lq))
        geometries |= {tuple(row[2:].tolist()) for row in batch.geometry}
    assert len(geometries) == 8
    # Epochs 0, 3, ... 15, and a sample that comes in the same step once more, in the epoch after.
    assert NUM * 6 <= inner.num_calls < NUM * 6 + 6
    stream.close()


class Clock:
    """A student whose picture tells at which step it was restored, and a prior that reads it as the mask's area."""

    step = 0

    def restore(self, lq: Tensor) -> Tensor:
        return torch.full_like(lq, (self.step + 1) / 255)

    def __call__(self, images: Tensor, batch: object = None, *, restore: object = None) -> MaskSet:
        area = (images[:, 0] * 255).round()
        h, w = images.shape[-2:]
        return largest_first(list(torch.arange(h * w).view(1, 1, h, w) < area[:, None]), num_masks=6)

    def describe(self) -> dict[str, Any]:
        return {}


def steps_of_masks(
    reader: ShardReader,
    folder: Path,
    *,
    refresh: int,
    steps: range,
    world: int = 1,
    checkpoints: Callable[[], Iterable[int]] = tuple,
) -> tuple[dict[int, int], float]:
    """Position -> step at which the masks it saw were made; and how many were lost, in all."""
    clock, made, lost = Clock(), {}, 0.0
    priors = [cached(clock, reader, folder, refresh=refresh, checkpoints=checkpoints) for _ in range(world)]
    whole = {"crop_px": 40, "flips": "none"}
    streams = [batches(reader, rank=rank, world=world, start_step=steps[0], **whole) for rank in range(world)]
    for clock.step in steps:
        for prior, stream in zip(priors, streams, strict=True):
            batch = next(stream)
            # Cut to 40 of 56 columns; the masks begin at the upper left of the whole, where no crop begins but at 0.
            batch.geometry[:, :2] = 0
            masks = prior(batch.lq, batch, restore=clock.restore)
            made |= dict(zip(batch.positions.tolist(), (masks.masks.sum((1, 2, 3)) - 1).tolist(), strict=True))
            lost += masks.notes["masks_remade"] * len(batch.keys)
    for stream in streams:
        stream.close()
    return made, lost


def test_masks_are_those_of_the_visit_in_the_epoch_of_their_version(reader: ShardReader, tmp_path: Path) -> None:
    """Found from the sample's visits alone."""
    made, lost = steps_of_masks(reader, tmp_path / "one", refresh=3, steps=range(20))
    stream = batches(reader)
    visits = {}
    for position, key in enumerate(key for _ in range(20) for key in next(stream).keys):
        epoch = position // NUM
        visits[key, epoch] = position // GLOBAL
        assert made[position] == visits[key, version_at(epoch, 3)]
    assert lost == 0
    assert (made, lost) == steps_of_masks(reader, tmp_path / "two", refresh=3, steps=range(20), world=2)
    assert (made, lost) == steps_of_masks(reader, tmp_path / "four", refresh=3, steps=range(20), world=4)


def test_a_resumed_run_sees_what_an_uninterrupted_one_does(reader: ShardReader, tmp_path: Path) -> None:
    """Killed 17 and 21 steps, so 7 and 8 versions of each sample, after the checkpoint it goes on from."""
    whole, _ = steps_of_masks(reader, tmp_path / "whole", refresh=2, steps=range(25))
    saved: list[int] = []
    for steps in (range(4), range(4, 8), range(8, 25)):
        steps_of_masks(reader, tmp_path / "killed", refresh=2, steps=steps, checkpoints=lambda: saved)
        saved.append(steps.stop)
    saved.pop()
    for start in (8, 4):  # as if the newer were damaged
        after, lost = steps_of_masks(
            reader, tmp_path / "killed", refresh=2, steps=range(start, 25), checkpoints=lambda: saved
        )
        assert after == {position: step for position, step in whole.items() if position >= start * GLOBAL}
        assert lost == 0
    _, lost = steps_of_masks(reader, tmp_path / "whole", refresh=2, steps=range(8, 25))
    assert lost > 0  # without the checkpoints' word the old versions are gone, which is counted


def test_disk_and_memory_are_bounded(reader: ShardReader, tmp_path: Path) -> None:
    steps_of_masks(reader, tmp_path, refresh=2, steps=range(40))
    assert {len(list(folder.glob("*"))) for folder in tmp_path.iterdir()} == {2}
    files = MaskFiles(tmp_path / "small", memory_mib=1 / 1024)
    rng = np.random.default_rng(0)
    for version in range(20):
        files.write("a", version, rng.random((2, 30, 40)) < 0.5, keep=range(20))
        assert files._num_bytes == sum(map(len, files._memory.values())) <= 1024
    assert files._memory and files.read("a", 0, (30, 40)) is not None


def _delete(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_delete, _truncate, _flip, _empty])
def test_what_is_lost_is_made_anew_and_counted(
    reader: ShardReader, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    stream = batches(reader)
    first = [next(stream) for _ in range(2)]
    prior = cached(ColourPrior(), reader, tmp_path, refresh=9)
    for batch in first:
        prior(batch.lq, batch, restore=identity)
    for path in tmp_path.rglob("*.png"):
        damage(path)
    prior, batch = cached(ColourPrior(), reader, tmp_path, refresh=9), next(stream)  # epoch 1 and 2
    masks = prior(batch.lq, batch, restore=identity)
    assert_same_masks(masks, ColourPrior()(batch.lq))
    assert masks.notes["masks_remade"] == 1
    assert prior(batch.lq, batch, restore=identity).notes["masks_remade"] == 0
    stream.close()


def test_neither_a_full_disk_nor_an_unreadable_picture_stops_a_rank(
    reader: ShardReader, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "masks").write_text("no folder can be made here")
    batch = next(batches(reader, flips="none"))
    prior = cached(ColourPrior(), reader, tmp_path / "masks", refresh=2)
    assert_same_masks(prior(batch.lq, batch, restore=identity), ColourPrior()(batch.lq))
    assert "was not written" in caplog.text

    def unreadable(number: int) -> None:
        raise ShardError("gone")

    monkeypatch.setattr(reader, "lq", unreadable)
    passes: list[Tensor] = []
    masks = prior(batch.lq, batch, restore=lambda lq: passes.append(lq) or lq)
    assert_same_masks(masks, ColourPrior()(batch.lq))
    assert "masks are of the crop alone" in caplog.text and len(passes) == GLOBAL


def test_pictures_from_outside_the_stream_are_segmented_as_they_come(reader: ShardReader, tmp_path: Path) -> None:
    batch = next(batches(reader))
    outside = Batch.of_images(batch.lq, batch.gt)
    prior = cached(ColourPrior(), reader, tmp_path, refresh=2)
    assert_same_masks(prior(batch.lq, outside, restore=None), ColourPrior()(batch.lq))
    assert_same_masks(prior(batch.lq), ColourPrior()(batch.lq))
    prior = cached(ColourPrior(num_masks=3), reader, tmp_path, refresh=2)  # fewer than the teacher takes
    masks = prior(batch.lq)
    assert masks.valid.shape == (GLOBAL, 6) and masks.counts().max() == 3
    assert not list(tmp_path.iterdir())


def test_the_student_is_seen_as_it_is_deployed_and_left_as_it_was() -> None:
    task: Any = tiny_task(tiny_run())
    frozen = nn.BatchNorm2d(3).eval()
    student = task.student
    task.student = nn.Sequential(nn.BatchNorm2d(3, momentum=1.0), nn.Dropout(0.5), frozen)
    task.train()
    frozen.eval()
    image = torch.rand(1, 3, 9, 7) + 3
    restored = task._restore_whole(image)
    assert torch.allclose(restored, image, atol=1e-4) and not restored.requires_grad
    assert task.student.training and task.student[0].training and not frozen.training
    assert task.student[0].running_mean.sum() == 0
    task.student = student


def test_in_training_all_is_logged_and_the_masks_are_of_the_restored_picture(tmp_path: Path) -> None:
    """Through the task, and `build_priors`."""
    write_pairs(make_pairs(tmp_path / "src", 4, h=24, w=32), tmp_path / "out")
    reader = ShardReader(tmp_path / "out")
    of = {"name": "regions", "num_masks": 9, "scale": 50.0, "min_area_px": 16}
    run = tiny_run(tmp_path, prior={"name": "cached", "of": of, "num_masks": 6, "refresh": 2})
    made = build_priors(run, torch.device("cpu"), train=reader, val=None, checkpoints=tuple)
    task: Any = tiny_task(run)
    data, seen = DataConfig(train="-", crop_px=16, workers=0), []
    stream = training_batches(reader, data, seed=0, plan=BatchPlan(4, 4, 1))
    for _ in range(4):
        terms = task(next(stream), made)
        seen.append([float(terms[name]) for name in ("mask_age_epochs", "masks_remade")])
    assert seen == [[0, 0], [1, 0], [0, 0], [1, 0]]
    key, number = reader.keys[2], 2
    whole = torch.from_numpy(reader.lq(number)).permute(2, 0, 1)[None].float() / 255
    masks = tiny_priors(tiny_run(prior=of)).masks(task._restore_whole(whole))  # type: ignore[misc]
    stored = MaskFiles(tmp_path / "tiny/masks", memory_mib=1).read(key, 2, (24, 32))
    assert stored is not None and np.array_equal(stored, masks.masks[0][masks.valid[0]].numpy())
    assert "not SAM" in made.describe()["masks"]["what"] and "every 2 epochs" in made.describe()["masks"]["what"]
    stream.close()
    build_priors(run, torch.device("cpu"), train=reader, val=None, checkpoints=lambda: [2])
    assert (tmp_path / "tiny/masks").exists()  # a run goes on
    build_priors(run, torch.device("cpu"), train=reader, val=None, checkpoints=tuple)
    assert not (tmp_path / "tiny/masks").exists()  # a run begins


def test_settings_of_the_prior_inside_are_named_in_errors_and_paths_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "prior.checkpoint" / "my prior.pth"
    with pytest.raises(ValueError) as caught:
        build_inner(CachedConfig(of=SamConfig(checkpoint=str(path))), torch.device("cpu"))
    assert f"prior.of.checkpoint={path}" in str(caught.value)


def test_how_alike_and_how_stale_on_a_known_case(tmp_path: Path) -> None:
    left, middle, nothing = (torch.zeros(1, 4, 6, dtype=torch.bool) for _ in range(3))
    left[..., :4], middle[..., 2:] = True, True
    assert matched_iou(left, left) == 1 and matched_iou(nothing[:0], nothing[:0]) == 1
    assert matched_iou(left, middle) == pytest.approx(1 / 3)
    assert matched_iou(left, nothing[:0]) == 0
    # The best partners are 1 and 1/3 in one direction, 1 in the other.
    assert matched_iou(torch.cat([left, middle]), left) == pytest.approx((1 + 1 / 3 + 1) / 3)
    files = MaskFiles(tmp_path, memory_mib=1)
    for version, masks in ((0, left), (2, left), (4, middle)):
        files.write("a", version, masks.numpy(), keep=range(9))
    ages = iou_by_age(tmp_path, {"a": (4, 6), "never seen": (4, 6)})
    assert ages == {2: [(0, 1.0), (2, pytest.approx(1 / 3))], 4: [(0, pytest.approx(1 / 3))]}
