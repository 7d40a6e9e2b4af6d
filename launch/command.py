"""The command `restill`: every entry point under one name, as `python -m launch.NAME` has it."""

import argparse
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn
from unittest import mock

# Only the standard library up here: the entry points take their program's name from this module, and --help is quick.


class Command(NamedTuple):
    """A sub-command."""

    module: str
    """With a function main(argv) that returns the exit code, or a package whose __main__ has one."""
    what: str
    """One line of help."""


GROUPS = {
    "data": {
        "shards": Command("shards", "make, check and list shards of picture pairs"),
        "masks": Command("launch.masks", "draw what a prior sees in pictures, and what restoring does to each object"),
        "mask-server": Command("launch.mask_server", "make masks for the ranks of runs on other machines"),
    },
    "training": {
        "train": Command("launch.train", "train a run, or go on with it"),
        "ablate": Command("launch.ablate", "train and compare the rungs from a plain net to the whole method"),
        "watch": Command("launch.watch", "look at a run that goes on, in this terminal"),
        "dashboard": Command("launch.dashboard", "make a wandb workspace for runs"),
    },
    "results": {
        "evaluate": Command("launch.evaluate", "PSNR and SSIM under named protocols"),
        "segment": Command("launch.segment", "what restoring is worth to a segmentation net"),
        "report": Command("launch.report", "one HTML page of runs: pictures, curves, tables"),
        "before-after": Command("launch.before_after", "one picture: degraded, restored, clean, masks"),
    },
    "use": {
        "export": Command("launch.export", "the student alone: safetensors, official .pth, ONNX and more"),
        "restore": Command("launch.restore", "restore pictures, folders and videos"),
        "page": Command("launch.page", "a page to drop pictures on, which restores them"),
    },
    "machine": {
        "doctor": Command("launch.doctor", "is this machine fit, are these files whole"),
        "bench": Command("launch.bench", "what things cost here"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}

SHELLS = {
    "bash": "restill completion bash > ~/.local/share/bash-completion/completions/restill",
    "zsh": "restill completion zsh > DIR/_restill, where DIR is a folder of $fpath",
    "fish": "restill completion fish > ~/.config/fish/completions/restill.fish",
}
"""What shtab can write, and where it goes."""


def program(module: str) -> str:
    """What an entry point calls itself: `restill NAME` if it was called so, else `python -m MODULE`."""
    names = [name for name, command in COMMANDS.items() if command.module == module]
    return f"restill {names[0]}" if names and Path(sys.argv[0]).stem == "restill" else f"python -m {module}"


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; returns its exit code, 2 if there is no such."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv == ["help"] or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        from dist_train import __version__

        print(f"restill {__version__}")
        return 0
    if argv[0] == "help":
        argv = [argv[1], "--help"]
    name, *rest = argv
    if name == "completion":
        return _complete(rest)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=2, cutoff=0.5)
        meant = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}."
        print(f"restill: there is no {name!r}; {meant} `restill` alone tells what each does", file=sys.stderr)
        return 2
    try:
        return _entry(name)(rest)
    except ModuleNotFoundError as error:
        from launch.console import mend_import

        print(f"error: {mend_import(error)}", file=sys.stderr)
        return 2
    except SystemExit as end:  # of argparse, which has told what is wrong
        if end.code == 2:
            print(f"`restill {name} --help` tells what it takes", file=sys.stderr)
        raise


def overview() -> str:
    """All sub-commands in their groups."""
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: restill COMMAND ...", "", "Restore pictures by nets that learned from Segment Anything.", ""]
    for group, commands in GROUPS.items():
        lines += [f"{group}:", *(f"  {name:{width}}{command.what}" for name, command in commands.items()), ""]
    lines += [
        "restill COMMAND --help      what it takes",
        "restill completion bash     tab completion, also for zsh and fish; with --help, where to put it",
        "restill --version",
    ]
    return "\n".join(lines)


def _entry(name: str) -> Callable[[list[str]], int]:
    module = COMMANDS[name].module
    spec = importlib.util.find_spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    main: Callable[[list[str]], int] = importlib.import_module(f"{module}.__main__" if is_package else module).main
    return main


def _complete(argv: list[str]) -> int:
    """Print the script that completes words in a shell."""
    args = _completion_parser().parse_args(argv)
    import shtab

    print(shtab.complete(whole_parser(), shell=args.shell))
    return 0


def _completion_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="restill completion",
        description="Print a script with which a shell completes commands, options and files.",
        epilog="\n".join(f"{shell}: {where}" for shell, where in SHELLS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=list(SHELLS))
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """One parser over the parsers of all sub-commands that can be imported here."""
    import shtab

    root = argparse.ArgumentParser(prog="restill", description="Restore pictures, and train nets that do.")
    commands = root.add_subparsers(metavar="COMMAND", parser_class=_as_it_is)  # type: ignore[call-overload]
    for name, command in COMMANDS.items():
        try:
            parser = _parser_of(_entry(name))
        except ImportError:  # without the packages that it needs
            parser = argparse.ArgumentParser(prog=f"restill {name}")
        _complete_files(parser, shtab.FILE)
        commands.add_parser(name, help=command.what, parser=parser)
    commands.add_parser("completion", help="tab completion", parser=_completion_parser())
    return root


def _as_it_is(*, parser: argparse.ArgumentParser, **_: object) -> argparse.ArgumentParser:
    return parser


class _Caught(BaseException):
    """Brings a parser out of the main that made it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _parser_of(main: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """The parser of an entry point, which ends when it is about to read its arguments."""

    def catch(parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        raise _Caught(parser)

    with mock.patch.multiple(argparse.ArgumentParser, parse_args=catch, parse_intermixed_args=catch):
        try:
            main([])
        except _Caught as caught:
            return caught.parser
    raise AssertionError("an entry point must parse its arguments")


def _complete_files(parser: argparse.ArgumentParser, how: object) -> None:
    """Complete whatever takes a value, and no choice of some, by the names of files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_files(inner, how)
        elif action.choices is not None:
            action.choices = list(action.choices)  # shtab takes a dictionary for subparsers
        elif action.nargs != 0 and not hasattr(action, "complete"):
            action.complete = how  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
