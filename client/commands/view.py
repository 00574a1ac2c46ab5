"""`client view`: slides, tiles and maps in the browser."""

from __future__ import annotations

import importlib.util
import logging
import secrets
import socket
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ClientError
from ..triton.endpoint import Endpoint
from ..viewer.library import Entry, Library
from . import options

LOOPBACK = "127.0.0.1"


@options.shares(endpoint=options.endpoint)
def command(
    out: Annotated[
        list[Path], typer.Argument(help="The --out folders of score or batch.", show_default=False)
    ],
    endpoint: Endpoint,
    slide: Annotated[
        Path | None,
        typer.Option(
            callback=options.existing_slide,
            help="The slide's file or address, where the folder holds one slide.",
        ),
    ] = None,
    wsi_dir: Annotated[
        Path | None,
        typer.Option(
            "--wsi-dir",
            "--wsi_dir",
            callback=options.existing,
            help="Folder of the slides [default: where they were scored].",
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            callback=options.existing, help="Your own GeoJSON: a file, or a folder with SLIDE_ID.geojson."
        ),
    ] = None,
    mask_frame: options.MaskFrame = "qupath",
    export: Annotated[
        Path | None,
        typer.Option(help="Write a static page into this folder instead, for a web host or a disk."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but the default needs the token that is printed.")
    ] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8420,
) -> None:
    """Show slides, tiles and maps in the browser, until Ctrl-C; with a server, ask it about areas.

    Example: `gigapath-client view out`
    """
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise ClientError("the viewer needs the extra `view`: pip install 'gigapath-triton[view]'")
    # Web server and matplotlib: not for `--help`, errors and other commands.
    import uvicorn

    from ..viewer.app import OPENSEADRAGON, create_app
    from ..viewer.ask import Asker
    from ..viewer.export import export_page

    if not OPENSEADRAGON.is_file():
        raise ClientError(
            f"OpenSeadragon is missing ({OPENSEADRAGON}): in a checkout run `make viewer`; elsewhere install "
            "a wheel that `make wheel` built"
        )
    library = Library(tuple(out), slide, wsi_dir, annotations, mask_frame)
    entries = library.entries()
    if slide is not None and len(entries) != 1:
        raise ClientError(f"--slide is the file of one slide, but there are {len(entries)}: give --wsi-dir")
    if export is not None:
        with options.console.status(f"writing {export}"):
            export_page(library, export)
        typer.echo(f"{counted(entries)}: open {export / 'index.html'}")
        return
    token = None if host == LOOPBACK else secrets.token_urlsafe(16)
    with _listening(host, port) as listening:
        where = f"http://{host}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
        typer.echo(f"{counted(entries)} at {where} until Ctrl-C")
        app = create_app(library, Asker(endpoint), token=token)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
        )
        uvicorn.Server(config).run(sockets=[listening])


def counted(entries: dict[str, Entry]) -> str:
    """How many slides there are, and how many results where several exports have scored them."""
    slides = len({entry.slide_id for entry in entries.values()})
    return f"{slides} slides" + (f", {len(entries)} results" if len(entries) > slides else "")


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ClientError: the port is taken, or the address is not this machine's.
    """
    try:
        return socket.create_server((host, port))
    except OSError as error:
        reason = error.strerror or error
        raise ClientError(f"cannot listen on {host}:{port} ({reason}): choose another --port") from None
