"""The report: what it shows is what the checkpoints give, and what it cannot show it says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.data.reader import ShardReader
from dist_train.evaluate import evaluate, means
from dist_train.load import student_of
from dist_train.metrics import to_u8
from dist_train.report.curves import MAX_POINTS, Curve, H, W, chart
from dist_train.report.page import render
from dist_train.report.runs import PROTOCOLS, Shown, Version, error_map, read_runs, restore_pictures
from tests.helpers.finished_runs import STEP, make_run
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
METRICS = [{"step": n, "loss/spd": 100.0 / n**3, "loss/total": -n} for n in range(1, STEP + 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    write_pairs(make_pairs(root / "pairs", 3, h=28, w=36), root / "val")
    distill = make_run(root, "distill", val=root / "val", metrics=METRICS)
    return [make_run(root, "plain", val=root / "val", metrics=METRICS, task="plain"), distill]


def test_pictures_and_scores_are_those_of_the_newest_checkpoints(runs: list[Path]) -> None:
    records = read_runs(runs)
    shown = restore_pictures(records, num=2, device=CPU, crop_px=20, score_all=True)
    reader = ShardReader(records[0].config.data.val or "")
    assert [picture.key for picture in shown] == list(reader.keys[:2]) and "36 x 28" in shown[0].part
    assert [record.notes for record in records] == [[], []]
    for record, run in zip(records, runs, strict=True):
        student = student_of(run / "checkpoints" / f"step-{STEP:08d}")  # averaged
        expected = evaluate(lambda batch: {"student_out": student(batch.lq)}, reader, protocols=PROTOCOLS, device=CPU)  # noqa: B023
        assert [row for row in record.rows if row.name != "teacher"] == expected
        lq, _ = reader.pair(1)
        whole = to_u8(student(torch.from_numpy(lq).permute(2, 0, 1)[None] / 255)[0])
        (found,) = [v for v in shown[1].versions if (v.of, v.what) == (record.label, "student")]
        np.testing.assert_array_equal(found.rgb_u8, whole[4:24, 8:28])
        row = next(
            row for row in record.rows if (row.key, row.name, row.protocol) == (reader.keys[1], "student", "rgb")
        )
        assert found.psnr_db == row.psnr  # of the whole picture, though a part is shown
    whats = [(version.of, version.what) for version in shown[0].versions]
    assert len(whats) == len(set(whats)) == 8
    assert {what for of, what in whats if of == "plain"} == {"student", "error"}
    assert {what for of, what in whats if of == "distill"} == {"student", "teacher", "error", "masks"}
    html = render(records, shown, made="now")
    assert f"{means(records[1].rows)['val/gopro/psnr/teacher']:.2f} / " in html
    assert not re.search(r"https?://", html), "a page that asks the network for nothing"


def test_what_cannot_be_shown_is_said_and_the_rest_is_there(runs: list[Path], tmp_path: Path) -> None:
    gone = make_run(tmp_path, "gone", val=tmp_path / "nowhere", metrics=METRICS, task="plain")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((gone / "config.yaml").read_text())
    stored = make_run(tmp_path, "stored", val=runs[0].parent / "val", metrics=[], prior={"name": "stored"})
    records = read_runs([gone, bare, stored])
    (picture,) = restore_pictures(records, num=1, device=CPU)
    html = render(records, [picture], made="now")
    for record, said in zip(records, ("nowhere", "no checkpoint yet", "holds no masks"), strict=True):
        (note,) = record.notes
        assert said in note and said in html
    assert {version.what for version in picture.versions} == {"degraded", "clean", "student", "error"}
    with pytest.raises(ValueError, match="no config.yaml"):
        read_runs([tmp_path])
    (plain,) = read_runs(runs[:1])
    restore_pictures([plain], num=1, keys=["s-9"], device=CPU)
    assert "no picture s-9" in plain.notes[0] and "s-1" in plain.notes[0]


def test_an_error_map_goes_from_black_to_pale_yellow_at_32_grey_levels() -> None:
    gt = np.full((1, 4, 3), 100, np.uint8)
    restored = gt.copy()
    restored[0, 1], restored[0, 2], restored[0, 3, 0] = 116, 40, 100 - 96  # means over channels: 16, 60, 32
    none, half, more, end = error_map(restored, gt)[0].astype(int)
    assert none.max() < 8 and end[0] > 240 and end[1] > 240
    np.testing.assert_array_equal(more, end)
    assert half[0] > half[2] > 0 and half[0] > 150, "inferno's middle is red: channels are not swapped"


def test_curves_lie_where_their_values_do() -> None:
    svg = chart([Curve("a", [(0, -1.0), (50, 0.0), (100, 1.0)]), Curve("<b>", [(0, -1.0)], run=1)], title='"t"')
    box, scale = (re.search(rf'data-{name}="(.*?)"', svg).group(1).split() for name in ("box", "range"))  # type: ignore[union-attr]
    left, right, bottom, top = map(float, box)
    assert [float(value) for value in scale] == [0, 100, -1, 1] and 0 < left < right < W and 0 < top < bottom < H
    first, second = (
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(r' points="(.*?)"', svg)
    )
    assert first == [(left, bottom), ((left + right) / 2, (top + bottom) / 2), (right, top)] and second == first[:1]
    assert "<b>" not in svg and "&lt;b&gt;" in svg and "&quot;t&quot;" in svg
    many = [(n, 10.0 ** (-n / 1000)) for n in range(3001)]
    svg = chart([Curve("a", many)], title="t")
    assert 'data-log="1"' in svg and len(re.findall(r"\d,\d", svg)) <= MAX_POINTS
    middle = re.findall(r' points="(.*?)"', svg)[0].split()[MAX_POINTS // 2]
    u, v = map(float, middle.split(","))  # a straight line on the logarithmic axis
    assert (u - left) / (right - left) == pytest.approx(0.5, abs=0.01)
    assert (bottom - v) / (bottom - top) == pytest.approx(0.5, abs=0.01)
    assert "nan" not in chart([Curve("constant", [(5, 0.0)])], title="t")


def test_the_page_escapes_what_it_is_told_and_leaves_out_what_is_not_finite(runs: list[Path]) -> None:
    (record,) = read_runs(runs[:1])
    evil = "<script>alert(1)</script>"
    record.label = evil
    record.notes.append(evil)
    record.metrics += [{"step": 9, "loss/total": float("nan"), f"loss/{evil}": 1.0}]
    white = np.full((4, 4, 3), 255, np.uint8)
    picture = Shown(evil, evil, [Version("", "degraded", white), Version(evil, "student", white, 30.0)], evil)
    html = render([record], [picture], made=evil)
    assert evil not in html and "&lt;script&gt;alert" in html
    assert "nan" not in "".join(re.findall(r' points="(.*?)"', html))
