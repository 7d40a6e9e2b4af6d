"""Make masks for the ranks of a run: `python -m launch.mask_server CONFIG [key.sub=value ...] --listen HOST:PORT`."""

import argparse
import errno
import logging
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from typing import TYPE_CHECKING, Any

from dist_train.config import RunConfig, host_and_port, load_run
from launch.command import program
from launch.console import device_of, run_main, set_up_logging

if TYPE_CHECKING:
    from dist_train.priors.masks import Prior

log = logging.getLogger(__name__)

STRANGER_LIMIT_S = 10.0
"""How long whoever connects may stay silent before having shown the key."""
PAUSE_S = 0.5
"""After a connection that could not be accepted."""


def main(argv: list[str] | None = None) -> int:
    """Parse, load, serve until Ctrl-C or SIGTERM; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("launch.mask_server"),
        description="Load the prior that prior.of names, and make masks for the ranks of runs whose prior.servers name "
        "this machine. One server uses one GPU, the first that CUDA_VISIBLE_DEVICES lets it see.",
        epilog=f"example: {program('launch.mask_server')} run.yaml --listen 0.0.0.0:7070",
    )
    parser.add_argument("config", help="YAML file of the run, with prior.name=remote")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that overrule the file")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="0.0.0.0: on all networks; port 0: any")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    args = parser.parse_intermixed_args(argv)

    def act() -> int:
        run = load_run(args.config, args.overrides)
        try:
            serve_run(run, args.listen, args.device)
        except KeyboardInterrupt:
            log.info("stopped")
        return 0

    set_up_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    return run_main(act)


def serve_run(run: RunConfig, listen: str, device_name: str) -> None:
    """Listen, load, serve. Ranks that come while SAM is being loaded wait in line."""
    if run.prior.name != "remote":
        raise ValueError(f"prior.name={run.prior.name}: a server makes the masks of prior.name=remote; see prior.of")
    host, port = host_and_port(listen)
    try:
        listener = socket.create_server((host, port), backlog=128)
    except OSError as error:
        raise OSError(f"--listen {listen}: {error}") from error
    with listener:
        from dist_train.priors import build_inner
        from dist_train.priors.remote import make_key

        device = device_of(device_name)
        key = make_key()
        prior = build_inner(run.prior, device)
        log.info("%s", prior.describe())
        print(f"making masks on {device} for those who ask {host}:{listener.getsockname()[1]}", flush=True)
        serve(listener, prior, of=run.prior.of.model_dump(mode="json"), key=key, device=device)


def serve(listener: socket.socket, prior: "Prior", *, of: dict[str, Any], key: bytes, device: Any) -> None:
    """Answer ranks, each in a thread of its own, until the listener is closed or Ctrl-C (KeyboardInterrupt) comes.

    One further thread alone makes masks, first come first served: what is compiled or captured for a GPU stays in it.

    Args:
        listener: bound and listening.
        prior: what makes the masks.
        of: settings it was made with, which ranks compare with their own.
        key: see `dist_train.priors.remote.make_key`.
        device: where pictures are handed to the prior.
    """
    maker = ThreadPoolExecutor(max_workers=1)
    try:
        while True:
            try:
                sock, (host, port, *_) = listener.accept()
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL):  # closed, or shut down
                    return
                log.warning("nobody can be let in: %s", error)  # too many open files, say: others will leave
                time.sleep(PAUSE_S)
                continue
            arguments = (sock, f"{host}:{port}", maker, prior, {"of": of, "prior": prior.describe()}, key, device)
            threading.Thread(target=_converse, args=arguments, daemon=True).start()
    finally:
        maker.shutdown(cancel_futures=True)  # what is being made is finished


def _converse(
    sock: socket.socket,
    peer: str,
    maker: ThreadPoolExecutor,
    prior: "Prior",
    hello: dict[str, Any],
    key: bytes,
    device: Any,
) -> None:
    """Serve one rank until it leaves."""
    from dist_train.priors.remote import as_connection, limit_waiting, receive, send

    with as_connection(sock, timeout_s=STRANGER_LIMIT_S) as connection:
        try:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            limit_waiting(connection, None)  # a rank may train for long between two batches
            send(connection, hello)
            log.info("%s is being served", peer)
            while True:
                request, data = receive(connection)
                try:
                    notes, bits = maker.submit(_make, prior, request["shape"], data, device).result()
                except Exception as error:  # the rank must hear of it, whatever it is, and others be served
                    log.exception("no masks for %s", peer)
                    send(connection, {"error": f"{type(error).__name__}: {error}"})
                else:
                    send(connection, {"notes": notes}, bits)
        except AuthenticationError:
            log.warning("%s is refused: it has another key", peer)
        except (OSError, EOFError):
            log.info("%s has left", peer)
        except ValueError as error:
            log.warning("%s is dropped, it does not speak as a rank does: %s", peer, error)


def _make(prior: "Prior", shape: list[int], data: bytes, device: Any) -> tuple[dict[str, float], bytes]:
    import torch

    from dist_train.priors.remote import pack_masks

    pictures = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(*shape)
    found = prior(pictures.to(device).float() / 255)
    return dict(found.notes), pack_masks(found)


if __name__ == "__main__":
    sys.exit(main())
