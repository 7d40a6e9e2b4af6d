"""Tables of the page: what runs are, what they score, how they were set up."""

import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeVar

from dist_train.config import dump_run
from dist_train.evaluate import means
from dist_train.protocols import PROTOCOLS_SAY, present_name
from dist_train.report.curves import key
from dist_train.report.runs import PROTOCOLS, RunRecord

Name = TypeVar("Name")


def facts(records: Sequence[RunRecord]) -> str:
    """What the runs are and where they stand, and what could not be shown of them."""
    notes = "".join(
        f'<p class="note"><b>{escape(record.label)}</b>: {escape(note)}</p>'
        for record in records
        for note in record.notes
    )
    return table(records, [_facts(record) for record in records]) + notes


def _facts(record: RunRecord) -> dict[str, str]:
    run, env = record.config, record.env
    seconds = [line["time/step_s"] for line in record.metrics if "time/step_s" in line]
    done = int(max([record.step or 0, *(line["step"] for line in record.metrics)]))
    validated = next((line for line in reversed(record.metrics) if _cells_of(line)), {})
    said = {
        "Task": run.task,
        "Student": run.student.name,
        "Parameters": f"{env['parameters']['student']:,}" if "parameters" in env else "",
        "Prior": run.prior.name if run.task != "plain" else "",
        "Steps": f"{done:,} of {run.optim.steps:,}",
        "Samples seen": f"{done * run.optim.global_batch:,}",
        "Seconds a step, median": f"{statistics.median(seconds):.3g}" if seconds else "",
        "Ranks": str(env.get("world_size", "")),
        "Device": str(env.get("device", "")),
        "Commit": re.sub("(?<=[0-9a-f]{12})[0-9a-f]+", "", str(env.get("commit", ""))),
        "Pictures are of step": f"{record.step:,}" if record.step is not None else "none",
        "Validated at step": f"{validated['step']:,}" if validated else "never",
    }
    return said | {f"{protocol}: {of}": cell for (protocol, of), cell in _cells_of(validated).items()}


def scores(records: Sequence[RunRecord]) -> str:
    """Means over the pictures restored for this page: a row for each version, a column for each protocol."""
    if not any(record.rows for record in records):
        return ""
    number = " or ".join(map(str, sorted({len({row.key for row in record.rows}) for record in records if record.rows})))
    said = (
        f"PSNR in dB / SSIM by each run's newest checkpoint, means over pictures restored for this page ({number}). "
        "Collapsed: pictures that lost more than 3 dB of RGB PSNR against the input."
    )
    columns: dict[str, dict[str, str]] = {name: {} for name in (*PROTOCOLS, "collapsed")}
    for record in records:
        for (protocol, of), cell in _cells_of(means(record.rows)).items():
            if of != "lead":
                columns[protocol].setdefault(of if of == "input" else f"{record.label}: {of}", cell)
    best = {
        name: _best({of: cell for of, cell in cells.items() if of.endswith(": student")})
        for name, cells in columns.items()
    }
    body = "".join(
        f'<tr><th scope="row">{escape(of)}</th>'
        + "".join(_cell(cells.get(of, ""), best=of in best[name]) for name, cells in columns.items())
        + "</tr>"
        for of in columns[PROTOCOLS[0]]
    )
    meanings = "".join(f"<p><b>{name}</b>: {escape(PROTOCOLS_SAY[name])}.</p>" for name in PROTOCOLS)
    return (
        f'<p class="soft">{said}</p>{_scrolling("".join(f"<th scope=col>{name}</th>" for name in columns), body)}'
        f"<details><summary>What each protocol is</summary>{meanings}</details>"
    )


def configuration(records: Sequence[RunRecord]) -> str:
    """Settings in which the runs differ, and the whole of each."""
    flat = [_flat(record.config.model_dump(mode="json")) for record in records]
    named = {name: None for settings in flat for name in settings if name not in ("name", "out")}
    differing = [name for name in named if len({settings.get(name) for settings in flat}) > 1]
    said = ""
    if len(records) > 1:
        said = '<p class="soft">Settings in which the runs differ:</p>' if differing else "<p>All settings agree.</p>"
    if differing:
        said += table(records, [{name: settings.get(name, "-") for name in differing} for settings in flat])
    for record in records:
        name, text = escape(record.label), escape(dump_run(record.config))
        said += f'<details><summary>{name}, all settings</summary><pre tabindex="0">{text}</pre></details>'
    return said


def table(records: Sequence[RunRecord], columns: Sequence[Mapping[str, str]]) -> str:
    """A row for each name, a column for each run, in which the best of comparable scores stands out."""
    head = "".join(f'<th scope="col">{key(n)} {escape(record.label)}</th>' for n, record in enumerate(records))
    body = ""
    for name in {name: None for column in columns for name in column}:
        cells = {n: column.get(name, "") for n, column in enumerate(columns)}
        best = _best(cells) if name.endswith((": student", ": teacher")) else set()
        if any(cells.values()):
            row = "".join(_cell(cell, best=n in best) for n, cell in cells.items())
            body += f'<tr><th scope="row">{escape(name)}</th>{row}</tr>'
    return _scrolling(head, body)


def _scrolling(head: str, body: str) -> str:
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, *, best: bool) -> str:
    return f'<td class="best">{escape(text)}</td>' if best else f"<td>{escape(text)}</td>"


def _best(cells: Mapping[Name, str]) -> set[Name]:
    """Where the highest PSNR stands, if there are several to compare."""
    found = {name: float(cell.split(" / ")[0]) for name, cell in cells.items() if " / " in cell}
    return {name for name, value in found.items() if value == max(found.values())} if len(found) > 1 else set()


def _cells_of(scores: Mapping[str, float]) -> dict[tuple[str, str], str]:
    """Scores as `dist_train.evaluate.means` names them, as {(protocol or `collapsed`, version): cell}."""
    cells: dict[tuple[str, str], str] = {}
    for name, value in scores.items():
        match name.split("/"):
            case ["val", protocol, "psnr", of]:
                cells[present_name(protocol), of] = f"{value:.2f} / {scores[f'val/{protocol}/ssim/{of}']:.4f}"
            case ["val", "mcr", of]:
                cells["collapsed", of] = f"{value:.1f} %"
    return cells


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(tree, dict):
        return {prefix: str(tree)}
    return {
        name: value
        for part, content in tree.items()
        for name, value in _flat(content, f"{prefix}.{part}" if prefix else part).items()
    }
