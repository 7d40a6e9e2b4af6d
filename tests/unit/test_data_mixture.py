"""Several data sets read as one; and new data in the middle of a run."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dist_train.checkpoint import Checkpoint
from dist_train.config import BatchPlan, CachedConfig, DataConfig, RegionsConfig, RunConfig, changed_method, parse_run
from dist_train.data import mixture
from dist_train.data.loader import training_batches
from dist_train.data.mixture import Mixture, open_training, order_of
from dist_train.data.reader import ShardReader
from dist_train.priors.cached import CachedPrior
from dist_train.priors.mask_files import MaskFiles
from dist_train.resume import check_same_priors, check_same_run
from shards.schema import Masks
from tests.helpers.pairs import make_pairs, write_pairs
from tests.helpers.rectangles import ColourPrior, assert_same_masks, make_rectangles

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Seven samples of 24x32 in several shards, and three of 40x56."""
    folder = tmp_path_factory.mktemp("sets")
    write_pairs(make_pairs(folder / "small_src", 7), folder / "small", shard_mib=0.01)
    write_pairs(make_rectangles(folder / "large_src", 3), folder / "large")
    return folder / "small", folder / "large"


def parts(folders: tuple[Path, ...], shares: tuple[float, ...], *names: str | None) -> list[dict[str, Any]]:
    names = names or (None,) * len(folders)
    return [
        {"path": str(path), "share": share, "name": name}
        for path, share, name in zip(folders, shares, names, strict=True)
    ]


def test_it_reads_as_one_set_with_the_set_before_each_key(folders: tuple[Path, Path]) -> None:
    both = open_training(DataConfig(train=parts(folders, (1, 3), None, "r-2")))
    assert isinstance(both, Mixture) and len(both) == 10
    for number, key in enumerate(both.keys):
        name, own_key = key.split("/", 1)
        part = ShardReader(folders[name == "r-2"])
        own = part.keys.index(own_key)
        assert both.size_px(number) == part.size_px(own)
        assert all(map(np.array_equal, both.pair(number), part.pair(own)))
        assert np.array_equal(both.lq(number, (1, 2, 8, 9)), part.lq(own)[1:9, 2:11])
    assert Counter(key.split("/")[0] for key in both.keys) == {"0": 7, "r-2": 3}
    both.close()


def test_one_set_is_itself_however_it_is_written(folders: tuple[Path, Path]) -> None:
    alone, listed = (open_training(DataConfig(train=train)) for train in (str(folders[0]), parts(folders[:1], (0.3,))))
    assert isinstance(listed, ShardReader) and listed.keys == alone.keys and listed.fingerprint == alone.fingerprint
    streams = [
        [order_of(reader, DataConfig(train="-"), seed=1, global_batch=4).at(position) for position in range(20)]
        for reader in (alone, listed)
    ]
    assert streams[0] == streams[1]


def test_the_fingerprint_tells_sets_shares_and_names_apart(folders: tuple[Path, Path]) -> None:
    def fingerprint(*args: Any) -> str:
        return open_training(DataConfig(train=parts(*args))).fingerprint

    same = fingerprint(folders, (1, 3))
    assert same == fingerprint(folders, (0.25, 0.75)) == fingerprint(folders, (1, 3), "0", "1")
    others = {
        fingerprint(folders, (1, 2)),
        fingerprint(folders[::-1], (1, 3)),
        fingerprint(folders, (1, 3), "a", None),
        ShardReader(folders[0]).fingerprint,
    }
    assert len(others) == 4 and same not in others and len(same) == 16


def test_ranks_that_found_different_shards_are_told(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture.ranks, "gather_objects", lambda value: [value, "other"])
    with pytest.raises(ValueError, match="data.train holds other shards on one node than on another"):
        open_training(DataConfig(train=str(folders[0])))


def test_batches_hold_the_shares(folders: tuple[Path, Path]) -> None:
    data = DataConfig(train=parts(folders, (1, 3)), crop_px=16, workers=0)
    stream = training_batches(open_training(data), data, seed=0, plan=BatchPlan(8, 4, 2), rank=0)
    keys = [key for _ in range(24) for key in next(stream).keys]
    assert all(
        Counter(key[0] for key in keys[start : start + 4]) == {"0": 1, "1": 3} for start in range(0, len(keys), 4)
    )
    uses = Counter(keys)
    assert max(uses.values()) == 24 and len(uses) == 10 and {uses[key] for key in uses if key[0] == "0"} <= {3, 4}


