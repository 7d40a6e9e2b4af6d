"""The bench: its table for a tiny net, what it counts, its tiles; and the faster nets equal the plain ones."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from dist_train.config import NetConfig, RcdnetConfig
from dist_train.nets import build_net
from dist_train.nets.fast import FAST, prepare_for_inference, rewrites
from dist_train.nets.rcdnet import Rcdnet
from launch.bench.__main__ import main
from launch.bench.cost import net_cost, spf_cost
from launch.bench.nets import HEADER, PRESETS, plan
from launch.bench.passes import MARGIN_PX, awaken, restore_tiles
from launch.bench.race import Lap, Outcome, Work, preload, race
from tests.helpers.nets import TINY_NETS
from tests.helpers.shared import parity

pytestmark = pytest.mark.unit

TINY = TINY_NETS | {"nafnet_tlc": TINY_NETS["nafnet"] | {"tlc_train_px": 16}}


@pytest.fixture(autouse=True, scope="module")
def _processes_start_with_torch() -> None:
    preload("launch.bench.feeding", "launch.bench.passes", "launch.bench.masking", "segment_anything")


def new_net(name: str) -> Any:
    torch.manual_seed(0)
    net = build_net(TypeAdapter(NetConfig).validate_python(TINY[name]))
    awaken(net)
    return net


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(32, 32), (45, 39)])
def test_the_faster_net_restores_the_same(name: str, size: tuple[int, int]) -> None:
    net = new_net(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    fast = prepare_for_inference(net, device="cpu")
    lq = torch.rand(2, 3, *size)
    with torch.no_grad():
        plain, restored = net.eval()(lq), fast(lq)
    assert (restored - plain).abs().max() < 1e-5 * plain.abs().max()
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())  # a copy was changed


def test_batch_norms_are_gone_and_their_statistics_count() -> None:
    net = new_net("rcdnet")
    fast = prepare_for_inference(net, device="cpu")
    assert not [module for module in fast.modules() if isinstance(module, nn.BatchNorm2d)]
    lq = torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        assert (net.eval()(lq) - fast(lq)).abs().max() > 1e-3


def test_no_net_is_rewritten_where_nothing_was_measured() -> None:
    for kinds in FAST.values():
        assert kinds.keys() <= {"cpu"}
    with torch.device("meta"):
        net = build_net(RcdnetConfig())
    assert isinstance(net, Rcdnet) and rewrites(net, "cpu") and not rewrites(net, "cuda:0")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_cost_what_the_official_nets_do(name: str) -> None:
    facts = json.loads(parity(f"full_{name}.json").read_text())
    cost = net_cost(PRESETS[name], height=256, width=256)
    assert cost.parameters == facts["n_params"]
    assert cost.macs == pytest.approx(facts["macs_256"], rel=1e-3)


def test_spf_units_cost_less_the_fewer_they_are() -> None:
    config = RcdnetConfig(num_stages=6)
    each, third = (spf_cost(config, height=32, width=32, every=every) for every in (1, 3))
    assert each.parameters / third.parameters == pytest.approx(3, rel=0.02)  # 6 units and 2
    assert each.macs / third.macs == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("tile_px", [None, 64, 100])
def test_tiles_of_a_local_net_make_up_the_picture(tile_px: int | None) -> None:
    torch.manual_seed(0)
    lq = torch.rand(1, 3, 200, 170)
    blur = nn.AvgPool2d(9, 1, 4)
    assert torch.allclose(restore_tiles(blur, lq, tile_px), blur(lq), atol=1e-6)


def test_the_table_holds_every_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "tiny.yaml"
    run.write_text(f"name: tiny\ndata: {{train: none}}\nstudent: {json.dumps(TINY['nafnet'])}\n")
    out = tmp_path / "out.json"
    options = ["--size", "48x32", "--variant", "channels_last", "--rounds", "2", "--threads", "1", "--json", str(out)]
    assert main(["nets", "--net", str(run), *options]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    rows = [line.split() for line in lines[lines.index(HEADER) + 1 :] if line.startswith("tiny")]
    assert [row[:3] for row in rows] == [["tiny", "48x32", variant] for variant in ("plain", "channels_last")]
    for row in rows:
        numbers = [float(cell) for cell in row[3:]]  # no "-" among them
        assert len(numbers) == 8 and all(number >= 0 for number in numbers) and numbers[-1] < 1e-5

    record = json.loads(out.read_text())
    assert record["machine"].keys() >= {"cpu", "threads", "torch", "load_before", "load_after"}
    assert [cost["of"] for cost in record["costs"]] == ["tiny", "+ SPF units, every=1"]
    assert len(record["cases"]) == 4 and all(len(case["laps"]) == 2 for case in record["cases"])


def test_what_is_too_large_is_tiled_and_what_is_too_slow_is_left_out() -> None:
    plain = Outcome(1.0, (Lap(2.0, 100.0),))
    assert plan(None, 999, 1.0, 1.0) == (None, "")
    assert plan((100 * 100, plain), 150 * 200, 300.0, 6.0) == (None, "")
    tile_px, reason = plan((100 * 100, plain), 1000 * 1000, 700.0, 200.0)
    assert not reason and tile_px == 192 and (tile_px + 2 * MARGIN_PX) ** 2 / 100**2 * 100.0 < 700.0
    assert "about 200 s" in plan((100 * 100, plain), 1000 * 1000, 1e9, 199.0)[1]


def allocate_or_hang(case: str) -> Work:
    if case == "broken":
        raise ValueError("no such net")
    laps = itertools.count()

    def lap() -> torch.Tensor:
        if next(laps) and case == "hangs":
            time.sleep(100)
        return torch.ones(50, 2**18).sum(0)[:1]  # 50 MiB

    return Work(lap, held_bytes=10 * 2**20)


def test_a_race_measures_memory_and_tells_what_it_leaves_out() -> None:
    cases = {name: name for name in ("well", "hangs", "broken")}
    outcomes = race(allocate_or_hang, cases, device="cpu", threads=1, rounds=2, limit_s=3, first_limit_s=100)
    well = outcomes["well"]
    assert well.value is not None and well.value.item() == 50 and well.laps and well.gain(well) == 1
    assert well.peak_mib is not None and 58 < well.peak_mib < 70
    assert outcomes["hangs"].left_out == "a pass not done in 3 s"
    assert "no such net" in outcomes["broken"].left_out


def test_what_is_no_net_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nets", "--net", "nafnet"]) == 2
    assert "nafnet_gopro_w32" in capsys.readouterr().err
