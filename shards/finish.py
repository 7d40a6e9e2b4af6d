"""The end of a writing: what lies in the finished shards, and the index and the manifest that tell of it."""

import hashlib
import importlib.metadata
import io
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from shards.folder import Finished, clear, write_file
from shards.index import content_line, index_of, masks_line, read_tar, row
from shards.parallel import in_order
from shards.schema import INDEX, MANIFEST, Manifest, Masks, Shard, ShardError, sha256_of
from shards.sources import source_line


class Contents(NamedTuple):
    """What lies in finished shards, read from the disk."""

    shards: tuple[Shard, ...]
    rows: np.ndarray
    """As `shards.schema.index_dtype`."""
    notes: dict[str, dict[str, Any]]
    """KEY.json of each sample."""
    content_sha256: str
    source_sha256: str | None
    masks_sha256: str


def look_over(tars: Mapping[Path, Finished], *, jobs: int = 1) -> Contents:
    """Read finished shards in order, strictly.

    Raises:
        ShardError: damaged, or not what was written.
    """
    shards, entries, notes = [], [], {}
    content, source, masks = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    sourced = True
    with closing(in_order(_look_into, tars, jobs=min(jobs, len(tars)))) as read:
        bar = tqdm(read, "indexing", len(tars), unit="shard", disable=None)
        for number, (tar, found) in enumerate(zip(tars, bar, strict=True)):
            if found.sha256 != tars[tar].sha256:
                raise ShardError("changed since it was written: run the same command with --verify", url=tar)
            size = tars[tar].filesize
            shards.append(Shard(url=tar.name, nsamples=len(found.rows), filesize=size, sha256=found.sha256))
            entries += [(key, number, *rest) for key, _, *rest in found.rows]
            notes.update(found.notes)
            content.update(found.content)
            masks.update(found.masks)
            lines = [source_line(key, note) for key, note in found.notes.items()]
            sourced = sourced and None not in lines
            source.update(b"".join(line for line in lines if line))
    return Contents(
        shards=tuple(shards),
        rows=index_of(entries),
        notes=notes,
        content_sha256=content.hexdigest(),
        source_sha256=source.hexdigest() if sourced else None,
        masks_sha256=masks.hexdigest(),
    )


def finish(out: Path, contents: Contents, *, masks: Mapping[str, Any] | None = None, **about: Any) -> Manifest:
    """Write index and manifest, the manifest last, and clear away what served the writing.

    Args:
        out: the folder.
        contents: what lies in it.
        masks: fields of `Masks` but for the sha256; None: the set has none.
        about: fields of `Manifest` that are known beforehand.
    """
    index = io.BytesIO()
    np.save(index, contents.rows, allow_pickle=False)
    write_file(out / INDEX, index.getvalue())
    manifest = Manifest(
        num_samples=len(contents.rows),
        shardlist=contents.shards,
        index_sha256=hashlib.sha256(index.getbuffer()).hexdigest(),
        content_sha256=contents.content_sha256,
        source_sha256=contents.source_sha256,
        masks=None if masks is None else Masks(**masks, sha256=contents.masks_sha256),
        tool_version=tool_version(),
        **about,
    )
    write_file(out / MANIFEST, manifest.model_dump_json(indent=2).encode() + b"\n")
    clear(out, {shard.url for shard in contents.shards})
    return manifest


def tool_version() -> str:
    """Version of this package, for records."""
    try:
        return importlib.metadata.version("restill")
    except importlib.metadata.PackageNotFoundError:
        return "uninstalled"


class _Read(NamedTuple):
    rows: list[tuple]
    notes: dict[str, dict[str, Any]]
    content: bytes
    masks: bytes
    sha256: str


def _look_into(tar: Path) -> _Read:
    rows, notes, content, masks = [], {}, [], []
    for entry in read_tar(tar):
        rows.append(row(entry, 0))
        notes[entry.key] = entry.note
        content.append(content_line(entry.key, entry.lq.data, entry.gt.data))
        if entry.masks:
            masks.append(masks_line(entry.key, entry.masks.data))
    return _Read(rows, notes, b"".join(content), b"".join(masks), sha256_of(tar))
