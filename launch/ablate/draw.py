"""The comparison as pictures: scores with their intervals, and crops of what the nets restore."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launch.ablate.plan import Trial
from launch.ablate.table import Row
from launch.console import device_of

CROP_PX = 96
COLOURS = {"student": "#1f6fb4", "teacher": "#d1782b"}


def draw_ladder(rows: Sequence[Row], path: Path, *, protocol: str, data: str) -> None:
    """PSNR of student and teacher for each variant: mean, 95 % interval and every seed; below, the paired gains.

    Args:
        rows: at least one.
        path: PNG file.
        protocol, data: for the title.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"the figure wants matplotlib ({error}): pip install 'restill[train]'") from None
    groups = list(dict.fromkeys(row.group for row in rows))
    sizes = [sum(row.group == group for row in rows) for group in groups]
    compared = any(row.gains for row in rows)
    plain = next((row for row in rows if row.variant == "plain"), None)
    figure = Figure(figsize=(2.0 + 1.3 * sum(sizes), 6.6 if compared else 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1 + compared, len(groups), sharey="row", squeeze=False, width_ratios=sizes)
    for column, group in enumerate(groups):
        some = [row for row in rows if row.group == group]
        grid[0][column].set_title(group, fontsize=10)
        for axes, told in zip(grid[:, column], ("means", "gains"), strict=False):
            for place, row in enumerate(some):
                for net, shift in (("student", -0.12), ("teacher", 0.12)):
                    value = getattr(row, told).get(f"{net}/psnr")
                    if value is not None:
                        axes.errorbar(
                            place + shift, value.mean, yerr=value.half, fmt="o", color=COLOURS[net], capsize=4
                        )
                    dots = _dots(row, net, plain if told == "gains" else None)
                    axes.plot([place + shift] * len(dots), dots, "x", color=COLOURS[net], alpha=0.6, markersize=5)
            labels = [row.variant.removeprefix("prior-").removeprefix(f"{group}-") for row in some]
            axes.set_xticks(range(len(some)), labels)
            axes.set_xlim(-0.5, len(some) - 0.5)
            axes.grid(axis="y", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.ticklabel_format(axis="y", useOffset=False)
            if told == "gains":
                axes.axhline(0, color="0.4", linewidth=1)
    grid[0][0].set_ylabel(f"PSNR, dB ({protocol})")
    if compared:
        grid[1][0].set_ylabel("gain over plain, paired, dB")
    points = [grid[0][0].plot([], [], "o", color=colour, label=net)[0] for net, colour in COLOURS.items()]
    figure.legend(handles=points, loc="outside lower center", ncols=2, frameon=False)
    seeds = max(len(row.seeds) for row in rows)
    told = f"mean of {seeds} seeds, 95 % intervals, seeds as crosses" if seeds > 1 else "one seed"
    figure.suptitle(f"{'/'.join(Path(data).parts[-2:])}: {told}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _dots(row: Row, net: str, plain: Row | None) -> list[float]:
    """PSNR of each seed, or what it is above that of the plain student, where there are several."""
    mine = row.dots.get(f"{net}/psnr", {}) if len(row.seeds) > 1 and row is not plain else {}
    if plain is None:
        return list(mine.values())
    base = plain.dots["student/psnr"]
    return [value - base[seed] for seed, value in mine.items() if seed in base]


def draw_crops(trials: Sequence[Trial], path: Path, *, num_pictures: int = 3) -> None:
    """The same crops of some validation pictures as each variant's student restores them.

    A crop is where the degraded picture is worst, so that it is chosen without a look at any result. The numbers are
    PSNR of the whole picture under the run's protocol.

    Args:
        trials: finished ones, one for each variant.
        path: PNG file.
        num_pictures: spread evenly over the validation set.
    """
    import torch

    from dist_train.checkpoint import find
    from dist_train.data.reader import ShardReader
    from dist_train.evaluate import whole_picture
    from dist_train.load import student_of
    from dist_train.metrics import score, to_u8
    from dist_train.nets.fast import prepare_for_inference
    from dist_train.pictures import grid, panel, write_png

    device = device_of("auto")
    nets = {}
    for trial in trials:
        checkpoint = find(trial.run.dir)
        assert checkpoint is not None, "finished runs alone are drawn"
        nets[trial.variant.name] = prepare_for_inference(student_of(checkpoint), device=device)
    run = trials[0].run
    assert run.data.val is not None, "`make_trials` sees to it"
    reader = ShardReader(run.data.val)
    rows = []
    for index in sorted({round(place) for place in np.linspace(0, len(reader) - 1, num_pictures)}):
        batch, lq_u8, gt_u8 = whole_picture(reader, index, device)
        pictures = {"degraded": lq_u8}
        with torch.no_grad():
            pictures |= {name: to_u8(net(batch.lq)[0].cpu()) for name, net in nets.items()}
        place = worst_place(lq_u8, gt_u8, CROP_PX)
        scored = {name: score(picture, gt_u8, run.eval.protocol)["psnr"] for name, picture in pictures.items()}
        columns = [(f"{name} {scored[name]:.2f} dB", picture[place]) for name, picture in pictures.items()]
        rows.append(panel([*columns, ("clean", gt_u8[place])]))
    write_png(path, grid(rows))


def worst_place(lq_u8: np.ndarray, gt_u8: np.ndarray, side_px: int) -> tuple[slice, slice]:
    """The square (or all there is of a smaller side) in which two (H,W,3) pictures differ most, mean square."""
    error = np.square(lq_u8.astype(np.float64) - gt_u8).mean(2)
    sums = np.pad(error, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    height, width = (min(side_px, side) for side in error.shape)
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = (int(place) for place in np.unravel_index(inside.argmax(), inside.shape))
    return slice(top, top + height), slice(left, left + width)
