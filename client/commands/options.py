"""Options that several commands share, and the decorator that gives them to a command."""

from __future__ import annotations

import functools
import inspect
import math
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gigapath_contract.files import NO_SUCH

from ..errors import ClientError
from ..scoring.embedding import Throughput
from ..scoring.score import TilingOptions
from ..slides.address import RemotePath, slide_path
from ..slides.geojson import Frame
from ..triton.endpoint import DEFAULT_URL, Endpoint

# Progress and log lines share it, so that neither overwrites the other; results go to stdout.
console = Console(stderr=True)


def finite(value: float | None) -> float | None:
    """A number from the command line; nan lies between all bounds, so they don't refuse it."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("not a finite number")
    return value


def existing(path: Path | None) -> Path | None:
    """A file or folder from the command line to read from, which must exist."""
    if path is not None and not path.exists():
        raise typer.BadParameter(f"{path}: {NO_SUCH}")
    return path


def address(path: Path | None) -> Path | None:
    """A slide's path from the command line, which is an address where it begins with https:// or s3://."""
    return path and slide_path(path)


def existing_slide(path: Path | None) -> Path | None:
    """The same, where what is no address must exist."""
    slide = address(path)
    return slide if isinstance(slide, RemotePath) else existing(slide)


WsiDir = Annotated[
    Path | None,
    typer.Option(
        "--wsi-dir",
        "--wsi_dir",
        callback=existing,
        help="Folder of a manifest's slides [default: the manifest's].",
    ),
]

TileSize = Annotated[
    int | None,
    typer.Option(min=1, help="Side of the tiles in level-0 px, where the H5 file lacks it (CLAM's)."),
]
Mpp = Annotated[
    float | None,
    typer.Option(
        callback=finite,
        help="Microns per level-0 pixel, where the slide or the H5 file lacks them (STAMP's).",
    ),
]

PatchTokens = Annotated[
    bool,
    typer.Option(
        "--patch-tokens",
        help="Store every patch's token too, in another pass over the slide: with ViT-g 0.6 MB per tile.",
    ),
]

_server, _speed, _tiles = (
    functools.partial(typer.Option, rich_help_panel=panel) for panel in ("Server", "Speed", "Tiles")
)
MaskFrame = Annotated[
    Frame, _tiles(help="Origin of GeoJSON on slides with bounds: theirs, as in QuPath, or level 0's.")
]


def endpoint(
    url: Annotated[
        str,
        _server(
            help="host:port of Triton's gRPC, several with commas, or dns:///name:port.", envvar="TRITON_URL"
        ),
    ] = DEFAULT_URL,
    tls: Annotated[bool, _server("--tls", help="Use TLS.")] = False,
    tls_ca: Annotated[
        Path | None, _server(callback=existing, help="CA certificate to trust (PEM); implies --tls.")
    ] = None,
    tls_cert: Annotated[
        Path | None, _server(callback=existing, help="Client certificate (PEM), for mutual TLS.")
    ] = None,
    tls_key: Annotated[Path | None, _server(callback=existing, help="Client private key (PEM).")] = None,
    header: Annotated[
        list[str] | None, _server(help="name=value sent with every request; may be repeated.")
    ] = None,
    timeout: Annotated[float, _server(help="Deadline of one request, in seconds.")] = 300.0,
    retry_for: Annotated[
        float, _server(help="Seconds to retry a request while the server is unavailable.")
    ] = 30.0,
    shared_memory: Annotated[
        bool, _server("--shared-memory", help="Send through system shared memory: one server, on this host.")
    ] = False,
) -> Endpoint:
    """Build the Endpoint from the command line."""
    return Endpoint(
        url, tls, tls_ca, tls_cert, tls_key, _headers(header or []), timeout, retry_for, shared_memory
    )


def throughput(
    workers: Annotated[int, _speed(min=1, help="Decoding threads per slide.")] = min(8, os.cpu_count() or 1),
    chunk: Annotated[
        int | None, _speed(min=1, help="Tiles per request, at most the model's batch size [default: that].")
    ] = None,
    in_flight: Annotated[int, _speed(min=1, help="Requests in flight per server.")] = 4,
) -> Throughput:
    """Build the Throughput from the command line."""
    return Throughput(workers, chunk, in_flight)


def tiling(
    min_tissue: Annotated[
        float, _tiles(min=0, max=1, callback=finite, help="Fraction of a tile that must be tissue.")
    ] = 0.1,
    all_tiles: Annotated[bool, _tiles("--all-tiles", help="Keep tiles without tissue too.")] = False,
    mask_frame: MaskFrame = "qupath",
) -> TilingOptions:
    """Build the TilingOptions from the command line."""
    return TilingOptions(tissue=not all_tiles, min_tissue=min_tissue, mask_frame=mask_frame)


def shares(**groups: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command: its parameter `name` becomes the options of the function `groups[name]`.

    `@shares(endpoint=options.endpoint)` gives a command with a parameter `endpoint: Endpoint` every option of
    the server, and calls it with the finished Endpoint.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for function in (command, *groups.values()):
            plain = function.func if isinstance(function, functools.partial) else function
            hints = typing.get_type_hints(plain, include_extras=True)
            parameters += [
                parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
                for name, parameter in inspect.signature(function).parameters.items()
                if function is not command or name not in groups
            ]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            for name, group in groups.items():
                values[name] = group(
                    **{option: values.pop(option) for option in inspect.signature(group).parameters}
                )
            command(**values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _headers(texts: list[str]) -> tuple[tuple[str, str], ...]:
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise ClientError(f"--header takes name=value, not {name!r}")
    return tuple((name.strip().lower(), value.strip()) for name, _, value in pairs)
