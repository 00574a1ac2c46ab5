"""`python -m server`: serve a model repository on this machine, in the foreground."""

from __future__ import annotations

import logging
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from gigapath_contract.command_line import call, run
from server.assemble import ROOT
from server.diagnosis import diagnose
from server.errors import ServerError
from server.front.proxy import LINE, Settings, Tls, run_front
from server.local import LOOPBACK, run_triton
from server.ports import as_clients_name, check_ports, free_port, is_loopback

LOG = ROOT / "build" / "log" / "triton.log"
CERTS = ROOT / "deploy" / "certs" / "server"
DEFAULT_URLS = ("127.0.0.1:8001", "localhost:8001")
SETTLED = 60
"""Seconds that a server must have served for to be started again without a pause when it dies."""
LONGEST_PAUSE = 30
LONGEST_GRACE = 3600


def serve(
    flags: Annotated[
        list[str] | None,
        typer.Argument(help="Flags for tritonserver, after `--`.", metavar="[-- FLAGS]"),
    ] = None,
    repository: Annotated[Path, typer.Option(help="Model repository to serve.")] = ROOT / "model_repository",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = LOOPBACK,
    front: Annotated[
        bool,
        typer.Option(
            "--front", help="Check every request before Triton: wanted for a --host beyond loopback."
        ),
    ] = False,
    tls: Annotated[Tls, typer.Option(help="TLS of the front.")] = "off",
    certs: Annotated[
        Path, typer.Option(help="Folder with the front's tls.crt and tls.key, and ca.crt.")
    ] = CERTS,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="gRPC port.")] = 8001,
    http_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="HTTP port (default: no HTTP).")
    ] = None,
    metrics_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the Prometheus metrics.")
    ] = 8002,
    shared_memory: Annotated[
        bool, typer.Option("--shared-memory", help="Let clients on this machine use shared memory.")
    ] = False,
    log: Annotated[Path, typer.Option(help="Triton's log file.")] = LOG,
    grace: Annotated[float, typer.Option(help="Seconds to finish requests in flight when stopped.")] = 10,
) -> None:
    """Serve a model repository with a real Triton until Ctrl-C or SIGTERM; start it again when it dies.

    Example: python -m server --grpc-port 9001 -- --log-verbose=1
    """
    signal.signal(signal.SIGTERM, _interrupt)
    if not front and not is_loopback(host):
        raise ServerError(
            f"Triton 2.51 ends over malformed requests (docs/security.md): stay on loopback, not {host}, "
            "or give --front, which refuses them"
        )
    if not 0 <= grace <= LONGEST_GRACE:
        raise ServerError(f"--grace is {grace:g}: give 0 to {LONGEST_GRACE} seconds")
    if shared_memory and front:
        raise ServerError("--front passes no shared memory on: leave it or --shared-memory out")
    if tls != "off" and not front:
        raise ServerError("--tls is the front's: give --front too")
    listen = f"[{host}]:{grpc_port}" if ":" in host else f"{host}:{grpc_port}"
    behind = free_port(LOOPBACK) if front else grpc_port
    pause = 0.0
    try:
        with ExitStack() as running:
            if front:
                inside = {"metrics": metrics_port} | ({"http": http_port} if http_port else {})
                check_ports(
                    {"grpc": (host, grpc_port)} | {name: (LOOPBACK, port) for name, port in inside.items()}
                )
                _log_front(log.with_name("front.log"))
                settings = Settings(listen, f"{LOOPBACK}:{behind}", tls=tls, certs=certs, grace=grace)
                running.enter_context(run_front(settings))
            while True:
                with run_triton(
                    repository,
                    log=log,
                    host=LOOPBACK if front else host,
                    grpc_port=behind,
                    http_port=http_port,
                    metrics_port=metrics_port,
                    flags=flags or [],
                    grace=grace,
                    client_shared_memory=shared_memory,
                ) as server:
                    began = time.monotonic()
                    typer.echo(
                        f"serving {', '.join(server.models)} at {listen if front else server.url} (gRPC)"
                    )
                    typer.echo(f"metrics {server.metrics_url} · log {server.log} · Ctrl-C stops")
                    url = as_clients_name(host, grpc_port)
                    where = "" if url in DEFAULT_URLS else f" --url {url}"
                    typer.echo(
                        f"next, in another terminal: gigapath-client batch SLIDES --out results{where}"
                    )
                    code = server.wait()
                if code <= 0:  # ended in order by somebody else, or the guard was killed
                    raise ServerError(f"tritonserver ended by itself with code {code}: see {log}")
                kept = log.replace(log.with_name(f"{log.name}.previous"))
                settled = time.monotonic() - began > SETTLED
                pause = 0.0 if settled else min(max(1, 2 * pause), LONGEST_PAUSE)
                typer.echo(f"{diagnose(kept, code)}; starting it again in {pause:.0f} s", err=True)
                time.sleep(pause)
    except KeyboardInterrupt:
        typer.echo("stopped")


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 1."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(serve)
    run(lambda: call(app), ServerError)


def _log_front(path: Path) -> None:
    """Write a line per request to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(LINE))
    logger = logging.getLogger("server.front")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
