"""Pairs -> shards, all or nothing: the folder appears under its name only when it is complete and on the disk."""

import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shards.codec import inspect_colour
from shards.index import build_index, content_line, open_index
from shards.layouts import Pair
from shards.schema import INDEX, MANIFEST, Manifest, Masks, Rejected, Shard, ShardError, key_problem, sha256_of

logger = logging.getLogger(__name__)

_MIB = 2**20
_HINTS = {
    errno.ENOSPC: "the disk is full: free some space, or choose another --out",
    errno.EDQUOT: "your disk quota is used up: free some space, or choose another --out",
    errno.EACCES: "no permission to write here: choose another --out, or ask for the right to",
    errno.EPERM: "no permission to write here: choose another --out, or ask for the right to",
    errno.EROFS: "this disk is read-only: choose another --out",
}


def write_shards(
    pairs: list[Pair],
    out: str | Path,
    *,
    src: str,
    layout: str,
    split: str,
    arguments: dict[str, Any],
    skip_bad: bool = False,
    shard_mib: float = 256,
) -> Manifest:
    """Write pairs, checked and in the given order, as shards of the files' own bytes.

    The same pairs give the same bytes on every call. A folder that holds just these pairs already is left as it is.

    Args:
        pairs: from a layout.
        out: folder to make; it may exist if it is empty.
        src, layout, split, arguments: for the manifest.
        skip_bad: leave bad pairs out, and record them, instead of refusing.
        shard_mib: a shard is closed before it grows beyond this.

    Raises:
        ValueError: no pairs, bad pairs (listed), or another data set in the way.
        ShardError: the disk is full or may not be written.
    """
    if not pairs:
        raise ValueError(f"no pictures found below {src}; is --src the right folder?")
    out = Path(out)
    arguments = {**arguments, "shard_mib": shard_mib}
    if (out / MANIFEST).is_file():
        return _already_there(pairs, out, layout=layout, split=split, arguments=arguments)
    needed = sum(path.stat().st_size for pair in pairs for path in (pair.lq, pair.gt) if path and path.is_file())
    with staged(out, needed_bytes=needed) as staging:
        rejected: list[Rejected] = []
        samples = _good_samples(pairs, rejected, go_on=skip_bad)
        tars = write_tars(samples, staging, max_bytes=shard_mib * _MIB)
        if rejected and not skip_bad:
            raise ValueError(_refusal(rejected, len(pairs)))
        if not tars:
            raise ValueError(f"none of the {len(pairs)} pairs is good; the first: {rejected[0].reason}")
        manifest = finish(tars, src=src, layout=layout, split=split, arguments=arguments, rejected=tuple(rejected))
    logger.info("%s: %d pairs in %d shards, %d rejected", out, manifest.num_samples, len(tars), len(rejected))
    return manifest


@contextmanager
def staged(out: Path, *, needed_bytes: int) -> Iterator[Path]:
    """A folder to write in, which becomes `out` when all went well and vanishes when not.

    Raises:
        ValueError: something is in the way.
        ShardError: the disk is full or may not be written.
    """
    staging = out.with_name(f"{out.name}.tmp.{socket.gethostname()}.{os.getpid()}")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is in the way: it is no data set of ours and not empty; choose another --out")
        if out.is_mount():
            raise ValueError(f"{out} is a mount point, which cannot appear at once; choose a folder in it")
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        free = shutil.disk_usage(out.parent).free
        if needed_bytes > free:
            raise ShardError(
                f"needs {needed_bytes / _MIB:.0f} MiB, free are {free / _MIB:.0f}: choose another --out", url=out
            )
        staging.mkdir()
        yield staging
        os.rename(staging, out)
        _sync(out.parent)
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, error.strerror or str(error))
        raise ShardError(f"nothing was written ({hint})", url=out) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _good_samples(pairs: list[Pair], rejected: list[Rejected], *, go_on: bool) -> Iterator[dict[str, Any]]:
    """WebDataset samples of the good pairs; bad ones go to `rejected`, and none follow the first unless `go_on`."""
    for pair in tqdm(pairs, desc="pairs", unit="pair", disable=None):
        try:
            sample = _load(pair)
        except ValueError as error:
            rejected.append(Rejected(key=pair.key, reason=str(error)))
            continue
        if go_on or not rejected:
            yield sample


