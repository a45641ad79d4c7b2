"""Remote shards: fetched whole, checked, and kept on this machine as long as there is room."""

import asyncio
import hashlib
import logging
import os
import tempfile
import time
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import aiohttp
import fsspec
from filelock import FileLock, Timeout

from carrara.errors import MachineError, UserError

_log = logging.getLogger(__name__)

REMOTE = ("http", "https", "s3", "gs")
_TRIES = 6
_FIRST_WAIT = 1.0  # seconds, doubled after every try
_SILENCE = 60  # seconds without a byte
_CHUNK = 1 << 22


def is_remote(path: str) -> bool:
    """Whether it is an address, not a file."""
    return path.partition("://")[0] in REMOTE


class ShardCache:
    """Copies of remote shards in a folder, whole or absent; above `limit` bytes the least recently used go.

    Any number of processes share it. On Linux a copy that goes stays readable to those who have opened it.
    """

    def __init__(self, folder: str | Path, limit: float) -> None:
        self.folder, self.limit = Path(folder) / "shards", limit

    def path(self, url: str) -> Path:
        """Where its copy is, or would be."""
        name = os.path.basename(url.partition("?")[0]) or "shard"
        return self.folder / hashlib.sha256(url.encode()).hexdigest()[:16] / name

    def open(self, url: str, size: int | None = None, sha256: str | None = None) -> BufferedReader:
        """Its copy, opened, from which others that make room cannot take it; see `local`."""
        while True:
            try:
                return self.local(url, size, sha256).open("rb")
            except FileNotFoundError:  # gone in this very moment
                continue

    def local(self, url: str, size: int | None = None, sha256: str | None = None) -> Path:
        """A copy to open, fetched if it is not there.

        Args:
            size, sha256: what it must have; None where nothing is known of it yet.

        Raises:
            UserError: there is none at this address, or another than the known one.
            MachineError: it cannot be fetched now.
        """
        path = self.path(url)
        if not self._is_there(path, size):
            self._fetch(url, path, size, sha256, patience=-1)
        return path

    def prefetch(self, url: str, size: int, sha256: str) -> None:
        """A copy for later, unless somebody else is fetching it. What fails is told when it is opened."""
        path = self.path(url)
        if not self._is_there(path, size):
            with suppress(Timeout, UserError, MachineError, OSError):
                self._fetch(url, path, size, sha256, patience=0)

    def forget(self, url: str) -> None:
        """Its copy goes: what it holds is of no use, and another may be there by now."""
        self.path(url).unlink(missing_ok=True)

    def _fetch(self, url: str, path: Path, size: int | None, sha256: str | None, patience: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / "fetch.lock", timeout=patience):
            for remains in path.parent.glob("*.partial"):  # of a process that was killed
                remains.unlink()
            if not self._is_there(path, size):
                with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as partial:
                    try:
                        found = fetch(url, partial)
                        if sha256 is not None and found != sha256:
                            raise UserError(
                                f"{url} is not the shard that was inspected; python shards.py do=inspect looks again "
                                "where you remove its index"
                            )
                        os.replace(partial.name, path)
                    except BaseException:
                        os.unlink(partial.name)
                        raise
                self._make_room(path)

    def _is_there(self, path: Path, size: int | None) -> bool:
        try:
            if size is not None and path.stat().st_size != size:
                return False
            os.utime(path)  # used now
            return True
        except FileNotFoundError:
            return False

    def _make_room(self, newest: Path) -> None:
        copies = []
        for copy in self.folder.glob("*/*"):
            if copy.suffix not in (".lock", ".partial") and copy != newest:
                try:
                    status = copy.stat()
                except FileNotFoundError:
                    continue
                copies.append((status.st_mtime_ns, status.st_size, copy))
        total = newest.stat().st_size + sum(size for _, size, _ in copies)
        for _, size, copy in sorted(copies):
            if total <= self.limit:
                break
            copy.unlink(missing_ok=True)
            total -= size


def size_of(url: str) -> int | None:
    """Bytes at the address, if it says; for an estimate, so what fails is not told."""
    system, path = _open_system(url)
    with suppress(Exception):  # as many kinds as there are kinds of addresses
        return int(system.info(path)["size"])
    return None


def fetch(url: str, file: IO[bytes]) -> str:
    """The whole of it into the empty `file`; its SHA-256. What fails for the moment is tried again, with patience.

    Raises:
        UserError: nothing is there, or it may not be read.
        MachineError: it still fails after `_TRIES`.
    """
    wait = _FIRST_WAIT
    for attempt in range(1, _TRIES + 1):
        try:
            return _fetch_once(url, file)
        except Exception as error:
            if not _may_pass(error):
                raise UserError(f"cannot read the shard {url}: {_reason(error)}") from None
            if attempt == _TRIES:
                raise MachineError(f"cannot fetch {url} after {attempt} tries: {_reason(error)}") from None
            _log.info("%s: %s; tried again in %g s", url, _reason(error), wait)
        time.sleep(wait)
        wait *= 2
        file.seek(0)
        file.truncate()
    raise AssertionError


def _fetch_once(url: str, file: IO[bytes]) -> str:
    system, path = _open_system(url)
    expected = system.info(path).get("size")
    digest, count = hashlib.sha256(), 0
    options = {"block_size": 0} if url.startswith("http") else {}  # a stream, not a file that seeks
    with system.open(path, "rb", **options) as stream:
        while chunk := stream.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            count += len(chunk)
    if expected is not None and count != expected:
        raise ConnectionError(f"{count} of {expected} bytes came")
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()


def _open_system(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if url.startswith("http"):
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # proxies as for every program
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        scheme = url.partition(":")[0]
        raise UserError(f"{scheme}: addresses need a package: pip install 'carrara[{scheme}]' ({error})") from None


def _may_pass(error: Exception) -> bool:
    """Whether the next try may do better."""
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in (408, 425, 429) or error.status >= 500
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    return isinstance(error, OSError | aiohttp.ClientError | asyncio.TimeoutError | TimeoutError)


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientResponseError):
        return f"{error.status} {error.message}"
    if isinstance(error, FileNotFoundError):
        return "there is nothing at this address"
    return str(error) or type(error).__name__
