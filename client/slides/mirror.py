"""Files at https:// and s3://, read in parts: the bytes that were asked for lie in a bounded cache on disk.

A mirror is a sparse file of the remote one's size, in which the blocks that were fetched are filled. A
library that takes local files alone can read it, once what it will read has been fetched.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary, finalize

import numpy as np
import obstore
from obstore import exceptions
from obstore.store import HTTPStore, S3Store

from ..errors import SlideServerError
from .address import RemotePath

if TYPE_CHECKING:  # what exists in obstore's stubs alone
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

CACHE, CACHE_GB = "GIGAPATH_SLIDE_CACHE", "GIGAPATH_SLIDE_CACHE_GB"
"""Environment variables of the cache's folder, and of its size in gigabytes."""
_CACHE_GB = 20.0
_BLOCK = 1 << 16  # what is fetched at least: some stored tiles that follow each other in the file
_BLOCKS = ".blocks"
_MIRRORS = re.compile(rf"[0-9a-f]{{64}}{re.escape(_BLOCKS)}")  # in a folder that may hold other things
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
_STATUS = re.compile(r"status code: (\d{3})")
_REQUEST = 1 << 22  # ... and at most in one request
_ROOM = 1 << 26  # bytes that are fetched at most, before the cache's size is looked at again
_RETRIES: RetryConfig = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
_TIMEOUTS: ClientConfig = {"timeout": "120s", "connect_timeout": "10s"}


@dataclass(frozen=True)
class Version:
    """A remote file as it is now: its size in bytes, and its ETag, or else the time of its last change."""

    path: RemotePath
    size: int
    mark: str

    @property
    def sha256(self) -> str:
        """The digest of address, size and mark. The content is not read for it."""
        return hashlib.sha256(repr((str(self.path), self.size, self.mark)).encode()).hexdigest()


def find_version(path: RemotePath) -> Version:
    """Ask the server about a file.

    Raises:
        SlideServerError: there is none, or the server refuses it, can't be reached or names no version.
    """
    with _errors(path):
        version = _version(path, obstore.head(_store(path), path.key))
    if not version.mark:
        raise SlideServerError(
            f"{path}: its server sends neither ETag nor Last-Modified, so no change would show: download it"
        )
    return version


def _version(path: RemotePath, found: ObjectMeta) -> Version:
    changed = found["last_modified"]
    mark = found["e_tag"] or (changed.isoformat() if changed.timestamp() > 0 else "")
    return Version(path, found["size"], mark)


