"""Is a folder of shards what its manifest says, down to the last pixel, and does stock WebDataset agree?"""

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards.codec import decode_masks, decode_rgb
from shards.index import Entry, content_line, load_index, masks_line, read_tar, row, size_problem
from shards.schema import Manifest, Shard, ShardError, sha256_of


@dataclass(frozen=True)
class Report:
    """What a check found; each problem names its mend."""

    folder: Path
    num_samples: int
    num_shards: int
    problems: tuple[str, ...]


def check(folder: str | Path, *, deep: bool = True) -> Report:
    """Check a folder of shards.

    Args:
        folder: the one with the manifest.
        deep: read and decode everything; otherwise manifest, index and the shards' presence and sizes.
    """
    folder = Path(folder)
    try:
        manifest, rows = load_index(folder)
    except ShardError as error:
        return Report(folder, 0, 0, (str(error),))
    problems: list[str] = []
    content, masks = hashlib.sha256(), hashlib.sha256()
    for number, shard in enumerate(tqdm(manifest.shardlist, desc="shards", unit="shard", disable=None)):
        problem = size_problem(folder / shard.url, shard.filesize)
        if problem:
            problems.append(problem)
        elif deep:
            problems += _shard_problems(folder, shard, rows[rows["shard"] == number], content, masks)
    if deep and not problems:
        if content.hexdigest() != manifest.content_sha256:
            problems.append(f"{folder}: the manifest is of other contents: write the set again")
        if manifest.masks and masks.hexdigest() != manifest.masks.sha256:
            problems.append(f"{folder}: the manifest is of other masks: write the set again")
        crc32s = [name for name in rows.dtype.names or () if name.endswith("_crc32")]
        indexed = [(key.decode(), *crc32) for key, *crc32 in rows[["key", *crc32s]].tolist()]
        if list(_stock_reading(folder, manifest)) != indexed:
            problems.append(f"{folder}: stock webdataset reads other samples than are indexed: write the set again")
    return Report(folder, manifest.num_samples, len(manifest.shardlist), tuple(problems))


def _shard_problems(
    folder: Path, shard: Shard, rows: np.ndarray, content: "hashlib._Hash", masks: "hashlib._Hash"
) -> Iterator[str]:
    """Problems of one shard; its samples are added to the hashes `content` and `masks`."""
    path = folder / shard.url
    if sha256_of(path) != shard.sha256:
        yield f"{path}: changed since it was written (sha256 differs): copy it again, or write the set again"
    found = []
    try:
        for entry in read_tar(path):
            found.append(row(entry, int(rows["shard"][0])))
            content.update(content_line(entry.key, entry.lq.data, entry.gt.data))
            if entry.masks:
                masks.update(masks_line(entry.key, entry.masks.data))
            yield from _member_problems(entry, path)
    except ShardError as error:
        yield str(error)
    else:
        if found != rows.tolist():
            yield f"{path}: the index tells of other samples: copy shard and index again, or write the set again"


def _member_problems(entry: Entry, path: Path) -> Iterator[str]:
    size_px = (entry.h, entry.w)
    for member in (entry.lq, entry.gt, *([entry.masks] if entry.masks else [])):
        name = f"{path}, {entry.key}.{member.ending}"
        try:
            if member is entry.masks:
                num, noted = len(decode_masks(member.data, size_px)), entry.note.get("masks")
                if num != noted:
                    yield f"{name}: holds {num} masks, and {entry.key}.json tells of {noted}: write the set again"
            elif (found := decode_rgb(member.data).shape[:2]) != size_px:
                yield f"{name}: height and width are {found}, not {size_px}: write the set again"
        except ValueError as error:
            yield f"{name}: {error}: copy the shard again, or write the set again"


def _stock_reading(folder: Path, manifest: Manifest) -> Iterator[tuple[str | int, ...]]:
    """Key and crc32 of lq, gt and masks of every sample, as webdataset itself sees them."""
    import webdataset  # pulls in torch, which takes seconds

    urls = [str(folder / shard.url) for shard in manifest.shardlist]
    for sample in webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=lambda urls: urls, empty_check=False):
        crc32 = {name.partition(".")[0]: zlib.crc32(data) for name, data in sample.items() if isinstance(data, bytes)}
        yield sample["__key__"], *(crc32[role] for role in ("lq", "gt", "masks") if role in crc32)
