"""Clean pictures and a synthetic degradation -> training and validation shards, split by photograph or by sequence."""

import importlib.resources
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
from tqdm import tqdm

from shards.codec import decode_rgb, encode_png
from shards.degrade import DEGRADATIONS, Degradation, Range
from shards.folder import making
from shards.layouts import Pair, pictures_below
from shards.pairing import runs
from shards.parallel import in_order
from shards.schema import Manifest
from shards.write import write_shards

# Photographs that lie inside scikit-image's wheel, so nothing is downloaded. The two motorcycles are a stereo pair.
TRAIN_PHOTOS = (
    "astronaut.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg", "camera.png", "brick.png",
    "grass.png", "gravel.png", "coins.png", "ihc.png",
)  # fmt: skip
VAL_PHOTOS = ("chelsea.png", "coffee.png")
MAX_PX = 768
TILE_PX = 256
VAL_PX = 480
WINDOW = (7, 13)  # frames that one picture is the mean of: an odd number, as for GoPro
_FRAMES = "blur_frames"
Item = TypeVar("Item")


class _Source(NamedTuple):
    """Files that pairs are made of."""

    name: str
    """Beginning of their keys."""
    paths: Sequence[Path]
    """A photograph, or the frames of a window."""


class _Piece(NamedTuple):
    name: str
    gt: np.ndarray
    given: Any
    """What is degraded: gt and what is around it, or the frames around it."""
    inner: tuple[slice, slice] = (slice(None), slice(None))
    """Where gt lies in there."""


def synthesise(
    degradation: str,
    out: str | Path,
    *,
    src: str | Path | None = None,
    seed: int = 0,
    variants: int | None = None,
    settings: Mapping[str, str] | None = None,
    jobs: int = 1,
) -> tuple[Manifest, Manifest]:
    """Write OUT/train and OUT/val: the same bytes on every call, whatever `jobs` is.

    Training photographs are cut into tiles of 256 px at two scales; those held out stay whole, at most 480 px a side.
    Frames, which `blur_frames` wants, stay as they are; each folder of them is a sequence, cut into windows.

    Args:
        degradation: a name in `DEGRADATIONS`.
        out: folder of the two.
        src: folder of clean photographs, or one of folders of frames; the last tenth by name is held out. None:
            scikit-image's photographs.
        seed: decides, with the key of a picture, its degradation.
        variants: degradations of each picture; None: as many as the degradation usually has, two for most.
        settings: options of the degradation, as they are written: `{"sigma": "15,50"}`.
        jobs: processes.

    Raises:
        ValueError: no such degradation or setting, too few pictures, an unreadable one.
        ShardError: as `write_shards`.
    """
    if degradation not in DEGRADATIONS:
        raise ValueError(f"no degradation {degradation!r}; there are {', '.join(DEGRADATIONS)}")
    if src is not None and not Path(src).is_dir():
        raise ValueError(f"no folder {src}; point --src at one with clean photographs, or leave it out")
    chosen = DEGRADATIONS[degradation]
    options = _parse(degradation, settings or {})
    arguments: dict[str, Any] = {"seed": seed, "variants": variants or chosen.variants}
    if settings:
        arguments["settings"] = dict(sorted(settings.items()))
    if degradation == _FRAMES:
        if arguments["variants"] != 1:
            raise ValueError(f"--variants {variants}: there is but one mean of the same frames; leave it out")
        parts = _windows_in(src, seed=seed, window=options.pop("window", WINDOW))
    else:
        parts = _sample_photographs() if src is None else _photographs_in(Path(src))
    Path(out).mkdir(parents=True, exist_ok=True)
    manifests = []
    for split, sources in zip(("train", "val"), parts, strict=True):
        # Beside what becomes of it, where there must be room for as much.
        with making(Path(out), prefix=".synth-") as scratch:
            write = partial(
                _write,
                cut=_middle if degradation == _FRAMES else _tiles if split == "train" else _whole,
                degradation=chosen,
                options=options,
                seed=seed,
                variants=arguments["variants"],
                scratch=scratch,
            )
            written = in_order(write, sources, jobs=min(jobs, len(sources)))
            # On a terminal as ever; a log gets a line in a minute.
            often = 0.1 if sys.stderr.isatty() else 60
            bar = tqdm(written, desc=f"{split}: {degradation}", total=len(sources), unit="source", mininterval=often)
            manifest = write_shards(
                sorted(pair for pairs in bar for pair in pairs),
                Path(out, split),
                src="scikit-image" if src is None else str(src),
                layout=f"synth_{degradation}",
                split=split,
                arguments=arguments | _origins(degradation, sources),
                allow_suspicious=True,  # these are pairs, even where rain falls before a white wall
                jobs=jobs,
            )
            manifests.append(manifest)
    return manifests[0], manifests[1]


def _write(
    source: _Source,
    *,
    cut: Callable[[_Source, int], Iterator[_Piece]],
    degradation: Degradation,
    options: dict[str, Any],
    seed: int,
    variants: int,
    scratch: Path,
) -> list[Pair]:
    """Degrade what is cut from a source, and save it."""
    pairs = []
    for piece in cut(source, degradation.margin_px):
        for variant in range(variants):
            key = piece.name if cut is _middle else f"{piece.name}-{variant}"
            rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(key.encode())]))
            numbered = {"variant": variant} if degradation.numbered else {}
            made = degradation.make(piece.given, rng, **options, **numbered)
            lq, mask = made if isinstance(made, tuple) else (made, None)
            paths = [scratch / role / f"{key}.png" for role in ("lq", "gt", "masks")]
            _save(paths[0], encode_png(lq[piece.inner]))
            _save(paths[1], encode_png(piece.gt))
            if mask is not None:
                _save(paths[2], cv2.imencode(".png", 255 * mask[piece.inner].astype(np.uint8))[1].tobytes())
            pairs.append(Pair(key, paths[0], paths[1], masks=None if mask is None else paths[2]))
    return pairs


