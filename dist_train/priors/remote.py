"""`remote`: masks made by other processes (`python -m launch.mask_server`), each of which may serve several ranks.

The servers are no part of the run's process group: a run that restarts, or changes its number of ranks, is no concern
of theirs, and SAM's code and weights are theirs alone. A rank waits for its masks, which are those of the local prior,
bit by bit.

What travels is messages of two parts: a line of JSON, and bytes. Nothing that is received is ever executed.

    server -> rank   {"of": settings, "prior": its description}   after each has proved that it has the key
    rank -> server   {"shape": [B,3,H,W]}, (B,3,H,W) uint8
    server -> rank   {"notes": {...}}, `valid` and `masks` one bit each; or {"error": text}

The key is a file that the first server to start writes, `key_path`. It keeps others out; it encrypts nothing.
"""

import json
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train import ranks
from dist_train.config import RemoteConfig, host_and_port
from dist_train.priors.masks import MaskSet, Restore, Samples, finite

log = logging.getLogger(__name__)


class RemotePrior:
    """The masks of a prior that runs elsewhere.

    Args:
        connection: to a server that has said what it runs; it is taken over.
        config: see there.
        address: of the server, for errors.
        description: of the prior there.
    """

    def __init__(self, connection: Connection, config: RemoteConfig, *, address: str, description: dict[str, Any]):
        self._connection, self._config, self._address = connection, config, address
        self._description = description

    def __call__(self, images: Tensor, batch: Samples | None = None, *, restore: Restore | None = None) -> MaskSet:
        """Segment pictures; see `Prior`. Of a picture that is not finite there are no masks.

        Raises:
            ConnectionError: the server is gone, silent for `timeout_s`, or failed. On this rank alone: the launcher
                ends the others, and the same command goes on from the last checkpoint.
        """
        pictures = (images.detach().float().nan_to_num().clamp(0, 1) * 255 + 0.5).byte()  # as `masks.to_uint8`
        shape = (len(images), self._config.num_masks, *images.shape[-2:])
        try:
            send(self._connection, {"shape": pictures.shape}, pictures.cpu().numpy().tobytes())
            answer, bits = receive(self._connection)
        except (OSError, EOFError) as error:
            raise ConnectionError(
                f"mask server {self._address} is gone, or slower than prior.timeout_s={self._config.timeout_s:g} "
                f"({_reason(error)}); its own log says more"
            ) from error
        if "error" in answer:
            raise ConnectionError(f"mask server {self._address} failed: {answer['error']}")
        found = unpack_masks(bits, shape).to(images.device)
        return MaskSet(found.masks, found.valid & finite(images), answer["notes"])

    def describe(self) -> dict[str, Any]:
        """For the run record: what makes the masks, and where."""
        there = self._description
        return there | {
            "name": self._config.name,
            "what": f"{there['what']}; made by mask servers",
            "parameters": self._config.model_dump(mode="json", exclude={"name", "of"})
            | {"of": {"name": there["name"], **there["parameters"]}},
        }


def load_remote_prior(config: RemoteConfig, device: torch.device) -> RemotePrior:
    """Reach this rank's server. All ranks call.

    Args:
        config: see there.
        device: of no concern; masks lie where the pictures do.

    Raises:
        ValueError: on all ranks, if one of them found no server, or one with another key or other settings, or if the
            servers are not alike.
    """
    address = config.servers[ranks.rank() % len(config.servers)]
    connection: Connection | None = None
    description: dict[str, Any] = {}
    problem = None
    try:
        connection, description = _reach(address, config)
    except ValueError as error:
        problem = str(error)
    everyone = ranks.gather_objects((address, description, problem))
    for _, _, failed in everyone:
        if failed is not None:
            raise ValueError(failed)
    first, wanted, _ = everyone[0]
    for other, found, _ in everyone:
        if unlike := [name for name in wanted if name != "weights" and found.get(name) != wanted[name]]:
            name = unlike[0]
            raise ValueError(
                f"mask servers {first} and {other} differ in {name}: {wanted[name]} and {found.get(name)}; "
                "start them with the same files, all on GPUs or none"
            )
    assert connection is not None  # or there was a problem
    return RemotePrior(connection, config, address=address, description=description)


