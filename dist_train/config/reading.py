"""From YAML and the command line to a run, with errors that say what, where and how to mend it."""

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from dist_train.config.fields import Section
from dist_train.config.run import RunConfig


def load_run(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run configuration.

    Args:
        path: YAML file; only what differs from the defaults.
        overrides: `key.sub=value` strings; values are read as YAML.

    Raises:
        ValueError: with the file, the dotted key, the value and what would be right.
    """
    path = Path(path)
    if not path.is_file():
        near = ", ".join(str(p) for p in sorted(path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise ValueError(f"no configuration {path}" + (f"; there are {near}" if near else ""))
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold sections (key: value), not {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return parse_run(tree, source=str(path))


def parse_run(tree: dict[str, Any], *, source: str) -> RunConfig:
    """Validate a tree of plain values; `source` names it in errors."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ValueError(f"{source}: " + "\n".join(lines)) from None


def dump_run(run: RunConfig) -> str:
    """The resolved configuration as YAML; loading it gives an equal object."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"cannot read {override!r}: an override is key.sub=value, for example optim.lr=0.001")
    *parents, leaf = key.split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ValueError(f"{override}: {'.'.join(parents[: depth + 1])} is a value ({child!r}), not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override}: the value is not YAML: {error}") from error


def _explain(problem: Any) -> str:
    # pydantic puts the tag of a union (sam, nafnet) into the location; the user never wrote it.
    location = [str(part) for part in problem["loc"] if not str(part).startswith(("constrained-", "tuple["))]
    tag = None
    for place in (("prior",), ("prior", "of"), ("student",), ("teacher", "net")):
        if tuple(location[: len(place)]) == place and len(location) > len(place) + 1:
            tag = location.pop(len(place))
    key = ".".join(location) or "run"
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], tag)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}" if known else ""
        return f"{key}: no such setting{hint}"
    if problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
        given = f"{value['name']!r} is none of" if isinstance(value, dict) and "name" in value else "must be one of"
        return f"{key}.name: {given} {problem['ctx'].get('expected_tags') or ', '.join(_names(location))}"
    if problem["type"] == "missing":
        return f"{key}: must be given"
    if key == "run":
        return problem["msg"].removeprefix("Value error, ")
    return f"{key}={value!r}: {problem['msg'].removeprefix('Value error, ')}"


def _known_keys(location: list[str], tag: str | None) -> list[str]:
    """Settings at a place; where `name` tells several sections apart, those of the one called `tag`."""
    sections = _sections(location)
    named = [section for section in sections if tag and section.model_fields["name"].default == tag]
    return sorted({key for section in named or sections for key in section.model_fields})


def _names(location: list[str]) -> list[str]:
    return sorted(section.model_fields["name"].default for section in _sections(location))


def _sections(location: list[str]) -> list[type[Section]]:
    """The sections that may stand at a place of the configuration; several where `name` tells them apart."""
    found: list[type[Section]] = [RunConfig]
    for part in location:
        fields = [section.model_fields[part] for section in found if part in section.model_fields]
        found = [section for field in fields for section in _sections_in(field.annotation)]
    return found


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for option in get_args(annotation) for section in _sections_in(option)]
