"""Tables of text: columns are titles and formats."""

from typing import Any


def header(columns: dict[str, str]) -> str:
    """Titles of a table."""
    return "".join(format(title, _width(spec)) for title, spec in columns.items())


def line(columns: dict[str, str], row: dict[str, Any]) -> str:
    """A row, title -> value; what is absent or None is a dash."""
    cells = [(row.get(title), spec) for title, spec in columns.items()]
    return "".join(format("-", _width(spec)) if cell is None else format(cell, spec) for cell, spec in cells)


def _width(spec: str) -> str:
    return spec.partition(".")[0]
