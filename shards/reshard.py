"""A data set written again: one of ours in another form or other shard sizes, or tars that others wrote."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import compress, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shards.codec import decode_rgb, encode_png
from shards.finish import finish, look_over, tool_version
from shards.folder import Finished, being_written, draft, finished, keep, making, need_space
from shards.foreign import Place, find_samples
from shards.index import Entry, open_index, read_tar
from shards.layouts import Pair
from shards.parallel import in_order
from shards.schema import MANIFEST, MASKS, Manifest, ShardError
from shards.storage import Storage, parse
from shards.tiles import is_tiles
from shards.write import write_shards

logger = logging.getLogger(__name__)

_MIB = 2**20


def reshard(
    shards: str | Path, out: str | Path, *, storage: Storage | None = None, shard_mib: float = 256, jobs: int = 1
) -> Manifest:
    """Write a data set of ours again; keys, order, pixels, masks and what is known of each sample stay.

    Finished shards of an interrupted call are kept, and a folder that holds just this already is left as it is.

    Args:
        shards: the folder of the data set.
        out: the folder to make.
        storage: form of the pictures, None: the one they have. They are encoded anew only if it is another.
        shard_mib: about how much a shard holds, as long as the form stays; all hold equally many samples.
        jobs: processes.

    Raises:
        ValueError: something else lies in `out`, or a picture is too large for the form.
        ShardError: `shards` is damaged, or the disk is full or may not be written.
    """
    shards, out = Path(shards), Path(out)
    source, _ = open_index(shards)
    old = parse(source.storage)
    new = storage or old
    arguments = source.arguments | {"shard_mib": shard_mib}
    if (out / MANIFEST).is_file():
        return _already_there(source, out, str(new), arguments)
    num_bytes = sum(shard.filesize for shard in source.shardlist)
    per_shard = math.ceil(source.num_samples / max(1, math.ceil(num_bytes / (shard_mib * _MIB))))
    with being_written(out, what=f"{source.layout}, {source.split}, as {new}, of {source.fingerprint}"):
        plan: dict[Path, tuple[int, str]] = {}
        written: dict[Path, Finished] = {}
        for number, start in enumerate(range(0, source.num_samples, per_shard)):
            num = min(per_shard, source.num_samples - start)
            plan[out / f"{number:06d}.tar"] = num, _hash(tool_version(), source.index_sha256, str(new), start, num)
        there = {tar: finished(tar, inputs=inputs) for tar, (_, inputs) in plan.items()}
        missing = [not there[tar] for tar, (num, _) in plan.items() for _ in range(num)]
        need_space(out, num_bytes * sum(missing) / len(missing))
        entries = (entry for shard in source.shardlist for entry in read_tar(shards / shard.url))
        convert = partial(_converted, old=old, new=new)
        with closing(in_order(convert, compress(entries, missing), jobs=jobs)) as converted:
            samples = iter(tqdm(converted, "pairs", sum(missing), unit="pair", disable=None))
            for tar, (num, inputs) in plan.items():
                written[tar] = there[tar] or keep(tar, inputs=inputs, nsamples=draft(tar, islice(samples, num)))
        contents = look_over(written, jobs=jobs)
        if contents.source_sha256 != source.source_sha256 or (
            new == old and contents.content_sha256 != source.content_sha256
        ):
            raise ShardError(f"its manifest is of other contents; run `python -m shards check {shards}`", url=shards)
        manifest = finish(
            out,
            contents,
            masks=source.masks.model_dump(exclude={"sha256"}) if source.masks else None,
            storage=str(new),
            arguments=arguments,
            **source.model_dump(include={"layout", "split", "src", "rejected", "suspicious"}),
        )
    logger.info("%s: %d pairs in %d shards, stored as %s", out, manifest.num_samples, len(manifest.shardlist), new)
    return manifest


def adopt(
    tars: Sequence[Path], out: str | Path, *, lq_ext: str = "lq", gt_ext: str = "gt", split: str = "", **options: Any
) -> Manifest:
    """Write what lies in others' tars as a data set of ours, with all checks that pictures in folders get.

    The pictures are unpacked beside `out` first, which for a while takes as much space again.

    Args:
        tars: in order.
        out: the folder to make.
        lq_ext, gt_ext: what follows the key in the pictures' names: `input.png`, or `input` for any kind of picture.
        split: for the manifest; the name of `out` if not given.
        options: of `shards.write.write_shards`.

    Raises:
        ValueError, ShardError: as `shards.foreign.find_samples` and `shards.write.write_shards` do.
    """
    out = Path(out)
    samples = find_samples(tars, lq_ext=lq_ext, gt_ext=gt_ext)
    out.parent.mkdir(parents=True, exist_ok=True)
    need_space(out.parent, 2 * sum(place.size for places in samples.values() for place in places.values()))
    with making(out.parent, prefix=f".{out.name}.unpacked-") as scratch:
        pairs = []
        for key, places in tqdm(samples.items(), desc="unpacking", unit="pair", disable=None):
            files = {role: _unpack(place, Path(scratch, role, key)) for role, place in places.items()}
            pairs.append(Pair(key, files.get("lq"), files.get("gt")))
        return write_shards(
            pairs,
            out,
            src=os.path.commonpath([tar.resolve().parent for tar in tars]),
            layout="reshard",
            split=split or out.name,
            arguments={"lq_ext": lq_ext, "gt_ext": gt_ext, "kind": options.get("kind")},
            **options,
        )


def tars_of(src: Sequence[Path]) -> list[Path]:
    """Tars that are named, and in the order of their names those that lie in folders that are named.

    Raises:
        ValueError: something is not there, or a folder holds none.
    """
    found: list[Path] = []
    for path in src:
        inside = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.is_file() else []
        if not inside:
            raise ValueError(f"{path} is no tar, and no folder with tars in it")
        found += inside
    return found


def _already_there(source: Manifest, out: Path, storage: str, arguments: dict[str, Any]) -> Manifest:
    there, _ = open_index(out)
    # Of the pixels, whatever their form; sets made before there was a source_sha256 have only that of their form.
    pixels = "content_sha256" if there.storage == source.storage or not source.source_sha256 else "source_sha256"
    alike = ("layout", "split", "num_samples", "rejected", "suspicious", "masks", pixels)
    wanted = [storage, arguments, *(getattr(source, name) for name in alike)]
    if [there.storage, there.arguments, *(getattr(there, name) for name in alike)] != wanted:
        raise ValueError(f"{out} holds another data set; choose another folder, or delete it")
    logger.info("%s: already there, %d pairs, nothing to do", out, there.num_samples)
    return there


def _hash(*inputs: Any) -> str:
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _converted(entry: Entry, *, old: Storage, new: Storage) -> dict[str, Any]:
    sample: dict[str, Any] = {"__key__": entry.key}
    for role, member in (("lq", entry.lq), ("gt", entry.gt)):
        suffix, data = member.ending.removeprefix(role), member.data
        if new != old:
            suffix, data = new.encode(data if old.form == "keep" else None, suffix, decode_rgb(data))
        sample[role + suffix] = data
    if entry.masks:
        sample[MASKS] = entry.masks.data
    return sample | {"json": json.dumps(entry.note, sort_keys=True).encode()}


def _unpack(place: Place, path: Path) -> Path:
    """Write a picture, dated like its tar, by which the writer knows what it has done already."""
    data, suffix = place.read(), place.suffix
    if is_tiles(data):
        data, suffix = encode_png(decode_rgb(data)), ".png"
    path = path.with_name(path.name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    seen = place.tar.stat()
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    return path
