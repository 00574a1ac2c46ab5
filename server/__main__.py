"""`python -m server`: serve a model repository on this machine, in the foreground."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from gigapath_contract.command_line import run
from server.assemble import ROOT
from server.diagnosis import diagnose
from server.errors import ServerError
from server.local import LOOPBACK, run_triton
from server.ports import is_loopback

LOG = ROOT / "build" / "log" / "triton.log"
SETTLED = 60
"""Seconds that a server must have served for to be started again without a pause when it dies."""
LONGEST_PAUSE = 30


def serve(
    flags: Annotated[
        list[str] | None,
        typer.Argument(help="Flags for tritonserver, after `--`.", metavar="[-- FLAGS]"),
    ] = None,
    repository: Annotated[Path, typer.Option(help="Model repository to serve.")] = ROOT / "model_repository",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = LOOPBACK,
    front: Annotated[
        bool,
        typer.Option("--front", help="A proxy that checks requests stands before a --host beyond loopback."),
    ] = False,
    grpc_port: Annotated[int, typer.Option(help="gRPC port.")] = 8001,
    http_port: Annotated[int | None, typer.Option(help="HTTP port (default: no HTTP).")] = None,
    metrics_port: Annotated[int, typer.Option(help="Port of the Prometheus metrics.")] = 8002,
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
            "or say --front where a proxy that checks requests stands before it"
        )
    pause = 0.0
    try:
        while True:
            with run_triton(
                repository,
                log=log,
                host=host,
                grpc_port=grpc_port,
                http_port=http_port,
                metrics_port=metrics_port,
                flags=flags or [],
                grace=grace,
                client_shared_memory=shared_memory,
            ) as server:
                began = time.monotonic()
                typer.echo(f"serving {', '.join(server.models)} at {server.url} (gRPC)")
                typer.echo(f"metrics {server.metrics_url} · log {server.log} · Ctrl-C stops")
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
    run(app, ServerError)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
