"""A file server, in a process of its own, that fails as it is told."""

import contextlib
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = str
"""`cut` in the middle, `500`, `wrong` bytes, `slow`, `stall` for ever in the middle, or `` for none."""


@contextlib.contextmanager
def serve(folder: Path, log: Path, fault: Callable[[str, int], Fault] = lambda name, turn: "") -> Iterator[str]:
    """Serve a folder.

    Args:
        folder: its files are read at each request.
        log: file to which each request adds a line: name, fault or `whole`, query.
        fault: of the n-th request (from 0) for a name.

    Yields:
        The folder's URL.
    """
    turns: Counter[str] = Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, _, query = self.path.lstrip("/").partition("?")
            with lock:
                kind = fault(name, turns[name])
                turns[name] += 1
                with log.open("a") as file:
                    file.write(f"{name} {kind or 'whole'} {query}\n")
            if kind == "500" or not (folder / name).is_file():
                return self.send_error(500 if kind else 404)
            data = (folder / name).read_bytes()
            if kind == "wrong":
                data = data[:-1] + bytes([data[-1] ^ 1])
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data[: len(data) // 2])
                if kind == "stall":
                    time.sleep(600)
                if kind == "slow":
                    time.sleep(0.1)
                if kind != "cut":
                    self.wfile.write(data[len(data) // 2 :])

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
    process.start()
    server.server_close()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        process.kill()
        process.join()


def whole_transfers(log: Path) -> Counter[str]:
    """How often each file was sent without a fault."""
    lines = [line.split() for line in log.read_text().splitlines()]
    return Counter(name for name, kind, *_ in lines if kind in ("whole", "slow"))
