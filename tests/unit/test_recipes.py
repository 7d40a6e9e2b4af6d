"""The recipes in configs/official and configs/paper say what the authors' code and papers say.

The tables here were read from the official training scripts and papers, not from the configurations.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import ConditioningConfig, RunConfig, load_run, plan_batch
from dist_train.published import FILE

pytestmark = pytest.mark.unit

CONFIGS = Path(__file__).parents[2] / "configs"

RCDNET = {
    "data.crop_px": 64, "data.flips": "horizontal", "data.mixup": None, "data.rainmix": None,
    "loss.rec": "rcdnet", "optim.global_batch": 16, "optim.name": "adam", "optim.lr": 1e-3, "optim.betas": (0.9, 0.999),
    "optim.weight_decay": 0, "optim.schedule": "step", "optim.step_gamma": 0.2, "optim.clip_norm": 0,
    "optim.warmup_steps": 0, "student.batch_norm": "rank", "eval.protocol": "did_ddn",
    "student.num_stages": 17, "student.num_m": 32, "student.num_z": 32, "student.num_res_blocks": 4,
}  # fmt: skip
EFFICIENTDERAIN = {
    "data.crop_px": 256, "data.flips": "none", "data.mixup": None, "loss.rec": "l1_ssim", "optim.global_batch": 16,
    "optim.name": "adam", "optim.lr": 2e-4, "optim.betas": (0.5, 0.999), "optim.weight_decay": 0,
    "optim.schedule": "linear", "optim.min_lr": 0, "optim.clip_norm": 0, "student.kernel_px": 3,
    "optim.warmup_steps": 0, "student.base_width": 64,
}  # fmt: skip
UFORMER_B = {
    "data.flips": "all", "data.rainmix": None, "loss.rec": "charbonnier", "optim.name": "adamw", "optim.lr": 2e-4,
    "optim.betas": (0.9, 0.999), "optim.weight_decay": 0.02, "optim.schedule": "cosine", "optim.min_lr": 1e-6,
    "optim.clip_norm": 0, "engine.precision": "fp16", "student.embed_dim": 32,
    "student.depths": (1, 2, 8, 8, 2, 8, 8, 2, 1), "student.win_size": 8, "student.modulator": True,
    "student.drop_path_rate": 0.1, "student.num_heads": (1, 2, 4, 8, 16, 16, 8, 4, 2), "student.mlp_ratio": 4.0,
    "student.shift": True,
}  # fmt: skip
NAFNET = {
    "data.crop_px": 256, "data.flips": "all", "data.mixup": None, "data.rainmix": None, "loss.rec": "psnr",
    "optim.global_batch": 32, "optim.name": "adamw", "optim.lr": 1e-3, "optim.betas": (0.9, 0.9),
    "optim.schedule": "cosine", "optim.min_lr": 1e-7, "optim.warmup_steps": 0, "optim.clip_norm": 0.01,
    "engine.precision": "fp32",
}  # fmt: skip
GOPRO = {
    "student.enc_blk_nums": (1, 1, 1, 28), "student.middle_blk_num": 1, "student.dec_blk_nums": (1, 1, 1, 1),
    "student.tlc_train_px": 256, "optim.weight_decay": 1e-3, "eval.protocol": "gopro",
}  # fmt: skip
SIDD = {
    "student.enc_blk_nums": (2, 2, 4, 8), "student.middle_blk_num": 12, "student.dec_blk_nums": (2, 2, 2, 2),
    "student.tlc_train_px": 0, "optim.weight_decay": 0, "eval.protocol": "gopro",
}  # fmt: skip

OFFICIAL: dict[str, dict[str, Any]] = {
    "derain_rcdnet": RCDNET | {"optim.steps": 100 * 1000, "optim.step_every": 25 * 1000, "student.layout": "official"},
    "derain_rcdnet_simple": RCDNET
    | {"optim.steps": 100 * 1500, "optim.step_every": 25 * 1500, "student.layout": "simple"},
    **{
        f"derain_efficientderain_{data}": EFFICIENTDERAIN
        | {"optim.steps": epochs * pairs // 16, "optim.decay_from": constant * pairs // 16, "data.rainmix": None}
        for data, pairs, epochs, constant in (
            ("rain100H", 1800, 5000, 2000),
            ("rain100L", 200, 20000, 500),
            ("rain1400", 12600, 250, 50),
            ("spa", 638492, 20, 7),
        )
    },
    "derain_efficientderain_rainmix": EFFICIENTDERAIN
    | {"optim.steps": 5000 * 1800 // 16, "optim.decay_from": 2000 * 1800 // 16, "data.rainmix.clean": 4 / 11},
    "deblur_uformer_b": UFORMER_B
    | {
        "data.crop_px": 256, "optim.global_batch": 8, "optim.steps": 3000 * 2103 // 8, "data.mixup": None,
        "optim.warmup_steps": 3 * 2103 // 8, "student.img_size": 256,
    },
    "denoise_uformer_b": UFORMER_B
    | {
        "data.crop_px": 128, "optim.global_batch": 32, "optim.steps": 250 * 320 * 300 // 32, "student.img_size": 128,
        "optim.warmup_steps": 3 * 320 * 300 // 32, "data.mixup.alpha": 1.2, "data.mixup.from_step": 5 * 320 * 300 // 32,
    },
    "deblur_nafnet_w32": NAFNET | GOPRO | {"student.width": 32, "optim.steps": 200_000},
    "deblur_nafnet_w64": NAFNET | GOPRO | {"student.width": 64, "optim.steps": 400_000},
    "denoise_nafnet_w32": NAFNET | SIDD | {"student.width": 32, "optim.steps": 200_000},
    "denoise_nafnet_w64": NAFNET | SIDD | {"student.width": 64, "optim.steps": 400_000},
}  # fmt: skip

PAPER_PAIRS = {"rain200H": 1800, "gopro": 2103, "sensenoise": 500}


def value(run: RunConfig, key: str) -> Any:
    found: Any = run
    for part in key.split("."):
        found = getattr(found, part)
    return found


def recipes(folder: str) -> dict[str, RunConfig]:
    return {path.stem: load_run(path) for path in sorted((CONFIGS / folder).glob("*.yaml"))}


def test_every_official_recipe_is_checked() -> None:
    assert recipes("official").keys() == OFFICIAL.keys()


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_recipe_says_what_the_authors_do(name: str) -> None:
    run = load_run(CONFIGS / "official" / f"{name}.yaml")
    wanted = OFFICIAL[name] | {"task": "plain", "name": name, "optim.ema_decay": 0, "data.progressive": ()}
    assert {key: value(run, key) for key in wanted} == wanted


def test_the_paper_s_setting_is_adam_batch_8_200_epochs_for_every_net() -> None:
    runs = {name: run for name, run in recipes("paper").items() if run.task != "conditioned"}
    assert {run.student.name for run in runs.values()} == {"rcdnet", "efficientderain", "uformer", "nafnet"}
    official_loss = {"rcdnet": "rcdnet", "efficientderain": "l1_ssim", "uformer": "charbonnier", "nafnet": "psnr"}
    for name, run in runs.items():
        assert (run.task, run.name, run.prior.name, run.teacher.net) == ("distill", name, "sam", None)
        assert (run.optim.name, run.optim.global_batch) == ("adam", 8)
        assert run.optim.steps == 200 * PAPER_PAIRS[name.split("_")[1]] // 8
        assert (run.loss.spd.weight, run.loss.sgr.weight) == (0.005, 200.0)
        assert run.loss.rec == official_loss[run.student.name]


def test_sam_deblur_s_three_say_what_its_authors_do() -> None:
    runs = {name: run for name, run in recipes("paper").items() if run.task == "conditioned"}
    wanted = NAFNET | GOPRO | {"student.width": 32, "optim.steps": 200_000, "seed": 42, "prior.name": "stored"}
    wanted |= {"conditioning.grouping": "grey", "optim.ema_decay": 0, "data.progressive": ()}
    methods = {"cat": {"method": "cat"}, "map": {"mask_dropout": 0.0}, "samdeblur": {"mask_dropout": 0.5}}
    assert runs.keys() == {f"deblur_gopro_nafnet_w32_{method}" for method in methods}
    for method, fields in methods.items():
        run = runs[f"deblur_gopro_nafnet_w32_{method}"]
        assert {key: value(run, key) for key in wanted} == wanted
        assert run.conditioning == ConditioningConfig.model_validate(fields)


def test_every_configuration_is_read_and_its_batch_fits_its_ranks() -> None:
    for path in sorted({*CONFIGS.rglob("*.yaml")} - {FILE}):
        run = load_run(path)
        assert run.name == path.stem, path
        gpus = re.search(r"_(\d+)gpu$", path.stem)
        plan = plan_batch(run.optim, int(gpus[1]) if gpus else 1)
        assert plan.grad_accum == 1 and plan.global_batch == run.optim.global_batch, path


def test_64_gpus_see_as_many_samples_at_the_rate_of_the_square_root_rule() -> None:
    one, eight, many = (load_run(CONFIGS / f"scale/derain_{gpus}gpu.yaml") for gpus in (1, 8, 64))
    paper = load_run(CONFIGS / "paper/derain_rain200H_efficientderain.yaml")
    assert [run.model_copy(update={"name": ""}) for run in (one, eight)] == [paper.model_copy(update={"name": ""})] * 2
    assert plan_batch(eight.optim, 8).batch_per_rank == plan_batch(many.optim, 64).batch_per_rank == 1
    growth = many.optim.global_batch / one.optim.global_batch
    assert many.optim.steps * many.optim.global_batch == one.optim.steps * one.optim.global_batch
    assert many.optim.lr == pytest.approx(one.optim.lr * growth**0.5, rel=0.01) and many.optim.warmup_steps > 0
    changed = {"name": "", "optim": one.optim, "eval": one.eval, "checkpoint": one.checkpoint}
    assert many.model_copy(update=changed) == one.model_copy(update=changed)
