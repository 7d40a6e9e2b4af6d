"""`python -m launch.page` serves: a picture sent to it comes back restored, as a file like it was."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import cv2
import numpy as np
import pytest
import torch

from dist_train.config import NafnetConfig
from dist_train.export import write_export
from dist_train.nets import build_net
from dist_train.picture_files import Picture, read_picture, write_picture
from dist_train.restore import restore_image

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


@pytest.fixture
def net(tmp_path: Path) -> torch.nn.Module:
    """A net whose weights, random, are exported to net.safetensors."""
    config = NafnetConfig(width=4, enc_blk_nums=(1,), dec_blk_nums=(1,))
    torch.manual_seed(0)
    net = build_net(config).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    write_export(net, tmp_path / "net.safetensors", config=config, facts={})
    return net


@pytest.fixture
def url(tmp_path: Path, net: torch.nn.Module) -> Iterator[str]:
    """Where the page is served."""
    pytest.importorskip("gradio", reason="gradio, of the extra `page`, is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "launch.page", "net.safetensors", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield _wait_for(f"http://127.0.0.1:{port}/", server, tmp_path / "log")
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            urlopen(url, timeout=5).close()
        except URLError:
            time.sleep(0.2)
        else:
            return url
    raise AssertionError(f"not served after two minutes: {log.read_text()}")


def test_a_picture_comes_back_restored_in_its_own_format(url: str, net: torch.nn.Module, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    rng = np.random.default_rng(0)
    picture = Picture(
        rng.integers(0, 65536, (21, 30, 3)).astype(np.uint16), rng.integers(0, 65536, (21, 30)).astype(np.uint16)
    )
    write_picture(tmp_path / "deep.png", picture)
    client = Client(url, verbose=False, download_files=str(tmp_path / "fetched"))
    (before, after), file, note = client.predict(handle_file(str(tmp_path / "deep.png")), False, api_name="/restore")
    restored = read_picture(Path(file))
    assert Path(file).name == "deep.png" and "30 x 21 px" in note
    np.testing.assert_array_equal(restored.rgb, restore_image(net, picture.rgb))
    np.testing.assert_array_equal(restored.alpha, picture.alpha)
    for shown, deep in ((before, picture.rgb), (after, restored.rgb)):
        np.testing.assert_array_equal(cv2.imread(shown)[..., ::-1], (deep >> 8).astype(np.uint8))
    eight = client.predict(handle_file(str(tmp_path / "deep.png")), True, api_name="/restore")[1]
    assert (read_picture(Path(eight)).rgb != restored.rgb).any(), "the mean over eight is another picture"
    (tmp_path / "damaged.png").write_bytes((tmp_path / "deep.png").read_bytes()[:500])
    with pytest.raises(AppError, match="not restored"):
        client.predict(handle_file(str(tmp_path / "damaged.png")), False, api_name="/restore")