def _parse(degradation: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """Options of a degradation from what was written: numbers, ranges such as 5,50, or words."""
    taken = DEGRADATIONS[degradation].options | ({"window": WINDOW} if degradation == _FRAMES else {})
    options: dict[str, Any] = {}
    for name, text in settings.items():
        if name not in taken:
            raise ValueError(f"--set {name}={text}: {degradation} takes {', '.join(taken) or 'no settings'}")
        if isinstance(taken[name], str):
            options[name] = text
            continue
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 2):
            raise ValueError(f"--set {name}={text}: a number is wanted, or two such as low,high")
        options[name] = numbers if len(numbers) == 2 else numbers[0]
    return options


def _origins(degradation: str, sources: Sequence[_Source]) -> dict[str, list[str]]:
    if degradation == _FRAMES:
        return {"sequences": list(dict.fromkeys(source.paths[0].parent.name for source in sources))}
    return {"photographs": [source.paths[0].name for source in sources]}


def _sample_photographs() -> tuple[list[_Source], list[_Source]]:
    folder = Path(str(importlib.resources.files("skimage"))) / "data"
    absent = [name for name in TRAIN_PHOTOS + VAL_PHOTOS if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"this scikit-image has no {', '.join(absent)} in {folder}; give your own photographs by --src"
        )
    train, val = (
        [_Source(_name(Path(name).stem), [folder / name]) for name in names] for names in (TRAIN_PHOTOS, VAL_PHOTOS)
    )
    return train, val


def _photographs_in(folder: Path) -> tuple[list[_Source], list[_Source]]:
    sources: dict[str, _Source] = {}
    for key, path in pictures_below(folder).items():
        other = sources.setdefault(_name(key), _Source(_name(key), [path]))
        if other.paths[0] != path:
            raise ValueError(f"{other.paths[0]} and {path} would both be {_name(key)!r}: rename one")
    return _hold_out(list(sources.values()), f"{folder} holds {len(sources)} photographs")


def _windows_in(src: str | Path | None, *, seed: int, window: Range) -> tuple[list[_Source], list[_Source]]:
    """Windows of an odd number of frames, one behind the other in each sequence; a rest at its end is left out."""
    if src is None:
        raise ValueError(f"{_FRAMES} needs --src, a folder that holds a folder of frames for each sequence")
    low, high = window if isinstance(window, tuple) else (window, window)
    lengths = [number for number in range(int(low), int(high) + 1) if number % 2]
    if not lengths or lengths[0] < 3:
        raise ValueError(f"--set window={low:g},{high:g}: windows have an odd number of frames, 3 at least")
    found = pictures_below(Path(src))
    sequences: dict[str, list[_Source]] = {}
    for run in runs(list(found)):  # frames whose numbers follow each other
        folder = str(Path(run[0]).parent)
        rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(run[0].encode())]))
        start = 0
        while start + (length := lengths[int(len(lengths) * rng.random())]) <= len(run):
            frames = run[start : start + length]
            source = _Source(_name(frames[length // 2]), [found[key] for key in frames])
            sequences.setdefault(folder, []).append(source)
            start += length
    told = f"{src} holds {len(sequences)} folders of {lengths[0]} or more numbered frames"
    train, val = _hold_out([sequences[folder] for folder in sorted(sequences)], told)
    return sum(train, []), sum(val, [])


def _hold_out(items: list[Item], told: str) -> tuple[list[Item], list[Item]]:
    if len(items) < 2:
        raise ValueError(f"{told}; two are the least, one to train on, one held out")
    num_val = max(1, len(items) // 10)
    return items[:-num_val], items[-num_val:]


def _whole(source: _Source, margin_px: int) -> Iterator[_Piece]:
    rgb = _read(source.paths[0])
    rgb = _resize(rgb, min(1.0, VAL_PX / max(rgb.shape)))
    yield _Piece(source.name, rgb, rgb)


def _tiles(source: _Source, margin_px: int) -> Iterator[_Piece]:
    """Tiles that cover a photograph, and a smaller copy of it, evenly."""
    rgb = _read(source.paths[0])
    largest = min(1.0, MAX_PX / max(rgb.shape))
    for level, scale in enumerate((largest, 0.6 * largest)):
        scaled = _resize(rgb, scale)
        if level and min(scaled.shape[:2]) < TILE_PX:
            return
        corners = [(top, left) for top in _starts(scaled.shape[0]) for left in _starts(scaled.shape[1])]
        for number, (top, left) in enumerate(corners):
            gt = scaled[top : top + TILE_PX, left : left + TILE_PX]
            above, before = min(top, margin_px), min(left, margin_px)
            inner = slice(above, above + gt.shape[0]), slice(before, before + gt.shape[1])
            given = scaled[top - above : top + TILE_PX + margin_px, left - before : left + TILE_PX + margin_px]
            yield _Piece(f"{source.name}-{level}-{number:02d}", gt, given, inner)


def _middle(source: _Source, margin_px: int) -> Iterator[_Piece]:
    frames = [_read(path) for path in source.paths]
    yield _Piece(source.name, frames[len(frames) // 2], frames)


def _starts(length: int) -> list[int]:
    last = max(0, length - TILE_PX)
    return [round(start) for start in np.linspace(0, last, -(-length // TILE_PX))] if last else [0]


def _read(path: Path) -> np.ndarray:
    try:
        return decode_rgb(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; remove it from the folder") from None


def _resize(rgb: np.ndarray, scale: float) -> np.ndarray:
    return rgb if scale == 1 else cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _name(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_/-]", "-", key)


def _save(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
