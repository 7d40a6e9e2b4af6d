"""What others published is read as it was printed, and stands only beside what it is of."""

from pathlib import Path

import pytest

from dist_train.evaluate import Row, means
from dist_train.metrics import PROTOCOLS
from dist_train.published import FILE, find_published, published
from launch.scores import layout_if_tested
from shards.layouts import LAYOUTS
from shards.schema import Manifest

pytestmark = pytest.mark.unit

# Collapsed pictures and pictures in all, of NAFNet, CAT, MAP and SAM-Deblur: SAM-Deblur, Table 1.
COLLAPSED = {
    "realblur_j": ((2, 3, 3, 0), 980, ("0.20", "0.31", "0.31", "0.00")),
    "reds": ((114, 77, 12, 6), 3000, ("3.80", "2.57", "0.40", "0.20")),
    "reloblur": ((216, 232, 219, 55), 395, ("54.68", "58.73", "55.44", "13.92")),
}


def test_every_row_is_sound() -> None:
    rows = published()
    assert len({row.name for row in rows}) == len(rows) > 40
    for row in rows:
        assert row.values and row.source and row.layout in (None, *LAYOUTS) and row.protocol in (None, *PROTOCOLS)
    assert [row.values for row in published("distill-5")] == [{"psnr": 34.09, "ssim": 0.9847, "fid": 5.02}]
    assert find_published(rows[-1].name) == rows[-1]
    assert {row.layout for row in published(layout="gopro")} == {"gopro"}


@pytest.mark.parametrize("layout", COLLAPSED)
def test_the_published_collapse_rates_are_those_of_their_counts(layout: str) -> None:
    counts, num, rates = COLLAPSED[layout]
    printed = {row.name: row.values["mcr"] for row in published("samdeblur-1") if "mcr" in row.values}
    for net, count, rate in zip(("nafnet", "cat", "map", "samdeblur"), counts, rates, strict=True):
        rows = [
            Row(f"{i}", "gopro", name, 0, 0, name != "input" and i < count)
            for i in range(num)
            for name in ("input", "student")
        ]
        # A second protocol must not count the pictures twice.
        rows += [Row(row.key, "rgb", row.name, 0, 0, row.collapsed) for row in rows]
        assert f"{means(rows)['val/mcr/student']:.2f}" == rate
        assert f"{printed[f'samdeblur-1/{net}-{layout}']:.2f}" == rate
    assert "val/mcr/student" not in means([row for row in rows if row.name != "input"])


def test_the_gains_that_sam_deblurs_abstract_names_are_those_of_its_table_in_another_order() -> None:
    table = {row.name.split("/")[1]: row.values["psnr"] for row in published("samdeblur-1")}
    gains = {layout: table[f"samdeblur-{layout}"] - table[f"nafnet-{layout}"] for layout in COLLAPSED}
    assert {layout: round(gain, 2) for layout, gain in gains.items()} == {
        "realblur_j": 0.05, "reds": 0.96, "reloblur": 7.03,
    }  # fmt: skip
    named = {row.layout: row.values["psnr_gain"] for row in published("samdeblur-abstract")}
    assert named == {"realblur_j": 0.05, "reds": 7.03, "reloblur": 0.96}


def test_only_whole_splits_for_testing_have_published_numbers() -> None:
    facts = dict.fromkeys(("index_sha256", "content_sha256"), "0" * 64)
    for layout, split, num, found in (
        ("gopro", "test", 1111, "gopro"), ("gopro", "test", 1110, None), ("gopro", "train", 2103, None),
        ("rain100L", "val", 20, None), ("pairs", "test", 3, None), ("unheard-of", "test", 3, None),
    ):  # fmt: skip
        manifest = Manifest(
            layout=layout, split=split, num_samples=num, shardlist=(), src="", arguments={}, tool_version="", **facts
        )
        assert layout_if_tested(manifest) == found


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no published table 'rcdnet-1'; there are distill-1"):
        find_published("rcdnet-1/spa")
    with pytest.raises(ValueError, match="no published row 'rcdnet/gopro'; there are rcdnet/rain100L"):
        find_published("rcdnet/gopro")
    assert FILE.exists() and published(path=tmp_path / "none.yaml") == []
    with pytest.raises(ValueError, match="none.yaml, which is not here"):
        find_published("rcdnet/spa", path=tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("t: {rows: {r: {what: w, data: d, values: {psnrs: 3}}}}")
    with pytest.raises(ValueError, match="psnrs"):
        published(path=tmp_path / "bad.yaml")
