"""A run that is broken in every way, and started again by the same command, ends as if nothing had been.

After each fault: weights, average and moments of the last checkpoint are those of the uninterrupted run, bit by bit;
its record has each step once, with equal losses; its samples are the planned ones, each once. The table that is printed
at the end (pytest -s) says how many steps were computed twice.

Elsewhere: a node that loses its power, preemption and requeue in test_slurm.py; NaN in every ZeRO stage in
multirank/test_engine.py; hung ranks that are named with their stacks in multirank/test_watch.py; every moment of a
save, and a disk that is full then, in unit/test_checkpoint.py; damaged shards in unit/test_bad_shards.py.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from tests.e2e.ranks_of_faults import be_impatient, die_at, poison, tree_of
from tests.e2e.test_samples import Seen, planned, recorded
from tests.helpers.flaky_server import serve
from tests.helpers.starts import SAVES, STEPS, Start, TinyRun

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    TinyRun.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def plan(work: Path) -> Seen:
    return planned(work / "run.yaml")


@pytest.fixture(scope="module")
def whole(work: Path) -> TinyRun:
    """The run that nothing happens to."""
    run = TinyRun(work, "whole")
    with run.start() as start:
        assert start.wait() == [0, 0], start.said
    return run


@pytest.fixture(scope="module")
def half(work: Path) -> TinyRun:
    """Killed when it had two checkpoints and had gone on from there."""
    run = TinyRun(work, "half")
    with run.start() as start:
        start.until(lambda: run.step >= 2 * SAVES + 2, "a step after the second checkpoint")
    assert steps_of(run) == [SAVES, 2 * SAVES]
    return run


class Row(NamedTuple):
    """What a fault cost."""

    fault: str
    times: int
    repeated: int


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    print("\n| fault | times | steps computed again |\n|---|---|---|")
    for row in rows:
        print(f"| {row.fault} | {row.times} | {row.repeated} |")


def steps_of(run: TinyRun) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in run.saved]


def copy_of(half: TinyRun, name: str, *settings: str) -> TinyRun:
    """A run as far as `half`."""
    run = TinyRun(half.work, name, *settings)
    shutil.copytree(half.folder, run.folder)
    run.log.touch()
    return run


def losses(run: TinyRun) -> list[dict[str, float]]:
    """The record as it stands in the file, without what was measured of time and memory."""
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    record = [
        {name: value for name, value in line.items() if not name.startswith(("time/", "memory/"))} for line in lines
    ]
    return [line for line in record if line.keys() > {"step"}]


def same_end(run: TinyRun, whole: TinyRun) -> None:
    for name in ("model", "ema", "moments"):
        path = f"checkpoints/step-{STEPS:08d}/{name}.safetensors"
        assert (run.folder / path).read_bytes() == (whole.folder / path).read_bytes(), name
    assert [line["step"] for line in losses(run)] == list(range(1, STEPS + 1))
    assert losses(run) == losses(whole)
    assert not list((run.folder / "checkpoints").glob(".tmp-*"))


def finish(run: TinyRun, whole: TinyRun, plan: Seen) -> str:
    """The same command again, to the end, which must be that of the uninterrupted run; returns what it says."""
    with run.start() as start:
        assert start.wait() == [0, 0], start.said
        said = start.said
    same_end(run, whole)
    assert recorded(run.folder) == plan
    return said


# ------------------------------------------------------------------------- what ends a start, and what it must leave

Fault = Callable[[TinyRun, random.Random], None]


def at_a_random_step(run: TinyRun, start: Start, dice: random.Random) -> None:
    """Some steps after the last one of the starts before."""
    step = run.step + dice.randint(1, 3)
    start.until(lambda: run.step >= step, f"step {step}")


def kill_one(rank: int, run: TinyRun, dice: random.Random) -> None:
    """The other one notices by itself, and says who is dead."""
    with run.start() as start:
        at_a_random_step(run, start, dice)
        start.kill(rank)
        assert start.wait(1 - rank) == [1], start.said
        assert f"rank {rank} on " in start.said and "has said nothing" in start.said


def kill_one_and_end_the_other(rank: int, run: TinyRun, dice: random.Random) -> None:
    """As a launcher does."""
    with run.start() as start:
        at_a_random_step(run, start, dice)
        start.kill(rank)


def kill_all(run: TinyRun, dice: random.Random) -> None:
    with run.start() as start:
        at_a_random_step(run, start, dice)


def kill_at_save(event: str, path: str, run: TinyRun, dice: random.Random) -> None:
    """Rank 0, just before it does something to a file; a launcher then ends the other."""
    with run.start(sabotage=partial(die_at, event, path)) as start:
        assert start.wait(0) == [-signal.SIGKILL], start.said
    assert run.step < STEPS


def kill_at_load(event: str, path: str, rank: int, run: TinyRun, dice: random.Random) -> None:
    before, begun = steps_of(run), run.step
    with run.start(sabotage=partial(die_at, event, path, rank=rank)) as start:
        assert start.wait(rank) == [-signal.SIGKILL], start.said
    assert steps_of(run) == before and run.step == begun


def ask_to_stop(number: int, rank: int, run: TinyRun, dice: random.Random) -> None:
    with run.start() as start:
        at_a_random_step(run, start, dice)
        start.signal(number, rank)
        assert start.wait() == [3, 3], start.said
        assert f"{signal.Signals(number).name} to rank {rank}" in start.said
    assert steps_of(run)[-1] == run.step  # saved at once: nothing is computed again


def touch_stop(run: TinyRun, dice: random.Random) -> None:
    with run.start() as start:
        at_a_random_step(run, start, dice)
        (run.folder / "stop").write_text("the power goes at noon")
        assert start.wait() == [3, 3] and "the power goes at noon" in start.said
    assert steps_of(run)[-1] == run.step and not (run.folder / "stop").exists()


def nan_on_one_rank(run: TinyRun, dice: random.Random) -> None:
    """Such steps are skipped; after two in a row all ranks stop, the bad ones having been saved nowhere."""
    step = SAVES + 1
    with run.start("engine.max_bad_steps=2", sabotage=partial(poison, step)) as start:
        assert start.wait() == [2, 2], start.said
        assert "not finite in 2 steps in a row" in start.said and "rank 1 on " in start.said
    assert list((run.folder / "bad_steps").glob(f"step-{step + 1:08d}-rank1.safetensors"))


def hang(run: TinyRun, dice: random.Random) -> None:
    """The other rank waits as long as it is told to, says who is missing, and ends."""
    with run.start("engine.hang_timeout_s=8") as start:
        at_a_random_step(run, start, dice)
        start.signal(signal.SIGSTOP, 1)
        assert start.wait(0) == [1], start.said
        assert "more than 8 s (engine.hang_timeout_s)" in start.said and "rank 1 on " in start.said


FAULTS: dict[str, tuple[Fault, ...]] = {
    "kill -9 of rank 0": (partial(kill_one, 0), *[partial(kill_one_and_end_the_other, 0)] * 3),
    "kill -9 of rank 1": (partial(kill_one, 1), *[partial(kill_one_and_end_the_other, 1)] * 3),
    "kill -9 of all ranks": (kill_all,) * 4,
    "kill -9 at a save": (
        partial(kill_at_save, "open", ".tmp-step-00000003/state.json"),  # weights, and no more
        partial(kill_at_save, "open", ".tmp-step-00000006/MANIFEST.json"),
        partial(kill_at_save, "os.rename", "checkpoints/step-00000009"),  # all written, not committed
        partial(kill_at_save, "shutil.rmtree", "checkpoints/step-00000006"),  # 12 is committed, 6 would go
    ),
    "SIGTERM to one rank": (partial(ask_to_stop, signal.SIGTERM, 0), partial(ask_to_stop, signal.SIGTERM, 1)),
    "SIGUSR1 to one rank": (partial(ask_to_stop, signal.SIGUSR1, 0), partial(ask_to_stop, signal.SIGUSR1, 1)),
    "the file `stop`": (touch_stop,),
    "NaN on one rank": (nan_on_one_rank,),
    "a rank that hangs": (hang,),
}


@pytest.mark.parametrize("name", FAULTS)
def test_broken_from_its_beginning(name: str, work: Path, whole: TinyRun, plan: Seen, table: list[Row]) -> None:
    dice, run = random.Random(name), TinyRun(work, name.replace(" ", "-").replace("`", ""))
    repeated = 0
    for fault in FAULTS[name]:
        reached = run.step
        fault(run, dice)
        assert run.step > reached or run.saved  # it got somewhere
        kept = steps_of(run)[-1] if run.saved else 0
        repeated += run.step - kept
        assert run.step - kept <= SAVES + 1  # a step may have begun that the last save was before
    finish(run, whole, plan)
    table.append(Row(name, len(FAULTS[name]), repeated))


def test_killed_at_load(half: TinyRun, whole: TinyRun, plan: Seen, table: list[Row]) -> None:
    run = copy_of(half, "at-load")
    newest = f"step-{2 * SAVES:08d}"
    kill_at_load("open", f"{newest}/moments.safetensors", 0, run, random.Random(0))  # while it verifies
    kill_at_load("open", f"{newest}/state.json", 1, run, random.Random(0))  # while it reads
    assert f"{newest}, " in finish(run, whole, plan)
    table.append(Row("kill -9 at load", 2, 0))


# ---------------------------------------------------------------------------------------------------------- disks


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Callable[[str], None]]:
    """Mount something at a folder; yields a way to mount it anew with other options."""
    if os.geteuid():
        pytest.skip("mounting takes root; see unit/test_checkpoint.py for full disks without it")
    folder.mkdir(parents=True)

    def mount(*arguments: str) -> None:
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
        if done.returncode and "busy" in done.stderr:
            raise BlockingIOError(done.stderr)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")

    mount(*options)
    try:
        yield lambda changed: mount("-o", f"remount,{changed}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(work: Path, whole: TinyRun, plan: Seen, table: list[Row]) -> None:
    run = TinyRun(work, "full-disk")
    pages = sum(-(-file.stat().st_size // 4096) + 1 for file in whole.saved[-1].iterdir())
    with mounted(run.folder / "checkpoints", "-t", "tmpfs", "-o", f"size={4096 * pages * 3 // 2}", "tmpfs") as remount:
        with run.start() as start:
            assert start.wait() == [2, 2], start.said
            assert "step-00000006 was not written" in start.said and "No space left" in start.said
        assert steps_of(run) == [SAVES] and not list((run.folder / "checkpoints").glob(".tmp-*"))
        repeated = run.step - SAVES
        remount("size=64m")
        assert "step-00000003, " in finish(run, whole, plan)
    table.append(Row("disk full at a save", 1, repeated))


def test_a_folder_that_becomes_read_only(work: Path, whole: TinyRun, plan: Seen, table: list[Row]) -> None:
    run = TinyRun(work, "read-only")
    folder = run.folder / "checkpoints"
    with mounted(folder, "--bind", str(folder)) as remount:

        def close() -> bool:
            try:
                remount("bind,ro")
            except BlockingIOError:  # a save is being written
                return False
            return True

        with run.start() as start:
            start.until(lambda: run.saved, "a checkpoint")
            start.until(close, "a moment without a save")
            kept = steps_of(run)
            assert start.wait() == [2, 2], start.said
            assert "was not written" in start.said and "Read-only file system" in start.said
        assert steps_of(run) == kept
        repeated = run.step - kept[-1]
        remount("bind,rw")
        finish(run, whole, plan)
    table.append(Row("folder read-only at a save", 1, repeated))


# ----------------------------------------------------------------------------------------------- damaged checkpoints


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("newest checkpoint: a bit flipped", lambda newest: flip(newest / "moments.safetensors"), "has changed since"),
        ("newest checkpoint: a file cut short", lambda newest: cut(newest / "model.safetensors"), " bytes instead of "),
        ("newest checkpoint: half of it", lambda newest: (newest / "MANIFEST.json").unlink(), "no readable MANIFEST"),
    ],
)
def test_a_damaged_checkpoint(
    name: str, damage: Callable[[Path], Any], says: str, half: TinyRun, whole: TinyRun, plan: Seen, table: list[Row]
) -> None:
    run = copy_of(half, name.replace(": ", "-").replace(" ", "-"))
    newest = run.saved[-1]
    shutil.copytree(newest, newest.with_name(".tmp-step-00000009"))  # and what a killed save leaves
    damage(newest)
    said = finish(run, whole, plan)
    assert f"{newest} is passed over" in said and says in said
    assert run.resumed == [SAVES]
    table.append(Row(name, 1, half.step - SAVES))


def test_all_checkpoints_damaged(half: TinyRun, whole: TinyRun, plan: Seen, table: list[Row]) -> None:
    run = copy_of(half, "all-damaged")
    for path in run.saved:
        flip(path / "ema.safetensors")
    (run.folder / "lock").unlink()  # of the dead owner
    before = tree_of(run.folder)
    with run.start() as start:
        assert start.wait() == [2, 2]
        assert "none of the 2 checkpoints" in start.said and "move the folder away" in start.said
    assert tree_of(run.folder) == before
    for path in run.saved:
        flip(path / "ema.safetensors")  # mended
    finish(run, whole, plan)
    table.append(
        Row("all checkpoints damaged: refused, nothing touched, until one is mended", 1, half.step - 2 * SAVES)
    )


# --------------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def spoilt(work: Path) -> Path:
    """The shards, a byte of one picture changed."""
    folder = shutil.copytree(work / "train", work / "spoilt")
    tar = sorted(folder.glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    return folder


def test_a_damaged_shard_stops_a_strict_run_until_it_is_mended(
    half: TinyRun, whole: TinyRun, plan: Seen, spoilt: Path, table: list[Row]
) -> None:
    run = copy_of(half, "strict")
    with run.start(f"data.train={spoilt}", "data.max_bad_samples=0") as start:
        assert start.wait() == [2, 2], start.said
        assert "crc32 differs" in start.said
    repeated = run.step - steps_of(run)[-1]
    finish(run, whole, plan)
    table.append(Row("damaged shard, none allowed: stopped until mended", 1, repeated))


def test_a_damaged_shard_costs_its_own_samples_and_no_other(
    work: Path, plan: Seen, spoilt: Path, table: list[Row]
) -> None:
    run = TinyRun(work, "lenient", f"data.train={spoilt}", "data.max_bad_samples=9")
    kill_all(run, random.Random(0))
    with run.start() as start:
        assert start.wait() == [0, 0], start.said
    bad = [json.loads(line) for line in (run.folder / "bad_samples.jsonl").read_text().splitlines()]
    (key,) = {line["key"] for line in bad}
    seen = recorded(run.folder)
    stood_in = {position for position, (wanted, _) in plan.items() if wanted == key}
    assert stood_in == {line["position"] for line in bad} and seen.keys() == plan.keys()
    assert {position for position in plan if seen[position] != plan[position]} == stood_in
    table.append(Row("damaged shard, allowed: stand-ins in its own places alone", len(stood_in), 0))


def test_a_server_of_shards_that_is_cut_off(work: Path, whole: TinyRun, plan: Seen, table: list[Row]) -> None:
    down = work / "down"

    def fault(name: str, turn: int) -> str:
        return ("cut", "500")[turn % 2] if down.exists() and name.endswith(".tar") else ""

    with serve(work / "train", work / "served.txt", fault) as url:
        largest = max(tar.stat().st_size for tar in (work / "train").glob("*.tar"))
        cache = (f"data.cache_dir={work}/cache", f"data.cache_gib={4.5 * largest / 2**30}")  # four shards at a time
        run = TinyRun(work, "served", f"data.train={url}", *cache)
        with run.start() as start:
            at_a_random_step(run, start, random.Random(0))
            down.touch()
            start.until(lambda: start.said.count("trying again") > 2, "fetches that fail")
            down.unlink()
            start.until(lambda: run.saved, "a checkpoint")
            down.touch()
            start.until(lambda: start.said.count("trying again") > 6, "fetches that fail")
        repeated = run.step - steps_of(run)[-1]  # killed while it could get none
        down.unlink()
        finish(run, whole, plan)
    table.append(Row("shard server cut off: waited for; the second time killed meanwhile", 2, repeated))


# -------------------------------------------------------------------------------------------------- two starts at once


def test_a_second_start_is_refused(work: Path, whole: TinyRun, plan: Seen, table: list[Row]) -> None:
    run = TinyRun(work, "twice")
    with run.start() as first:
        first.until(lambda: run.step >= 1, "a step")
        first.signal(signal.SIGSTOP)  # for as long as the second takes
        with run.start(sabotage=partial(be_impatient, wait_s=1.0)) as second:
            assert second.wait() == [2, 2], second.said
            assert "is being written by another start of this run: process " in second.said
        first.signal(signal.SIGCONT)
        assert first.wait() == [0, 0], first.said
    same_end(run, whole)
    assert recorded(run.folder) == plan
    table.append(Row("a second start of the same run: refused", 1, 0))


def test_a_start_that_was_taken_for_dead_writes_no_more(
    work: Path, whole: TinyRun, plan: Seen, table: list[Row]
) -> None:
    run = TinyRun(work, "frozen")
    with run.start() as first:
        first.until(lambda: run.saved and run.step > SAVES + 1, "a checkpoint")
        first.signal(signal.SIGSTOP)
        repeated = run.step - steps_of(run)[-1]
        with run.start(sabotage=partial(be_impatient, silent_s=2.0)) as second:
            assert second.wait() == [0, 0], second.said
            assert "its owner is dead" in second.said
        first.signal(signal.SIGCONT)
        assert first.wait() == [2, 2], first.said
        assert "has been taken over by another start" in first.said
    same_end(run, whole)
    assert recorded(run.folder) == plan
    table.append(Row("a start that froze and was replaced, then thawed", 1, repeated))


# -------------------------------------------------------------------------------------------------- with its launcher


def test_under_torchrun(work: Path, whole: TinyRun, plan: Seen, table: list[Row]) -> None:
    """kill -9 of a rank, which the launcher notices, and of the launcher, which the ranks notice."""
    run = TinyRun(work, "launched")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "launch.train", *run.command]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    repeated = 0
    for victim in ("rank", "launcher"):
        with run.log.open("a") as log:
            launcher = psutil.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        ranks: list[psutil.Process] = []
        try:
            first = run.step
            while run.step <= first + 1:
                assert launcher.poll() is None, run.log.read_text()
            ranks = launcher.children()
            (ranks[1] if victim == "rank" else launcher).kill()
            assert launcher.wait(timeout=120) == (1 if victim == "rank" else -signal.SIGKILL)
            assert len(psutil.wait_procs(ranks, timeout=120)[0]) == 2
        finally:
            for process in (launcher, *ranks):
                if process.is_running():
                    process.kill()
        kept = steps_of(run)[-1] if run.saved else 0
        assert kept == run.step or victim == "rank"
        repeated += run.step - kept
    assert "the launcher of rank " in run.log.read_text()
    finish(run, whole, plan)
    table.append(Row("torchrun: kill -9 of a rank; of the launcher", 2, repeated))
