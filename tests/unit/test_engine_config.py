"""What DeepSpeed is told, and the learning rate of every step."""

import math

import pytest

from dist_train.config import OptimConfig, plan_batch
from dist_train.engine import deepspeed_config
from dist_train.ranks import start_ranks
from dist_train.schedule import learning_rate
from tests.helpers.tasks import tiny_run

pytestmark = pytest.mark.unit


def test_deepspeed_is_left_no_default_that_matters() -> None:
    run = tiny_run(optim={"batch_per_rank": 1, "global_batch": 4}, engine={"zero_stage": 1, "precision": "bf16"})
    config = deepspeed_config(run, plan_batch(run.optim, 2))
    assert config["gradient_clipping"] == 0.0  # DeepSpeed's own default of 1.0 would couple the nets
    assert config["train_batch_size"] == 4 and config["gradient_accumulation_steps"] == 2
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert config["zero_optimization"]["stage"] == 1


def test_schedules() -> None:
    cosine = OptimConfig(steps=110, lr=1.0, min_lr=0.1, warmup_steps=10)
    assert learning_rate(cosine, 0) == pytest.approx(1 / 11)
    assert learning_rate(cosine, 10) == pytest.approx(1.0)
    assert learning_rate(cosine, 60) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert learning_rate(cosine, 110) == pytest.approx(0.1)
    linear = OptimConfig(steps=100, lr=1.0, min_lr=0.0, schedule="linear", decay_from=50)
    assert [learning_rate(linear, step) for step in (0, 50, 75, 100)] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    steps = OptimConfig(steps=100, lr=1.0, min_lr=0.0, schedule="step", step_every=25, step_gamma=0.2)
    assert [learning_rate(steps, step) for step in (24, 25, 50)] == pytest.approx([1.0, 0.2, 0.04])
    assert learning_rate(OptimConfig(lr=0.5, schedule="constant"), 999) == 0.5


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "launcher says zero_stage=3 and the run engine.zero_stage=2"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "launcher says mixed_precision=bf16 and the run engine.precision=fp32"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "launcher says gradient_clipping=1.0 and the run optim.clip_norm=0.0"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "launcher says gradient_accumulation_steps=4"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "launcher says deepspeed_config_file=ds.json"),
    ],
)
def test_a_launcher_that_contradicts_the_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        start_ranks(tiny_run())
