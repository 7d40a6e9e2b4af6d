import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from dist_train.priors.weights import Source, cache_dir, cached, fetch, load_state, looks_like

pytestmark = pytest.mark.unit

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT under any name; cuts what is called cut, changes what is called wrong."""

    num_requests = 0

    def source(self, name: str) -> Source:
        return Source(f"http://127.0.0.1:{self.server_port}/{name}", SHA256, len(CONTENT))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.num_requests += 1
        name = self.path[1:]
        if name == "absent.pth":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        body = CONTENT[: len(CONTENT) // 2] if name == "cut.pth" else CONTENT
        self.wfile.write(body.replace(b"\x07", b"\x08") if name == "wrong.pth" else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def files() -> list[str]:
    return sorted(path.name for path in cache_dir().iterdir() if path.suffix != ".lock")


def test_a_file_is_downloaded_once(server):
    source = server.source("good.pth")
    assert cached(source) is None
    assert fetch(source).read_bytes() == CONTENT and files() == ["good.pth"]
    assert fetch(source) == cached(source) == cache_dir() / "good.pth"
    assert server.num_requests == 1


def test_ranks_that_start_together_download_once(server):
    threads = [threading.Thread(target=fetch, args=[server.source("good.pth")]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.num_requests == 1 and files() == ["good.pth"]


def test_a_damaged_file_in_the_cache_is_replaced(server):
    source = server.source("good.pth")
    fetch(source).write_bytes(CONTENT[:1000])
    assert cached(source) is None
    assert fetch(source).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("wrong.pth", ValueError, "did not give the published file.*removed"),
        ("cut.pth", OSError, "cannot download http.*put it at .*cut.pth"),
        ("absent.pth", OSError, "404.*put it at .*absent.pth"),
    ],
)
def test_what_is_not_whole_is_not_kept(server, name, error, message):
    with pytest.raises(error, match=message):
        fetch(server.source(name))
    assert files() == []


def test_no_network(server):
    source = server.source("good.pth")
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=r"cannot download http://127.*put it at .*good\.pth"):
        fetch(source)


def test_unreadable_files(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.randn(100)}, path)
    assert list(load_state(path, setting="x")) == ["a"]
    for content in (path.read_bytes()[:300], path.read_bytes()[:-300], b"", b"\x80", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"prior\.checkpoint=.*not a readable PyTorch file"):
            load_state(path, setting="prior.checkpoint")
    torch.save({"model": {"a": torch.zeros(1)}, "step": 3}, path)
    with pytest.raises(ValueError, match="wanted a dictionary of tensors.*model"):
        load_state(path, setting="prior.checkpoint")


def test_what_a_file_looks_like():
    assert looks_like({"image_encoder.pos_embed": torch.zeros(1, 64, 64, 1280)}) == "SAM vit_h"
    vgg16 = {f"features.{i}.weight": torch.zeros(1, 1, 3, 3) for i in range(13)}
    assert looks_like(vgg16) == "torchvision's VGG-16"
    assert "body.0" in looks_like({"body.0": torch.zeros(1)})
