"""What a batch job does first, without torch; and what it reads from a list."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import job
from tests.helpers.slurm import ROOT

pytestmark = pytest.mark.unit


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: r\nout: {tmp_path}/runs\ndata: {{train: somewhere}}\noptim: {{global_batch: 4}}\n")
    return path


def test_the_folder_of_a_start_holds_the_resolved_configuration(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert job.main([str(config), "seed=3", "--start", "12_1.0", "--world", "2"]) == 0
    folder = tmp_path / "runs/r/jobs/12_1.0"
    assert capsys.readouterr().out == f"{folder}\n"
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 3


@pytest.mark.parametrize(
    ("overrides", "world", "words"), [(["optim.lrr=1"], "2", "did you mean lr"), ([], "3", "shared by 3 ranks")]
)
def test_a_mistake_is_told_before_ranks_start(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, overrides: list[str], world: str, words: str
) -> None:
    assert job.main([str(config), *overrides, "--start", "12.0", "--world", world]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_it_imports_no_torch() -> None:
    script = "import sys, launch.job; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_a_line_of_a_list_becomes_words_and_nothing_runs(tmp_path: Path) -> None:
    (tmp_path / "list").write_text(
        "# comment\n\nfirst\n  a 'b={c: d, e: f}' $HOME `touch /nowhere` \"g h\"\nc name=it's\n"
    )

    def line(number: int | None) -> subprocess.CompletedProcess:
        script = f'set -euo pipefail; source slurm/list.sh; read_line_of {tmp_path}/list; printf "<%s>" "${{words[@]}}"'
        env = {"PATH": "/usr/bin:/bin"} | ({} if number is None else {"SLURM_ARRAY_TASK_ID": str(number)})
        return subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, text=True, capture_output=True)

    assert line(2).stdout.splitlines()[-1] == "<a><b={c: d, e: f}><$HOME><`touch><" + "/nowhere`><g h>"
    assert line(3).returncode == 2 and "quotes do not match: c name=it's" in line(3).stderr
    assert line(4).returncode == 2 and "has no line 4" in line(4).stderr
    assert line(None).returncode == 2 and "submit with --array" in line(None).stderr
