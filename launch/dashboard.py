"""A wandb workspace for runs, as it is written here: `python -m launch.dashboard RUN ...`."""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import yaml

from launch.command import program
from launch.console import run_main

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


class Panel(NamedTuple):
    """One panel of a dashboard."""

    title: str
    keys: tuple[str, ...]
    """As runs log them; `{protocol}` and `{picture}` stand for each that the runs have."""
    kind: Literal["lines", "shares", "pictures"] = "lines"
    """Over the steps: a line for each key; or what each has of their sum, as areas; or pictures."""
    log: bool = False
    """A logarithmic axis."""


PHASES = (
    "data", "student", "prior", "teacher", "features", "losses", "backward", "communication", "update", "other",
)  # fmt: skip

DASHBOARD: Mapping[str, tuple[Panel, ...]] = {
    "Training health": (
        Panel("reconstruction", ("loss/student_rec", "loss/teacher_rec")),
        Panel("how far the teacher is ahead on crops, dB", ("lead/psnr",)),
        Panel("share of crops on which it is", ("lead/share",)),
        Panel("SPD, unweighted", ("loss/spd",), log=True),
        Panel("SGR, unweighted", ("loss/sgr",), log=True),
        Panel("gradient over the reconstruction's", ("gradient_ratio/spd", "gradient_ratio/sgr"), log=True),
        Panel("gradient at the student's output", ("gradient/student_rec", "gradient/spd", "gradient/sgr"), log=True),
        Panel("total", ("loss/total",)),
        Panel("learning rate", ("lr",)),
        Panel("weights of terms", ("weight/spd", "weight/sgr")),
        Panel("skipped steps", ("skipped_steps",)),
    ),
    "Quality": (
        Panel(
            "PSNR, {protocol} (dB)",
            ("val/{protocol}/psnr/student", "val/{protocol}/psnr/teacher", "val/{protocol}/psnr/input"),
        ),
        Panel("teacher's lead in PSNR, {protocol} (dB)", ("val/{protocol}/psnr/lead",)),
        Panel(
            "SSIM, {protocol}",
            ("val/{protocol}/ssim/student", "val/{protocol}/ssim/teacher", "val/{protocol}/ssim/input"),
        ),
        Panel("teacher's lead in SSIM, {protocol}", ("val/{protocol}/ssim/lead",)),
        Panel("collapsed pictures (%)", ("val/mcr/student", "val/mcr/teacher")),
        Panel("validation pictures", ("pictures/val/{picture}",), kind="pictures"),
    ),
    "Throughput": (
        Panel("samples/s", ("time/samples_per_s",)),
        Panel("seconds a step", ("time/step_s",)),
        Panel("where a step goes", tuple(f"time/{phase}_s" for phase in PHASES), kind="shares"),
        Panel("the prior's (SAM's) share of a step", ("time/prior_share",)),
        Panel("TFLOP/s of a rank", ("time/tflops",)),
        Panel("share of what the GPU could do", ("time/mfu",)),
        Panel("slowest rank over the median", ("time/spread",)),
        Panel("slowest rank", ("time/slowest_rank",)),
        Panel("aside (s)", ("time/validation_s", "time/pictures_s", "time/checkpoint_s")),
    ),
    "Data health": (
        Panel("bad samples", ("bad_samples",)),
        Panel("waiting for data (s a step)", ("time/data_s",)),
        Panel("epoch", ("epoch",)),
        Panel("samples seen", ("samples_seen",)),
        Panel("masks a picture", ("prior/masks_per_picture",)),
        Panel("share of the picture that masks cover", ("prior/mask_coverage",)),
        Panel("age of cached masks (epochs)", ("prior/mask_age_epochs",)),
        Panel("share of cached masks made anew", ("prior/masks_remade",)),
    ),
    "System": (
        Panel("memory of the fullest host process (GiB)", ("memory/host_gib",)),
        Panel("peak memory of the fullest GPU (GiB)", ("memory/gpu_peak_gib",)),
        Panel("memory of the main machine (%)", ("system/memory_percent",)),
        Panel("disk of the main machine (%)", ("system/disk./.usagePercent",)),
        Panel("network of the main machine (bytes)", ("system/network.recv", "system/network.sent")),
    ),
}
"""Sections and their panels, from top left. What is under `system/` wandb measures itself."""

MEASURED_BY_WANDB = "system/"


