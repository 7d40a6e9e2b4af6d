"""Batches: the same for any world and any workers, aligned, in RGB, and honest about what cannot be read."""

import itertools
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch

from dist_train.config import BatchPlan, DataConfig
from dist_train.data.augment import apply_geometry, geometry_at, turned, turned_picture, undo_turns
from dist_train.data.loader import training_batches
from dist_train.data.mix import mixup_weight
from dist_train.data.order import MIXUP, Chance, partner_at
from dist_train.data.reader import BadSampleError, ShardReader
from shards.codec import decode_rgb
from shards.schema import ShardError
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.unit

NUM, GLOBAL = 11, 8  # 8 does not divide 11: batches straddle epochs


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs") / "src", NUM)


@pytest.fixture
def folder(source, tmp_path):
    write_pairs(source, tmp_path / "out")
    return tmp_path / "out"


def config(**values):
    return DataConfig(**{"train": "data", "crop_px": 16, "workers": 0, **values})


def global_batches(folder, *, world, accum=1, steps=3, start_step=0, **values):
    """Global batches put together from all ranks, each (lq, gt, keys, geometry) in the order of positions."""
    plan = BatchPlan(GLOBAL, GLOBAL // world // accum, accum)
    reader = ShardReader(folder)
    streams = [
        training_batches(reader, config(**values), seed=9, plan=plan, rank=rank, world=world, start_step=start_step)
        for rank in range(world)
    ]
    for step in range(start_step, start_step + steps):
        micro = [next(streams[rank]) for _ in range(accum) for rank in range(world)]
        assert torch.cat([batch.positions for batch in micro]).tolist() == list(
            range(step * GLOBAL, (step + 1) * GLOBAL)
        )
        yield (
            torch.cat([batch.lq for batch in micro]),
            torch.cat([batch.gt for batch in micro]),
            sum((batch.keys for batch in micro), ()),
            torch.cat([batch.geometry for batch in micro]),
            sum((batch.bad for batch in micro), ()),
        )
    for stream in streams:
        stream.close()


def same(one, two):
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("world", "accum", "workers"), [(1, 4, 0), (2, 1, 0), (4, 2, 0), (8, 1, 0), (1, 1, 1), (1, 2, 2), (2, 2, 1)]
)
def test_any_world_accumulation_and_workers_give_the_same_bits(folder, world, accum, workers):
    expected = global_batches(folder, world=1)
    found = global_batches(folder, world=world, accum=accum, workers=workers)
    assert all(same(*both) for both in zip(expected, found, strict=True))


