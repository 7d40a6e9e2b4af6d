"""`remote`: masks from another process are those of the local prior, and all that can go wrong says what it is."""

import contextlib
import errno
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config import RegionsConfig, RemoteConfig, SamConfig, changed_method
from dist_train.priors import build_prior
from dist_train.priors.masks import MaskSet
from dist_train.priors.remote import as_connection, key_path, make_key, receive, send
from launch import mask_server
from tests.helpers.mask_servers import serving
from tests.helpers.rectangles import ColourPrior
from tests.helpers.tasks import tiny_run

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
REGIONS = RegionsConfig(num_masks=7, scale=50, min_area_px=16)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def ask_at(address: str, of: Any = REGIONS, *, timeout_s: float = 20) -> Any:
    return build_prior(RemoteConfig(of=of, servers=(address,), timeout_s=timeout_s), CPU)


def pictures(seed: int, batch: int = 3, height: int = 37, width: int = 53) -> torch.Tensor:
    """Blocks and noise, some of it outside of [0,1]."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(batch, 3, height // 9 + 1, width // 9 + 1, generator=generator)
    blocks = blocks.repeat_interleave(9, 2).repeat_interleave(9, 3)[..., :height, :width]
    return blocks * 1.2 - 0.1 + 0.05 * torch.randn(batch, 3, height, width, generator=generator)


def assert_equal(found: MaskSet, wanted: MaskSet) -> None:
    assert torch.equal(found.masks, wanted.masks) and torch.equal(found.valid, wanted.valid)


def test_masks_are_the_local_ones_bit_by_bit() -> None:
    local = build_prior(REGIONS, CPU)
    ties = ((torch.arange(3 * 16 * 16) % 256 + 0.5) / 255).view(1, 3, 16, 16)
    with serving(REGIONS) as address:
        remote = ask_at(address)
        for images in (pictures(0), pictures(1, batch=1, height=64, width=40), pictures(2).bfloat16(), ties):
            assert_equal(remote(images.requires_grad_()), local(images))
        assert local(pictures(0)).counts().min() > 1
        said = remote.describe()
    assert said["name"] == "remote" and said["parameters"]["of"]["scale"] == 50 and "not SAM" in said["what"]
    assert said["sha256"] is None and said["parameters"]["servers"] == [address]


class Watched:
    """Bytes of the picture as masks; notes how many are at it at a time, and fails on demand."""

    def __init__(self) -> None:
        self.inside, self.most, self.seen, self.fails = 0, 0, [], False

    def __call__(self, images: torch.Tensor, batch: object = None, *, restore: object = None) -> MaskSet:
        if self.fails:
            raise RuntimeError("out of memory")
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.01)
        self.seen.append(images)
        levels = (images * 255).round().int()[:, :1]
        masks = (levels >> torch.arange(7)[:, None, None] & 1).bool()
        self.inside -= 1
        return MaskSet(masks, masks.flatten(2).any(2), {"busy": len(images) / 2})

    def describe(self) -> dict[str, Any]:
        return ColourPrior().describe()


def test_several_ranks_at_once_get_each_its_own_one_after_the_other() -> None:
    watched = Watched()
    with serving(REGIONS, watched) as address, ThreadPoolExecutor(3) as ranks:

        def rank(number: int) -> None:
            remote = ask_at(address)
            for step in range(6):
                images = pictures(10 * number + step, batch=1 + number)
                found = remote(images)
                u8 = (images[:, :1].clamp(0, 1) * 255 + 0.5).int()
                assert torch.equal(found.masks, (u8 >> torch.arange(7)[:, None, None] & 1).bool())
                assert found.notes == {"busy": (1 + number) / 2}

        list(ranks.map(rank, range(3)))
    assert watched.most == 1 and len(watched.seen) == 18


def test_a_picture_that_is_not_finite_has_no_masks() -> None:
    images = pictures(0)
    images[1, 2, 3, 4], images[2, 0, 0, 0] = torch.nan, torch.inf
    with serving(REGIONS, Watched()) as address:
        found = ask_at(address)(images)
    assert found.valid.any(1).tolist() == [True, False, False]


def test_a_prior_that_fails_is_an_error_of_the_rank_and_the_server_lives() -> None:
    watched = Watched()
    with serving(REGIONS, watched) as address:
        remote, watched.fails = ask_at(address), True
        with pytest.raises(ConnectionError, match=f"{address} failed: RuntimeError: out of memory"):
            remote(pictures(0))
        watched.fails = False
        assert remote(pictures(0)).valid.any() and ask_at(address)(pictures(0)).valid.any()


def test_who_has_another_key_is_refused_and_others_are_served() -> None:
    make_key()
    with serving(REGIONS, key=b"other") as address:
        with pytest.raises(ValueError, match=f"{address} has another key than {key_path()}"):
            ask_at(address)
        key_path().write_bytes(b"other")
        assert ask_at(address)(pictures(0)).valid.any()


def test_a_silent_stranger_is_sent_away_and_a_rank_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_server, "STRANGER_LIMIT_S", 0.3)
    with serving(REGIONS) as address:
        rank = ask_at(address)
        with socket.create_connection(address.split(":"), timeout=5) as stranger:
            while stranger.recv(1000):  # the challenge, and then the end
                pass
        assert rank(pictures(0)).valid.any()


def test_an_error_of_accept_does_not_end_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def sometimes(listener: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", sometimes)
    with serving(REGIONS) as address:
        assert ask_at(address)(pictures(0)).valid.any()
    assert "Too many open files" in caplog.text


def test_a_peer_that_sends_nonsense_is_dropped_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with serving(REGIONS) as address:
        rank = ask_at(address)
        rank._connection.send_bytes(b"\xff{")
        with pytest.raises(EOFError):
            rank._connection.recv_bytes()
    assert "is dropped, it does not speak as a rank does" in caplog.text


def test_a_server_with_other_settings_is_refused() -> None:
    with serving(REGIONS) as address:
        with pytest.raises(ValueError, match=f"{address} was started with prior.of.scale=50.0, not 80.0; start"):
            ask_at(address, REGIONS.model_copy(update={"scale": 80.0}))
        with pytest.raises(ValueError, match="prior.of.name=regions, not sam"):
            ask_at(address, SamConfig())


def test_the_key_is_for_its_owner_and_made_once() -> None:
    with ThreadPoolExecutor(8) as servers:
        keys = list(servers.map(lambda _: make_key(), range(8)))
    assert set(keys) == {key_path().read_bytes()} and len(keys[0]) == 64
    assert key_path().stat().st_mode & 0o777 == 0o600 and len(list(key_path().parent.iterdir())) == 1


def test_without_a_key_it_says_where_it_should_be() -> None:
    with serving(REGIONS, key=b"other") as address:
        with pytest.raises(ValueError, match=f"no key {key_path()}, which the server writes"):
            ask_at(address, timeout_s=0.1)


@pytest.mark.parametrize("silent", [False, True])
def test_nobody_there_names_the_place_and_the_command(silent: bool) -> None:
    make_key()
    with socket.create_server(("127.0.0.1", 0)) as listener:  # silent: takes calls and never says a word
        port = listener.getsockname()[1]
        if not silent:
            listener.close()
        begun = time.monotonic()
        command = f"python -m launch.mask_server CONFIG --listen 0.0.0.0:{port}"
        with pytest.raises(ValueError, match=f"(?s)no mask server at 127.0.0.1:{port} .*{command}"):
            ask_at(f"127.0.0.1:{port}", timeout_s=0.4)
        assert 0.1 < time.monotonic() - begun < 2


@contextlib.contextmanager
def one_talk(address: str) -> Iterator[None]:
    """A server that is gone after the first picture."""
    host, port = address.split(":")
    key = make_key()
    hello = {"of": REGIONS.model_dump(mode="json"), "prior": build_prior(REGIONS, CPU).describe()}
    listener = socket.create_server((host, int(port)))

    def talk() -> None:
        with as_connection(listener.accept()[0]) as connection:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            send(connection, hello)
            receive(connection)

    thread = threading.Thread(target=talk, daemon=True)
    with listener:
        thread.start()
        yield
        thread.join()


def test_a_server_that_comes_late_is_waited_for_and_one_that_dies_over_a_picture_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with ThreadPoolExecutor(1) as rank:
        asked = rank.submit(ask_at, address)
        time.sleep(0.25)
        with one_talk(address):
            with pytest.raises(ConnectionError, match=f"mask server {address} is gone"):
                asked.result()(pictures(0))


def test_a_server_that_takes_too_long_is_an_error_that_names_the_setting() -> None:
    class Slow(Watched):
        def __call__(self, *args: Any, **kwargs: Any) -> MaskSet:
            time.sleep(0.8)
            return super().__call__(*args, **kwargs)

    with serving(REGIONS, Slow()) as address:
        remote = ask_at(address, timeout_s=0.3)
        with pytest.raises(ConnectionError, match=r"slower than prior.timeout_s=0.3 \(it never answered\)"):
            remote(pictures(0))


def test_a_rank_needs_nothing_of_sam() -> None:
    code = (
        "import sys, torch; sys.modules['segment_anything'] = None\n"
        "from dist_train.config import RemoteConfig, SamConfig\n"
        "from dist_train.priors import build_prior\n"
        "config = RemoteConfig(of=SamConfig(num_masks=6), servers=(sys.argv[1],), timeout_s=20)\n"
        "remote = build_prior(config, torch.device('cpu'))\n"
        "assert remote(torch.tensor([0., 1., 0.]).view(1, 3, 1, 1).expand(2, 3, 8, 8)).counts().tolist() == [1, 1]\n"
    )
    with serving(SamConfig(num_masks=6), ColourPrior(6)) as address:
        subprocess.run([sys.executable, "-c", code, address], check=True, cwd=ROOT)


def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "name: trial\ndata: {train: '-'}\n"
        "prior: {name: remote, servers: ['x:1'], of: {name: regions, num_masks: 7, scale: 50, min_area_px: 16}}\n"
    )

    def command(*more: str) -> subprocess.Popen[str]:
        whole = [sys.executable, "-m", "launch.mask_server", str(config), *more]
        return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    with command("--listen", "127.0.0.1:0", "--device", "cpu") as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        remote = ask_at(address)
        assert_equal(remote(pictures(0)), build_prior(REGIONS, CPU)(pictures(0)))
        with command("--listen", address) as other:
            assert f"--listen {address}: " in other.communicate(timeout=60)[1] and other.returncode == 2
        server.send_signal(signal.SIGTERM)
        said = server.communicate(timeout=60)[1]
        assert server.returncode == 0 and "Traceback" not in said and "stopped" in said
    with pytest.raises(ConnectionError, match=f"mask server {address} is gone"):
        remote(pictures(0))
    with command("--listen", "127.0.0.1:0", "prior={name: regions}") as server:
        assert "prior.name=regions: a server makes" in server.communicate(timeout=60)[1] and server.returncode == 2


@pytest.mark.parametrize("servers", [["gpu7"], [":70"], ["gpu7:x"], ["gpu7:70000"], ["a:b:7"], []])
def test_addresses_are_host_and_port(servers: list[str]) -> None:
    with pytest.raises(ValueError, match="prior.servers"):
        tiny_run(prior={"name": "remote", "of": {"name": "regions"}, "servers": servers})


def test_where_masks_are_made_is_no_part_of_the_method() -> None:
    def remote(**settings: Any) -> Any:
        return tiny_run(prior={"name": "remote", "of": {"name": "sam"}, "servers": ["a:1"], **settings})

    here = tiny_run(prior={"name": "sam"})
    assert changed_method(here, remote()) == changed_method(remote(servers=["b:2"], timeout_s=9), here) == []
    assert changed_method(here, remote(of={"name": "sam", "num_masks": 8})) == ["prior.num_masks=32 is now 8"]
    assert remote(of={"name": "sam", "num_masks": 8}).prior.num_masks == 8
