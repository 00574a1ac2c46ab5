"""What the viewer's tests share: results to show, a browser, and requests to the server without a network."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from starlette.types import ASGIApp, Message

from benchmarks.browser import open_browser
from client.attribution.attribute import Settings
from client.attribution.explain import explain
from client.attribution.model.embedded import read_embedded
from client.attribution.model.served import ServedForward
from client.attribution.render.files import write_explanation
from client.errors import ClientError
from client.outputs.store import SingleFile, score_to
from client.scoring.score import SlideSource
from client.triton.connection import Connection
from client.viewer.app import OPENSEADRAGON
from gigapath_contract.schema import Contract
from tests.support.pyramid import write_pyramid

TILE = 512  # level-0 px of a tile on the slide at 0.25 mpp
BLACK = (1, 1)  # column and row of its black tile


@dataclass(frozen=True)
class Answer:
    """What the server answered."""

    status: int
    headers: dict[str, str]
    body: bytes


def send(
    app: ASGIApp,
    path: str,
    *,
    query: str = "",
    method: str = "GET",
    body: bytes = b"",
    gone_after: float | None = None,
    **headers: str,
) -> Answer:
    """One request straight to an ASGI application; `gone_after`: seconds until who asked is gone."""
    sent: list[Message] = []
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    named = {"host": "127.0.0.1:8420", **headers}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()],
    }

    async def receive() -> Message:
        if requests:
            return requests.pop()
        if gone_after is None:
            await asyncio.Event().wait()
        await asyncio.sleep(gone_after or 0)
        return {"type": "http.disconnect"}

    async def take(message: Message) -> None:
        sent.append(message)

    async def answer() -> None:
        await app(scope, receive, take)

    asyncio.run(answer())
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))


@pytest.fixture(scope="session")
def explained(
    real_slide: Path, connection: Connection, contract: Contract, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What `score` and `attribute` write for the real slide, as in the demo; read only."""
    out = tmp_path_factory.mktemp("explained")
    score_to(SingleFile(out), SlideSource(real_slide), connection, contract)
    h5 = out / f"{real_slide.stem}.h5"
    forward = ServedForward(connection, contract)
    explanation = explain(read_embedded(h5), forward, contract, Settings(max_evals=100))
    write_explanation(explanation, h5, out, None)
    return out


@pytest.fixture(scope="session")
def coarse(
    picture: NDArray[np.uint8],
    connection: Connection,
    contract: Contract,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A pyramid at 0.25 mpp scored by mask at 0.5: one tile is black, and it alone has a value in its map."""
    folder = tmp_path_factory.mktemp("coarse")
    pixels = picture[600:2400, 100:2148].copy()
    for rim, shade in ((40, 255), (0, 0)):
        rows, columns = (slice(at * TILE - rim, (at + 1) * TILE + rim) for at in BLACK[::-1])
        pixels[rows, columns] = shade
    slide = write_pyramid(folder / "coarse.tif", pixels, mpp=0.25, levels=(1, 4), quality=95)
    mask = folder / "mask.geojson"
    mask.write_text(
        json.dumps(
            {"type": "Feature", "geometry": shapely.geometry.mapping(shapely.box(300, 100, 2000, 1700))}
        )
    )
    out = folder / "out"
    score_to(SingleFile(out), SlideSource(slide, mask=mask), connection, contract)
    with h5py.File(out / "coarse.h5", "a") as file:
        values = np.full((len(file["coords"]), 2), np.nan)
        values[(file["coords"][:] == np.array(BLACK) * TILE).all(axis=1)] = (-1, 1)
        file["attribution_occlusion"] = values
        file["attribution_occlusion"].attrs["classes"] = ["benign", "lesion"]
    return out


@pytest.fixture(scope="session")
def serve() -> Callable[..., AbstractContextManager[str]]:
    """`with serve(OUT, …) as address`: the command `client view` in a process, ended by Ctrl-C."""

    @contextmanager
    def run(*arguments: object) -> Iterator[str]:
        assert OPENSEADRAGON.is_file(), f"{OPENSEADRAGON} is missing: run `make viewer`"
        command = [sys.executable, "-m", "client", "view", "--port", "0", *map(str, arguments)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout
            try:
                line = process.stdout.readline()
                assert " at http" in line, process.communicate()[1]
                yield line.split(" at ")[1].split(" until")[0]
            finally:
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=120)
            assert process.returncode == 130
            assert "Traceback" not in errors

    return run


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's chromium, see `benchmarks.browser`."""
    try:
        driver = open_browser()
    except ClientError as error:
        pytest.skip(str(error))
    yield driver
    driver.quit()
