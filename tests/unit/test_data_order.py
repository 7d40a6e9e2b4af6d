"""The stream is a pure function of seed and position."""

from collections import Counter

import numpy as np
import pytest

from dist_train.data.order import CROP, STAND_IN, Chance, Order, draws, partner_at

pytestmark = pytest.mark.unit

SHARDS = (5, 1, 7, 4)


def stream(num: int, shards=(SHARDS,), **options) -> np.ndarray:
    order = Order(shards, **{"seed": 5, **options})
    return np.array([order.at(position) for position in range(num)])


@pytest.mark.parametrize(
    "options", [{}, {"window": 6, "lanes": 1}, {"window": 1, "lanes": 8}, {"window": 100, "lanes": 40}]
)
@pytest.mark.parametrize("shards", [SHARDS, (1,), (3, 13)])
def test_every_epoch_is_another_permutation(shards, options):
    num = sum(shards)
    epochs = stream(6 * num, [shards], **options).reshape(6, num)
    assert all(sorted(epoch) == list(range(num)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == (1 if num == 1 else 6)


def test_order_is_frozen():
    """These numbers are a promise: a run resumed with a later release, or a later numpy, sees the same samples."""
    assert stream(10, [[3, 4]], seed=3).tolist() == [6, 1, 5, 2, 4, 3, 0, 3, 5, 6]
    assert stream(10, [[3, 4]], seed=3, window=2, lanes=2).tolist() == [2, 4, 0, 3, 1, 6, 5, 6, 0, 4]
    assert stream(10, [[3], [4]], seed=3, shares=(1, 2)).tolist() == [3, 4, 1, 5, 2, 6, 5, 0, 4, 0]
    assert [draw % 1000 for draw in draws(3, 12345678901, CROP, 3)] == [977, 592, 903]
    assert [partner_at(position, seed=3, global_batch=5) for position in range(5, 10)] == [9, 8, 5, 7, 6]
    chance = Chance(3, 12345678901, CROP)
    found = chance.random(), chance.uniform(2, 3), chance.below(1000), chance.normal(1, 2)
    assert found == pytest.approx((0.07711322417861, 2.08023798287465, 566, 1.1583038318910), abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"window": 6, "lanes": 4}])
def test_a_position_asked_for_alone_is_that_of_the_stream(options):
    """Resuming anywhere, in any direction, with the tables of other epochs in memory or none."""
    sets = {"shards": [SHARDS, (4, 2)], "shares": (3, 2), "start": 7, "seed": 1, **options}
    expected = [Order(**sets).at(position) for position in range(7, 300)]
    order = Order(**sets)
    for position in (299, 7, 150, 8, 298, 149, 20):
        assert order.at(position) == expected[position - 7]


def test_a_stream_that_begins_later_is_another_and_begins_with_a_whole_epoch():
    first, later = Order([SHARDS], seed=5), Order([SHARDS], seed=5, start=20)
    whole = [later.at(position) for position in range(20, 37)]
    assert sorted(whole) == list(range(17)) and later.epoch_at(36, 0) == 0 and later.epoch_at(37, 0) == 1
    assert whole not in ([first.at(p) for p in range(17)], [first.at(p) for p in range(17, 34)])


def _downloads(order: np.ndarray, samples_per_shard: int, *, global_batch: int, nodes: int) -> tuple[float, int]:
    """Over all nodes the shards that are fetched, relative to their number; and the most that live on one at a time."""
    shard, node = order // samples_per_shard, np.arange(len(order)) % global_batch * nodes // global_batch
    fetched, most = 0, 0
    for here in range(nodes):
        seen = shard[node == here]
        shards, first = np.unique(seen, return_index=True)
        last = len(seen) - 1 - np.unique(seen[::-1], return_index=True)[1]
        live = np.bincount(first, minlength=len(seen) + 1) - np.bincount(last + 1, minlength=len(seen) + 1)
        fetched, most = fetched + len(shards), max(most, live.cumsum().max())
    return fetched / len(set(shard.tolist())), most


