"""Videos: frames go through, sound and timing do not change."""

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from dist_train.restore import restore_files
from dist_train.video import change_video

pytestmark = pytest.mark.unit
av = pytest.importorskip("av", reason="videos need PyAV")

TIMES = (0, 1, 2, 4, 7)
"""Of the frames, in 1/12 s: not evenly, as a phone's."""


def shades(height: int, width: int) -> list[np.ndarray]:
    """Frames of one colour each."""
    return [np.full((height, width, 3), (40 + 30 * i, 120, 200 - 20 * i), np.uint8) for i in range(len(TIMES))]


def write_video(path: Path, frames: list[np.ndarray], *, sound: bool = True) -> Path:
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=12, options={"crf": "1"})
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuv444p"
        video.codec_context.time_base = Fraction(1, 12)
        voice = file.add_stream("aac", rate=8000, layout="mono") if sound else None
        for time, rgb in zip(TIMES, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 12)
            file.mux(video.encode(frame))
        if voice is not None:
            for start in range(0, 5120, 1024):
                samples = np.sin(np.arange(start, start + 1024) / 10, dtype=np.float32)[None]
                heard = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
                heard.sample_rate, heard.pts, heard.time_base = 8000, start, Fraction(1, 8000)
                file.mux(voice.encode(heard))
            file.mux(voice.encode())
        file.mux(video.encode())
    return path


def read_video(path: Path) -> tuple[list[np.ndarray], list[float], list[bytes]]:
    """Frames, their times in seconds, packets of sound."""
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
    with av.open(str(path)) as file:
        sound = (
            [bytes(packet) for packet in file.demux(*file.streams.audio) if packet.size] if file.streams.audio else []
        )
    return [frame.to_ndarray(format="rgb24") for frame in frames], [frame.time for frame in frames], sound


@pytest.mark.parametrize("size, suffix", [((48, 64), ".mp4"), ((33, 47), ".mkv"), ((32, 32), ".mov")])
def test_frames_change_and_all_else_stays(tmp_path, size, suffix) -> None:
    src = write_video(tmp_path / "in.mp4", shades(*size))
    seen = []

    def brighter(frames: list[np.ndarray]) -> list[np.ndarray]:
        seen.append(len(frames))
        return [frame + 30 for frame in frames]

    assert change_video(brighter, src, tmp_path / f"out{suffix}", batch=2) == len(TIMES)
    assert seen == [2, 2, 1]
    before, times, sound = read_video(src)
    after, kept, copied = read_video(tmp_path / f"out{suffix}")
    # From the first frame on: in .mkv both begin later by what AAC needs ahead.
    assert np.diff(kept) == pytest.approx(np.diff(times), abs=2e-3)
    assert sound and copied == sound
    for was, now in zip(before, after, strict=True):
        assert now.shape == was.shape
        assert np.abs(now - (was + 30.0)).max() <= 3  # 8 bits of YUV
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", f"out{suffix}"]


def test_a_phone_held_upright(tmp_path) -> None:
    frames = shades(32, 48)
    for frame in frames:
        frame[:16, :24] = 250  # above on the left
    src = write_video(tmp_path / "in.mp4", frames, sound=False)
    data = src.read_bytes()
    plain, clockwise = (struct.pack(">9i", *matrix) for matrix in [
        (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), (0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30),
    ])  # fmt: skip
    at = data.index(plain, data.index(b"tkhd"))  # the track's; the film's comes before
    src.write_bytes(data[:at] + clockwise + data[at + 36 :])
    change_video(lambda frames: frames, src, tmp_path / "out.mp4")
    for was, now in zip(frames, read_video(tmp_path / "out.mp4")[0], strict=True):
        assert now.shape == (48, 32, 3)
        assert np.abs(np.rot90(was, -1) - now.astype(float)).mean() < 2


def test_a_video_among_files(tmp_path, capsys) -> None:
    src = write_video(tmp_path / "in.webm.mkv", shades(16, 16), sound=False)
    (tmp_path / "broken.mp4").write_bytes(src.read_bytes()[:100])

    def same(lq):
        return lq

    result = restore_files(same, [tmp_path / "*.m[kp][v4]"], tmp_path / "out", batch=3)
    assert [path.name for path in result.written] == ["in.webm.mkv"]
    assert [path.name for path in result.failed] == ["broken.mp4"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["in.webm.mkv"]
    assert restore_files(same, [src], tmp_path / "one.webm").written == [tmp_path / "one.webm"]
    assert len(read_video(tmp_path / "one.webm")[0]) == len(TIMES)
    with pytest.raises(ValueError, match=r"videos are written as \.mp4"):
        restore_files(same, [src], tmp_path / "out.gif.avi")
    loud = write_video(tmp_path / "loud.mp4", shades(16, 16))  # AAC, which WebM does not take
    assert "name the output .mkv" in restore_files(same, [loud], tmp_path / "loud.webm").failed[loud]
