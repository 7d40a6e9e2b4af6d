"""A net as a graph that runs without this library, for pictures of any number and size.

    derain.onnx         ONNX: onnxruntime, and what else reads it
    derain.pt2          torch.export: PyTorch alone, on any device after `torch.export.passes.move_to_device_pass`
    derain.aoti.pt2     AOTInductor: compiled for one device and sides above the net's multiple; PyTorch's C++ or Python

A graph takes `lq`, (B,3,H,W) float32 RGB in [0,1], and gives `restored`, the same, to be clamped; padding and cutting
out are in it. Its card is in it too, see `read_card`.

ONNX of an EfficientDerain that resizes differs the more the larger the picture, 9e-5 at 1281 x 719; all others by 1e-6.
"""

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Graph = Callable[[Tensor], Tensor]
"""(B,3,H,W) float32 on the CPU -> the same."""

TOLERANCE = 1e-4
"""Largest difference from the net that a graph may have, of pictures in [0,1]: a fortieth of a grey level."""

Shape = tuple[int, int, int, int]

TRACED: Shape = (2, 3, 83, 70)
PROVED: tuple[Shape, ...] = ((1, 3, 64, 96), (2, 3, 45, 39), (1, 3, 17, 130), (1, 3, 5, 7))
"""Shapes at which a graph is compared with its net: odd, flat, smaller than any net's own multiple."""

KEY = "restill"
"""Of the card among a graph's own notes."""


def form_of(path: Path) -> str | None:
    """`onnx`, `export` or `aoti`, by the file's suffixes; None for what holds no graph."""
    return {".onnx": "onnx", ".pt2": "aoti" if path.name.endswith(".aoti.pt2") else "export"}.get(path.suffix)