def _reach(address: str, config: RemoteConfig) -> tuple[Connection, dict[str, Any]]:
    """Connect, trying again until `timeout_s` is over, and make sure that what runs there is what the run wants."""
    connection = _connect(address, config.timeout_s)
    try:
        hello, _ = receive(connection)
    except (OSError, EOFError) as error:
        raise ValueError(_nobody(address, config.timeout_s, error)) from error
    wanted = config.of.model_dump(mode="json")
    if unlike := sorted(key for key in hello["of"].keys() | wanted if hello["of"].get(key) != wanted.get(key)):
        told = ", ".join(f"prior.of.{key}={hello['of'].get(key)}, not {wanted.get(key)}" for key in unlike)
        raise ValueError(f"mask server {address} was started with {told}; start it again with this run's configuration")
    return connection, hello["prior"]


def _connect(address: str, timeout_s: float) -> Connection:
    deadline, pause_s = time.monotonic() + timeout_s, 0.1
    while True:
        try:
            key = key_path().read_bytes()
            sock = socket.create_connection(host_and_port(address), timeout=timeout_s)
            connection = as_connection(sock, timeout_s=timeout_s)
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
            return connection
        except AuthenticationError:
            raise ValueError(
                f"mask server {address} has another key than {key_path()} here; copy its file of that name, or remove "
                "this one if both should be the same, and start the server again"
            ) from None
        except (OSError, EOFError) as error:
            if time.monotonic() + pause_s > deadline:
                raise ValueError(_nobody(address, timeout_s, error)) from error
            if pause_s == 0.1:
                log.warning("waiting up to %g s for mask server %s (%s)", timeout_s, address, _reason(error))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 5.0)


def _nobody(address: str, timeout_s: float, error: Exception) -> str:
    return (
        f"prior.servers: no mask server at {address} within prior.timeout_s={timeout_s:g} ({_reason(error)}); start it "
        f"there: python -m launch.mask_server CONFIG --listen 0.0.0.0:{host_and_port(address)[1]}"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, BlockingIOError):
        return "it never answered"
    if isinstance(error, FileNotFoundError):
        return f"no key {key_path()}, which the server writes; where homes are not shared, copy it from there"
    return str(error) or type(error).__name__


# ------------------------------------------------------------------------------------------- both sides of the wire


def key_path() -> Path:
    """The file that proves to a server that a rank is its owner's: $XDG_CONFIG_HOME/restill/mask_key, or ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "restill" / "mask_key"


def make_key() -> bytes:
    """The key; written first, for its owner alone, where there is none."""
    path = key_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(secrets.token_hex(32).encode())
    try:
        os.link(new, path)  # whole or not at all, and never in the place of another
    except FileExistsError:
        pass
    finally:
        new.unlink()
    return path.read_bytes()


def as_connection(sock: socket.socket, *, timeout_s: float | None = None) -> Connection:
    """A socket, which is taken over, as a connection of messages; OSError if one takes longer than `timeout_s`."""
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection = Connection(sock.detach())
    limit_waiting(connection, timeout_s)
    return connection


def limit_waiting(connection: Connection, timeout_s: float | None) -> None:
    """From now on OSError if the other side is silent for longer; None: never."""
    seconds = timeout_s or 0.0  # which to the system is no limit
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock = socket.socket(fileno=connection.fileno())
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, limit)
    sock.detach()


def send(connection: Connection, line: dict[str, Any], data: bytes = b"") -> None:
    """Send a message."""
    connection.send_bytes(json.dumps(line).encode())
    connection.send_bytes(data)


def receive(connection: Connection) -> tuple[dict[str, Any], bytes]:
    """Wait for a message; EOFError if the other side is gone."""
    return json.loads(connection.recv_bytes()), connection.recv_bytes()


def pack_masks(found: MaskSet) -> bytes:
    """`valid`, then `masks`, 8 to a byte: 2.1 MB for 8 pictures of 256x256 with 32 masks."""
    flags = torch.cat([found.valid.flatten(), found.masks.flatten()])
    return np.packbits(flags.cpu().numpy()).tobytes()


def unpack_masks(data: bytes, shape: Sequence[int]) -> MaskSet:
    """What `pack_masks` packed, on the CPU; `shape` is (B,K,H,W)."""
    batch, num_masks, height, width = shape
    num_valid = batch * num_masks
    flags = np.unpackbits(np.frombuffer(data, np.uint8), count=num_valid * (1 + height * width)).view(bool)
    valid, masks = torch.from_numpy(flags).split([num_valid, num_valid * height * width])
    return MaskSet(masks.view(*shape), valid.view(batch, num_masks))
