"""Names of what is logged, and the warning of a term that is dead or drowns the others."""

import logging

import pytest

from dist_train.config import LossConfig
from dist_train.meters import named_losses

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


def test_a_plain_run_has_no_weights() -> None:
    assert named_losses({"student_rec": 1.0, "total": 1.0}, LossConfig()) == {
        "loss/student_rec": 1.0,
        "loss/total": 1.0,
    }
