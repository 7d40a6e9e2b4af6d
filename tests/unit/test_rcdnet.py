"""RCDNet's two layouts, what its stages and traces hold, and what is trained of it."""

import json

import pytest
import torch

from dist_train.config import RcdnetConfig
from dist_train.losses import rcdnet_loss
from dist_train.nets import build_net
from dist_train.nets.rcdnet import initial_kernels
from dist_train.nets.stages import RestorationNet, Trace
from tests.helpers.shared import parity

pytestmark = pytest.mark.unit


def tiny(layout: str = "official", **settings: object) -> RestorationNet:
    torch.manual_seed(0)
    config = {"layout": layout, "num_stages": 3, "num_m": 4, "num_z": 5, **settings}
    return build_net(RcdnetConfig.model_validate(config))


@pytest.mark.parametrize(("layout", "name"), [("official", "full_rcdnet"), ("simple", "full_rcdnet_simple")])
def test_published_configuration_has_the_official_keys(layout: str, name: str) -> None:
    facts = json.loads(parity(f"{name}.json").read_text())
    with torch.device("meta"):
        net = build_net(RcdnetConfig(layout=layout))  # type: ignore[arg-type]
    ours = [[key, list(tensor.shape), str(tensor.dtype)] for key, tensor in net.state_dict().items()]
    assert ours == [[key, shape, f"torch.{dtype}"] for key, shape, dtype in facts["keys"]]


def test_layouts_hold_the_same_net() -> None:
    official, simple = tiny(), tiny("simple")
    with torch.no_grad():
        for tensor in official.state_dict().values():  # any, but different ones
            tensor.copy_(torch.rand(tensor.shape) / 4 + 0.1)
    old, new = official.state_dict(), {}
    new["etaM_S"], new["etaB_S"] = old["eta11"], torch.cat([old["eta2"][None], old["eta12"]])
    new["C0"], new["C"], new["C_z"], new["tau"] = old["weight0"], old["conv"][1], old["w_z_f"], old["tau"]
    nets = {"xnet": "proxNet_B_0", "x_stage": "proxNet_B_S", "m_stage": "proxNet_M_S", "fxnet": "proxNet_B_last_layer"}
    for key, tensor in old.items():
        net, _, rest = key.partition(".")
        if net in nets:
            for number in range(4):
                for letter in "xm":
                    rest = rest.replace(f"res{letter}{number + 1}", f"layer.{number}")
            new[f"{nets[net]}.{rest}"] = tensor
    simple.load_state_dict(new)
    lq = torch.rand(2, 3, 12, 14)
    for net in (official, simple):
        net.eval()
    assert torch.equal(official(lq), simple(lq))


def test_every_tensor_is_of_its_own_memory() -> None:
    for layout in ("official", "simple"):
        tensors = list(tiny(layout).state_dict().values())
        assert all(tensor.is_contiguous() for tensor in tensors)
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_num_res_blocks_are_counted() -> None:
    assert len(list(tiny("simple", num_res_blocks=2).get_submodule("proxNet_M_S.0.layer").children())) == 2


def test_initial_values() -> None:
    state = tiny().state_dict()
    values = {"eta1": 1, "eta2": 5, "eta11": 1, "eta12": 5, "tau": 1, "w_z_f": 1 / 9, "m_stage.2.tau": 0.5}
    for key, value in values.items():
        assert torch.equal(state[key], torch.full_like(state[key], value)), key
    assert all(torch.equal(state["weight0"], kernels) for kernels in state["conv"])
    kernels = initial_kernels(32)
    assert kernels.shape == (3, 32, 9, 9) and kernels.min() >= 0
    assert torch.equal(kernels[0], kernels[1]) and torch.equal(kernels[0], kernels[2])
    assert torch.equal(kernels, kernels.flip(-2)) and torch.equal(kernels, kernels.flip(-1))
    rows, columns = kernels[0].sum(2), kernels[0].sum(1)
    offsets = torch.arange(9.0) - 4
    height, width = (rows * offsets.square()).sum(1), (columns * offsets.square()).sum(1)
    assert (height.diff() > 0).all() and (width[1:] < height[1:]).all()


def test_trace_is_of_the_pictures_on_the_way() -> None:
    net = tiny().eval()
    trace: Trace = {}
    lq = torch.rand(2, 3, 12, 14)
    restored = net(lq, trace=trace)
    assert torch.equal(restored, net(lq))
    assert torch.equal(trace["backgrounds"][-1], restored)
    assert [len(trace[name]) for name in ("backgrounds", "rains")] == [1 + 3 + 1, 3]
    assert {picture.shape for pictures in trace.values() for picture in pictures} == {lq.shape}
    # A step from B_1 to B_2 that the second background net leaves as it is: eta12 / 10 of the way to lq - R_2.
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("x_stage.1") and name.endswith(("4.weight", "4.bias")):
                parameter.zero_()  # then relu(x + 0)
    net(lq, trace=trace)
    before, after, rain = trace["backgrounds"][1], trace["backgrounds"][2], trace["rains"][1]
    assert torch.allclose(after, (0.5 * before + 0.5 * (lq - rain)).relu(), atol=1e-5)


def test_what_the_loss_reaches() -> None:
    net = tiny()
    trace: Trace = {}
    lq = torch.rand(2, 3, 12, 12)
    net(lq, trace=trace)
    rcdnet_loss(trace, lq / 2, lq).backward()
    parameters = dict(net.named_parameters())
    unread = {name for name in parameters if name == "eta1" or name.startswith("mnet.")}
    assert unread == {name for name, parameter in parameters.items() if not parameter.requires_grad}
    assert unread == {name for name, parameter in parameters.items() if parameter.grad is None}
    conv = parameters["conv"].grad
    assert conv is not None and [bool(part.any()) for part in conv] == [False, True]
    assert int(net.get_buffer("mnet.resm1.1.num_batches_tracked")) == 0
    assert int(net.get_buffer("m_stage.0.resm1.1.num_batches_tracked")) == 1
    net.load_state_dict(net.state_dict(), assign=True)
    assert not net.get_parameter("eta1").requires_grad


def test_a_stage_is_its_z_alone() -> None:
    net = tiny().eval()
    assert [stage.name for stage in net.stages] == ["x_stage.0", "x_stage.1", "x_stage.2"]
    outputs = []
    for stage in net.stages:
        net.get_submodule(stage.name).register_forward_hook(lambda *call: outputs.append(call[2]))
    seen = []

    def watch(index: int, features: torch.Tensor) -> torch.Tensor:
        seen.append((index, features))
        return features

    lq = torch.rand(1, 3, 11, 13)
    assert torch.equal(net(lq, watch), net(lq))
    for place, (index, features) in enumerate(seen):
        assert index == place and features.shape == (1, net.stages[index].channels, 11, 13)
        assert torch.equal(features, outputs[index][:, 3:])
    assert len(seen) == 3
    for changed in range(3):  # and the net goes on with what comes back, the last one too
        zeroed = net(lq, lambda index, z, changed=changed: 0 * z if index == changed else z)
        assert not torch.equal(zeroed, net(lq)), changed
