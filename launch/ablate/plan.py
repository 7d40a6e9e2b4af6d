"""What is compared: variants of one configuration, each trained from the same seeds on the same samples."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from dist_train.config import RunConfig, load_run

FULL = ("task=distill",)
RUNGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("student alone", ("task=plain",)),
    "teacher": (
        "+ cascaded teacher",
        (*FULL, "prior={name: none}", "loss.spd.weight=0", "loss.sgr.weight=0"),
    ),
    "spf": ("+ SPF", (*FULL, "loss.spd.weight=0", "loss.sgr.weight=0")),
    "spd": ("+ SPD", (*FULL, "loss.sgr.weight=0")),
    "sgr": ("+ SGR: the full method", FULL),
}
"""Rungs of the ladder (Table 5 of the paper), each one part more: what it is, and the settings that make it so."""
CONTROLS = {
    "control": (
        "SPD's term towards the ground truth",
        (*FULL, "loss.sgr.weight=0", "loss.spd.towards=gt"),
    ),
}
"""Beside the ladder: what a rung's form alone would do."""

BEFORE = "before the options, right after CONFIG"
SET_HERE = ("name", "out", "seed", "task", "eval.teacher")


class Variant(NamedTuple):
    """One way to train."""

    name: str
    """First part of its runs' names."""
    group: str
    """Which comparison it belongs to: `ladder`, `priors` or the setting that is swept."""
    what: str
    """For people."""
    settings: tuple[str, ...]
    """`key.sub=value`, after the user's own."""


class Trial(NamedTuple):
    """One variant from one seed. Trials that come to the same settings share a run."""

    variant: Variant
    seed: int
    run: RunConfig
    arguments: tuple[str, ...]
    """Of launch.train."""


def make_variants(
    base: RunConfig, *, rungs: Sequence[str] = (), priors: Sequence[str] = (), sweeps: Sequence[str] = ()
) -> list[Variant]:
    """All that is asked for, in order.

    Args:
        base: the full method.
        rungs: keys of `RUNGS` and `CONTROLS`.
        priors: names, or sections `prior` as YAML (`{name: psp, weights: psp.pth}`): the full method with each.
        sweeps: `key.sub=VALUE,VALUE,...`: the full method with each, one setting at a time (Table 6).

    Raises:
        ValueError: nothing is asked for, a rung does not exist, or the base lacks what it would add.
    """
    if base.task not in ("plain", "distill"):
        raise ValueError(f"task={base.task}: the ladder is of task=distill")
    variants = [_rung(base, name) for name in rungs] + [_prior(base, text) for text in priors]
    for sweep in sweeps:
        variants += _sweep(sweep)
    if not variants:
        raise ValueError("nothing to compare: give --ladder, --priors NAME ... or --sweep key.sub=VALUE,VALUE,...")
    return variants


def _rung(base: RunConfig, name: str) -> Variant:
    known = RUNGS | CONTROLS
    if name not in known:
        raise ValueError(f"--rungs {name}: there are {', '.join(known)}; a setting for all runs stands {BEFORE}")
    term = {"control": "spd"}.get(name, name)
    if {"spd": base.loss.spd.weight, "sgr": base.loss.sgr.weight}.get(term) == 0:
        raise ValueError(f"--rungs {name}: loss.{term}.weight is 0, so that it adds nothing; give it a weight")
    if name not in ("plain", "teacher") and base.prior.name == "none":
        raise ValueError(f"--rungs {name}: prior.name=none gives it no masks; take another prior")
    what, settings = known[name]
    return Variant(name, "ladder", f"{what} ({base.prior.name})" if name == "spf" else what, settings)


