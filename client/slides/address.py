"""Addresses of slides: https://, s3:// and the series of a DICOMweb server, where a path is expected."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import Self
from urllib.parse import unquote, urlsplit

from ..errors import SlideError, SlideServerError

TOKENS = "GIGAPATH_SLIDE_TOKENS"
"""Environment variable of the logins to servers of slides: HOST=TOKEN or HOST=USER:PASSWORD, with spaces."""
SCHEMES = ("https", "s3", "http")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_SERIES = re.compile(r"(?P<root>/.*)?/studies/(?P<study>[0-9.]+)/series/(?P<series>[0-9.]+)")
_SECRET = re.compile(r"(?<=/)[^/@]*@|[?#].*", re.DOTALL)
_HOST = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class RemotePath(PosixPath):
    """The address of a slide; it is a path so that everything that takes a slide's path takes it.

    No file of this machine is called so: functions of `os` and `pathlib` find nothing there.
    """

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def absolute(self) -> Self:
        """Itself."""
        return self

    def resolve(self, strict: bool = False) -> Self:
        """Itself."""
        return self

    @property
    def scheme(self) -> str:
        """The part before `://`."""
        return urlsplit(str(self)).scheme

    @property
    def host(self) -> str:
        """Server, with the port where one is given; the bucket of an s3:// address."""
        return urlsplit(str(self)).netloc

    @property
    def key(self) -> str:
        """The file on that server, without percent-encoding; keys of s3:// have none."""
        if self.scheme == "s3":
            return "/".join(self.parts[2:])
        return unquote(urlsplit(str(self)).path.lstrip("/"))

    @property
    def series(self) -> tuple[str, str, str] | None:
        """Address of the DICOMweb service, and the UIDs of study and series; None for a file."""
        found = None if self.scheme == "s3" else _SERIES.fullmatch(urlsplit(str(self)).path)
        if not found:
            return None
        return f"{self.scheme}://{self.host}{found['root'] or ''}", found["study"], found["series"]

    def login(self) -> tuple[str, str] | str | None:
        """User and password, or a bearer token, that the environment holds for this host; None without."""
        entries = (entry.partition("=") for entry in os.environ.get(TOKENS, "").split())
        secret = {host.lower(): secret for host, _, secret in entries}.get(self.host.lower())
        user, colon, password = (secret or "").partition(":")
        return (user, password) if colon else secret

    def refusal(self, reason: str) -> SlideServerError:
        """What to do where a login is wrong or missing."""
        if self.scheme == "s3":
            remedy = (
                "set or renew AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN (a profile's: "
                "aws configure export-credentials), or for a public bucket "
                "AWS_SKIP_SIGNATURE=true"
            )
        elif self.login():
            remedy = f"check what {TOKENS} holds for {self.host}"
        else:
            remedy = f"set {TOKENS}={self.host}=TOKEN, or {self.host}=USER:PASSWORD"
        return SlideServerError(f"{self}: the server refuses access ({reason}): {remedy}")

    def unreachable(self, reason: str) -> SlideServerError:
        """What to do where there is no answer that can be used."""
        return SlideServerError(
            f"{self}: cannot be read ({reason}): check the address and the network, and with a certificate "
            "authority of your own SSL_CERT_FILE"
        )


def slide_path(text: str | Path, folder: Path = Path()) -> Path:
    """A slide's path, in `folder` where it is relative; a `RemotePath` where it is an address.

    Raises:
        SlideError: an address of a kind that is not read.
    """
    found = _ADDRESS.match(str(text))
    if not found:
        return folder / text
    path = RemotePath(text)
    try:
        parts = urlsplit(str(path))
        is_whole = bool(_HOST.fullmatch(path.host)) and (parts.port or 0) >= 0
    except ValueError:
        raise SlideError(f"an address of {found[1]}:// that names no server: correct it") from None
    if parts.username or (path.scheme != "s3" and (parts.query or parts.fragment)):
        raise SlideError(
            f"{path.scheme}://{parts.hostname}: a query or login in an address shows in outputs: give it "
            f"without (logins: {TOKENS}; ? and # of a file's name: %3F and %23)"
        )
    if path.scheme not in SCHEMES:
        raise SlideError(
            f"{path}: {path.scheme}:// is not read: give a file's path, https://, s3:// or download it"
        )
    if path.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise SlideError(
            f"{path}: http:// would show slide and login on the network: give https://, or a tunnel to it on "
            "this machine (http://localhost:PORT)"
        )
    named = path.key.split("/")
    if not (is_whole and path.key) or {".", ".."} & set(named) or _CONTROL.search(path.key):
        raise SlideError(f"{_CONTROL.sub('?', str(path))}: names no file on a server: correct the address")
    return path


def without_secret(text: str) -> str:
    """A text that may be an address, without a login or query in it."""
    return _SECRET.sub("", text) if _ADDRESS.match(text) else text


@contextmanager
def extra_of(path: RemotePath) -> Iterator[None]:
    """Say what to install where the block imports libraries that are not there.

    Raises:
        SlideServerError: the optional extra for addresses of this kind is not installed.
    """
    try:
        yield
    except ImportError:
        extra = "dicomweb" if path.series else "remote"
        raise SlideServerError(
            f"{path}: needs the extra `{extra}`: pip install 'gigapath-triton[{extra}]'"
        ) from None
