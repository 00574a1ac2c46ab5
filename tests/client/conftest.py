"""What the client's tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from client.cli import main
from client.connection import Connection
from client.contract import Contract, read_contract
from client.endpoint import Endpoint


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run_client(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run_client("score", path, …)` runs the command line in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["client", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        written = capsys.readouterr()
        code = end.value.code
        return Outcome(code if isinstance(code, int) else 0, written.out, written.err)

    return run


@pytest.fixture(scope="session")
def connection(triton_url: str) -> Iterator[Connection]:
    """An open connection to the demo server."""
    with Connection(Endpoint(triton_url, retry_for=2)) as opened:
        yield opened


@pytest.fixture(scope="session")
def contract(connection: Connection) -> Contract:
    """The demo server's contract."""
    return read_contract(connection)


@pytest.fixture(scope="session")
def slides(real_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real slide under three names; read only."""
    folder = tmp_path_factory.mktemp("slides")
    for name in ("a", "b", "c"):
        (folder / f"{name}.svs").symlink_to(real_slide)
    return folder