def _prior(base: RunConfig, text: str) -> Variant:
    try:
        section = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--priors {text}: not YAML: {error}") from error
    if not isinstance(section, dict):
        if "=" in text:
            raise ValueError(f"--priors {text}: no prior; a setting for all runs stands {BEFORE}")
        # The configuration's own prior keeps its settings.
        section = base.prior.model_dump(mode="json") if text == base.prior.name else {"name": text}
    name = str(section.get("name"))
    settings = (*FULL, f"prior={json.dumps(section)}", *(("loss.sgr.weight=0",) if name == "none" else ()))
    called = "prior-" + (name if text == name else _slug(text))
    what = f"full method{' but for SGR' if name == 'none' else ''}, prior {text}"
    return Variant(called, "priors", what, settings)


def _sweep(text: str) -> list[Variant]:
    key, equals, listed = text.partition("=")
    try:
        values = yaml.safe_load(f"[{listed}]")
    except yaml.YAMLError as error:
        raise ValueError(f"--sweep {text}: the values are not YAML: {error}") from error
    if not equals or len(values) < 2:
        raise ValueError(
            f"--sweep {text}: write key.sub=VALUE,VALUE,..., for example loss.spd.weight=0.0005,0.005; a setting for "
            f"all runs stands {BEFORE}"
        )
    _check_free(key, "--sweep")
    shown = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return [
        Variant(_slug(f"{key}-{said}"), key, f"{key}={said}", (*FULL, f"{key}={json.dumps(value)}"))
        for said, value in zip(shown, values, strict=True)
    ]


def make_trials(
    config: str, overrides: Sequence[str], variants: Sequence[Variant], *, seeds: Sequence[int], out: Path
) -> list[Trial]:
    """The runs, seed by seed, so that what is done first can be compared.

    Args:
        config: YAML file of the full method.
        overrides: `key.sub=value` for all runs.
        variants: see `make_variants`.
        seeds: each variant is trained from each.
        out: folder that holds the runs' folders.

    Raises:
        ValueError: a setting is wrong, nothing validates, or runs would see different numbers of samples.
    """
    for override in overrides:
        _check_free(override.partition("=")[0], config)
    trials: list[Trial] = []
    known: dict[str, Trial] = {}
    for seed in seeds:
        for variant in variants:
            trial = _trial(config, overrides, variant, seed, out)
            same = known.setdefault(trial.run.model_dump_json(exclude={"name"}), trial)
            trials.append(trial._replace(run=same.run, arguments=same.arguments))
    samples = {trial.run.name: trial.run.optim.steps * trial.run.optim.global_batch for trial in trials}
    if len(set(samples.values())) > 1:
        raise ValueError(f"runs would see different numbers of samples, which compares nothing: {_listed(samples)}")
    names = [trial.run.name for trial in known.values()]
    if clashes := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"different settings come to one name: {', '.join(sorted(clashes))}")
    return trials


def _trial(config: str, overrides: Sequence[str], variant: Variant, seed: int, out: Path) -> Trial:
    forced = (f"name={variant.name}-s{seed}", f"out={out}", f"seed={seed}", "eval.teacher=true")
    settings = (*overrides, *variant.settings, *forced)
    try:
        run = load_run(config, settings)
    except ValueError as error:
        if variant.group != "priors":
            raise
        raise ValueError(f"{error}. --priors takes sections, too, such as '{{name: psp, weights: FILE}}'") from None
    if run.data.val is None:
        raise ValueError(f"{config}: data.val must be given: the comparison is of its pictures")
    if not run.eval.every:  # the teacher's lead is worth seeing on the way
        settings = (*settings, f"eval.every={-(-run.optim.steps // 5)}")
        run = load_run(config, settings)
    return Trial(variant, seed, run, (config, *settings))


def unique(trials: Sequence[Trial]) -> list[Trial]:
    """One trial for each run."""
    found: dict[str, Trial] = {}
    for trial in trials:
        found.setdefault(trial.run.name, trial)
    return list(found.values())


def _check_free(key: str, where: str) -> None:
    if key in SET_HERE:
        raise ValueError(f"{where}: {key} is set for each run; see --seeds, --out and --rungs")


def _listed(samples: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in samples.items())


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")
