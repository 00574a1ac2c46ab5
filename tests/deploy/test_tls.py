"""TLS and mutual TLS of a server started by start.sh: the right certificates, wrong ones and none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.errors import ServerUnavailable
from client.triton.connection import Connection
from client.triton.endpoint import Endpoint

TILE = {"TILES": np.zeros((1, 224, 224, 3), np.uint8)}


@pytest.fixture(scope="module")
def ours(certificates: Callable[[str], Path]) -> Path:
    return certificates("ours")


@pytest.fixture(scope="module")
def strangers(certificates: Callable[[str], Path]) -> Path:
    """Made by the same script, under another root."""
    return certificates("strangers")


@pytest.fixture(scope="module")
def tls(deploy: Callable[..., Any], ours: Path) -> str:
    url: str = deploy(TLS="server", CERTS=str(ours / "server")).url
    return url


@pytest.fixture(scope="module")
def mutual(deploy: Callable[..., Any], ours: Path) -> str:
    url: str = deploy(TLS="mutual", CERTS=str(ours / "server")).url
    return url


def embed(url: str, ca: Path | None = None, identity: Path | None = None) -> tuple[int, ...]:
    """The shape of a tile's embedding from a server; `identity` holds a client's certificate."""
    cert, key = (identity and identity / "client" / f"tls.{end}" for end in ("crt", "key"))
    endpoint = Endpoint(url, tls_ca=ca, tls_cert=cert, tls_key=key, timeout=30, retry_for=0)
    with Connection(endpoint) as connection:
        return connection.infer("tile_encoder", TILE, ["EMBEDDINGS"])["EMBEDDINGS"].shape


def test_tls_with_the_right_root(tls: str, ours: Path) -> None:
    assert embed(tls, ours / "client" / "ca.crt")[0] == 1


def test_tls_holds_for_the_name_too(tls: str, ours: Path) -> None:
    assert embed(tls.replace("127.0.0.1", "localhost"), ours / "client" / "ca.crt")[0] == 1


def test_tls_with_a_wrong_root(tls: str, strangers: Path) -> None:
    with pytest.raises(ServerUnavailable, match="with this TLS"):
        embed(tls, strangers / "client" / "ca.crt")


def test_tls_refuses_plain_text(tls: str) -> None:
    with pytest.raises(ServerUnavailable):
        embed(tls)


def test_plain_text_refuses_tls(deployment: Any, ours: Path) -> None:
    with pytest.raises(ServerUnavailable, match="with this TLS"):
        embed(deployment.url, ours / "client" / "ca.crt")


def test_mutual_tls_with_the_right_certificate(mutual: str, ours: Path) -> None:
    assert embed(mutual, ours / "client" / "ca.crt", identity=ours)[0] == 1


def test_mutual_tls_with_a_strangers_certificate(mutual: str, ours: Path, strangers: Path) -> None:
    with pytest.raises(ServerUnavailable):
        embed(mutual, ours / "client" / "ca.crt", identity=strangers)


def test_mutual_tls_without_a_certificate(mutual: str, ours: Path) -> None:
    with pytest.raises(ServerUnavailable):
        embed(mutual, ours / "client" / "ca.crt")


def test_each_side_has_its_own_key_and_nobody_the_roots(ours: Path) -> None:
    keys = {path.relative_to(ours).as_posix(): path for path in ours.rglob("*.key")}
    assert set(keys) == {"server/tls.key", "client/tls.key"}
    assert keys["server/tls.key"].read_bytes() != keys["client/tls.key"].read_bytes()
    assert all(path.stat().st_mode & 0o077 == 0 for path in keys.values())