RECIPES = {
    "none": {},
    "progressive": {"progressive": [{"from_step": 1, "crop_px": 18}, {"from_step": 4, "crop_px": 24}]},
    "mixup": {"mixup": {"from_step": 1}},
    "rainmix": {"rainmix": {}},
}
RECIPES["all"] = RECIPES["progressive"] | RECIPES["mixup"] | RECIPES["rainmix"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_resuming_elsewhere_continues_the_uninterrupted_stream(folder, recipe):
    whole = list(global_batches(folder, world=1, steps=5, **RECIPES[recipe]))
    for world, accum, workers, start in ((2, 1, 0, 3), (4, 2, 0, 4), (1, 2, 2, 0), (2, 2, 1, 1)):
        rest = global_batches(
            folder, world=world, accum=accum, workers=workers, start_step=start, steps=5 - start, **RECIPES[recipe]
        )
        assert all(same(*both) for both in zip(whole[start:], rest, strict=True))


def test_crops_grow_at_the_first_position_of_a_step_and_stay_cut_from_their_pictures(folder, source):
    sides = []
    for lq, gt, keys, geometry, _ in global_batches(folder, world=2, steps=6, **RECIPES["progressive"]):
        sides.append(lq.shape[-1])
        assert lq.shape == gt.shape and torch.allclose(lq + gt, torch.ones(()))
        rgb = torch.from_numpy(decode_rgb((source / "lq" / f"{keys[0]}.png").read_bytes())).permute(2, 0, 1)
        assert torch.equal((lq[0] * 255).round().byte(), apply_geometry(rgb, geometry[0], sides[-1]))
    assert sides == [16, 18, 18, 18, 24, 24]


def test_mixup_weighs_a_sample_against_one_of_its_global_batch_both_sides_alike(folder):
    plain = list(global_batches(folder, world=1))
    mixed = list(global_batches(folder, world=2, mixup={"from_step": 1, "alpha": 0.7}))
    assert same(plain[0], mixed[0])
    for step in (1, 2):
        for row, position in enumerate(range(step * GLOBAL, (step + 1) * GLOBAL)):
            partner = partner_at(position, seed=9, global_batch=GLOBAL) % GLOBAL
            weight = mixup_weight(Chance(9, position, MIXUP), 0.7)
            for side in (0, 1):
                expected = weight * plain[step][side][row] + (1 - weight) * plain[step][side][partner]
                assert torch.allclose(mixed[step][side][row], expected, atol=1e-6)
        assert not torch.equal(plain[step][0], mixed[step][0])
        assert plain[step][2] == mixed[step][2] and torch.equal(plain[step][3], mixed[step][3])


def test_rainmix_leaves_the_ground_truth_alone_and_rains_on_either_picture(folder):
    share = {}
    for clean in (0, 4 / 11, 1):
        batches = zip(
            global_batches(folder, world=1), global_batches(folder, world=1, rainmix={"clean": clean}), strict=True
        )
        on_clean = []
        for (lq, gt, *_), (rainy, same_gt, *_) in batches:
            assert torch.equal(gt, same_gt) and rainy.dtype == torch.float32 and rainy.max() <= 1
            on_lq, on_gt = ((rainy >= base - 1e-6).flatten(1).all(1) for base in (lq, gt))
            assert (on_lq ^ on_gt).all()
            on_clean += on_gt.tolist()
        share[clean] = sum(on_clean) / len(on_clean)
    assert share[0] == 0 < share[4 / 11] < share[1] == 1


def test_a_bad_partner_is_reported_too(folder):
    _spoil(folder, "s-5")
    plain = list(global_batches(folder, world=1))
    mixed = list(global_batches(folder, world=2, workers=1, mixup={}))
    assert any(before[4] for before in plain)
    for before, after in zip(plain, mixed, strict=True):  # once as itself, once as a partner
        assert set(after[4]) == set(before[4]) and len(after[4]) == 2 * len(before[4])


def test_an_epoch_drops_and_repeats_no_sample_and_cuts_it_anew(folder):
    batches = list(global_batches(folder, world=2, steps=NUM))
    keys = list(itertools.chain(*(batch[2] for batch in batches)))
    assert all(len(set(keys[start : start + NUM])) == NUM for start in range(0, GLOBAL * NUM, NUM))
    crops = [
        tuple(row.tolist()) for batch in batches for key, row in zip(batch[2], batch[3], strict=True) if key == "s-1"
    ]
    assert len(crops) == GLOBAL and len(set(crops)) > 1  # each time cut elsewhere


def test_the_global_random_state_is_left_alone(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(global_batches(folder, world=1, workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_the_source_pictures_in_rgb_cut_alike(folder, source):
    lq, gt, keys, geometry, bad = next(global_batches(folder, world=1))
    assert lq.dtype == torch.float32 and lq.shape == (GLOBAL, 3, 16, 16) and not bad
    assert torch.allclose(lq + gt, torch.ones(()))  # each gt is its lq inverted, so any misalignment shows
    for row, key in enumerate(keys):
        top, left, flip, turns = geometry[row].tolist()
        rgb = decode_rgb((source / "lq" / f"{key}.png").read_bytes())[top : top + 16, left : left + 16]
        rgb = np.rot90(rgb[:, ::-1] if flip else rgb, turns)  # numpy, too, turns counter-clockwise
        assert np.array_equal((lq[row] * 255).round().byte().permute(1, 2, 0).numpy(), rgb)
    assert len({tuple(row[2:].tolist()) for batch in global_batches(folder, world=1) for row in batch[3]}) == 8


def test_masks_follow_their_picture_and_back():
    whole = torch.arange(24 * 32).view(1, 24, 32).repeat(4, 1, 1)
    for position in range(50):
        geometry = geometry_at(0, position, (24, 32), crop_px=16, flips="all")
        crop = apply_geometry(whole, geometry, 16)
        top, left = geometry[:2]
        assert torch.equal(undo_turns(crop, torch.tensor(geometry)), whole[:, top : top + 16, left : left + 16])
    assert apply_geometry(torch.tensor([[1, 2], [3, 4]]), (0, 0, 1, 1), 2).tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize(("flips", "kinds"), [("none", {(0, 0)}), ("horizontal", {(0, 0), (1, 0)})])
def test_flips_do_what_the_setting_says(flips, kinds):
    found = [geometry_at(0, position, (17, 16), crop_px=16, flips=flips) for position in range(40)]
    assert {geometry[2:] for geometry in found} == kinds
    assert {geometry[:2] for geometry in found} == {(0, 0), (1, 0)}  # every place is reached, none beyond the border


def _spoil(folder, key):
    reader = ShardReader(folder)
    row = reader._rows[reader.keys.index(key)]
    with open(folder / "000000.tar", "r+b") as file:
        file.seek(int(row["gt_offset"]) + 60)
        file.write(b"spoilt")


def test_a_bad_sample_is_reported_and_replaced_alike_everywhere_and_no_other_changes(folder):
    clean = list(global_batches(folder, world=1))
    _spoil(folder, "s-5")
    with pytest.raises(BadSampleError, match="000000.tar, s-5.gt: crc32 differs"):
        ShardReader(folder).pair(ShardReader(folder).keys.index("s-5"))
    spoilt = list(global_batches(folder, world=1))
    assert all(same(*both) for both in zip(spoilt, global_batches(folder, world=2, workers=1), strict=True))
    for before, after in zip(clean, spoilt, strict=True):
        hit = [row for row, key in enumerate(before[2]) if key == "s-5"]
        assert len(after[4]) == len(hit)
        for row in range(GLOBAL):
            assert torch.equal(before[0][row], after[0][row]) == (row not in hit)
        for row, bad in zip(hit, after[4], strict=True):
            assert bad.key == "s-5" != after[2][row] and "s-5.gt: crc32 differs" in bad.reason
            assert bad.shard == str(folder / "000000.tar")
    with pytest.raises(BadSampleError, match="s-5.gt: crc32 differs"):
        list(global_batches(folder, world=1, strict=True))


def test_a_read_that_fails_three_times_is_read_again(folder, monkeypatch):
    expected = next(global_batches(folder, world=1))
    failed = []
    pread = os.pread

    def flaky(file, size, offset):
        if len(failed) < 3:
            failed.append(offset)
            raise OSError(5, "Input/output error")
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", flaky)
    assert same(next(global_batches(folder, world=1)), expected) and len(failed) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_lost_in_training_is_fatal_and_named(folder, workers):
    stream = training_batches(ShardReader(folder), config(workers=workers), seed=0, plan=BatchPlan(GLOBAL, GLOBAL, 1))
    (folder / "000000.tar").unlink()
    with pytest.raises(ShardError, match=r"^[^\n]*000000.tar: No such file or directory: bring it back[^\n]*$"):
        next(stream)  # one line, no traceback of a worker
    assert not multiprocessing.active_children()  # the workers are gone before anybody collects garbage


def test_settings_that_do_not_fit_the_data_are_refused_before_the_first_step(folder, tmp_path):
    reader = ShardReader(folder)
    with pytest.raises(ValueError, match="optim.global_batch=16 but data.train=.* has 11 samples"):
        training_batches(reader, config(), seed=0, plan=BatchPlan(16, 16, 1))
    with pytest.raises(
        ValueError, match=r"data.crop_px=25 .* s-1 \(32x24\).* and 1 more; set data.crop_px to at most 24"
    ):
        training_batches(reader, config(crop_px=25), seed=0, plan=BatchPlan(8, 8, 1))
    grow = [{"from_step": 1, "crop_px": 20}, {"from_step": 2, "crop_px": 25}]
    with pytest.raises(ValueError, match=r"data.progressive.1.crop_px=25 .* set data.progressive.1.crop_px to at most"):
        training_batches(reader, config(progressive=grow), seed=0, plan=BatchPlan(8, 8, 1))
    streaks = config(rainmix={"streaks": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="data.rainmix.streaks=.*nowhere is no folder"):
        training_batches(reader, streaks, seed=0, plan=BatchPlan(8, 8, 1))
    (folder / "000000.tar").write_bytes(b"")
    with pytest.raises(ShardError, match="has 0 bytes instead of .*python -m shards check"):
        ShardReader(folder)
    with pytest.raises(ShardError, match="did you mean"):
        ShardReader(tmp_path)


def test_a_pickled_reader_opens_its_own_files(folder):
    reader = ShardReader(folder)
    first = reader.pair(0)
    copy = pickle.loads(pickle.dumps(reader))
    reader.close()
    assert all(np.array_equal(a, b) for a, b in zip(first, copy.pair(0), strict=True))
    assert len(copy) == NUM and copy.fingerprint == reader.fingerprint and copy.size_px(0) == (24, 32)


def test_a_picture_is_turned_as_a_tensor_is():
    crop = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)[:, 2:11]
    for flip, turns in itertools.product(range(2), range(4)):
        geometry = (0, 2, flip, turns)
        expected = turned(torch.from_numpy(crop.copy()).permute(2, 0, 1), geometry)
        assert np.array_equal(turned_picture(crop, geometry), expected.numpy())
