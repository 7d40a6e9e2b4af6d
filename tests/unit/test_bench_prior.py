"""The bench of the priors: its tables for a tiny SAM, and what it says of how alike masks are."""

import json
from pathlib import Path

import pytest
import torch

from launch.bench.__main__ import main
from launch.bench.cost import _counted, sam_cost
from launch.bench.masking import NUM_COPIED, agreement
from launch.bench.prior import COLUMNS, MODELS, PROVIDERS, STEP_COLUMNS, _too_long, header
from launch.bench.race import preload
from tests.helpers.tiny_sam import tiny_sam

pytestmark = pytest.mark.unit

OPTIONS = ["--size", "64x48", "--batch", "2", "--rounds", "2", "--threads", "1", "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    preload("launch.bench.feeding", "launch.bench.passes", "launch.bench.masking", "segment_anything")
    monkeypatch.setitem(MODELS, "vit_b", tiny_sam)


def test_the_generators_table_holds_every_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["prior", "--points", "4", "--json", str(out), *OPTIONS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120 and any("RANDOM" in line for line in lines)
    rows = [line.split() for line in lines[lines.index(header(COLUMNS)) + 1 :] if line.startswith("vit_b")]
    assert [row[1:3] for row in rows] == [["4x4", "reference"], ["4x4", "batched"]]
    for row in rows:
        seconds, gain, *parts = map(float, row[3:8])
        assert seconds > 0 and gain > 0 and min(parts) > 0 and sum(parts) == pytest.approx(seconds, rel=0.3)
        assert 0 <= float(row[10]) < 2 and float(row[11]) >= 0  # of peak, of copy
        same, of = map(int, row[14].split("/"))
        assert same == of > 2 and row[12:14] == ["1.000", "1.000"]
    record = json.loads(out.read_text())
    assert record["machine"].keys() >= {"cpu", "threads", "load_before", "load_after"}
    reference, batched, matmul, copy = record["cases"]
    assert len(reference["laps"]) == len(batched["parts_s"]) == 2 and batched["of peak"] > 0
    cost = sam_cost(tiny_sam, height=48, width=64)
    spent = cost.per_picture["batched"] + cost.per_prompt["batched"] * 16
    pairs = list(zip(copy["parts_s"], batched["parts_s"], strict=True))
    copied, here = (sum(once[0] / (of[0] / 2) for once, of in pairs) / 2, 2 * NUM_COPIED["cpu"])  # 2 pictures, 2 rounds
    assert batched["of copy"] == pytest.approx(spent.numbers / here * copied)
    assert len(matmul["parts_s"]) == 2
    gains = [slow[0] / fast[0] for slow, fast in zip(reference["parts_s"], batched["parts_s"], strict=True)]
    assert batched["gain"] == pytest.approx(sum(gains) / 2) and reference["gain"] == 1
    assert batched["s/picture"] * 2 == pytest.approx(sum(parts[0] for parts in batched["parts_s"]) / 2)  # of 2


def test_the_steps_table_holds_every_provider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "tiny.yaml"
    net = {"name": "nafnet", "width": 4, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}
    run.write_text(f"name: tiny\ndata: {{train: none}}\nstudent: {json.dumps(net)}\n")
    out = tmp_path / "out.json"
    assert main(["prior", "--step", str(run), "--points", "4", "--crop", "32", "--json", str(out), *OPTIONS]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[lines.index(header(STEP_COLUMNS)) + 1 :] if line.startswith("tiny")]
    rows = {masks: [float(cell) for cell in cells] for _, masks, *cells in table}
    assert list(rows) == ["fixed", *PROVIDERS]
    assert rows["fixed"][2] == 1 and rows["fixed"][1] < 0.01
    for step, masks, ratio, other_ratio, mib in rows.values():
        assert 0 <= masks < step and ratio > 0 and mib > 0 and other_ratio >= 1
    fixed, *_, cached, _ = json.loads(out.read_text())["cases"]
    made, read = (cached["cases"][part]["parts_s"] for part in ("made_batched", "read"))
    steps = [(one[0] + 9 * nine[0]) / 10 for one, nine in zip(made, read, strict=True)]
    ratios = [step / without[0] for step, without in zip(steps, fixed["cases"]["fixed"]["parts_s"], strict=True)]
    assert cached["masks"] == "cached_batched" and cached["with/without"] == pytest.approx(sum(ratios) / 2)
    assert made[0][1] > 3 * read[0][1]


def test_what_sam_costs_is_counted() -> None:
    cost = sam_cost(MODELS["tiny_vit"])
    assert cost.per_picture["reference"].macs == pytest.approx(38.8e9, rel=0.01)  # as MobileSAM's encoder is known for
    assert cost.per_prompt["reference"].macs == pytest.approx(1.811e9, rel=0.001)  # and SAM's decoder
    assert cost.per_prompt["batched"].macs < 0.4 * cost.per_prompt["reference"].macs
    assert cost.per_prompt["batched"].numbers < 0.45 * cost.per_prompt["reference"].numbers


def test_what_operations_move_is_counted_once() -> None:
    x = torch.ones(2, 3, 4, 5, device="meta")
    assert _counted(lambda: x + x[:, :1])[0].numbers == 120 + 40 + 120  # views move nothing
    assert _counted(lambda: x @ x.mT)[0].numbers == 2 * 120 + 2 * 3 * 4 * 4  # however it is laid out in between
    attend = torch.nn.functional.scaled_dot_product_attention
    assert _counted(lambda: attend(x, x, x))[0].numbers == 4 * 120  # and no scores


def test_what_takes_too_long_is_foretold() -> None:
    assert _too_long(None, 32, 1.0) == ""
    assert _too_long((16, 10.0, 0.5), 32, 25.1) == ""  # 5 for the picture, 20 for four times the prompts
    assert _too_long((16, 10.0, 0.5), 32, 24.9) == "about 25 s a turn, and --limit is 25 s"


def test_agreement_is_of_masks_and_of_pixels() -> None:
    wanted = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    wanted[0, 0, :, :2] = wanted[0, 1, 0, 0] = True  # 8 pixels, one of them also in a mask of its own; and padding
    found = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    found[0, 0, :, :1] = found[0, 1, 0, 0] = True  # half of the large one
    agreed = agreement(found, wanted)
    assert agreed["same"] == "1/2" and agreed["IoU"] == pytest.approx(0.75)
    assert agreed["pixels"] == pytest.approx((8 + 1 + 3 * 0.5) / 16)  # 4 have lost their mask
    assert agreement(wanted, wanted) == {"IoU": 1.0, "pixels": 1.0, "same": "2/2"}
    assert agreement(found, wanted.zero_()) == {}


def test_a_checkpoint_is_of_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prior", "--model", "vit_b", "vit_h", "--checkpoint", "sam.pth", *OPTIONS]) == 2
    assert "--model the one" in capsys.readouterr().err
