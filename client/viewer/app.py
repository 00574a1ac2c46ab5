"""The viewer's server: the page, the slides' tiles and what is stored of them."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from gigapath_contract.command_line import explain
from gigapath_contract.errors import ContractError

from ..errors import ClientError
from ..triton.connection import Connection
from .ask import Asker, answer
from .contents import describe, limits, summary
from .library import Entry, Library
from .neighbours import nearest
from .safety import Guard

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
OPENSEADRAGON = PAGE / "openseadragon" / "openseadragon.min.js"
KEEP = {"Cache-Control": "private, max-age=3600"}


def create_app(library: Library, asker: Asker | None = None, *, token: str | None = None) -> Starlette:
    """The ASGI application that shows a library; with a `token` to those who have it.

    asker: the served model that answers questions; None: there is none.
    """
    view = _View(library, asker)
    return Starlette(
        routes=[
            Route("/", view.page),
            Mount("/page", StaticFiles(directory=PAGE)),
            Route("/api/slides", view.slides),
            Route("/api/limits", view.limits),
            Route("/api/slides/{key}", view.slide),
            Route("/api/slides/{key}/neighbours/{row:int}", view.neighbours),
            Route("/api/slides/{key}/ask", view.ask, methods=["POST"]),
            Route("/api/server", view.server),
            Route("/slides/{key}_files/{level:int}/{column:int}_{row:int}.jpeg", view.tile),
            Route("/slides/{key}/maps/{x:int}_{y:int}.png", view.tile_map),
        ],
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={ClientError: _failed, ContractError: _failed, OSError: _failed},
    )


class _View:
    """The answers; Starlette calls the plain functions in threads."""

    def __init__(self, library: Library, asker: Asker | None) -> None:
        self._library = library
        self._asker = asker
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}

    def page(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    def slides(self, request: Request) -> Response:
        return JSONResponse([summary(entry) for entry in self._read().values()])

    def limits(self, request: Request) -> Response:
        return JSONResponse(limits(self._library))

    def slide(self, request: Request) -> Response:
        return JSONResponse(describe(self._library, self._entry(request)))

    def neighbours(self, request: Request) -> Response:
        entry = self._entry(request)
        everywhere = request.query_params.get("everywhere") == "1"
        among = list(self._read().values()) if everywhere else [entry]
        return JSONResponse(nearest(self._library, entry, request.path_params["row"], among))

    def server(self, request: Request) -> Response:
        return JSONResponse(self._asker.server() if self._asker else {"error": "no server was named"})

    async def ask(self, request: Request) -> Response:
        """Ask the model; the question is taken back when the page goes away."""
        if request.headers.get("content-type") != "application/json":  # another site could send the rest
            raise HTTPException(415)
        try:
            question = await request.json()
        except ValueError:
            raise HTTPException(400) from None
        entry = self._entry(request)
        bank = self._entries.get(str(question.get("bank"))) if isinstance(question, dict) else None
        if self._asker is None:
            raise ClientError("no server was named, so the model cannot be asked: give --url")
        with self._asker.connect() as connection:
            watching = asyncio.create_task(_cancel_when_gone(request, connection))
            try:
                return JSONResponse(await run_in_threadpool(answer, connection, entry, question, bank))
            finally:
                watching.cancel()

    def tile(self, request: Request) -> Response:
        at = request.path_params
        jpeg = self._library.open(self._entry(request)).read(at["level"], at["column"], at["row"])
        if jpeg is None:
            raise HTTPException(404)
        return Response(jpeg, media_type="image/jpeg", headers=KEEP)

    def tile_map(self, request: Request) -> Response:
        at = request.path_params
        path = self._library.tile_maps(self._entry(request)).get((at["x"], at["y"]))
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, media_type="image/png")

    def _entry(self, request: Request) -> Entry:
        """The slide that an address names; only what the folders hold can be named."""
        key = request.path_params["key"]
        entry = self._entries.get(key) or self._read().get(key)
        if entry is None:
            raise HTTPException(404, f"no slide {key!r} in the folders that are shown")
        return entry

    def _read(self) -> dict[str, Entry]:
        with self._lock:
            self._entries = self._library.entries()
            return self._entries


async def _cancel_when_gone(request: Request, connection: Connection) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    connection.cancel()


def _failed(request: Request, error: Exception) -> Response:
    """A broken file is one line in the log and a message on the page."""
    logger.warning("%s: %s", request.url.path, explain(error))
    return JSONResponse({"error": explain(error)}, 422)
