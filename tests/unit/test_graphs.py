"""Nets as graphs: one graph restores pictures of every size as the net does, and says so only if it does."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from dist_train import graphs
from dist_train.config import NetConfig
from dist_train.export import write_export
from dist_train.graphs import max_difference, open_graph, read_card, trace, write_graph
from dist_train.nets import build_net
from tests.helpers.nets import TINY_NETS

pytestmark = pytest.mark.unit

VARIANTS: dict[str, dict[str, Any]] = {  # few blocks, since each is traced
    "nafnet": {"name": "nafnet", "width": 2, "middle_blk_num": 1, "enc_blk_nums": [0], "dec_blk_nums": [0]},
    "nafnet_local": {
        "name": "nafnet", "width": 2, "middle_blk_num": 1, "enc_blk_nums": [0], "dec_blk_nums": [0], "tlc_train_px": 24,
    },
    "rcdnet": TINY_NETS["rcdnet_simple"] | {"num_stages": 2},
}  # fmt: skip


def new_net(name: str) -> Any:
    torch.manual_seed(0)
    net = build_net(TypeAdapter(NetConfig).validate_python(VARIANTS[name])).eval().requires_grad_(False)
    for parameter in net.parameters():  # at initialisation some are zero, which would hide mistakes
        torch.nn.init.normal_(parameter, 0, 0.1)
    return net


@pytest.mark.parametrize("name", ["nafnet_local", "rcdnet"])  # the others, which take longer: tests/e2e/test_graphs.py
def test_onnx_restores_any_size_as_the_net_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs restill[onnx]")
    net, file = new_net(name), tmp_path / "net.onnx"
    card = write_graph(net, file, card={"net": VARIANTS[name]}, device="cpu")
    assert card["graph"]["max_difference"] < 1e-5
    assert read_card(file)["net"]["name"] == VARIANTS[name]["name"]
    graph = open_graph(file)
    for shape in [(1, 3, 1, 1), (3, 3, 33, 32), (1, 3, 32, 64), (1, 3, 100, 50)]:
        lq = torch.rand(shape)
        torch.testing.assert_close(graph(lq), net(lq), rtol=0, atol=1e-5)


class Doubtful(torch.nn.Module):
    """Brightens large pictures: a branch that no graph for all sizes holds."""

    def forward(self, lq: torch.Tensor) -> torch.Tensor:
        return lq + 1 if lq.shape[-1] > 64 else lq


def test_what_differs_or_cannot_be_traced_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="cannot be traced for pictures of any size"):
        trace(Doubtful(), "cpu")
    assert max_difference(lambda lq: lq * float("nan"), torch.nn.Identity(), "cpu") != 0.0
    config = TypeAdapter(NetConfig).validate_python(VARIANTS["nafnet"])
    for wrong in (2e-4, float("nan")):
        monkeypatch.setattr(graphs, "open_graph", lambda file, wrong=wrong: lambda lq: torch.full_like(lq, wrong))
        monkeypatch.setitem(graphs.WRITERS, "export", lambda program, file, card: file.touch())
        monkeypatch.setattr(graphs, "trace", lambda net, device, smallest_px: net)
        net = new_net("nafnet")
        monkeypatch.setattr(net, "forward", torch.zeros_like)
        monkeypatch.setattr(net, "__deepcopy__", lambda memo, net=net: net, raising=False)
        with pytest.raises(ValueError, match="differs from the net"):
            write_export(net, tmp_path / "net.pt2", config=config, facts={})
        assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    config = TypeAdapter(NetConfig).validate_python(VARIANTS["nafnet"])
    with pytest.raises(ValueError, match=r"pip install 'restill\[onnx\]'"):
        write_export(new_net("nafnet"), tmp_path / "net.onnx", config=config, facts={})
    assert not list(tmp_path.iterdir())


def test_a_torch_export_carries_its_card(tmp_path: Path) -> None:
    config = TypeAdapter(NetConfig).validate_python(VARIANTS["nafnet"])
    card = write_export(new_net("nafnet"), tmp_path / "net.pt2", config=config, facts={"note": "\u00e9"})
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]
    held = read_card(tmp_path / "net.pt2")
    assert held["note"] == "\u00e9" and held["net"] == card["net"] and card["graph"]["max_difference"] < 1e-5
    torch.export.save(torch.export.export(torch.nn.Identity(), (torch.zeros(1),)), tmp_path / "net.pt2")
    with pytest.raises(ValueError, match="holds no card"):
        read_card(tmp_path / "net.pt2")
