"""Data sets that lie elsewhere: fetched whole or not at all, shared by processes, within a limit."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import pickle
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset.gopen  # noqa: F401  # once here instead of once in each process below

from dist_train.data.reader import BadSampleError, ShardReader
from shards import fetch
from shards.cache import ShardCache
from shards.index import open_index
from shards.schema import ShardError
from tests.helpers.flaky_server import serve, whole_transfers
from tests.helpers.pairs import make_pairs, write_pairs

pytestmark = pytest.mark.unit

NUM, PER_SHARD = 16, 2
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("far")
    manifest = write_pairs(make_pairs(root / "src", NUM, h=64, w=64), root / "set", shard_mib=0.045)
    assert len(manifest.shardlist) == NUM // PER_SHARD
    return root / "set"


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(fetch, "PAUSES_S", (0.01,) * 9)


def cache_of(tmp_path: Path, folder: Path, num_shards: float) -> ShardCache:
    """One that holds so many shards."""
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    return ShardCache(tmp_path / "cache", limit_gib=(num_shards * largest + 1) / 2**30)


def held_bytes(cache: ShardCache) -> int:
    """What lies in a cache in a moment in which nobody makes room."""
    total = 0
    with (cache.folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in cache.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # of a fetch that failed
                total += path.stat().st_size
    return total


def equal(reader: ShardReader, local: ShardReader, number: int) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(reader.pair(number), local.pair(number), strict=True))


def kept(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {"lock"}


def stall_once(name: str, turn: int) -> str:
    return "stall" if name == "000000.tar" and turn == 0 else ""


# Concurrent processes ---------------------------------------------------------------------------------------------


def some_fault(name: str, turn: int) -> str:
    """Of ten transfers of a shard three are cut, one gives 500, one wrong bytes, one is slow."""
    faults = ("cut", "", "wrong", "cut", "slow", "500", "", "cut", "", "")
    return faults[(zlib.crc32(name.encode()) + turn) % 10] if name.endswith(".tar") else ""


def read_all(url: str, cache: ShardCache, folder: Path, seed: int, rounds: int) -> None:
    reader, local = ShardReader(url, cache), ShardReader(folder)
    for number in np.random.default_rng(seed).permuted(np.tile(np.arange(NUM), (rounds, 1)), axis=1).flat:
        assert equal(reader, local, int(number)), number


@pytest.mark.parametrize("num_shards", [NUM // PER_SHARD // 2, NUM // PER_SHARD], ids=["half", "all"])
def test_processes_share_a_cache_while_transfers_fail(folder, tmp_path, num_shards):
    cache = cache_of(tmp_path, folder, num_shards)
    with serve(folder, tmp_path / "log", some_fault) as url:
        processes = [FORK.Process(target=read_all, args=(url, cache, folder, seed, 1)) for seed in range(6)]
        for process in processes:
            process.start()
        most = 0
        while any(process.is_alive() for process in processes):
            most = max(most, held_bytes(cache) if cache.folder.exists() else 0)
            time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    assert cache.limit / 2 < most <= cache.limit
    assert not list(cache.folder.glob("*.part"))
    transfers = whole_transfers(tmp_path / "log")
    tars = {name: num for name, num in transfers.items() if name.endswith(".tar")}
    assert len(tars) == NUM // PER_SHARD
    if num_shards == NUM // PER_SHARD:
        assert set(tars.values()) == {1}  # whoever came second waited, or found it
    assert transfers["manifest.json"] == len(processes)


def test_a_process_killed_in_the_middle_leaves_nothing_bad(folder, tmp_path):
    cache, local = cache_of(tmp_path, folder, 4), ShardReader(folder)
    with serve(folder, tmp_path / "log", stall_once) as url:
        victim = FORK.Process(target=read_all, args=(url, cache, folder, 0, 1))
        victim.start()
        part = cache.folder / f"{local.manifest.shardlist[0].sha256}.part"
        while not part.exists() or not part.stat().st_size:
            time.sleep(0.01)
        waiting = FORK.Process(target=read_all, args=(url, cache, folder, 1, 1))
        waiting.start()
        time.sleep(0.1)
        victim.kill()
        victim.join()
        waiting.join()
        assert waiting.exitcode == 0
        assert not list(cache.folder.glob("*.part"))

        (cache.folder / f"{'0' * 64}.part").write_bytes(bytes(10))  # of one that nobody asks for again
        ShardReader(url, cache)
        assert not list(cache.folder.glob("*.part"))


# What is fetched --------------------------------------------------------------------------------------------------


def test_a_shard_that_is_not_there_is_fatal(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set" / "000001.tar").unlink()
    with serve(tmp_path / "set", tmp_path / "log") as url:
        reader = ShardReader(url, cache_of(tmp_path, folder, 8))
        number = reader.keys.index(ShardReader(folder).keys[PER_SHARD])
        with pytest.raises(ShardError, match=rf"^{url}/000001.tar: could not be fetched: .*404") as caught:
            reader.pair(number)
        assert not isinstance(caught.value, BadSampleError)  # for which there would be a stand-in
        assert whole_transfers(tmp_path / "log")["000001.tar"] == 1  # it is not asked for again and again
        with pytest.raises(ShardError, match=rf"^{url}/other/manifest.json: could not be fetched: .*404"):
            ShardReader(f"{url}/other")


def test_wrong_bytes_are_never_kept(folder, tmp_path):
    cache = cache_of(tmp_path, folder, 8)
    with serve(folder, tmp_path / "log", lambda name, turn: "wrong" if name.endswith(".tar") else "") as url:
        with pytest.raises(ShardError, match=rf"^{url}/.*tried 10 times\): other bytes came"):
            ShardReader(url, cache).pair(0)
    assert not kept(cache)


def test_a_changed_data_set_is_noticed(folder, tmp_path):
    src, cache = make_pairs(tmp_path / "src", NUM, h=64, w=64), cache_of(tmp_path, folder, 16)
    shutil.copytree(folder, tmp_path / "set")
    with serve(tmp_path / "set", tmp_path / "log") as url:
        before = ShardReader(url, cache)
        assert equal(before, ShardReader(folder), NUM - 1)
        shutil.copyfile(src / "lq" / "s-2.png", src / "lq" / "s-1.png")
        shutil.rmtree(tmp_path / "set")
        write_pairs(src, tmp_path / "set", shard_mib=0.045)  # shards of the same names
        with pytest.raises(ShardError, match=rf"^{url}/000000.tar: .* (other bytes came|bytes came instead of)"):
            before.pair(0)
        after, local = ShardReader(url, cache), ShardReader(tmp_path / "set")
        assert after.fingerprint == local.fingerprint != before.fingerprint
        assert all(equal(after, local, number) for number in range(NUM))


@pytest.mark.parametrize("form", ["pipe", "file", "s3", "http"])
def test_forms_of_urls(folder, tmp_path, monkeypatch, form):
    (tmp_path / "aws").write_text('#!/bin/sh\ntest "$1 $2 $3 $5" = "s3 cp --only-show-errors -" && cat "${4#s3:/}"\n')
    (tmp_path / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    local, cache = ShardReader(folder), cache_of(tmp_path, folder, 8)
    with serve(folder, tmp_path / "log") as url:
        where = {
            "pipe": f"pipe:cat {folder}/{{}} | cat",
            "file": f"file://{folder}",
            "s3": f"s3:/{folder}/",
            "http": f"{url}/?token=a[1]",
        }[form]
        reader = pickle.loads(pickle.dumps(ShardReader(where, cache)))
        assert reader.fingerprint == local.fingerprint
        assert equal(reader, local, 3)
        manifest, rows = open_index(where)
        assert manifest == local.manifest and len(rows) == NUM
    if form == "http":
        assert all(line.endswith(" token=a[1]") for line in (tmp_path / "log").read_text().splitlines())
    if form == "file":
        assert not cache.folder.exists()  # read in place
    else:
        assert kept(cache) == {local.manifest.shardlist[3 // PER_SHARD].sha256}


def test_urls_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="write {} where the command takes the name"):
        ShardReader("pipe:cat /data/rain")
    with pytest.raises(ValueError, match=r"http\(s\)://, s3:// or pipe:COMMAND"):
        ShardReader("gopher://data/rain")
    with pytest.raises(ShardError, match="tried 10 times.*status 3"):
        ShardReader("pipe:exit 3; echo {}")


# The cache itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def far(folder, tmp_path):
    """Reader, its cache for two shards, and the same data set here."""
    cache = cache_of(tmp_path, folder, 2)
    return ShardReader(f"pipe:cat {folder}/{{}}", cache), cache, ShardReader(folder)


def test_what_was_read_longest_ago_goes_and_stays_readable(far, folder):
    reader, cache, local = far
    shards, num_open = local.manifest.shardlist, len(os.listdir("/proc/self/fd"))
    for number in (0, 1 * PER_SHARD, 0):
        reader.pair(number)
    held = cache.open(shards[1], "pipe:no such command")  # it is here: nothing is fetched
    reader.pair(0)
    reader.pair(2 * PER_SHARD)
    assert kept(cache) == {shards[0].sha256, shards[2].sha256}
    assert os.pread(held, 10**9, 0) == (folder / shards[1].url).read_bytes()
    os.close(held)
    assert len(os.listdir("/proc/self/fd")) == num_open  # or what was thrown away would still fill the disk


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_shard_that_changed_on_the_disk_is_fetched_again(far, caplog, damage):
    reader, cache, local = far
    assert equal(reader, local, 0)
    (path,) = (cache.folder / name for name in kept(cache))
    data = path.read_bytes()
    middle = len(data) // 4  # within the first sample
    path.write_bytes(data[:middle] if damage == "cut" else data[:middle] + bytes(512) + data[middle + 512 :])
    assert equal(reader, local, 0)
    assert path.read_bytes() == data
    assert "fetched again: see whether the disk is sound" in caplog.text


def test_a_cache_that_cannot_be_is_told_before_anything_starts(folder, tmp_path, monkeypatch):
    url = f"pipe:cat {folder}/{{}}"
    with pytest.raises(ValueError, match="the largest shard alone has .*: raise data.cache_gib"):
        ShardReader(url, cache_of(tmp_path, folder, 0.5))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/cache cannot be used .*: set data.cache_dir"):
        ShardReader(url, ShardCache(tmp_path / "file" / "cache"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    with pytest.raises(ValueError, match="its disk has room for .*: lower data.cache_gib"):
        ShardReader(url, cache_of(tmp_path, folder, 2))
    ShardReader(url, cache_of(tmp_path, folder, 1))


def test_several_data_sets_must_fit_onto_the_disk_together(folder, tmp_path, monkeypatch):
    write_pairs(make_pairs(tmp_path / "other_src", 3), tmp_path / "other")
    one, other = (f"pipe:cat {path}/{{}}" for path in (folder, tmp_path / "other"))
    free = sum(path.stat().st_size for path in folder.glob("*.tar"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    cache = ShardCache(tmp_path / "cache")
    ShardReader(one, cache)
    ShardReader(one, cache)  # counts once
    with pytest.raises(ValueError, match="its disk has room for"):
        ShardReader(other, cache)


def test_a_disk_that_fills_up_later_is_told_too(far, monkeypatch):
    reader, cache, _ = far

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ShardError, match="000000.tar: could not be kept in the cache .*: No space left on device"):
        reader.pair(0)
    assert not kept(cache)


def test_a_shard_may_be_fetched_ahead(far):
    reader, cache, local = far
    reader.prefetch(PER_SHARD)
    deadline = time.monotonic() + 10
    while kept(cache) != {local.manifest.shardlist[1].sha256} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kept(cache) == {local.manifest.shardlist[1].sha256}
    local.prefetch(0)  # nothing to do