class Mirror:
    """The sparse copy of one version of a remote file, for all threads; in use as long as it is referred to.

    Attributes:
        path: the sparse file.
        size: of the whole file, bytes.
    """

    def __init__(self, version: Version) -> None:
        self.version, self.size = version, version.size
        folder = _cache_folder() / version.sha256
        self.path, blocks = folder / version.path.name, folder.with_suffix(_BLOCKS)
        with _disk_errors(folder.parent):
            self._sums = _lock(blocks)  # a checksum of every block that was fetched
            finalize(self, os.close, self._sums)
            folder.mkdir(0o700, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            finalize(self, os.close, self._file)
            os.truncate(self._file, self.size)
            os.utime(self._sums)
            self._there = np.zeros(1 + self.size // _BLOCK, np.bool_)  # as this process knows

    def fetch(self, starts: Iterable[int], lengths: Iterable[int]) -> None:
        """Have the bytes of all ranges in the sparse file.

        Raises:
            SlideServerError: they can't be fetched or kept.
        """
        wanted = {
            block
            for start, length in zip(starts, lengths, strict=True)
            for block in range(start // _BLOCK, -(-min(start + length, self.size) // _BLOCK))
            if not (self._there[block] or self._was_fetched(block))
        }
        for first, last in _runs(sorted(wanted)):
            self._download(first, last)

    def fetch_all(self) -> None:
        """Have the whole file.

        Raises:
            SlideServerError: see `fetch`.
        """
        self.fetch([0], [self.size])

    def open(self) -> io.BufferedReader:
        """The whole file for reading; what is read is fetched."""
        return io.BufferedReader(_Reader(self), _BLOCK)

    def _was_fetched(self, block: int) -> bool:
        """Whether the block is there since another process or run; what a crash left behind is not."""
        kept = os.pread(self._sums, 4, 4 * block)
        self._there[block] = any(kept) and kept == _sum(os.pread(self._file, _BLOCK, block * _BLOCK))
        return bool(self._there[block])

    def _download(self, first: int, last: int) -> None:
        path, begin, end = self.version.path, first * _BLOCK, min(last * _BLOCK, self.size)
        options: GetOptions = {"range": (begin, end)}
        with _room_in(self.path.parents[1]).reserved(self.path.parent, end - begin):
            with _errors(path):
                answer = obstore.get(_store(path), path.key, options=options)
                if _version(path, answer.meta) != self.version:
                    raise SlideServerError(f"{path}: was replaced while it was read: run again")
                data = bytes(answer.bytes())
            if len(data) != end - begin:
                raise SlideServerError(
                    f"{path}: the server sent {len(data)} of {end - begin} bytes: try again"
                )
            with _disk_errors(self.path.parents[1]):
                _write(self._file, data, begin)
                sums = [_sum(data[start : start + _BLOCK]) for start in range(0, len(data), _BLOCK)]
                _write(self._sums, b"".join(sums), 4 * first)
        self._there[first:last] = True


class _Reader(io.RawIOBase):
    """A mirror as Python's file object."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror, self._place = mirror, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._mirror.size}[whence]
        )
        return self._place

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._mirror.size - self._place))
        self._mirror.fetch([self._place], [length])
        buffer[:length] = os.pread(self._mirror._file, length, self._place)
        self._place += length
        return length


_mirrors: WeakValueDictionary[Version, Mirror] = WeakValueDictionary()
_opening = threading.Lock()


def open_mirror(path: RemotePath) -> Mirror:
    """The mirror of a file's present version.

    Raises:
        SlideServerError: see `find_version`; the cache's folder can't be written.
    """
    version = find_version(path)
    with _opening:
        mirror = _mirrors.get(version)
        if mirror is None:
            mirror = _mirrors[version] = Mirror(version)
        return mirror


def _sum(block: bytes) -> bytes:
    """Four bytes, not all 0."""
    return (zlib.crc32(block) or 1).to_bytes(4)


def _write(file: int, data: bytes, place: int) -> None:
    if os.pwrite(file, data, place) < len(data):  # the rest did not fit
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _store(path: RemotePath) -> HTTPStore | S3Store:
    endpoints = (os.environ.get(name) for name in _ENDPOINTS)
    endpoint = next(filter(None, endpoints), "") if path.scheme == "s3" else ""
    if endpoint and not re.match("https?://" if _allows_http() else "https://", endpoint):
        raise SlideServerError(
            f"{path}: the endpoint {endpoint} is not https://: correct {_ENDPOINTS[0]}, or for http:// in a "
            "closed network set AWS_ALLOW_HTTP=true"
        )
    return _opened(path.scheme, path.host, path.login())


def _allows_http() -> bool:
    return os.environ.get("AWS_ALLOW_HTTP") == "true"


@lru_cache(64)
def _opened(scheme: str, host: str, login: tuple[str, str] | str | None) -> HTTPStore | S3Store:
    if scheme == "s3":
        options: ClientConfig = {**_TIMEOUTS, "allow_http": _allows_http()}
        return S3Store(host, client_options=options, retry_config=_RETRIES)
    headers = {}
    if login:
        basic = "Basic " + base64.b64encode(":".join(login).encode()).decode()
        headers["Authorization"] = f"Bearer {login}" if isinstance(login, str) else basic
    options = {**_TIMEOUTS, "allow_http": scheme == "http", "default_headers": headers}
    return HTTPStore.from_url(f"{scheme}://{host}", client_options=options, retry_config=_RETRIES)


@contextmanager
def _errors(path: RemotePath) -> Iterator[None]:
    """What obstore raises, as one line."""
    try:
        yield
    except FileNotFoundError:
        raise SlideServerError(f"{path}: no such file on the server: check the address") from None
    except exceptions.UnauthenticatedError:
        raise path.refusal("401") from None
    except exceptions.PermissionDeniedError:
        raise path.refusal("403") from None
    except exceptions.NotSupportedError:
        raise SlideServerError(f"{path}: its server does not send parts of files: download it") from None
    except exceptions.BaseError as error:
        raise _explained(path, str(error)) from None


def _explained(path: RemotePath, message: str) -> SlideServerError:
    """What to do about another message of obstore's, without an answer's body: S3's may hold a token."""
    if path.scheme == "s3" and "/latest/api/token" in message:  # as a virtual machine would ask for them
        return path.refusal("no credentials found")
    if path.scheme == "s3" and "<Code>ExpiredToken" in message:
        return path.refusal("expired token")
    if path.scheme == "s3" and "configured region" in message:
        return SlideServerError(f"{path}: its bucket lies in another region: set AWS_REGION to that")
    status = _STATUS.search(message)
    return path.unreachable(f"answer {status[1]}" if status else message.partition("\n")[0].strip())


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SlideServerError(
            f"cannot keep what is read of a slide in {path} ({error.strerror}): free some space, or set "
            f"{CACHE} to another folder"
        ) from None


def _runs(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of consecutive blocks, each for one request."""
    parts = np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1) if blocks else []
    for part in parts:
        for first in range(int(part[0]), int(part[-1]) + 1, _REQUEST // _BLOCK):
            yield first, min(first + _REQUEST // _BLOCK, int(part[-1]) + 1)


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(CACHE) or base / "gigapath-client" / "slides")


def _limit() -> float:
    text = os.environ.get(CACHE_GB) or str(_CACHE_GB)
    try:
        if (size := float(text)) > 0:
            return size * 1e9
    except ValueError:
        pass
    raise SlideServerError(f"{CACHE_GB}={text} is no number of gigabytes: correct it")


def _lock(blocks: Path) -> int:
    """Open the file of a mirror's blocks, locked so that nobody removes the mirror."""
    while True:
        blocks.parent.mkdir(0o700, parents=True, exist_ok=True)
        lock = os.open(blocks, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_SH)
        if os.fstat(lock).st_nlink:  # else it was removed in between
            return lock
        os.close(lock)


class _Room:
    """The room that this process may still fill in a cache folder; other processes have theirs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._left = 0  # bytes that may be fetched before the cache's size is looked at again
        self._in_flight = 0  # bytes that are being fetched, so not yet on disk

    @contextmanager
    def reserved(self, keep: Path, size: int) -> Iterator[None]:
        """Have room for what the block writes into the mirror `keep`.

        Raises:
            SlideServerError: what is being read does not fit.
        """
        with self._lock:
            if self._left < size:
                with _disk_errors(self._folder):
                    self._left = size + _make_room(keep, self._in_flight + size)
            self._left -= size
            self._in_flight += size
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= size


_room_in = lru_cache(_Room)


def _make_room(keep: Path, needed: int) -> int:
    """Remove mirrors that nobody reads, the oldest first, until `needed` bytes fit; how many more then do."""
    limit = _limit()
    sizes = {
        blocks: _used(blocks.with_suffix(""))
        for blocks in keep.parent.iterdir()
        if _MIRRORS.fullmatch(blocks.name)
    }
    total = sum(sizes.values()) + needed
    for blocks in sorted(sizes, key=_time):
        if total <= limit:
            break
        if blocks.with_suffix("") != keep and _remove(blocks):
            total -= sizes[blocks]
    if total > limit:
        raise SlideServerError(
            f"{keep.parent}: {limit / 1e9:g} GB do not hold what is read at once: set {CACHE_GB} higher, or "
            "read fewer slides at a time"
        )
    return int(min(limit - total, _ROOM))


def _remove(blocks: Path) -> bool:
    """Remove a mirror, unless it is in use."""
    try:
        with blocks.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_nlink:  # else another process did, and may have begun a new one
                shutil.rmtree(blocks.with_suffix(""), ignore_errors=True)
                blocks.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def _used(folder: Path) -> int:
    """Bytes that a mirror takes on disk."""
    with contextlib.suppress(FileNotFoundError):  # removed by another process
        return sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    return 0


def _time(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0
