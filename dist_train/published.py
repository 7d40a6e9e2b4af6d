"""Numbers that others published, each with where it stands and how it was taken; the file is configs/published.yaml."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError, field_validator

from dist_train.config.fields import Real, Section
from dist_train.protocols import protocol_name

FILE = Path(__file__).parents[1] / "configs/published.yaml"
Quantity = Literal["psnr", "ssim", "fid", "mcr", "iou", "dice", "psnr_gain", "ssim_gain"]


class Published(Section):
    """One row of a published table on one data set."""

    table: str
    """Of configs/published.yaml, for example `distill-5`."""
    row: str
    """Its name there; `table/row` is unique."""
    what: str
    """What was measured, for people."""
    data: str
    layout: str | None = None
    """Of the data set, as `python -m shards write` calls it; None: there is none, or the paper does not say."""
    protocol: str | None = None
    """Of `dist_train.protocols`; None: it cannot be known, or is none of ours, as the remark says."""
    values: dict[Quantity, Real]
    """PSNR in dB; SSIM, IoU and DICE in [0,1]; MCR in percent; gains over the row's plain net."""
    remark: str = ""
    source: str = ""
    """The paper or the program."""

    @property
    def name(self) -> str:
        """`table/row`, for --beside."""
        return f"{self.table}/{self.row}"

    @field_validator("protocol")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return name and protocol_name(name)


def published(table: str | None = None, *, layout: str | None = None, path: Path = FILE) -> list[Published]:
    """Published rows, in the order of the file; none where the file is not installed.

    Args:
        table: only of this table.
        layout: only on this data set.
        path: of the YAML file: tables, each with `source`, perhaps `protocol` and `remark` for all rows, and `rows`.

    Raises:
        ValueError: no such table, or the file is not as it should be.
    """
    if not path.is_file():
        return []
    tables: dict[str, Any] = yaml.safe_load(path.read_text())
    if table is not None and table not in tables:
        raise ValueError(f"no published table {table!r}; there are {', '.join(tables)}")
    rows = [row for name in tables for row in _rows(name, tables[name], path) if table in (None, name)]
    return [row for row in rows if layout in (None, row.layout)]


def find_published(name: str, *, path: Path = FILE) -> Published:
    """The row called `table/row`.

    Raises:
        ValueError: no such table or row, the message lists what there is; or the file is not installed.
    """
    if not path.is_file():
        raise ValueError(f"published numbers are in {path}, which is not here; it comes with the repository")
    table = name.partition("/")[0]
    rows = published(table, path=path)
    for row in rows:
        if row.name == name:
            return row
    raise ValueError(f"no published row {name!r}; there are {', '.join(row.name for row in rows)}")


def _rows(table: str, tree: dict[str, Any], path: Path) -> list[Published]:
    shared = {key: value for key, value in tree.items() if key != "rows"}
    try:
        return [
            Published.model_validate({"table": table, "row": name} | shared | row) for name, row in tree["rows"].items()
        ]
    except ValidationError as error:
        raise ValueError(f"{path}: {table}: {error}") from None