def test_a_windowed_order_fetches_each_shard_once_and_holds_few():
    """On 376 shards of 64, as REDS has, by global batches of 64."""
    num, per_shard = 24064, 64

    def measure(nodes, **options):
        order = stream(num, [[per_shard] * (num // per_shard)], **options)
        batches = order.reshape(-1, 64) // per_shard
        diversity = np.mean([len(set(batch.tolist())) for batch in batches])
        return *_downloads(order, per_shard, global_batch=64, nodes=nodes), diversity

    fetched, live, diversity = measure(8, window=512, lanes=64)
    assert fetched < 1.02 and live <= 50 and diversity > 58.9  # that of samples drawn uniformly
    fetched, live, diversity = measure(8)
    assert fetched > 7.9 and live > 300
    fetched, live, diversity = measure(1, window=512, lanes=1)
    assert fetched == 1 and live < 15 and diversity < 15
    fetched, live, diversity = measure(1, window=2048, lanes=1)
    assert fetched == 1 and live < 45 and diversity > 20


def test_a_window_bounds_how_far_a_sample_moves():
    order = stream(512, [[16] * 32], window=64) // 16
    spans = [np.ptp(np.flatnonzero(order == shard)) for shard in range(32)]
    assert 30 < max(spans) < 16 + 64


SETS = [SHARDS, (40, 10), (3,)]
SHARES = (2, 5, 3)


@pytest.mark.parametrize("options", [{}, {"window": 6, "lanes": 20}])
def test_shares_are_exact_in_each_block_and_samples_are_used_equally_often(options):
    numbers = stream(10 * 173, SETS, shares=SHARES, **options)
    which = np.searchsorted([17, 67], numbers, side="right")
    assert all(np.bincount(block, minlength=3).tolist() == list(SHARES) for block in which.reshape(-1, 10))
    for stop in (1, 7, 50, 333, 1725):  # at any moment, not just at the end of a block
        for first, num in ((0, 17), (17, 50), (67, 3)):
            used = Counter(numbers[:stop].tolist())
            counts = [used[number] for number in range(first, first + num)]
            assert max(counts) - min(counts) <= 1


def test_each_data_set_has_permutations_of_its_own():
    numbers = stream(4 * 34, [(17,), (17,)], shares=(1, 1))
    mine, other = numbers[numbers < 17], numbers[numbers >= 17] - 17
    assert len(mine) == len(other) == 68 and not np.array_equal(mine[:17], other[:17])
    assert all(sorted(epoch) == list(range(17)) for one in (mine, other) for epoch in one.reshape(4, 17))


def test_epochs_are_those_in_which_a_sample_is_visited_once():
    order = Order(SETS, seed=5, shares=SHARES)
    visits = Counter()
    for position in range(700):
        number = order.at(position)
        assert order.epoch_at(position, number) == visits[number]
        visits[number] += 1


def test_lanes_of_several_sets_stay_at_their_places_in_the_batch():
    """Four nodes share a batch of two blocks: no shard is wanted by two of them, but for those at a cut."""
    numbers = stream(800, [[8] * 40, [8] * 100], shares=(4, 6), window=16, lanes=20)
    wanted = {(shard, place // 5) for shard, place in zip(numbers // 8, np.arange(800) % 20, strict=True)}
    num_shards = len({shard for shard, _ in wanted})
    assert num_shards > 80 and len(wanted) - num_shards <= 6


def test_draws_depend_on_seed_position_and_stream():
    values = [draws(*args) for args in ((1, 2, CROP, 2), (2, 2, CROP, 2), (1, 3, CROP, 2), (1, 2, STAND_IN, 2))]
    assert len({tuple(value) for value in values}) == 4 and values[0] == draws(1, 2, CROP, 2)
    raw = np.array([draws(0, position, CROP, 2) for position in range(4000)], dtype=np.float64) / 2**64 - 0.5
    assert np.abs(raw.mean(0)).max() < 0.02 and abs((raw[:, 0] * raw[:, 1]).mean()) < 0.006


def test_partners_are_another_permutation_of_each_global_batch():
    batches = [[partner_at(8 * step + place, seed=1, global_batch=8) for place in range(8)] for step in range(4)]
    assert all(sorted(batch) == list(range(8 * step, 8 * step + 8)) for step, batch in enumerate(batches))
    assert len({tuple(np.array(batch) % 8) for batch in batches}) == 4


def test_chance_is_what_it_says():
    chance = Chance(0, 0, CROP)
    uniform = chance.random((200, 100))
    assert 0 < uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.var() * 12 - 1) < 0.03
    assert abs(((uniform[1:] - 0.5) * (uniform[:-1] - 0.5)).mean()) < 0.003
    normal = np.array([chance.normal(3, 2) for _ in range(5000)])
    assert abs(normal.mean() - 3) < 0.1 and abs(normal.std() - 2) < 0.07
    assert np.bincount([chance.below(7) for _ in range(3500)]).min() > 400
    assert 2 < chance.uniform(2, 2.1) < 2.1 and chance.uniform(2, 3, (4, 5)).shape == (4, 5)
    again = Chance(0, 0, CROP)
    assert [again.random() for _ in range(3)] == uniform.ravel()[:3].tolist()  # one by one or many: the same
