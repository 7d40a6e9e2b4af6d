"""Video files, frame by frame: the pictures are changed, the sound and the timing are not."""

import mimetypes
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    ".mp4": ("libx264", {"crf": "14"}),
    ".m4v": ("libx264", {"crf": "14"}),
    ".mov": ("libx264", {"crf": "14"}),
    ".mkv": ("libx264", {"crf": "14"}),
    ".webm": ("libvpx-vp9", {"crf": "14", "b:v": "0", "row-mt": "1"}),
}
"""Suffix of an output -> encoder and its options: constant quality, visually without loss."""

_BT601, _BT709 = 5, 1  # numbers of FFmpeg's colour matrices; those beyond 9 are not among what it converts
_KNOWN_MATRICES = (1, 4, 5, 6, 7, 9)


def is_video(path: Path) -> bool:
    """Whether a file's name says that it is a video."""
    kind, _ = mimetypes.guess_type(path.name)
    return path.suffix.lower() in ENCODERS or (kind or "").startswith("video/")


def check_writes(path: Path) -> None:
    """Raise ValueError if a video cannot be written under this name, or videos not at all."""
    if path.suffix.lower() not in ENCODERS:
        raise ValueError(f"{path}: videos are written as {' '.join(ENCODERS)}; name the output so")
    _import_av()


def change_video(change: Callable[[list[NDArray]], list[NDArray]], src: Path, dst: Path, *, batch: int = 1) -> int:
    """Write a video whose frames went through `change`, each by itself, with a progress bar.

    Size, times of the frames and colour matrix are kept, sound is copied; a video that is filmed turned is written
    upright. Frames are taken as 8 bits a colour. The file appears whole or not at all.

    Args:
        change: (H,W,3) uint8 RGB pictures of one size, at most `batch` -> the same number, of the same size.
        src: any video that FFmpeg reads.
        dst: its suffix says container and encoder, of ENCODERS.
        batch: frames at once.

    Returns:
        The number of frames.

    Raises:
        ValueError: no video, a damaged one, an output that cannot be, or PyAV is not installed.
    """
    check_writes(dst)
    av = _import_av()
    dst.parent.mkdir(parents=True, exist_ok=True)
    part = dst.with_name(f".{dst.stem}.{os.getpid()}.tmp{dst.suffix}")
    try:
        with av.open(str(src)) as source, av.open(str(part), "w") as target:
            count = _copy(av, change, source, target, batch=batch)
        part.replace(dst)
    except av.FFmpegError as error:
        raise ValueError(f"{src} to {dst.name}: {error}") from None
    finally:
        part.unlink(missing_ok=True)
    return count


def _copy(
    av: ModuleType, change: Callable[[list[NDArray]], list[NDArray]], source: Any, target: Any, *, batch: int
) -> int:
    if not source.streams.video:
        raise ValueError(
            f"{source.name} has no pictures, only {', '.join(s.type for s in source.streams) or 'nothing'}"
        )
    stream = source.streams.video[0]
    stream.thread_type = "AUTO"
    first = next(source.decode(stream), None)
    if first is None:
        raise ValueError(f"{source.name} has no frame")
    source.seek(0)
    upright, matrix = _rgb(first, _matrix(first)), _matrix(first)
    encoder, options = ENCODERS[Path(target.name).suffix]
    out = target.add_stream(encoder, rate=stream.average_rate, options=options)
    out.height, out.width = upright.shape[:2]
    out.pix_fmt = "yuv444p" if out.height % 2 or out.width % 2 else "yuv420p"  # half the colours want even sides
    out.time_base = out.codec_context.time_base = stream.time_base
    out.codec_context.colorspace, out.codec_context.color_range = matrix, first.color_range
    out.codec_context.color_primaries, out.codec_context.color_trc = first.color_primaries, first.color_trc
    try:
        sound = {audio.index: target.add_stream_from_template(audio) for audio in source.streams.audio}
    except ValueError as error:  # AAC in WebM, say
        raise ValueError(f"its sound, which is copied as it is, does not fit: {error}; name the output .mkv") from None

    def write(frames: list[Any]) -> None:
        for frame, rgb in zip(frames, change([_rgb(frame, matrix) for frame in frames]), strict=True):
            made = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            made = made.reformat(format=out.pix_fmt, dst_colorspace=matrix)
            made.pts, made.time_base = frame.pts, frame.time_base
            target.mux(out.encode(made))
        bar.update(len(frames))

    waiting: list[Any] = []
    with tqdm(total=stream.frames or None, unit="frame", desc=Path(source.name).name) as bar:
        for packet in source.demux(stream, *source.streams.audio):
            if packet.stream.index != stream.index:
                if packet.dts is not None:  # else what ends a stream
                    packet.stream = sound[packet.stream.index]
                    target.mux(packet)
                continue
            for frame in packet.decode():
                waiting.append(frame)
                if len(waiting) == batch:
                    write(waiting)
                    waiting = []
        if waiting:
            write(waiting)
        target.mux(out.encode())
        return int(bar.n)


def _matrix(frame: Any) -> int:
    """The colour matrix that the video names, or the one that is usual for its size."""
    if int(frame.colorspace) in _KNOWN_MATRICES:
        return int(frame.colorspace)
    return _BT709 if frame.height >= 720 else _BT601


def _rgb(frame: Any, matrix: int) -> NDArray:
    """(H,W,3) uint8 RGB, the right way up."""
    rgb = frame.reformat(format="rgb24", src_colorspace=matrix).to_ndarray()
    return np.rot90(rgb, round(frame.rotation / 90) % 4)


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError:
        raise ValueError("videos need PyAV: pip install 'restill[video]'") from None
    return av