def write_graph(net: nn.Module, file: Path, *, card: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Write a net as a graph, open the file, and compare it with the net at each of `PROVED`, enlarged if need be.

    Args:
        net: in evaluation mode, (B,3,H,W) -> (B,3,H,W).
        file: of a suffix that `form_of` knows.
        card: goes into the file.
        device: what an AOTInductor package is compiled for; the others are traced there.

    Returns:
        The card with `graph`: form, version, smallest side, shapes compared, `max_difference`. The file's own card
        lacks the last.

    Raises:
        ValueError: the net cannot be traced for any size, a package is missing, or the graph differs by more than
            `TOLERANCE`.
    """
    for package in ("onnx", "onnxscript", "onnxruntime") if form_of(file) == "onnx" else ():
        _require(package)
    net = copy.deepcopy(net).to(device)
    smallest_px = getattr(net, "multiple", 1) + 1 if form_of(file) == "aoti" else 1
    shapes = [_at_least(smallest_px, shape) for shape in PROVED]
    about = {"form": form_of(file), "torch": torch.__version__, "smallest_px": smallest_px, "compared_at": shapes}
    card = {**card, "graph": about}
    WRITERS[str(form_of(file))](trace(net, device, smallest_px=smallest_px), file, json.dumps(card))
    difference = max_difference(open_graph(file), net, device, shapes)
    if not difference <= TOLERANCE:  # NaN too
        raise ValueError(
            f"{file.name} differs from the net by {difference:.2g}, more than {TOLERANCE:g}; nothing was written. "
            "Export as .safetensors, or as the other graph"
        )
    return {**card, "graph": about | {"max_difference": difference}}


def trace(net: nn.Module, device: torch.device | str, *, smallest_px: int = 1) -> torch.export.ExportedProgram:
    """The operations of a net, with batch, height and width left open.

    Args:
        net: as for `write_graph`.
        device: where the graph will run.
        smallest_px: of the sides. Above 1, the sizes have those of an example behind them: what AOTInductor of PyTorch
            2.15 makes of wholly open ones restores wrongly, by half of the range.

    Raises:
        ValueError: what the net does depends on the size in a way that no one graph can hold.
    """
    lq = torch.rand(_at_least(smallest_px, TRACED), device=device)
    try:
        return _trace_open(net, lq) if smallest_px == 1 else _trace_from(smallest_px, net, lq)
    except ImportError:
        raise ValueError(f"graphs of any size need a newer PyTorch than {torch.__version__}; 2.15 does") from None
    except Exception as error:  # of what it cannot trace, torch raises anything
        raise ValueError(
            f"this net cannot be traced for pictures of any size: {str(error).strip().splitlines()[0]}. In a net from "
            "elsewhere, let no branch ask for the size; or export as .safetensors"
        ) from error


def _trace_open(net: nn.Module, lq: Tensor) -> torch.export.ExportedProgram:
    from torch.fx.experimental.dynamic_spec import ShapesSpec, ShapeVar, TensorSpec

    batch, height, width = (ShapeVar(name, min=1) for name in ("batch", "height", "width"))
    return torch.export.export(net, (lq,), dynamic_shapes=ShapesSpec({"lq": TensorSpec([batch, 3, height, width])}))


def _trace_from(smallest_px: int, net: nn.Module, lq: Tensor) -> torch.export.ExportedProgram:
    from torch.fx.experimental import _config

    height, width = (torch.export.Dim(name, min=smallest_px) for name in ("height", "width"))
    # So that a graph made of two pictures takes one, and one made of a padded size a size that needs no padding.
    with _config.patch(backed_size_oblivious=True):
        return torch.export.export(
            net,
            (lq,),
            dynamic_shapes=({0: torch.export.Dim("batch"), 2: height, 3: width},),
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _at_least(side_px: int, shape: Shape) -> Shape:
    batch, channels, height, width = shape
    return batch, channels, max(side_px, height), max(side_px, width)


def open_graph(file: Path) -> Graph:
    """What runs the graph in a file.

    Raises:
        ValueError: onnxruntime is missing.
    """
    match form_of(file):
        case "onnx":
            session = _require("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
            return lambda lq: torch.from_numpy(session.run(None, {"lq": lq.numpy()})[0])
        case "export":
            module = torch.export.load(file).module()
            return lambda lq: module(lq.to(_device_of(module))).cpu()
        case "aoti":
            from torch._inductor import aoti_load_package

            package = aoti_load_package(str(file))
            device = package.get_metadata()["AOTI_DEVICE_KEY"]
            return lambda lq: package(lq.to(device)).cpu()
    raise ValueError(f"{file} is no graph; they end in .onnx, .pt2 or .aoti.pt2")


def read_card(file: Path) -> dict[str, Any]:
    """The card that `write_graph` put into a file.

    Raises:
        ValueError: there is none.
    """
    match form_of(file):
        case "onnx":
            found = {prop.key: prop.value for prop in _require("onnx").load(file).metadata_props}
        case "export":
            found = {KEY: ""}
            torch.export.load(file, extra_files=found)
        case _:
            from torch._inductor import aoti_load_package

            found = aoti_load_package(str(file)).get_metadata()
    if not found.get(KEY):
        raise ValueError(f"{file} holds no card; this program did not write it")
    return json.loads(found[KEY])


@torch.no_grad()
def max_difference(graph: Graph, net: nn.Module, device: torch.device | str, shapes: Sequence[Shape] = PROVED) -> float:
    """Largest absolute difference between a graph and its net over pictures of noise; NaN if either gives one."""
    draws = torch.Generator().manual_seed(0)
    pictures = [torch.rand(shape, generator=draws) for shape in shapes]
    differences = [(graph(lq) - net(lq.to(device)).cpu()).abs().max() for lq in pictures]
    return float(torch.stack(differences).max())


def _write_onnx(program: torch.export.ExportedProgram, file: Path, card: str) -> None:
    for chatty in ("onnx_ir", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    graph = torch.onnx.export(program, dynamo=True, input_names=["lq"], output_names=["restored"], verbose=False)
    assert graph is not None, "it is only with a file name that nothing comes back"
    graph.model.metadata_props[KEY] = card
    for end in (graph.model.graph.inputs[0], graph.model.graph.outputs[0]):
        end.shape = type(end.shape)(("batch", 3, "height", "width"))
    graph.save(file, external_data=False)


def _write_export(program: torch.export.ExportedProgram, file: Path, card: str) -> None:
    torch.export.save(program, file, extra_files={KEY: card})


def _write_aoti(program: torch.export.ExportedProgram, file: Path, card: str) -> None:
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(file), inductor_configs={"aot_inductor.metadata": {KEY: card}})


WRITERS: dict[str, Callable[[torch.export.ExportedProgram, Path, str], None]] = {
    "onnx": _write_onnx,
    "export": _write_export,
    "aoti": _write_aoti,
}


def _device_of(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _require(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"ONNX needs {package} ({error}); pip install 'restill[onnx]'") from None
