"""Masks beside pictures that are shards already: the same samples again, each with KEY.masks.png."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shards.codec import decode_rgb, encode_masks
from shards.fetch import here
from shards.finish import finish, look_over
from shards.folder import being_written, draft, finished, keep, need_space
from shards.index import Entry, open_index, read_tar
from shards.schema import MANIFEST, MASKS, Manifest, Shard, ShardError, sha256_of

logger = logging.getLogger(__name__)

MaskMaker = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(lq, gt), each (H,W,3) uint8 RGB -> (K,H,W) bool, K as it comes, 0 too."""


def add_masks(shards: str | Path, out: str | Path, make: MaskMaker, *, of: str, prior: dict[str, Any]) -> Manifest:
    """Write a data set again with masks, shard for shard; the old one stays as it is.

    The pictures' bytes are the same, and so is the fingerprint: a run may change from one to the other. If `out` is
    what this call would write, wherever the prior's weights lie now, nothing is done; finished shards of an interrupted
    call are kept.

    Args:
        shards: the folder of the data set; masks it may have are left behind.
        out: the folder to make.
        make: called once per sample.
        of: what the masks are of, for the manifest.
        prior: what makes them, likewise.

    Raises:
        ValueError: another data set is in the way.
        ShardError: `shards` is damaged, or the disk is full or may not be written.
    """
    shards, out = here(shards), here(out)
    source, _ = open_index(shards)
    note = {"of": of, "prior": json.loads(json.dumps(prior)), "source": sha256_of(shards / MANIFEST)}
    if (out / MANIFEST).is_file():
        there, _ = open_index(out)
        if there.masks is None or _essence(there.masks.model_dump(exclude={"sha256"})) != _essence(note):
            raise ValueError(f"{out} holds another data set, or other masks; choose another --out, or delete it")
        logger.info("%s: already there, %d samples with masks, nothing to do", out, there.num_samples)
        return there
    with being_written(out, what=f"masks for {source.layout}, {source.split}"):
        inputs = {shard: _inputs(shard, note) for shard in source.shardlist}
        done = {shard: finished(out / shard.url, inputs=inputs[shard]) for shard in source.shardlist}
        rest = [shard for shard in source.shardlist if not done[shard]]
        need_space(out, sum(shard.filesize for shard in rest))
        with tqdm(total=sum(shard.nsamples for shard in rest), desc="masks", unit="picture", disable=None) as bar:
            for shard in rest:
                tar = out / shard.url
                num = draft(tar, _with_masks(shards / shard.url, make, bar))
                done[shard] = keep(tar, inputs=inputs[shard], nsamples=num)
        contents = look_over({out / shard.url: told for shard, told in done.items() if told})
        if contents.content_sha256 != source.content_sha256:
            raise ShardError(f"its manifest is of other contents; run `python -m shards check {shards}`", url=shards)
        about = source.model_dump(include={"layout", "split", "src", "arguments", "storage", "rejected", "suspicious"})
        manifest = finish(out, contents, masks=note, **about)
    num_masks = sum(sample["masks"] for sample in contents.notes.values()) / manifest.num_samples
    logger.info("%s: %d samples, %.1f masks each, of %s", out, manifest.num_samples, num_masks, of)
    return manifest


def _inputs(shard: Shard, note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([shard.sha256, _essence(note)], sort_keys=True).encode()).hexdigest()


def _with_masks(tar: Path, make: MaskMaker, bar: tqdm) -> Iterator[dict[str, Any]]:
    for entry in read_tar(tar):
        png, num = _masks_of(entry, make)
        yield {
            "__key__": entry.key,
            **{member.ending: member.data for member in (entry.lq, entry.gt)},
            "json": json.dumps(entry.note | {"masks": num}, sort_keys=True).encode(),
            MASKS: png,
        }
        bar.update()


def _essence(note: dict[str, Any]) -> dict[str, Any]:
    """Without the path of the prior's weights, whose sha256 tells them."""
    return note | {"prior": {name: value for name, value in note["prior"].items() if name != "weights"}}


def _masks_of(entry: Entry, make: MaskMaker) -> tuple[bytes, int]:
    """The file, and how many masks it holds."""
    masks = make(decode_rgb(entry.lq.data), decode_rgb(entry.gt.data))
    assert masks.dtype == bool and masks.shape[1:] == (entry.h, entry.w), (masks.dtype, masks.shape)
    masks = masks[masks.any((1, 2))]
    return encode_masks(masks), len(masks)
