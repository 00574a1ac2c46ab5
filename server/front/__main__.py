"""`python -m server.front`: stand before a Triton and refuse what would harm it (docs/security.md)."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from pathlib import Path

from gigapath_contract.command_line import fail, run
from server.errors import ServerError
from server.front.proxy import LINE, Settings, front


def settings() -> Settings:
    """The command line."""
    default = Settings
    parser = argparse.ArgumentParser(prog="python -m server.front", description=__doc__)
    parser.error = fail  # type: ignore[assignment]  # one line, where argparse prints the usage as well
    add = parser.add_argument
    add("--listen", default="127.0.0.1:8003", help="host:port (default: %(default)s)")
    add("--upstream", default="127.0.0.1:8001", help="Triton's host:port (default: %(default)s)")
    add("--tls", choices=["off", "server", "mutual"], default=default.tls, help="(default: %(default)s)")
    add("--certs", type=Path, default=default.certs, help="tls.crt, tls.key, ca.crt (default: %(default)s)")
    add("--in-flight", type=int, default=default.in_flight, help="requests per client (default: %(default)s)")
    add("--mebibytes", type=int, default=default.mebibytes, help="that these hold (default: %(default)s)")
    add("--connections", type=int, default=default.connections, help="of all clients (default: %(default)s)")
    add(
        "--grace", type=float, default=default.grace, help="seconds to finish requests (default: %(default)g)"
    )
    add("--admin", action="store_true", help="pass restricted calls on, which need Triton's token")
    return Settings(**vars(parser.parse_args()))


async def serve(chosen: Settings) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with front(chosen):
        logging.info("%s before %s, TLS %s", chosen.listen, chosen.upstream, chosen.tls)
        await stop.wait()


def main() -> None:
    """Run the command line; a mistake is one line on stderr and exit code 1."""
    logging.basicConfig(level=logging.INFO, format=LINE)
    run(lambda: asyncio.run(serve(settings())), ServerError)


if __name__ == "__main__":
    main()
