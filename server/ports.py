"""Find free ports and report ports in use."""

from __future__ import annotations

import ipaddress
import random
import socket

from server.errors import ServerError

# Below the range from which the kernel takes ports for outgoing connections: a port found free stays free.
FREE_PORTS = range(20_000, 32_000)


def free_port(host: str) -> int:
    """A port of `FREE_PORTS` that nothing listens on."""
    for port in random.sample(FREE_PORTS, 100):
        if _bind_error(host, port) is None:
            return port
    raise ServerError(f"no free port on {host} between {FREE_PORTS.start} and {FREE_PORTS.stop}")


def check_port(host: str, port: int, option: str) -> None:
    """Raise ServerError, naming the port and the `option` that changes it, if it cannot be listened on."""
    reason = _bind_error(host, port)
    if reason is not None:
        raise ServerError(f"port {port} on {host} can't be used ({reason}): choose another with {option}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`; an unknown name counts as reachable."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def _bind_error(host: str, port: int) -> str | None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As tritonserver does: a port whose last connections are still closing counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            return str(error)
    return None
