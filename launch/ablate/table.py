"""The comparison as text and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_train.published import Published
from launch.ablate.plan import Variant
from launch.ablate.scores import Score
from launch.ablate.statistics import Estimate, estimate, paired

NETS, METRICS = ("student", "teacher"), ("psnr", "ssim")
FIT = "fit/psnr"
DIGITS = {"psnr": 2, "ssim": 4}


@dataclass(frozen=True)
class Row:
    """One variant over its seeds."""

    variant: str
    group: str
    what: str
    seeds: tuple[int, ...]
    means: dict[str, Estimate]
    """`<net>/<metric>` and `fit/psnr`, see `Score`, and `lead/<metric>`: the teacher over its own student."""
    gains: dict[str, Estimate]
    """`<net>/<metric>` over the plain student of the same seed; `fit/psnr` over its."""
    step_s: float
    """Median time of a step, mean over seeds."""
    dots: dict[str, dict[int, float]]
    """`<net>/psnr` of each seed."""


def make_rows(variants: Sequence[Variant], scores: Sequence[Score]) -> list[Row]:
    """Compare: means over seeds, and differences to `plain` paired by seed. Variants without a finished run are left
    out.

    Raises:
        ValueError: runs saw different numbers of samples, or were scored under different protocols.
    """
    for what, told in (("samples", {s.samples for s in scores}), ("protocols", {s.protocol for s in scores})):
        if len(told) > 1:
            raise ValueError(f"the runs' records tell of different {what}, {sorted(told)}; that compares nothing")
    plain = {score.seed: score.values for score in scores if score.variant == "plain"}
    rows = []
    for variant in variants:
        mine = {score.seed: score for score in scores if score.variant == variant.name}
        if mine:
            rows.append(_row(variant, mine, plain))
    return rows


def _row(variant: Variant, mine: dict[int, Score], plain: dict[int, dict[str, float]]) -> Row:
    values = {seed: dict(score.values) for seed, score in mine.items()}
    for found in values.values():
        if "teacher/psnr" in found:
            found |= {f"lead/{metric}": found[f"teacher/{metric}"] - found[f"student/{metric}"] for metric in METRICS}
    by_name = {
        name: {seed: found[name] for seed, found in values.items() if name in found}
        for name in [*(f"{net}/{metric}" for net in ("input", *NETS, "lead") for metric in METRICS), FIT]
    }
    gains = {}
    against = {f"{net}/{metric}": f"student/{metric}" for net in NETS for metric in METRICS} | {FIT: FIT}
    for name, other in against.items():
        base = {seed: found[other] for seed, found in plain.items() if other in found}
        gain = paired(by_name[name], base)
        if gain is not None and variant.name != "plain":
            gains[name] = gain
    return Row(
        variant.name,
        variant.group,
        variant.what,
        tuple(mine),
        {name: estimate(list(found.values())) for name, found in by_name.items() if found},
        gains,
        estimate([score.step_s for score in mine.values()]).mean,
        {name: found for name, found in by_name.items() if found and name.endswith("/psnr")},
    )


def markdown(rows: Sequence[Row], *, protocol: str, data: str, published: Sequence[Published] = ()) -> str:
    """A table for each comparison, and what its numbers mean.

    Args:
        rows: at least one.
        protocol: of all scores.
        data: validation pictures.
        published: rows of the paper's ladder, by the rungs' names.
    """
    told = {row.row: row for row in published}
    seeds = sorted({seed for row in rows for seed in row.seeds})
    lines = [
        f"{data}, protocol {protocol}, seeds {', '.join(map(str, seeds))}. PSNR in dB / SSIM; mean over seeds +- half "
        "the 95 % interval (Student's t). Gains are over the plain student of the same seed, paired; a gain whose "
        "interval holds 0 shows nothing. The lead is of the teacher over its own student."
        + (
            " The fit is the PSNR of the student's training crops over the last quarter of the steps, each scored "
            "before the step that learns from it."
            if any(FIT in row.gains for row in rows)
            else ""
        )
    ]
    given = {name: value._replace(half=None) for name, value in rows[0].means.items()}  # the same for every seed
    lines += ["", f"degraded: {_both(given, 'input')}"]
    for group in dict.fromkeys(row.group for row in rows):
        some = [row for row in rows if row.group == group]
        beside = group == "ladder" and any(row.variant in told for row in some)
        fit = any(FIT in row.gains for row in some)
        titles = ["run", "what", "student", "gain dB", *(["fit gain dB"] if fit else []), "teacher", "gain dB"]
        titles += ["lead dB", "s/step", *(["published"] if beside else [])]
        lines += ["", f"## {group}", "", _line(titles), _line(["---"] * len(titles))]
        for row in some:
            cells = [row.variant, row.what]
            for net in NETS:
                cells += [_both(row.means, net), _gain(row.gains, f"{net}/psnr")]
                cells += [_gain(row.gains, FIT)] if fit and net == "student" else []
            cells += [_gain(row.means, "lead/psnr"), f"{row.step_s:.3g}"]
            if beside:
                cells.append(_published(told[row.variant]) if row.variant in told else "")
            lines.append(_line(cells))
        if beside:
            lines += ["", *(f"published, {row.name}: {row.source}; data {row.data}. {row.remark}" for row in published)]
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row], *, protocol: str, data: str, published: Sequence[Published] = ()) -> str:
    """The same and each seed's score, for programs."""
    tree: dict[str, Any] = {"data": data, "protocol": protocol, "rows": []}
    for row in rows:
        plain = asdict(row)
        for part in ("means", "gains"):
            plain[part] = {name: value._asdict() for name, value in getattr(row, part).items()}
        tree["rows"].append(plain)
    tree["published"] = [row.model_dump(exclude_none=True) for row in published]
    return json.dumps(tree, indent=1) + "\n"


def _both(values: dict[str, Estimate], net: str) -> str:
    """PSNR / SSIM of one net; empty if there is none."""
    names = {metric: f"{net}/{metric}" for metric in METRICS}
    return " / ".join(_one(values[name], f".{DIGITS[metric]}f") for metric, name in names.items() if name in values)


def _gain(values: dict[str, Estimate], name: str) -> str:
    return _one(values[name], "+.2f") if name in values else ""


def _one(value: Estimate, spec: str) -> str:
    text = format(value.mean, spec)
    return text if value.half is None else f"{text} +- {format(value.half, spec.lstrip('+'))}"


def _published(row: Published) -> str:
    found = [f"{row.values[metric]:.{DIGITS[metric]}f}" for metric in METRICS if metric in row.values]
    return f"{' / '.join(found)} (published)"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
