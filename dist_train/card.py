"""The model card: README.md of an export, as the Hugging Face hub shows it, written from the card that is data."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from dist_train.protocols import PROTOCOLS_SAY, present_name

PROGRAMS = {
    "nafnet": ("NAFNet", "MIT, parts of it from BasicSR under Apache-2.0"),
    "rcdnet": ("RCDNet", "without a licence file, so all rights are its authors'"),
    "efficientderain": ("EfficientDerain", "MIT"),
    "uformer": ("Uformer", "MIT"),
}
"""Net -> what it is called, and the licence of its authors' release."""

VERSIONS = {"input": "degraded", "student": "restored"}


class Score(NamedTuple):
    """Means of one version of the validation pictures under one protocol."""

    protocol: str
    version: str
    psnr: float
    ssim: float | None


def scores_of(card: Mapping[str, Any]) -> list[Score]:
    """The scores in a card, which are logged as `val/<protocol>/psnr/<version>`; what else is there is left out."""
    held = card.get("scores", {})
    names = [name.split("/") for name in held]
    return [
        Score(present_name(protocol), version, held[f"val/{protocol}/psnr/{version}"],
              held.get(f"val/{protocol}/ssim/{version}"))
        for protocol, version in ((n[1], n[3]) for n in names if len(n) == 4 and (n[0], n[2]) == ("val", "psnr"))
        if version in VERSIONS
    ]  # fmt: skip


def readme(card: Mapping[str, Any], *, title: str, licence: str | None, pictures: Sequence[str]) -> str:
    """The text of README.md.

    Args:
        card: of an export, see `dist_train.export`.
        title: its heading.
        licence: of the weights, as the hub spells it, for example `mit`; None: it is left open, and the card says so.
        pictures: paths from the card's folder.
    """
    return f"---\n{yaml.safe_dump(_front(card, title, licence), sort_keys=False)}---\n\n" + "\n".join(
        line for section in (_head(card, title), _use(), _scores(card), _pictures(pictures), _origin(card),
                             _licence(card, licence), _configuration(card)) for line in section
    )  # fmt: skip


def _front(card: Mapping[str, Any], title: str, licence: str | None) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "restill",
        "pipeline_tag": "image-to-image",
        "tags": ["image-restoration", card["net"]["name"]],
    }
    if licence:
        front["license"] = licence
    metrics = [
        {"type": kind, "value": round(value, 4), "name": f"{kind.upper()} ({score.protocol})"}
        for score in scores_of(card)
        for kind, value in (("psnr", score.psnr), ("ssim", score.ssim))
        if score.version == "student" and value is not None
    ]
    if metrics:
        data = {"type": "validation", "name": _data(card, "val")}
        task = {"type": "image-to-image", "name": "Image restoration"}
        front["model-index"] = [{"name": title, "results": [{"task": task, "dataset": data, "metrics": metrics}]}]
    return front


def _head(card: Mapping[str, Any], title: str) -> Iterator[str]:
    net = PROGRAMS.get(card["net"]["name"], (card["net"]["name"], ""))[0]
    yield from (f"# {title}", "", f"A {net} of {card['parameters']:,} parameters that restores pictures.")
    if card.get("task") == "distill":
        yield "It was trained beside a teacher that sees semantic masks; masks and teacher are needed no more."
    yield from (f"Images: {card.get('images', 'RGB in [0,1]')}.", "")


def _use() -> Iterator[str]:
    yield from (
        "## Use", "",
        "```sh", "restill restore THIS_FOLDER INPUT OUTPUT", "```", "",
        "```python",
        "from dist_train.hub import RestillNet", "",
        'net = RestillNet.from_pretrained("this folder, or OWNER/NAME on the hub")',
        "restored = net(lq).clamp(0, 1)", "```", "",
    )  # fmt: skip


def _scores(card: Mapping[str, Any]) -> Iterator[str]:
    scores = scores_of(card)
    if not scores:
        return
    yield from (
        "## Scores", "", f"Means over the pictures of {_data(card, 'val')}.", "",
        "| protocol | pictures | PSNR, dB | SSIM |", "|---|---|---|---|",
    )  # fmt: skip
    for score in scores:
        ssim = "" if score.ssim is None else f"{score.ssim:.4f}"
        yield f"| {score.protocol} | {VERSIONS[score.version]} | {score.psnr:.2f} | {ssim} |"
    yield ""
    for protocol in dict.fromkeys(score.protocol for score in scores):
        yield f"- `{protocol}`: {PROTOCOLS_SAY.get(protocol, 'see the program that wrote it')}."
    yield ""


def _pictures(pictures: Sequence[str]) -> Iterator[str]:
    if pictures:
        yield from ("## Pictures", "", *(f"![{path}]({path})" for path in pictures), "")


def _origin(card: Mapping[str, Any]) -> Iterator[str]:
    weights = "moving average" if card.get("ema") else "as trained"
    facts = {
        "sha256 of the weights": card.get("sha256"),
        "made of the official file": (official := card.get("official")) and f"{official['file']} {official['sha256']}",
        "step": card.get("step") and f"{card['step']:,} ({card['samples_seen']:,} samples, weights: {weights})",
        "training data": "config" in card and _data(card, "train"),
        "validation data": "config" in card and _data(card, "val"),
        "commit of the program": card.get("commit"),
    }
    yield from ("## Origin", "", *(f"- {name}: {fact}" for name, fact in facts.items() if fact), "")


def _licence(card: Mapping[str, Any], licence: str | None) -> Iterator[str]:
    program, terms = PROGRAMS.get(card["net"]["name"], ("", ""))
    init = card.get("config", {}).get("init", {}).get("student")
    start = card.get("official", {}).get("file") or init
    yield from ("## Licence", "")
    yield f"- Weights: {licence or 'not stated; ask who trained them'}."
    if start:
        yield f"- They come from `{start}`, whose terms hold for them too."
    if program:
        yield f"- The net is written anew from its description. The authors' release of {program} is {terms}."
    yield from ("- The pictures trained on have terms of their own, which may bear on the weights.", "")


def _configuration(card: Mapping[str, Any]) -> Iterator[str]:
    shown = card.get("config") or {"student": card["net"]}
    yield from ("## Configuration", "", "```yaml", yaml.safe_dump(shown, sort_keys=False).rstrip(), "```", "")


def _data(card: Mapping[str, Any], part: str) -> str:
    """Where the data lay, and the fingerprint of its manifest."""
    path = card.get("config", {}).get("data", {}).get(part)
    held = card.get("data")
    mark = held.get(part) if isinstance(held, Mapping) else held if part == "train" else None
    return f"{path or 'data that is not named'}" + (f", manifest {mark}" if mark else "")
