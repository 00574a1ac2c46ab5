"""TLS and mutual TLS of what start.sh starts, and of a front: the right certificates, wrong ones, none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.errors import ServerUnavailable
from client.triton.connection import Connection
from client.triton.endpoint import Endpoint
from server.front.proxy import Tls
from tests.support.fronted import fronted

TILE = {"TILES": np.zeros((1, 224, 224, 3), np.uint8)}


@pytest.fixture(scope="module")
def ours(certificates: Callable[[str], Path]) -> Path:
    return certificates("ours")


@pytest.fixture(scope="module")
def strangers(certificates: Callable[[str], Path]) -> Path:
    """Made by the same script, under another root."""
    return certificates("strangers")


@pytest.fixture(scope="module", params=["triton", "front"])
def at(
    request: pytest.FixtureRequest, deploy: Callable[..., Any], deployment: Any, ours: Path
) -> Iterator[Callable[[Tls], str]]:
    """The address of a server, or of a front before one, with the given TLS."""
    certs = ours / "server"
    with ExitStack() as running:

        def serve(tls: Tls) -> str:
            if request.param == "front":
                return running.enter_context(fronted(deployment.url, tls=tls, certs=certs))
            url: str = deploy(TLS=tls, CERTS=str(certs)).url
            return url

        yield serve


@pytest.fixture(scope="module")
def tls(at: Callable[[Tls], str]) -> str:
    return at("server")


@pytest.fixture(scope="module")
def mutual(at: Callable[[Tls], str]) -> str:
    return at("mutual")


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