def test_masks_count_only_if_all_sets_have_them_made_alike() -> None:
    class Part(SimpleNamespace):
        def __len__(self) -> int:
            return 1

    def together(*notes: Masks | None) -> Masks | None:
        found = [Part(masks_note=note, keys=("k",), fingerprint="f", folder="DIR") for note in notes]
        return Mixture(found, names=("a", "b"), shares=(1, 1)).masks_note  # type: ignore[arg-type]

    one = Masks(of="lq", prior={"what": "sam", "weights": "w"}, source="0" * 64, sha256="1" * 64)
    two = one.model_copy(update={"sha256": "2" * 64})
    assert together(one, None) is together(None, None) is None
    assert together(one, two).sha256 not in (one.sha256, two.sha256, together(two, one).sha256)
    assert together(one, two).prior == one.prior
    with pytest.raises(ValueError, match="DIR, DIR were not made alike"):
        together(one, two.model_copy(update={"of": "gt"}))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "train names no data set"),
        (3, "data.train=3: Input should be a valid tuple"),
        ([{"path": "a"}], "data.train.0.share: must be given"),
        ([{"path": "a", "share": 0}], "data.train.0.share=0: Input should be greater than 0"),
        ([{"path": "a", "share": 1}, {"path": "b", "share": 1, "name": "0"}], "two sets of one name: 0, 0"),
        ([{"path": "a", "share": 1}, {"path": "b", "share": 1.00001}], "come out even only after 200001 samples"),
    ],
)
def test_mistakes_are_named(train: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_run({"name": "x", "data": {"train": train}}, source="run.yaml")


def run_of(train: Any, **data: Any) -> RunConfig:
    return parse_run({"name": "x", "data": {"train": train, **data}}, source="test")


def test_the_order_is_part_of_the_method_and_paths_are_not() -> None:
    def sets(*shares: float, path: str = "a") -> RunConfig:
        return run_of([{"path": f"{path}{share}", "share": share} for share in shares])

    assert changed_method(run_of("a"), run_of("b", workers=3, strict=True, max_bad_samples=7)) == []
    assert changed_method(run_of("a"), run_of("a", order="windowed")) == ["data.order=full is now windowed"]
    assert changed_method(run_of("a"), run_of("a", window=3)) == ["data.window=512 is now 3"]
    assert changed_method(run_of("a"), run_of("a", lanes=3)) == ["data.lanes=None is now 3"]
    assert changed_method(sets(1, 3), sets(2, 6, path="b")) == []
    assert changed_method(sets(1, 3), sets(1, 2)) == ["data.shares.1=3 is now 2"]
    with pytest.raises(ValueError, match="data.shares.1=3 is now 2. .* or set data.accept_new_data=true"):
        check_same_run(checkpoint_of(sets(1, 3), data="old"), sets(1, 2), fingerprint="new")
    accepting = sets(1, 2).model_copy(update={"data": sets(1, 2).data.model_copy(update={"accept_new_data": True})})
    assert changed_method(sets(1, 3), accepting) == []


def checkpoint_of(run: RunConfig, **state: Any) -> Checkpoint:
    state = {"config": run.model_dump(mode="json"), "samples_seen": 40, **state}
    return Checkpoint(Path("step"), state, {}, None, {})


def test_other_shards_are_refused_unless_told_and_then_begin_a_new_stream() -> None:
    run, accepting = run_of("a"), run_of("a", accept_new_data=True)
    before = checkpoint_of(run, data="old")
    assert check_same_run(before, run, fingerprint="old") == check_same_run(before, accepting, fingerprint="old") == 0
    with pytest.raises(ValueError, match="other shards than data.train=a .* data.accept_new_data=true"):
        check_same_run(before, run, fingerprint="new")
    assert check_same_run(before, accepting, fingerprint="new") == 40
    after = checkpoint_of(run, data="new", stream_start=40, samples_seen=64)
    assert check_same_run(after, run, fingerprint="new") == check_same_run(after, accepting, fingerprint="new") == 40
    assert check_same_run(after, accepting, fingerprint="newer") == 64


def test_masks_that_come_with_the_data_may_change_with_it() -> None:
    for name, refused in (("stored", False), ("sam", True)):
        said = {"masks": {"name": name, "sha256": "a", "weights": "w"}}
        before = checkpoint_of(run_of("a"), env={"priors": said})
        now = {"masks": {**said["masks"], "sha256": "b"}}
        with pytest.raises(ValueError, match="masks of sha256 a"):
            check_same_priors(before, now)
        if refused:
            with pytest.raises(ValueError, match="masks of sha256 a"):
                check_same_priors(before, now, new_data=True)
        else:
            check_same_priors(before, now, new_data=True)


def test_cached_masks_age_by_the_epochs_of_their_own_set(tmp_path: Path) -> None:
    """Both sets' masks are made in their epochs 0, 3, 6, ..., once for each sample."""
    folders = []
    for num in (5, 2):
        write_pairs(make_rectangles(tmp_path / f"src{num}", num), tmp_path / f"out{num}")
        folders.append(tmp_path / f"out{num}")
    data = DataConfig(train=parts(tuple(folders), (1, 1)), crop_px=24, workers=0)
    reader = open_training(data)
    order = order_of(reader, data, seed=3, global_batch=2)
    inner, config = ColourPrior(), CachedConfig(of=RegionsConfig(), num_masks=6, refresh=3)
    files = MaskFiles(tmp_path / "masks", memory_mib=1)
    prior = CachedPrior(inner, config, pictures=reader, files=files, global_batch=2, epoch_at=order.epoch_at)
    stream, lost = training_batches(reader, data, seed=3, plan=BatchPlan(2, 2, 1)), 0.0
    for _ in range(60):  # 12 epochs of one set, 30 of the other
        batch = next(stream)
        masks = prior(batch.lq, batch, restore=lambda lq: lq)
        assert_same_masks(masks, ColourPrior()(batch.lq))
        lost += masks.notes["masks_remade"]
    assert lost == 0 and inner.num_calls == 5 * 4 + 2 * 10
    stream.close()
