"""How a value is decided, and what a person reads who made a mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.config import OptimConfig, changed_method, dump_run, load_run, parse_run, plan_batch
from dist_train.published import FILE

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("name: trial\ndata: {train: shards}\noptim: {lr: 1e-4}\nprior: {name: regions}\n")
    return path


def test_precedence_and_round_trip(config: Path) -> None:
    run = load_run(config, ["optim.steps=7", "data.crop_px=64", "track.wandb=off"])
    assert run.track.wandb == "off"  # which YAML reads as false
    assert run.optim.lr == 1e-4  # PyYAML reads it as a string
    assert (run.optim.steps, run.data.crop_px, run.optim.global_batch) == (7, 64, 8)
    import yaml

    assert parse_run(yaml.safe_load(dump_run(run)), source="dump") == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.sgr.wieght=1", "loss.sgr.wieght: no such setting; did you mean weight?"),
        ("optmi.lr=1", "optmi: no such setting; did you mean optim?"),
        ("optim.lr=-1", "optim.lr=-1: Input should be greater than 0"),
        ("optim.lr=true", "optim.lr=True: a number is wanted"),
        ("optim.steps=2.5", "optim.steps=2.5: Input should be a valid integer"),
        ("optim.lr=.inf", "optim.lr=inf: Input should be a finite number"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1=1.0: Input should be less than 1"),
        ("seed=true", "seed=True: Input should be a valid integer"),
        ("engine.zero_stage=4", "engine.zero_stage=4: Input should be less than or equal to 3"),
        ("data.crop_px.x=3", "data.crop_px"),
        ("optim.lr.x=3", "optim.lr is a value ('1e-4'), not a section"),
        ("prior.points_per_side=3", "prior.points_per_side: no such setting"),
        ("optim.lr", "an override is key.sub=value"),
        ("engine={precision: bf16, zero_stage: 0}", "needs engine.zero_stage=1, 2 or 3"),
        ("student={name: nafnet, enc_blk_nums: [1]}", "needs as many up as down"),
        (
            "student={name: nafnet, stages: 3}",
            "student.stages: no such setting; known here: dec_blk_nums, enc_blk_nums",
        ),
        ("student.width=8", "student.name: must be one of custom, efficientderain, nafnet, rcdnet, uformer"),
        ("student.name=nafent", "student.name: 'nafent' is none of"),
        ("prior.name=cached", "prior.of: must be given"),
        ("prior={name: cached, of: {scale: 3}}", "prior.of.name: must be one of"),
        ("prior={name: cached, of: {name: cached}}", "prior.of.name: 'cached' is none of"),
        ("prior={name: cached, of: {name: sam, modle: vit_b}}", "prior.of.modle: no such setting; did you mean model?"),
        (
            "prior={name: cached, of: {name: regions}, refrsh: 2}",
            "prior.refrsh: no such setting; did you mean refresh?",
        ),
        ("prior={name: cached, of: {name: regions, num_masks: 0}}", "prior.of.num_masks=0: Input should be greater"),
        ("prior={name: cached, of: {name: regions, num_masks: 8}}", "of.num_masks=8 must not be below num_masks=32"),
        (
            "prior={name: remote, of: {name: sam}, servers: ['a:1'], timeout_s: 1800}",
            "prior.timeout_s=1800 must be below engine.hang_timeout_s=1800",
        ),
    ],
)
def test_mistakes_are_named(config: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match="run.yaml|override|section") as caught:
        load_run(config, [override])
    assert message in str(caught.value)


def test_priors_that_cannot_be_where_or_of_what_they_should_are_refused(config: Path) -> None:
    sam = "{name: sam, dtype: fp16}"
    for prior, where in ((sam, "prior"), (f"{{name: cached, of: {sam}}}", "prior.of")):
        with pytest.raises(ValueError, match=rf"{where}.dtype=fp16 needs a GPU, and engine.device=cpu"):
            load_run(config, ["engine.device=cpu", f"prior={prior}"])
    load_run(config, ["engine.device=cpu", f"prior={{name: remote, of: {sam}, servers: ['gpu7:1']}}"])
    cached = ["prior={name: cached, of: {name: regions}}", "student={name: rcdnet, batch_norm: rank}"]
    with pytest.raises(ValueError, match="differ from rank to rank; set student.batch_norm=synced"):
        load_run(config, cached)
    load_run(config, [*cached, "student.batch_norm=synced"])


def test_a_missing_or_broken_file_is_named(tmp_path: Path, config: Path) -> None:
    with pytest.raises(ValueError, match=r"no configuration .*nope\.yaml; there are .*run\.yaml"):
        load_run(tmp_path / "nope.yaml")
    config.write_text("a: [b-{0..3}.tar: 1")
    with pytest.raises(ValueError, match="is not YAML"):
        load_run(config)


def test_batch_plan_divides_or_says_what_would() -> None:
    assert plan_batch(OptimConfig(global_batch=8, batch_per_rank=2), 2) == (8, 2, 2)
    with pytest.raises(ValueError, match=r"cannot be shared by 3 ranks; start \[1, 2, 4, 8\] ranks"):
        plan_batch(OptimConfig(global_batch=8), 3)
    with pytest.raises(ValueError, match=r"batch_per_rank=4 does not divide the 2 samples.*\[1, 2\]"):
        plan_batch(OptimConfig(global_batch=8, batch_per_rank=4), 4)


def test_another_method_or_stream_is_told_apart_from_another_path(config: Path) -> None:
    before = load_run(config)
    for override in ("optim.steps=9", "optim.lr=1", "features.weights=elsewhere.pth", "engine.zero_stage=3"):
        assert changed_method(before, load_run(config, [override])) == []
    now = load_run(config, ["loss.spd.weight=1", "data.crop_px=64", "prior={name: sam}"])
    changes = changed_method(before, now)
    assert {"loss.spd.weight=0.005 is now 1.0", "data.crop_px=128 is now 64"} <= set(changes)
    assert "prior.name=regions is now sam" in changes


def test_a_prior_inside_another_is_compared_like_any(config: Path) -> None:
    before = load_run(config, ["prior={name: cached, of: {name: sam}}"])
    for setting in ("of.checkpoint=elsewhere.pth", "of.download=true", "memory_mib=1"):
        assert (
            changed_method(before, load_run(config, ["prior={name: cached, of: {name: sam}}", f"prior.{setting}"]))
            == []
        )
    now = load_run(config, ["prior={name: cached, refresh: 2, of: {name: sam, model: vit_b}}"])
    assert changed_method(before, now) == ["prior.of.model=vit_h is now vit_b", "prior.refresh=10 is now 2"]


@pytest.mark.parametrize("path", sorted({*(ROOT / "configs").glob("*.yaml")} - {FILE}), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    load_run(path)


def test_configuration_needs_no_torch() -> None:
    code = "import sys, dist_train.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
