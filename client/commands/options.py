"""Options that several commands share, and the decorator that gives them to a command."""

from __future__ import annotations

import functools
import inspect
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import ClientError
from ..scoring.embedding import Throughput
from ..scoring.score import TilingOptions
from ..triton.endpoint import DEFAULT_URL, Endpoint

# Progress and log lines share it, so that neither overwrites the other; results go to stdout.
console = Console(stderr=True)

WsiDir = Annotated[
    Path | None,
    typer.Option("--wsi-dir", "--wsi_dir", help="Folder of a manifest's slides [default: the manifest's]."),
]

_SERVER, _SPEED, _TILES = "Server", "Speed", "Tiles"


def endpoint(
    url: Annotated[
        str,
        typer.Option(
            help="host:port of Triton's gRPC, several with commas, or dns:///name:port.",
            envvar="TRITON_URL",
            rich_help_panel=_SERVER,
        ),
    ] = DEFAULT_URL,
    tls: Annotated[bool, typer.Option("--tls", help="Use TLS.", rich_help_panel=_SERVER)] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(help="CA certificate to trust (PEM); implies --tls.", rich_help_panel=_SERVER),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Client certificate (PEM), for mutual TLS.", rich_help_panel=_SERVER)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Client private key (PEM).", rich_help_panel=_SERVER)
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(help="name=value sent with every request; may be repeated.", rich_help_panel=_SERVER),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Deadline of one request, in seconds.", rich_help_panel=_SERVER)
    ] = 300.0,
    retry_for: Annotated[
        float,
        typer.Option(
            help="Seconds to retry a request while the server is unavailable.", rich_help_panel=_SERVER
        ),
    ] = 30.0,
    shared_memory: Annotated[
        bool,
        typer.Option(
            "--shared-memory",
            help="Send through system shared memory: one server, on this host.",
            rich_help_panel=_SERVER,
        ),
    ] = False,
) -> Endpoint:
    """Build the Endpoint from the command line."""
    return Endpoint(
        url, tls, tls_ca, tls_cert, tls_key, _headers(header or []), timeout, retry_for, shared_memory
    )


def throughput(
    workers: Annotated[
        int, typer.Option(min=1, help="Decoding threads per slide.", rich_help_panel=_SPEED)
    ] = min(8, os.cpu_count() or 1),
    chunk: Annotated[
        int,
        typer.Option(
            min=1, help="Tiles per request (at most the model's batch size).", rich_help_panel=_SPEED
        ),
    ] = 64,
    in_flight: Annotated[
        int,
        typer.Option(min=1, help="Requests in flight per server.", rich_help_panel=_SPEED),
    ] = 4,
) -> Throughput:
    """Build the Throughput from the command line."""
    return Throughput(workers, chunk, in_flight)


def tiling(
    min_tissue: Annotated[
        float,
        typer.Option(min=0, max=1, help="Fraction of a tile that must be tissue.", rich_help_panel=_TILES),
    ] = 0.1,
    all_tiles: Annotated[
        bool, typer.Option("--all-tiles", help="Keep tiles without tissue too.", rich_help_panel=_TILES)
    ] = False,
) -> TilingOptions:
    """Build the TilingOptions from the command line."""
    return TilingOptions(tissue=not all_tiles, min_tissue=min_tissue)


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