def _load(pair: Pair) -> dict[str, Any]:
    problem = key_problem(pair.key)
    if problem:
        raise ValueError(problem)
    if pair.lq is None or pair.gt is None:
        raise ValueError(f"no {'lq' if pair.lq is None else 'gt'} partner for {pair.lq or pair.gt}")
    sample: dict[str, Any] = {"__key__": pair.key}
    note: dict[str, Any] = {}
    sizes = []
    for role, path in (("lq", pair.lq), ("gt", pair.gt)):
        try:
            data = path.read_bytes()
            sizes.append(inspect_colour(data))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        sample[role + path.suffix.lower()] = data
        note[role] = f"{path.parent.name}/{path.name}"
    if sizes[0] != sizes[1]:
        (lq_h, lq_w), (gt_h, gt_w) = sizes
        raise ValueError(f"sizes differ: {pair.lq} is {lq_w}x{lq_h}, {pair.gt} is {gt_w}x{gt_h}")
    note["h"], note["w"] = sizes[0]
    sample["json"] = json.dumps(note, sort_keys=True).encode()
    return sample


def write_tars(samples: Iterable[dict[str, Any]], folder: Path, *, max_bytes: float) -> list[Path]:
    """Write WebDataset samples; a tar is closed before it grows beyond `max_bytes`."""
    import webdataset  # pulls in torch, which takes seconds

    tars: list[Path] = []
    stream = iter(samples)
    sample = next(stream, None)
    while sample is not None:
        path = folder / f"{len(tars):06d}.tar"
        with open(path, "xb") as file:
            with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
                size = 0
                while sample is not None and (not size or size + sum(map(len, sample.values())) <= max_bytes):
                    size += tar.write(sample)
                    sample = next(stream, None)
            file.flush()
            os.fsync(file.fileno())
        tars.append(path)
    return tars


def finish(
    tars: list[Path],
    *,
    src: str,
    layout: str,
    split: str,
    arguments: dict[str, Any],
    rejected: tuple[Rejected, ...],
    masks: Masks | None = None,
) -> Manifest:
    """Index what lies on the disk, and write the manifest last."""
    folder = tars[0].parent
    rows, content_sha256 = build_index(tars)
    counts = np.bincount(rows["shard"], minlength=len(tars))
    with open(folder / INDEX, "xb") as file:
        np.save(file, rows, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    manifest = Manifest(
        layout=layout,
        split=split,
        num_samples=len(rows),
        shardlist=tuple(
            Shard(url=tar.name, nsamples=int(count), filesize=tar.stat().st_size, sha256=sha256_of(tar))
            for tar, count in zip(tars, counts, strict=True)
        ),
        index_sha256=sha256_of(folder / INDEX),
        content_sha256=content_sha256,
        src=src,
        arguments=arguments,
        rejected=rejected,
        masks=masks,
        tool_version=_tool_version(),
    )
    with open(folder / MANIFEST, "x") as file:
        file.write(manifest.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)
    return manifest


def _already_there(pairs: list[Pair], out: Path, *, layout: str, split: str, arguments: dict[str, Any]) -> Manifest:
    manifest, _ = open_index(out)
    # The source folder may have moved since; that the pairs are the same is seen in their bytes.
    if (layout, split, arguments) == (manifest.layout, manifest.split, manifest.arguments):
        rejected = {reject.key for reject in manifest.rejected}
        content = hashlib.sha256()
        for pair in tqdm(pairs, desc=f"comparing with {out}", unit="pair", disable=None):
            if pair.key not in rejected:
                lq, gt = (path.read_bytes() if path else b"" for path in (pair.lq, pair.gt))
                content.update(content_line(pair.key, lq, gt))
        if content.hexdigest() == manifest.content_sha256:
            logger.info("%s: already there, %d pairs, nothing to do", out, manifest.num_samples)
            return manifest
    raise ValueError(
        f"{out} holds another data set ({manifest.layout}, {manifest.split}, {manifest.num_samples} pairs, from "
        f"{manifest.src}, {manifest.arguments}); choose another --out, or delete it"
    )


def _refusal(rejected: list[Rejected], num_pairs: int) -> str:
    lines = [f"{len(rejected)} of {num_pairs} pairs cannot be used:"]
    lines += [f"  {reject.key}: {reject.reason}" for reject in rejected[:10]]
    if len(rejected) > 10:
        lines.append(f"  and {len(rejected) - 10} more")
    return "\n".join([*lines, "nothing was written; mend these pairs, or leave them out with --skip-bad"])


def _remove_leftovers(out: Path) -> None:
    """Remove what killed writers of this machine left behind; a living one keeps its folder."""
    prefix = f"{out.name}.tmp.{socket.gethostname()}."
    for folder in out.parent.iterdir():
        pid = folder.name.removeprefix(prefix)
        if folder.name.startswith(prefix) and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, and somebody else's
        return True
    return True


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tool_version() -> str:
    try:
        return importlib.metadata.version("restill")
    except importlib.metadata.PackageNotFoundError:
        return "uninstalled"
