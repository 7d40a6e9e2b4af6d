"""The page: one HTML file that holds all it shows and asks no network for anything."""

import base64
import math
from collections.abc import Callable, Sequence
from html import escape

from dist_train.report import tables
from dist_train.report.assets import SCRIPT, STYLE
from dist_train.report.curves import Curve, chart, key
from dist_train.report.runs import ERROR_RANGE, RunRecord, Shown, Version
from shards.codec import encode_webp

SECTIONS = {
    "val": "Quality on the validation pictures",
    "loss": "Loss terms",
    "gradient_ratio": "Gradient of each term over the reconstruction's, at the student's output",
    "gradient": "Gradient of each term, at the student's output",
    "lead": "How far the teacher is ahead on the crops it is trained on",
    "prior": "The prior",
    "time": "Speed",
    "memory": "Memory",
}
"""First part of a metric's name -> heading. The first two are open; all other names come last, under their own."""
OPEN = ("val", "loss")
DASHES = {"student": "", "teacher": "7 4"}
WEBP_LEVEL = 1


def render(records: Sequence[RunRecord], pictures: Sequence[Shown], *, made: str) -> str:
    """The page, as text.

    Args:
        records: at least one.
        pictures: of `dist_train.report.runs.restore_pictures`.
        made: when and by what, for the last line.
    """
    title = escape(", ".join(record.label for record in records))
    sections = {
        "Runs": tables.facts(records),
        "Scores": tables.scores(records),
        "Pictures": _pictures(pictures),
        "Curves": _curves(records),
        "Configuration": tables.configuration(records),
    }
    sections = {name: html for name, html in sections.items() if html}
    links = "".join(f'<a href="#{name}">{name}</a>' for name in sections)
    body = "".join(f'<section id="{name}"><h2>{name}</h2>{html}</section>' for name, html in sections.items())
    # Whatever a name or a configuration might bring in, the browser shall load nothing.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header><h1>{title}</h1><nav>{links}</nav><button id="theme" type="button">Light or dark</button></header>
<main>{body}</main>
<footer class="soft"><p>{escape(made)}</p></footer>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _pictures(pictures: Sequence[Shown]) -> str:
    """How to look at them, and each with a slider."""
    if not pictures:
        return ""
    errors = f'<span class="ramp"></span> 0 to {ERROR_RANGE} grey levels or more'
    return (
        '<p class="soft">Move the line with the mouse, a finger or the arrow keys; choose what stands on either side. '
        f"PSNR is of RGB, of the whole picture. Colours of an error map, mean over the channels: {errors}.</p>"
    ) + "".join(_picture(picture) for picture in pictures)


def _picture(picture: Shown) -> str:
    """A slider over two versions, and all versions below it, which hold the data of the pictures."""
    versions = sorted(picture.versions, key=_place(picture.versions))
    names = [" ".join(filter(None, (version.of, version.what))) for version in versions]
    restored = next(n for n, version in enumerate(versions) if version.what == "student")
    choices = [
        "".join(
            f'<option value="{n}"{" selected" if n == chosen else ""}>{escape(name)}</option>'
            for n, name in enumerate(names)
        )
        for chosen in (0, restored)
    ]
    strip = "".join(
        f'<button type="button"><img src="{_data(version)}" alt="{escape(name)}"><span>{escape(version.what)}'
        f"{f' <b>{version.psnr_db:.2f} dB</b>' if version.psnr_db is not None else ''}"
        f"{f'<br><small>{escape(version.of)}</small>' if version.of else ''}</span></button>"
        for name, version in zip(names, versions, strict=True)
    )
    where = escape(", ".join(filter(None, (picture.data, picture.part))))
    h, w = versions[0].rgb_u8.shape[:2]
    return f"""<article class="picture"><h3>{escape(picture.key)} <span class="soft">{where}</span></h3>
<div class="choice"><label>left <select>{choices[0]}</select></label>
<label>right <select>{choices[1]}</select></label></div>
<div class="slider" style="max-width:min(100%,{max(w, 480)}px,{round(w / h * 75)}vh)"><img alt=""><img alt=""><i></i>
<input type="range" min="0" max="100" value="50" aria-label="where left and right meet, {escape(picture.key)}"></div>
<div class="strip">{strip}</div></article>
"""


def _place(versions: Sequence[Version]) -> Callable[[Version], tuple[int, int]]:
    """Degraded first, clean last, between them run by run."""
    runs = list(dict.fromkeys(version.of for version in versions if version.of))
    whats = ("degraded", "student", "teacher", "error", "masks", "clean")
    last = len(runs)
    return lambda version: (
        runs.index(version.of) if version.of else {"degraded": -1, "clean": last}[version.what],
        whats.index(version.what),
    )


def _data(version: Version) -> str:
    return "data:image/webp;base64," + base64.b64encode(encode_webp(version.rgb_u8, level=WEBP_LEVEL)).decode()


def _curves(records: Sequence[RunRecord]) -> str:
    """A chart for everything that was logged and was not always the same, all runs in each."""
    charts: dict[str, dict[str, list[Curve]]] = {}
    always: dict[str, set[float]] = {}
    for n, record in enumerate(records):
        for name in sorted({name for line in record.metrics for name in line} - {"step", "epoch", "samples_seen"}):
            points = [(line["step"], line[name]) for line in record.metrics if math.isfinite(line.get(name, math.nan))]
            values = {value for _, value in points}
            head, _, rest = name.partition("/")
            if head == "val" and name.endswith("/input"):  # nothing to follow, and far below the rest
                continue
            if len(values) < 2 and head not in OPEN:
                always.setdefault(name, set()).update(values)
                continue
            # Student and teacher share a chart: val/rgb/psnr/student, .../teacher.
            shared, _, of = name.rpartition("/") if head == "val" and not name.endswith("/lead") else (name, "", "")
            label = " ".join(filter(None, (record.label if len(records) > 1 else "", of))) or name
            if points:
                curves = charts.setdefault(head if rest else "", {}).setdefault(shared, [])
                curves.append(Curve(label, points, run=n, dash=DASHES.get(of, "")))
    legend = "".join(f'<span class="key">{key(n)} {escape(record.label)}</span>' for n, record in enumerate(records))
    legend += "".join(f'<span class="key">{key(None, dash)} {of}</span>' for of, dash in DASHES.items())
    html = f'<p class="soft">{legend}</p>'
    for head in sorted(charts, key=lambda head: ([*SECTIONS].index(head) if head in SECTIONS else 99, head)):
        figures = "".join(_figure(name, curves) for name, curves in sorted(charts[head].items()))
        summary = f"<summary>{escape(SECTIONS.get(head, head) or 'The rest')}</summary>"
        html += f'<details{" open" if head in OPEN else ""}>{summary}<div class="charts">{figures}</div></details>'
    if always:
        said = ", ".join(f"{name} {' or '.join(f'{v:g}' for v in sorted(always[name]))}" for name in sorted(always))
        html += f'<p class="soft">Always the same: {escape(said)}</p>'
    return html if charts else ""


def _figure(name: str, curves: Sequence[Curve]) -> str:
    last = ", ".join(f"{curve.label} {curve.points[-1][1]:.4g}" for curve in curves)
    said = f"at the end: {last}"
    return (
        f"<figure><figcaption>{escape(name)}</figcaption>{chart(curves, title=f'{name} over steps, {said}')}"
        f"<output>{escape(said)}</output></figure>"
    )
