"""How ranks leave a run, and what the next start knows: together, with a name to each error, and nothing uncounted."""

import re
import shutil
import socket
from pathlib import Path

import pytest

from dist_train.track import read_metrics
from tests.helpers.starts import STEPS, TinyRun
from tests.multirank.ranks_of_leaving import BAD_STEP, close_slowly, spoil_a_step

pytestmark = pytest.mark.multirank


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaving")
    TinyRun.prepare(folder)
    return folder


def test_skipped_steps_stay_counted_and_no_rank_leaves_while_the_main_one_closes_its_files(work: Path) -> None:
    """A launcher ends all ranks soon after the first one has left."""
    run = TinyRun(work, "counted")
    with run.start(sabotage=spoil_a_step) as start:
        start.until(lambda: run.saved, "a checkpoint")
    with run.start(sabotage=close_slowly) as start:
        assert start.wait() == [0, 0], start.said
        assert start.said.count("a rank leaves") == 2
        assert start.said.index("files are closed") < start.said.index("a rank leaves")
    assert run.resumed[-1] >= BAD_STEP
    counted = [line["skipped_steps"] for line in read_metrics(run.folder)]
    assert counted == [0] * (BAD_STEP - 1) + [1] * (STEPS - BAD_STEP + 1)


def test_a_rank_that_alone_cannot_read_a_sample_is_named_by_the_others(work: Path) -> None:
    spoilt = shutil.copytree(work / "train", work / "spoilt")
    tar = sorted(spoilt.glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    run = TinyRun(work, "strict", f"data.train={spoilt}", "data.strict=true")
    with run.start() as start:
        codes = start.wait()
        assert sorted(codes) == [1, 2], start.said
        words = rf"rank {codes.index(2)} on {socket.gethostname()}, step \d+, in data: BadSampleError: "
        assert re.search(words, start.said), start.said
        assert "has said nothing" not in start.said
