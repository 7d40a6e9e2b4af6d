"""A mask server inside the test's own process."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

from dist_train.priors import build_prior
from dist_train.priors.masks import Prior
from dist_train.priors.remote import make_key
from launch.mask_server import serve


@contextlib.contextmanager
def serving(of: Any, prior: Prior | None = None, *, key: bytes | None = None) -> Iterator[str]:
    """Serve `prior`, or what `of` names, on a free port; gives the address."""
    listener = socket.create_server(("127.0.0.1", 0))
    settings = {"of": of.model_dump(mode="json"), "key": key or make_key(), "device": "cpu"}

    def run() -> None:
        serve(listener, prior or build_prior(of, "cpu"), **settings)  # type: ignore[arg-type]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
