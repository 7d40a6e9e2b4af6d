"""Data sets that lie elsewhere: a file from the URL of its folder, whole and verified, or an error that says why not.

Where a data set may lie:
    DIR or file:///DIR            a folder here, which is read in place
    http://..., https://...       with curl; a query is kept behind the name of each file. Keys belong in
                                  ~/.netrc, which curl reads: a URL is written into the records of a run
    s3://BUCKET/PREFIX            with the AWS command line tool and its credentials
    pipe:COMMAND with {}          whatever a shell command writes, {} being the name of the file, for example
                                  `pipe:ssh host cat /data/rain/{}`; webdataset's form. Nothing else meets a shell
    hf://..., gs://..., ...       with webdataset's own openers
"""

import hashlib
import io
import logging
import random
import re
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from shards.schema import ShardError

logger = logging.getLogger(__name__)

PAUSES_S = (0.5, 1, 2, 4, 8, 16, 32)
"""Between tries, give or take half, so that many ranks do not come back at the same moment."""
_CHUNK = 2**20
# webdataset's own curl waits a minute at each error 500, and for ever on a server gone silent; s3 it does not know.
_CURL = (
    "curl", "--fail", "--silent", "--show-error", "--location", "--globoff", "--netrc-optional",
    "--connect-timeout", "30", "--speed-limit", "1000", "--speed-time", "60",
)  # fmt: skip
_HOPELESS = re.compile(r"returned error: 4(?!08|29)\d\d")  # not there, or not for us: trying again changes nothing


class _TransferError(Exception):
    """One try failed."""

    def __init__(self, message: str, *, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


def locate(where: str | Path) -> Path | str:
    """A folder of this machine as a Path, anything else as the URL it is.

    Raises:
        ValueError: a command without {}.
    """
    if isinstance(where, Path):
        return where
    scheme, colon, rest = where.partition(":")
    if scheme == "pipe" and colon and "{}" not in rest:
        raise ValueError(f"{where}: write {{}} where the command takes the name of a file: 'pipe:cat /data/rain/{{}}'")
    if scheme == "file" and rest.startswith("//"):
        return Path(url2pathname(urlparse(where).path))
    return where if (scheme == "pipe" and colon) or rest.startswith("//") else Path(where)


def here(where: str | Path) -> Path:
    """A folder of this machine, for those who read all of it, or write.

    Raises:
        ValueError: a URL.
    """
    place = locate(where)
    if isinstance(place, str):
        raise ValueError(f"{where} is a URL, which only a run reads: name a folder of this machine, and copy it")
    return place


def file_url(folder: str, name: str) -> str:
    """The URL of a file in a folder that `locate` gave as a URL."""
    if folder.startswith("pipe:"):
        return folder.replace("{}", name)
    path, mark, query = folder.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def fetch(url: str, file: IO[bytes], *, size: int | None = None, sha256: str | None = None) -> None:
    """Copy what lies at a URL to an open file, from its beginning, trying again for about a minute.

    Args:
        url: of one file.
        file: what it holds is overwritten; if `size` is given it may have that size already, and keeps it.
        size: bytes it must have.
        sha256: what they must hash to. None: anything is taken that the transfer itself calls whole.

    Raises:
        ShardError: it is not there, cannot be fetched, or is not what it should be.
        ValueError: webdataset knows no such URL.
        OSError: the file cannot be written.
    """
    for tries, pause_s in enumerate((*PAUSES_S, None), 1):
        try:
            return _transfer(url, file, size=size, sha256=sha256)
        except _TransferError as error:
            if pause_s is None or error.hopeless:
                times = f" (tried {tries} times)" if tries > 1 else ""
                raise ShardError(
                    f"could not be fetched{times}: {error}. See whether the whole data set lies there and this "
                    "machine may read it, then start again",
                    url=url,
                ) from None
            logger.warning("%s: %s; trying again", url, error)
            time.sleep(pause_s * random.uniform(0.5, 1.5))


def fetch_bytes(url: str, *, sha256: str | None = None) -> bytes:
    """A small file, as `fetch`."""
    file = io.BytesIO()
    fetch(url, file, sha256=sha256)
    return file.getvalue()


def _transfer(url: str, file: IO[bytes], *, size: int | None, sha256: str | None) -> None:
    """One try."""
    file.seek(0)
    received, digest = 0, hashlib.sha256()
    with closing(_chunks(url, verified=sha256 is not None)) as chunks:
        for chunk in chunks:
            received += len(chunk)
            if size is not None and received > size:
                break
            digest.update(chunk)
            file.write(chunk)
    if size is None:
        file.truncate()
    file.flush()
    if size is not None and received != size:
        raise _TransferError(f"{received if received < size else 'more'} bytes came instead of {size}")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise _TransferError("other bytes came than those that its manifest tells of (sha256 differs)")


def _chunks(url: str, *, verified: bool) -> Generator[bytes, None, None]:
    """What comes; a sender that fails is an error, the wish to hear no more is none."""
    from webdataset.gopen import set_options  # pulls in torch, which takes seconds

    with tempfile.TemporaryFile() as complaints:
        with _opened(url, complaints, verified=verified) as stream:
            set_options(stream, ignore_errors=True)  # judged below, with what the sender itself says
            try:
                while chunk := stream.read(_CHUNK):
                    yield chunk
            except OSError as error:
                raise _TransferError(str(error)) from error
        if status := getattr(stream, "status", 0):
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip() or f"its command ended with status {status}"
            raise _TransferError(said, hopeless=bool(_HOPELESS.search(said)))


def _opened(url: str, complaints: IO[bytes], *, verified: bool) -> Any:
    from webdataset.gopen import Pipe, gopen

    scheme = url.partition(":")[0]
    if scheme in ("http", "https"):
        # What nothing verifies, the manifest, must not come from a proxy's cache.
        command = [*_CURL, *([] if verified else ["--header", "Cache-Control: no-cache"]), url]
    elif scheme == "s3":
        command = ["aws", "s3", "cp", "--only-show-errors", url, "-"]
    else:
        try:
            return gopen(url)
        except ValueError as error:
            raise ValueError(f"{error}. A data set is a folder, http(s)://, s3:// or pipe:COMMAND with {{}}") from error
    try:
        return Pipe(command, mode="r", stderr=complaints)
    except FileNotFoundError as error:
        raise _TransferError(f"the program {command[0]} is missing here: install it", hopeless=True) from error