def main(argv: list[str] | None = None) -> int:
    """Parse and make the workspace, or list it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("launch.dashboard"),
        description="Make a wandb workspace in the project of these runs: training health, quality, throughput, data "
        "health, system. A panel is left out if none of the runs has logged what it shows.",
        epilog=f"example: {program('launch.dashboard')} runs/derain --entity my-team; needs `wandb login` and the "
        "packages of pip install 'restill[dashboard]', but for --list",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")
    parser.add_argument("--entity", help="user or team in wandb (default: yours)")
    parser.add_argument("--project", help="in wandb (default: the runs' track.project)")
    parser.add_argument("--name", default="Restill", help="of the workspace (default: Restill)")
    parser.add_argument("--all", action="store_true", help="leave no panel out; before the first validation, say")
    parser.add_argument("--list", action="store_true", help="print sections, panels and keys, and make nothing")
    args = parser.parse_args(argv)
    return run_main(lambda: make(args))


def make(args: argparse.Namespace) -> int:
    """Read the runs, then list or save."""
    logged = frozenset().union(*(logged_keys(run) for run in args.runs))
    sections, left_out = fill(DASHBOARD, logged, keep_all=args.all)
    if args.list:
        for title, panels in sections.items():
            print(title)
            for panel in panels:
                print(f"  {panel.title}: {', '.join(panel.keys)}")
    if left_out:
        print(f"logged by none of these runs{'' if args.all else ', so left out'}: {', '.join(left_out)}")
    if not args.list:
        print(save(sections, entity=args.entity, project=args.project or project_of(args.runs), name=args.name))
    return 0


def logged_keys(folder: Path) -> frozenset[str]:
    """All names that a run has logged so far, those of its pictures among them.

    Raises:
        ValueError: it is no run's folder.
    """
    from dist_train.track import read_metrics

    if not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder} holds no metrics.jsonl, so it is no run's; give the folder of one, runs/NAME")
    root = folder / "pictures"
    pictures = {f"pictures/{path.relative_to(root).as_posix().rpartition('-')[0]}" for path in root.rglob("*.png")}
    return frozenset(pictures.union(*read_metrics(folder)) - {"step"})


def project_of(folders: Sequence[Path]) -> str:
    """The wandb project of all the runs.

    Raises:
        ValueError: they have several.
    """
    configs = {folder: yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders}
    projects = {str(config["track"]["project"]) for config in configs.values()}
    if len(projects) > 1:
        raise ValueError(f"the runs are of several projects, {', '.join(sorted(projects))}; choose with --project")
    return projects.pop()


def fill(
    dashboard: Mapping[str, Sequence[Panel]], logged: Collection[str], *, keep_all: bool = False
) -> tuple[dict[str, list[Panel]], list[str]]:
    """Put protocols and pictures in, and leave out what was never logged.

    Args:
        dashboard: sections of panels, such as `DASHBOARD`.
        logged: names.
        keep_all: leave nothing out. Where no protocol is logged it is rgb; pictures must be known.

    Returns:
        Sections with at least one panel of at least one key, and the keys that nobody has logged.
    """
    protocols = sorted({name.split("/")[1] for name in logged if name.startswith("val/") and "/psnr/" in name}) or [
        "rgb"
    ]
    pictures = sorted(name.removeprefix("pictures/val/") for name in logged if name.startswith("pictures/val/"))
    sections: dict[str, list[Panel]] = {}
    left_out: list[str] = []
    for title, panels in dashboard.items():
        for panel in panels:
            for protocol in protocols if "{protocol}" in "".join(panel.keys) else [""]:
                keys = [
                    key.format(protocol=protocol, picture=picture)
                    for key in panel.keys
                    for picture in (pictures if "{picture}" in key else [""])
                ]
                absent = [key for key in keys if key not in logged and not key.startswith(MEASURED_BY_WANDB)]
                left_out += absent
                shown = tuple(key for key in keys if keep_all or key not in absent)
                if shown:
                    filled = panel._replace(title=panel.title.format(protocol=protocol), keys=shown)
                    sections.setdefault(title, []).append(filled)
    return sections, list(dict.fromkeys(left_out))


def workspace(sections: Mapping[str, Sequence[Panel]], *, entity: str, project: str, name: str) -> "Workspace":
    """The workspace, not saved."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def drawn(panel: Panel) -> Any:
        keys: list[Any] = list(panel.keys)
        if panel.kind == "pictures":
            return wr.MediaBrowser(title=panel.title, media_keys=keys, num_columns=1)
        # wandb's own measurements have no step.
        x = "RelativeTime(Process)" if keys[0].startswith(MEASURED_BY_WANDB) else "Step"
        style: Any = {"plot_type": "pct-area"} if panel.kind == "shares" else {}
        return wr.LinePlot(title=panel.title, x=x, y=keys, log_y=panel.log or None, **style)

    layout = ws.SectionLayoutSettings(columns=3, rows=3)  # nine on one page of a section
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=title, panels=[drawn(panel) for panel in panels], is_open=True, layout_settings=layout)
            for title, panels in sections.items()
        ],
    )


def save(sections: Mapping[str, Sequence[Panel]], *, entity: str | None, project: str, name: str) -> str:
    """Make the workspace in wandb; returns its address.

    Raises:
        ValueError: wandb refuses, or cannot be reached.
    """
    import wandb
    import wandb_workspaces  # noqa: F401  # that it is missing shall be said first

    try:
        mine = entity or wandb.Api().default_entity
        return str(workspace(sections, entity=mine, project=project, name=name).save().url)
    except Exception as error:  # no login, no network, no such project: for each wandb raises what it likes
        raise ValueError(
            f"wandb did not make the workspace: {error}. `wandb login` first; --entity and --project must exist there"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
