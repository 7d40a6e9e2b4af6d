"""The command that makes graphs of nets, and the graphs where this program is not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from dist_train.config import NetConfig
from dist_train.export import write_export
from dist_train.nets import build_net
from tests.helpers.nets import TINY_NETS

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SHAPES = [(1, 3, 1, 1), (2, 3, 33, 32), (1, 3, 64, 32), (1, 3, 100, 50)]
RUNNERS = {
    ".onnx": "import onnxruntime\n"
    "session = onnxruntime.InferenceSession('net.onnx')\n"
    "graph = lambda lq: torch.from_numpy(session.run(None, {'lq': lq.numpy()})[0])\n",
    ".pt2": "graph = torch.export.load('net.pt2').module()\n",
    ".aoti.pt2": "graph = torch._inductor.aoti_load_package('net.aoti.pt2')\n",
}


@pytest.mark.parametrize(
    ("suffix", "config"),
    [
        (".onnx", TINY_NETS["efficientderain"]),
        (".onnx", TINY_NETS["uformer"] | {"depths": [1] * 7 + [2, 1]}),  # one block with shifted windows
        (".pt2", TINY_NETS["nafnet"]),
        (".aoti.pt2", TINY_NETS["nafnet"] | {"enc_blk_nums": [1], "dec_blk_nums": [0]}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_a_graph_restores_where_this_program_is_not(suffix: str, config: dict[str, Any], tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime", reason="needs restill[onnx]")
    if suffix == ".aoti.pt2" and not shutil.which("g++"):
        pytest.skip("no g++, which AOTInductor compiles with")
    torch.manual_seed(0)
    parsed = TypeAdapter(NetConfig).validate_python(config)
    net = build_net(parsed).eval().requires_grad_(False)
    for parameter in net.parameters():  # at initialisation some are zero, which would hide mistakes
        torch.nn.init.normal_(parameter, 0, 0.1)
    write_export(net, tmp_path / "net.safetensors", config=parsed, facts={})
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.export", "net.safetensors", f"net{suffix}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert "differs from the net by" in done.stdout

    smallest = net.multiple if suffix == ".aoti.pt2" else 0
    pictures = [torch.rand(shape) for shape in SHAPES if min(shape[2:]) > smallest]
    torch.save([(lq, net(lq)) for lq in pictures], tmp_path / "pairs.pt")
    script = (
        f"import sys, torch\n{RUNNERS[suffix]}"
        "for lq, wanted in torch.load('pairs.pt'):\n"
        "    torch.testing.assert_close(graph(lq), wanted, rtol=0, atol=1e-5)\n"
        "assert 'dist_train' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={"PATH": os.environ["PATH"]}, check=True)
