"""Nets from elsewhere: hooks as stages, and what is said when they do not fit."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config import CustomConfig
from dist_train.nets import build_net
from dist_train.nets.fusion import Teacher
from dist_train.priors.masks import MaskSet

pytestmark = pytest.mark.unit

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 4, stride=4), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(2 * width, 48, 1), nn.PixelShuffle(4))

    def forward(self, x):
        return x + self.up(self.down(self.head(x)))

def make(width=4):
    return Net(width).eval()

def number():
    return 3
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "nets_from_elsewhere.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("nets_from_elsewhere", None)


def config(**changed: Any) -> CustomConfig:
    fields = {"factory": "nets_from_elsewhere:make", "args": {"width": 6}, "stages": ("head", "down"), "multiple": 4}
    return CustomConfig(**{**fields, **changed})


@pytest.mark.usefixtures("elsewhere")
def test_hooks_make_stages_and_any_size_goes_in() -> None:
    net = build_net(config())
    assert all(module.training for module in net.modules())
    assert [tuple(stage) for stage in net.stages] == [("head", 6, 1), ("down", 12, 4)]
    lq = torch.rand(2, 3, 18, 21)
    seen = []

    def watch(index: int, features: torch.Tensor) -> torch.Tensor:
        seen.append((index, tuple(features.shape)))
        return features * (0 if index == 1 else 1)

    changed = net(lq, watch)
    assert seen == [(0, (2, 6, 20, 24)), (1, (2, 12, 5, 6))]
    assert changed.shape == lq.shape and not torch.equal(changed, net(lq))  # what a hook returns goes on
    assert torch.equal(net(lq), net.net(torch.nn.functional.pad(lq, (0, 3, 0, 2)))[..., :18, :21])


@pytest.mark.usefixtures("elsewhere")
def test_it_can_be_a_teacher() -> None:
    net = build_net(config())
    teacher = Teacher(net, num_masks=3, every=1, max_channels=8)
    image, masks = torch.rand(1, 3, 18, 21), MaskSet(torch.rand(1, 3, 18, 21) > 0.5, torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(teacher(image, masks), net(image))  # as any new teacher
    for unit in teacher.units.values():
        torch.nn.init.normal_(unit.fuse.weight)
    assert not torch.allclose(teacher(image, masks), net(image))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"factory": "not_here:make"}, "PYTHONPATH"),
        ({"factory": "nets_from_elsewhere:nothing"}, "nothing"),
        ({"factory": "nets_from_elsewhere:number", "args": {}}, "gave int"),
        ({"args": {"nope": 1}}, "unexpected keyword argument 'nope'"),
        ({"stages": ("head", "dwon")}, "no submodule 'dwon' to be a stage; there are down"),
        ({"stages": ("down", "head")}, r"they ran as \['head', 'down'\]"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_net(config(**changed))
