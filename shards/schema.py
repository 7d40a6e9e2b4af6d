"""What a folder of shards is: the manifest, the rows of the index, the rule for keys, and the error of bad data.

DIR/manifest.json   counts, sizes and sha256 of everything beside it; written last, so its presence means finished
DIR/index.npy       one row per sample: where its bytes lie, their crc32, height and width
DIR/000000.tar      WebDataset: KEY.gt.EXT, KEY.json, KEY.lq.EXT, perhaps KEY.masks.png, one sample after the other
"""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

MANIFEST = "manifest.json"
INDEX = "index.npy"
MASKS = "masks.png"
MAX_KEY = 88  # with the longest member ending (.masks.png) a name still fits tar's 100 bytes
_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1)]


class ShardError(Exception):
    """Data on disk is not what it should be.

    Args:
        message: what is wrong and how to mend it.
        url: folder or shard.
        key: sample, if one is to blame.
        member: file inside the shard, if one is to blame.
    """

    def __init__(self, message: str, *, url: str | Path = "", key: str = "", member: str = "") -> None:
        where = ", ".join(part for part in (str(url), member or key) if part)
        super().__init__(f"{where}: {message}" if where else message)
        self.url, self.key, self.member = str(url), key, member


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_problem(key: str) -> str | None:
    """Why `key` cannot name a sample, or None. WebDataset cuts member names at the first dot, so keys have none."""
    if not _KEY.fullmatch(key):
        return f"the key {key!r} may hold only A-Z a-z 0-9 _ - and / between them: rename the files"
    if len(key) > MAX_KEY:
        return f"the key {key!r} is {len(key)} characters long, at most {MAX_KEY} fit into a tar: rename the files"
    return None


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Record):
    """One tar, in the words of the wids index, which the manifest is as well."""

    url: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.tar$")]
    nsamples: Count
    filesize: Count
    sha256: Sha256


class Rejected(_Record):
    """A pair that was left out on request."""

    key: str
    reason: str


class Masks(_Record):
    """Where the masks beside the pictures come from."""

    of: str
    """`lq`, `gt`, or what restored the lq that was looked at."""
    prior: dict[str, Any]
    """What made them, in its own words."""
    source: Sha256
    """Of the manifest of the data set they were made for; of its source files if they came with it."""
    sha256: Sha256
    """Of the masks: see `shards.index.masks_line`."""


class Manifest(_Record):
    """Everything known of a folder of shards."""

    version: Literal[1] = 1
    wids_version: Literal[1] = 1
    layout: str
    split: str
    num_samples: Count
    shardlist: tuple[Shard, ...]
    index_sha256: Sha256
    content_sha256: Sha256
    """Of the stored pictures: see `shards.index.content_line`. Independent of where shards begin and end."""
    source_sha256: Sha256 | None = None
    """Of the source files, see `shards.sources.source_line`; None: written when only they were stored."""
    src: str
    """Where the pairs came from, for people to read."""
    arguments: dict[str, Any]
    """What the layout and the writer were called with."""
    storage: str = "keep"
    """Form of the pictures, as `shards.storage` names it; only in `keep` do members hold the source files' bytes."""
    rejected: tuple[Rejected, ...] = ()
    suspicious: tuple[str, ...] = ()
    """What `shards.pairing` found odd."""
    masks: Masks | None = None
    """None: the set has none."""
    tool_version: str

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that are equal exactly if keys, their order and the pictures' bytes are."""
        return self.content_sha256[:16]


def load_manifest(folder: str | Path) -> Manifest:
    """Read DIR/manifest.json.

    Raises:
        ShardError: the folder is missing, unfinished, or of another format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ShardError("no such folder; make it with `python -m shards write` or `synth`", url=folder)
    path = folder / MANIFEST
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
        hint = f"; did you mean {folder / inside[0]}? (here: {', '.join(inside)})" if inside else ""
        raise ShardError(f"not usable: it holds no {MANIFEST}, so it is no finished data set{hint}", url=folder)
    return parse_manifest(path.read_bytes(), url=path)


def parse_manifest(data: bytes, *, url: str | Path) -> Manifest:
    """What stands in a manifest.json; `url` names it in errors."""
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "JSON"
        raise ShardError(
            f"is no manifest of version 1 ({field}: {first['msg']}); write the set again", url=url
        ) from None


def index_dtype(key_bytes: int, *, masks: bool = False) -> np.dtype:
    """Row of index.npy for keys of at most so many bytes, of a set with or without masks.

    Offsets count from the start of the shard.
    """
    fields: list[tuple[str, str]] = [("key", f"S{key_bytes}"), ("shard", "<u4"), ("h", "<u4"), ("w", "<u4")]
    for role in ("lq", "gt", "masks") if masks else ("lq", "gt"):
        fields += [(f"{role}_offset", "<u8"), (f"{role}_size", "<u8"), (f"{role}_crc32", "<u4")]
    return np.dtype(fields)
