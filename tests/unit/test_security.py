"""What no line of the packages may do: run what it reads, or let a shell read what a configuration says."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
CODE = sorted(path for package in ("dist_train", "launch", "shards") for path in (ROOT / package).rglob("*.py"))

NEVER = {
    "eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.Unpickler", "marshal.loads", "shelve.open",
    "torch.hub.load", "multiprocessing.connection.Client", "multiprocessing.connection.Listener",
}  # fmt: skip
"""By the name they are called by; the last two greet a stranger with unpickling."""
MUST = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "np.save": ("allow_pickle", False)}
"""Calls that must say so: the defaults of torch have changed before."""
ALLOWED = {
    ("dist_train/ranks.py", "pickle.loads"),  # of what it has pickled itself, in the same line
}


def calls() -> Iterator[tuple[str, int, str, ast.Call]]:
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield str(path.relative_to(ROOT)), node.lineno, ast.unparse(node.func), node


def said(call: ast.Call) -> dict[str | None, object]:
    return {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}


def test_nothing_that_is_read_is_executed() -> None:
    found = [
        f"{file}:{line} {name}"
        for file, line, name, _ in calls()
        if (name in NEVER or name == "pickle.loads") and (file, name) not in ALLOWED
    ]
    assert not found
    lax = [
        f"{file}:{line} {name} without {MUST[name][0]}={MUST[name][1]}"
        for file, line, name, call in calls()
        if name in MUST and said(call).get(MUST[name][0]) is not MUST[name][1]
    ]
    assert not lax
    assert {name for _, _, name, _ in calls()} >= {"torch.load", "np.load", "pickle.loads"}  # or the test sees nothing


def test_these_names_mean_what_they_say() -> None:
    """None of the modules comes under another name, or has its functions imported out of it."""
    watched = {"pickle", "marshal", "subprocess", "shelve"}
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not [
                    name.asname for name in node.names if name.name in (*watched, "os", "torch") and name.asname
                ]
            if isinstance(node, ast.ImportFrom):
                assert node.module not in watched, path
                assert not (node.module == "torch" and "load" in [name.name for name in node.names]), path
                assert not (node.module == "os" and {"system", "popen"} & {name.name for name in node.names}), path


def test_no_command_goes_through_a_shell() -> None:
    """Commands are lists of words. Only data sets of the form pipe:COMMAND meet one, in webdataset's own opener; what
    is filled in there are names of shards, which a manifest must give in letters."""
    for file, line, name, call in calls():
        if name.split(".")[0] == "subprocess" or name in ("Pipe", "Popen"):
            assert said(call).get("shell", False) is False, f"{file}:{line}"
            first = call.args[0]
            assert not isinstance(first, (ast.JoinedStr, ast.Constant, ast.BinOp)), f"{file}:{line} is one string"


@pytest.mark.parametrize("name", ["0.tar; touch x", "../0.tar", "$(x).tar", "a b.tar", "0.tar\n"])
def test_a_manifest_cannot_smuggle_a_command_into_a_shell(name: str) -> None:
    from pydantic import ValidationError

    from shards.schema import Shard

    with pytest.raises(ValidationError, match="url"):
        Shard(url=name, nsamples=1, filesize=1, sha256="0" * 64)
