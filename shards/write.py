"""Pairs -> shards, by several processes, resumable by shard; the manifest comes last, and without it nothing counts."""

import hashlib
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from shards.finish import finish, look_over, tool_version
from shards.folder import Finished, being_written, draft, finished, keep, need_space
from shards.index import open_index
from shards.layouts import Pair
from shards.pairing import Kind, Measures, Problem, problems, shifts
from shards.parallel import in_order
from shards.schema import MANIFEST, Manifest, Rejected
from shards.sources import Recipe, load_pair, read_pair, source_line, source_note

logger = logging.getLogger(__name__)

_MIB = 2**20
_NAMED = 10  # bad pairs that a message lists; it counts them all
# Bytes that a picture takes in each form, as parts of a PNG's; and of a JPEG's, once it is stored without loss.
_GROWTH = {"keep": 1.0, "webp": 0.75, "tiles": 0.75, "raw": 2.3}
_JPEG_GROWTH = 5.0
_GIVEN_MASKS = {"name": "given", "what": "whoever made the data set", "weights": None}


class _Planned(NamedTuple):
    """A shard to be."""

    tar: Path
    pairs: Sequence[Pair]
    inputs: str
    """Hash of all that it is a function of."""
    num_bytes: float
    """About."""


def write_shards(
    pairs: Sequence[Pair],
    out: str | Path,
    *,
    src: str,
    layout: str,
    split: str,
    arguments: dict[str, Any],
    kind: Kind = "any",
    recipe: Recipe | None = None,
    skip_bad: bool = False,
    allow_suspicious: bool = False,
    shard_mib: float = 256,
    jobs: int = 1,
    verify: bool = False,
) -> Manifest:
    """Write pairs, checked and in the given order, as shards.

    The same pairs give the same bytes on every call, whatever `jobs` is, and however often it was interrupted: a shard
    is a function of its pairs' files and of `recipe`. Finished shards of an interrupted call are kept. A folder that
    holds just these pairs already is left as it is.

    Args:
        pairs: from a layout.
        out: folder to make: new, empty, or left by an interrupted call.
        src, layout, split, arguments: for the manifest.
        kind: what is wrong with lq, for the checks of how pairs of pictures look.
        recipe: how pictures are stored, and what is converted instead of refused; None: see its defaults.
        skip_bad: leave bad pairs out, and record them, instead of refusing.
        allow_suspicious: record, instead of refusing, what says that the pairs surely are none.
        shard_mib: about how much a shard holds; all hold equally many pairs.
        jobs: processes.
        verify: read again the shards that an interrupted call finished.

    Raises:
        ValueError: no pairs, bad pairs (listed), another data set in the way, or somebody else writing it.
        ShardError: the disk is full or may not be written, or a process died.
    """
    if not pairs:
        raise ValueError(f"no pictures found below {src}; is --src the right folder?")
    twice = [key for key, count in Counter(pair.key for pair in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} keys come twice: {', '.join(twice[:_NAMED])}; rename the files")
    out, recipe = Path(out), recipe or Recipe()
    about = {
        "layout": layout,
        "split": split,
        "arguments": _given({**arguments, "shard_mib": shard_mib, "to8": recipe.to8, "gray": recipe.gray}),
        "storage": str(recipe.storage),
    }
    if (out / MANIFEST).is_file():
        return _already_there(pairs, out, about, jobs=jobs)
    masked = any(pair.masks for pair in pairs)
    load = partial(load_pair, recipe=recipe, masked=masked)
    with being_written(out, what=f"{layout}, {split}"):
        plan = _plan(pairs, out, load, max_bytes=shard_mib * _MIB)
        there = {one.tar: note for one in plan if (note := finished(one.tar, inputs=one.inputs, verify=verify))}
        there = {tar: note for tar, note in there.items() if skip_bad or not note.rejected}
        rest = [one for one in plan if one.tar not in there]
        if there:
            logger.info("%s: %d of %d shards are there already, going on", out, len(there), len(plan))
        need_space(out, sum(one.num_bytes for one in rest))
        there |= _write_rest(rest, load, jobs=jobs, skip_bad=skip_bad)
        written = {one.tar: there[one.tar] for one in plan}
        rejected = tuple(reject for note in written.values() for reject in note.rejected)
        if len(rejected) == len(pairs):
            raise ValueError(f"none of the {len(pairs)} pairs is good; the first: {rejected[0].reason}")
        contents = look_over({tar: note for tar, note in written.items() if note.nsamples}, jobs=jobs)
        suspicious = _suspicious(pairs, contents.notes, kind, recipe)
        if any(problem.certain for problem in suspicious) and not allow_suspicious:
            told = "\n".join(f"  {problem}" for problem in suspicious)
            raise ValueError(f"these pairs are not what they should be:\n{told}\nif they are, add --allow-suspicious")
        for problem in suspicious:
            logger.warning("%s: look at this: %s", out, problem)
        manifest = finish(
            out,
            contents,
            src=src,
            rejected=rejected,
            suspicious=tuple(map(str, suspicious)),
            masks={"of": "lq", "prior": _GIVEN_MASKS, "source": contents.source_sha256} if masked else None,
            **about,
        )
    num_shards = len(manifest.shardlist)
    logger.info("%s: %d pairs in %d shards, %d rejected", out, manifest.num_samples, num_shards, len(rejected))
    return manifest


def _plan(pairs: Sequence[Pair], out: Path, load: partial, *, max_bytes: float) -> list[_Planned]:
    """Equally many pairs in each, so that a file that is mended, and changes its size, does not shift those behind."""
    num_bytes = [_stored_bytes(pair, load.keywords["recipe"]) for pair in pairs]
    per_shard = math.ceil(len(pairs) / max(1, math.ceil(sum(num_bytes) / max_bytes)))
    plan = []
    for number, start in enumerate(range(0, len(pairs), per_shard)):
        part = slice(start, start + per_shard)
        inputs = _inputs(pairs[part], load)
        plan.append(_Planned(out / f"{number:06d}.tar", pairs[part], inputs, sum(num_bytes[part])))
    return plan


def _stored_bytes(pair: Pair, recipe: Recipe) -> float:
    encoded = recipe.storage.form != "keep" or pair.side_by_side
    total = 0.0
    for path in {pair.lq, pair.gt}:
        if path and path.is_file():
            jpeg = path.suffix.lower() in (".jpg", ".jpeg")
            total += path.stat().st_size * _GROWTH[recipe.storage.form] * (_JPEG_GROWTH if encoded and jpeg else 1)
    return total


def _inputs(pairs: Sequence[Pair], load: partial) -> str:
    """Files are known by name, size and time, as `make` does."""
    seen = [(pair.key, pair.side_by_side, *map(_seen, (pair.lq, pair.gt, pair.masks))) for pair in pairs]
    return hashlib.sha256(json.dumps([tool_version(), repr(load.keywords), seen]).encode()).hexdigest()


def _seen(path: Path | None) -> tuple[str, int, int] | None:
    if path is None or not path.is_file():
        return None
    stat = path.stat()
    return f"{path.parent.name}/{path.name}", stat.st_size, stat.st_mtime_ns


def _write_rest(
    plan: Sequence[_Planned], load: Callable[[Pair], dict[str, Any] | Rejected], *, jobs: int, skip_bad: bool
) -> dict[Path, Finished]:
    """Write these shards.

    Raises:
        ValueError: there are bad pairs, which are listed; shards without any are written all the same.
    """
    there: dict[Path, Finished] = {}
    bad: list[Rejected] = []
    pairs = [pair for one in plan for pair in one.pairs]
    with closing(in_order(load, pairs, jobs=min(jobs, len(pairs)))) as loaded, _bar(len(pairs)) as bar:
        for one in plan:
            rejected: list[Rejected] = []
            num = draft(one.tar, _good(islice(loaded, len(one.pairs)), rejected, bar))
            if rejected and not skip_bad:
                bad += rejected
            else:
                there[one.tar] = keep(one.tar, inputs=one.inputs, nsamples=num, rejected=rejected)
    if bad:
        lines = [f"{len(bad)} of {len(pairs)} pairs cannot be used:"]
        lines += [f"  {reject.key}: {reject.reason}" for reject in bad[:_NAMED]]
        lines += [f"  and {len(bad) - _NAMED} more"] * (len(bad) > _NAMED)
        kept = f"{len(there)} of {len(plan)} shards are finished and kept" if there else "nothing was written"
        raise ValueError("\n".join([*lines, f"{kept}; mend these pairs, or leave them out with --skip-bad"]))
    return there


def _good(loaded: Iterable[dict[str, Any] | Rejected], rejected: list[Rejected], bar: tqdm) -> Iterator[dict[str, Any]]:
    for sample in loaded:
        if isinstance(sample, Rejected):
            rejected.append(sample)
        else:
            yield sample
        bar.update()


def _bar(total: int) -> tqdm:
    # On a terminal as ever; a log gets a line in a minute.
    return tqdm(total=total, desc="pairs", unit="pair", mininterval=0.1 if sys.stderr.isatty() else 60)


def _suspicious(pairs: Sequence[Pair], notes: dict[str, dict[str, Any]], kind: Kind, recipe: Recipe) -> list[Problem]:
    by_key = {pair.key: pair for pair in pairs}

    def read(key: str) -> tuple[Any, Any]:
        lq, gt = read_pair(by_key[key], recipe=recipe)
        return lq.rgb, gt.rgb

    measured = {key: Measures(**note["measures"]) for key, note in notes.items()}
    return [*problems(measured, kind), *shifts(list(notes), read)]


def _already_there(pairs: Sequence[Pair], out: Path, about: dict[str, Any], *, jobs: int) -> Manifest:
    manifest, _ = open_index(out)
    there = {name: getattr(manifest, name) for name in about} | {"arguments": _given(manifest.arguments)}
    # The source folder may have moved since; that the pairs are the same is seen in their bytes.
    if there == about:
        rejected = {reject.key for reject in manifest.rejected}
        wanted = [pair for pair in pairs if pair.key not in rejected]
        source = hashlib.sha256()
        with closing(in_order(source_note, wanted, jobs=jobs)) as notes:
            for pair, note in zip(tqdm(wanted, f"comparing with {out}", unit="pair", disable=None), notes, strict=True):
                source.update(source_line(pair.key, note) or b"")
        # Sets made before there was a source_sha256 hold the files' own bytes.
        if source.hexdigest() == (manifest.source_sha256 or manifest.content_sha256):
            logger.info("%s: already there, %d pairs, nothing to do", out, manifest.num_samples)
            return manifest
    raise ValueError(
        f"{out} holds another data set ({manifest.layout}, {manifest.split}, {manifest.num_samples} pairs, from "
        f"{manifest.src}, {manifest.arguments}, {manifest.storage}); choose another --out, or delete it"
    )


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}
