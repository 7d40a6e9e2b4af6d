"""Is a folder of shards what its manifest says, down to the last pixel, and does stock WebDataset agree?"""

import hashlib
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from shards.codec import decode_masks, decode_rgb
from shards.index import Entry, content_line, load_index, masks_line, read_tar, row, size_problem
from shards.layouts import LAYOUTS
from shards.pairing import Measures, measure, problems
from shards.parallel import in_order
from shards.schema import Manifest, Shard, ShardError, sha256_of


@dataclass(frozen=True)
class Report:
    """What a check found; each problem names its mend."""

    folder: Path
    num_samples: int
    num_shards: int
    problems: tuple[str, ...]
    statistics: tuple[str, ...] = ()
    """Of the pairs, a line each; last what looks odd, which is no damage."""


class _Examined(NamedTuple):
    """What one shard holds."""

    problems: list[str]
    content: bytes
    masks: bytes
    measured: dict[str, Measures]


def check(folder: str | Path, *, deep: bool = True, jobs: int = 1) -> Report:
    """Check a folder of shards.

    Args:
        folder: the one with the manifest.
        deep: read and decode everything; otherwise manifest, index and the shards' presence and sizes.
        jobs: processes that do.
    """
    folder = Path(folder)
    try:
        manifest, rows = load_index(folder)
    except ShardError as error:
        return Report(folder, 0, 0, (str(error),))
    sizes = {shard: size_problem(folder / shard.url, shard.filesize) for shard in manifest.shardlist}
    found = [problem for problem in sizes.values() if problem]
    measured: dict[str, Measures] = {}
    if deep:
        content, masks = hashlib.sha256(), hashlib.sha256()
        work = [
            (folder, shard, rows[rows["shard"] == number])
            for number, shard in enumerate(manifest.shardlist)
            if not sizes[shard]
        ]
        with closing(in_order(_examine, work, jobs=min(jobs, len(work)))) as examined:
            for one in tqdm(examined, "shards", len(work), unit="shard", disable=None):
                found += one.problems
                content.update(one.content)
                masks.update(one.masks)
                measured |= one.measured
        if not found:
            if content.hexdigest() != manifest.content_sha256:
                found.append(f"{folder}: the manifest is of other contents: write the set again")
            if manifest.masks and masks.hexdigest() != manifest.masks.sha256:
                found.append(f"{folder}: the manifest is of other masks: write the set again")
            crc32s = [name for name in rows.dtype.names or () if name.endswith("_crc32")]
            indexed = [(key.decode(), *crc32) for key, *crc32 in rows[["key", *crc32s]].tolist()]
            if list(_stock_reading(folder, manifest)) != indexed:
                found.append(f"{folder}: stock webdataset reads other samples than are indexed: write the set again")
    statistics = tuple(_statistics(measured, manifest)) if measured else ()
    return Report(folder, manifest.num_samples, len(manifest.shardlist), tuple(found), statistics)


def _examine(work: tuple[Path, Shard, np.ndarray]) -> _Examined:
    folder, shard, rows = work
    path = folder / shard.url
    found: list[str] = []
    if sha256_of(path) != shard.sha256:
        found.append(f"{path}: changed since it was written (sha256 differs): copy it again, or write the set again")
    entries, content, masks, measured = [], [], [], {}
    try:
        for entry in read_tar(path):
            entries.append(row(entry, int(rows["shard"][0])))
            content.append(content_line(entry.key, entry.lq.data, entry.gt.data))
            if entry.masks:
                masks.append(masks_line(entry.key, entry.masks.data))
            try:
                measured[entry.key] = measure(*_pictures(entry))
            except ValueError as error:
                found.append(f"{path}, {entry.key}.{error}: copy the shard again, or write the set again")
    except ShardError as error:
        found.append(str(error))
    else:
        if entries != rows.tolist():
            found.append(
                f"{path}: the index tells of other samples: copy shard and index again, or write the set again"
            )
    return _Examined(found, b"".join(content), b"".join(masks), measured)


def _pictures(entry: Entry) -> list[np.ndarray]:
    """Decode all of a sample; returns lq and gt.

    Raises:
        ValueError: a member cannot be decoded, or is not what KEY.json tells; the message begins with its ending.
    """
    size_px, decoded = (entry.h, entry.w), []
    for member in (entry.lq, entry.gt, *([entry.masks] if entry.masks else [])):
        try:
            if member is entry.masks:
                num, noted = len(decode_masks(member.data, size_px)), entry.note.get("masks")
                if num != noted:
                    raise ValueError(f"holds {num} masks, and {entry.key}.json tells of {noted}")
            else:
                decoded.append(decode_rgb(member.data))
                if decoded[-1].shape[:2] != size_px:
                    raise ValueError(f"height and width are {decoded[-1].shape[:2]}, not {size_px}")
        except ValueError as error:
            raise ValueError(f"{member.ending}: {error}") from None
    return decoded


def _stock_reading(folder: Path, manifest: Manifest) -> Iterator[tuple[str | int, ...]]:
    """Key and crc32 of lq, gt and masks of every sample, as webdataset itself sees them."""
    import webdataset  # pulls in torch, which takes seconds

    urls = [str(folder / shard.url) for shard in manifest.shardlist]
    for sample in webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=lambda urls: urls, empty_check=False):
        crc32 = {name.partition(".")[0]: zlib.crc32(data) for name, data in sample.items() if isinstance(data, bytes)}
        yield sample["__key__"], *(crc32[role] for role in ("lq", "gt", "masks") if role in crc32)


def _statistics(measured: dict[str, Measures], manifest: Manifest) -> Iterator[str]:
    yield f"{'of ' + str(len(measured)) + ' pairs':12} {'least':>9} {'median':>9} {'most':>9}"
    for name, values in zip(Measures._fields, zip(*measured.values(), strict=True), strict=True):
        if name != "identical":
            yield f"{name:12} {min(values):9.2f} {np.median(values):9.2f} {max(values):9.2f}"
    layout = LAYOUTS.get(manifest.layout)
    kind = manifest.arguments.get("kind") or (layout.kind if layout else "any")
    yield from (f"look at this: {problem}" for problem in problems(measured, kind))
