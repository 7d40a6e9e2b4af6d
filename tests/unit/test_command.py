"""`restill`: all sub-commands are there and quick, call themselves by name, and say what to do about mistakes."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from launch import command
from launch.command import COMMANDS, Command, main, overview, program, whole_parser
from launch.console import run_main

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


@pytest.fixture
def as_restill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/restill"])


def test_all_are_listed_and_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert said.strip() == overview()
    for name, (module, what) in COMMANDS.items():
        assert f"  {name} " in said and what in said
        assert find_spec(module), module
    mirrored = {
        found.stem for found in (ROOT / "launch").glob("*.py") if 'if __name__ == "__main__"' in found.read_text()
    }
    inner = {"command", "job", "mask_ages", "masks_ahead", "memory", "step_time"}
    assert mirrored - inner <= {module.removeprefix("launch.") for module, _ in COMMANDS.values()}


def test_parsers_call_themselves_as_the_user_called_them(as_restill: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (commands,) = [action.choices for action in whole_parser()._actions if action.choices]
    assert {name: parser.prog for name, parser in commands.items()} == {
        name: f"restill {name}" for name in [*COMMANDS, "completion"]
    }
    monkeypatch.setattr(sys, "argv", ["launch/train.py"])
    assert program("launch.train") == "python -m launch.train"


@pytest.mark.parametrize(
    ("typed", "near"), [("evalute", "evaluate"), ("before_after", "before-after"), ("xyz", "there are shards, masks")]
)
def test_the_nearest_is_suggested(typed: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed, "run.yaml"]) == 2
    assert near in capsys.readouterr().err


def test_wrong_arguments_end_with_where_help_is(as_restill: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["watch", "--nonsense"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "usage: restill watch" in said
    assert said.endswith("`restill watch --help` tells what it takes\n")


def test_a_missing_package_is_told_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def needs_onnx() -> int:
        raise ModuleNotFoundError("No module named 'onnx.helper'", name="onnx.helper")

    assert run_main(needs_onnx) == 2
    assert capsys.readouterr().err == "error: this needs the package onnx: pip install 'restill[onnx]'\n"
    monkeypatch.setitem(command.COMMANDS, "odd", Command("tests.not_there", ""))
    assert main(["odd"]) == 2
    assert "No module named" in capsys.readouterr().err

    def wrong() -> int:
        raise ModuleNotFoundError("No module named 'of_ours'", name="of_ours")

    with pytest.raises(ModuleNotFoundError):  # a mistake in the code keeps its traceback
        run_main(wrong)


def test_help_does_not_wait_for_torch() -> None:
    program = """
import sys
from launch.command import main
assert main([]) == 0
for name in ("train", "watch", "dashboard", "doctor", "restore", "evaluate"):
    try:
        main([name, "--help"])
    except SystemExit as end:
        assert end.code == 0
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_shell_completes_commands_options_choices_and_files(
    tmp_path: Path, as_restill: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "restill").write_text(capsys.readouterr().out)
    (tmp_path / "run.yaml").touch()
    asks = {
        "restill eva": "evaluate",
        "restill train --che": "--check",
        "restill restore --device cp": "cpu",
        "restill shards wri": "write",
        "restill shards write gopr": "gopro",
        "restill train ru": "run.yaml",
        "restill completion zs": "zsh",
    }
    script = f"""
source ./restill
for ask in {" ".join(f"'{ask}'" for ask in asks)}; do
    COMP_WORDS=($ask); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
    $(complete -p restill | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    echo "${{COMPREPLY[@]}}"
done
"""
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == list(asks.values()), done.stderr
    for shell in ("zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert "before-after" in capsys.readouterr().out
