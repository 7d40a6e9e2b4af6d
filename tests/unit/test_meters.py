"""Names of what is logged, and the warning of a term that is dead or drowns the others."""

import logging

import pytest

from dist_train.config import LossConfig
from dist_train.meters import Stopwatch, named_losses

pytestmark = pytest.mark.unit


def test_names_weights_and_ratios(caplog: pytest.LogCaptureFixture) -> None:
    losses = {
        "student_rec": -20.0, "spd": 3.0, "sgr": 0.1, "total": -19.0, "masks_per_picture": 4.0,
        "gradient/student_rec": 0.5, "gradient/spd": 0.25, "gradient/sgr": 50.0,
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        named = named_losses(losses, LossConfig())
    assert named == {
        "loss/student_rec": -20.0, "loss/spd": 3.0, "loss/sgr": 0.1, "loss/total": -19.0,
        "prior/masks_per_picture": 4.0, "gradient/student_rec": 0.5, "gradient/spd": 0.25, "gradient/sgr": 50.0,
        "gradient_ratio/spd": 0.5, "gradient_ratio/sgr": 100.0, "weight/spd": 0.005, "weight/sgr": 200.0,
    }  # fmt: skip
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "loss.sgr.weight: the term's gradient is 1e+02 of the reconstruction's, so it drowns the others"
    caplog.clear()
    named_losses(losses | {"gradient/sgr": 1e-6}, LossConfig())
    assert "next to nothing" in caplog.text


def test_the_stopwatch_leaves_out_what_is_not_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("dist_train.meters.time.perf_counter", lambda: now)
    watch = Stopwatch(global_batch=8)
    for _ in range(4):
        with watch.waiting_for_data():
            now += 0.1
        now += 0.4  # the step
        watch.step()
        now += 7.0  # a validation
        watch.leave_out_since_step()
    values = watch.lap()
    assert values["time/samples_per_s"] == pytest.approx(8 / 0.5)
    assert values["time/step_s"] == pytest.approx(0.5) and values["time/data_share"] == pytest.approx(0.2)
    assert watch.lap() == {}
    now += 0.4
    watch.step()
    now += 0.1  # written down, and counted
    watch.lap()
    now += 7.0
    watch.leave_out_since_step()  # what lies before the lap is not left out of the next one again
    now += 0.5
    watch.step()
    assert watch.lap()["time/step_s"] == pytest.approx(0.5)


def test_the_share_of_making_masks_is_that_of_training_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("dist_train.meters.time.perf_counter", lambda: now)
    watch = Stopwatch(global_batch=8)
    for cost in (0.1, 0.3):  # two passes of one step
        with watch.making_masks():
            now += cost
        now += 0.6
    watch.step()
    assert watch.lap()["time/prior_share"] == pytest.approx(0.4 / 1.6)
    now += 1.0
    watch.step()
    assert "time/prior_share" not in watch.lap()


def test_a_plain_run_has_no_weights() -> None:
    assert named_losses({"student_rec": 1.0, "total": 1.0}, LossConfig()) == {
        "loss/student_rec": 1.0,
        "loss/total": 1.0,
    }
