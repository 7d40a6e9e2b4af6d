"""Means between two lines of the log survive a stop in between."""

import json

import pytest
import torch

from dist_train.meters import RunningMeans

pytestmark = pytest.mark.unit


def feed(means: RunningMeans, values: list[float]) -> None:
    for value in values:
        means.add({"total": torch.tensor(value)})


def test_a_stop_in_between_changes_no_bit() -> None:
    values = [0.1, 0.7, 1e-3, 123.4, 5e-8]
    whole, first, second = RunningMeans(), RunningMeans(), RunningMeans()
    feed(whole, values)
    feed(first, values[:2])
    second.load(json.loads(json.dumps(first.state())), passes=1)
    feed(second, values[2:])
    assert second.drain() == whole.drain()
    assert second.drain() == {}


def test_another_world_goes_on_with_the_mean_and_each_step_weighs_the_same() -> None:
    """Two ranks with one pass a step did two steps; one rank with two passes a step does the third."""
    told = [{"total": (1.0 + 2.0, 2)}, {"total": (3.0 + 4.0, 2)}]
    means = RunningMeans()
    means.load(told, passes=2)
    feed(means, [7.0, 8.0])
    assert means.drain() == {"total": pytest.approx(((1 + 3) / 2 + (2 + 4) / 2 + (7 + 8) / 2) / 3)}
