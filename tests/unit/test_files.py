"""A file is whole or as it was."""

from pathlib import Path

import pytest

from shards.files import write_whole

pytestmark = pytest.mark.unit


def test_a_file_is_replaced_whole_and_a_failed_attempt_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "file.txt"
    write_whole(path, "\u00e4 first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]

    def cut_short(part: Path, data: bytes) -> int:
        with part.open("wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", cut_short)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"third")
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]
