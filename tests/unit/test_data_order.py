"""The stream is a pure function of seed and position."""

import numpy as np
import pytest

from dist_train.data.order import CROP, STAND_IN, Chance, draws, partner_at, sample_at

pytestmark = pytest.mark.unit


def test_every_epoch_is_another_permutation():
    epochs = [[sample_at(13 * epoch + place, seed=5, num_samples=13) for place in range(13)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_frozen():
    """These numbers are a promise: a run resumed with a later release, or a later numpy, sees the same samples."""
    assert [sample_at(place, seed=3, num_samples=7) for place in range(10)] == [6, 1, 5, 2, 4, 3, 0, 3, 5, 6]
    assert [draw % 1000 for draw in draws(3, 12345678901, CROP, 3)] == [977, 592, 903]
    assert [partner_at(position, seed=3, global_batch=5) for position in range(5, 10)] == [9, 8, 5, 7, 6]
    chance = Chance(3, 12345678901, CROP)
    found = chance.random(), chance.uniform(2, 3), chance.below(1000), chance.normal(1, 2)
    assert found == pytest.approx((0.07711322417861, 2.08023798287465, 566, 1.1583038318910), abs=1e-12)


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
