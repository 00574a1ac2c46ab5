"""Find free ports and report ports in use."""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Mapping

from server.errors import ServerError

# Below the range from which the kernel takes ports for outgoing connections: a port found free stays free.
FREE_PORTS = range(20_000, 32_000)
_GIVEN: set[int] = set()


def free_port(host: str) -> int:
    """A port of `FREE_PORTS` that nothing listens on and that this process was not given before."""
    for port in random.sample(FREE_PORTS, len(FREE_PORTS)):
        if port not in _GIVEN and _bind_error(host, port) is None:
            _GIVEN.add(port)
            return port
    raise ServerError(f"no free port on {host} between {FREE_PORTS[0]} and {FREE_PORTS[-1]}")


def check_port(host: str, port: int, option: str) -> None:
    """Raise ServerError, naming the port and the `option` that changes it, if it cannot be listened on."""
    if trouble := _trouble(host, port):
        raise ServerError(f"{trouble}: choose another with {option}")


def check_ports(ports: Mapping[str, tuple[str, int]]) -> None:
    """Check host and port of every `--<name>-port` of `python -m server`.

    Raises:
        ServerError: some cannot be listened on; it names them all, and free ones as they are typed.
    """
    failed = {name: trouble for name, place in ports.items() if (trouble := _trouble(*place))}
    if failed:
        others = " ".join(f"--{name}-port {free_port(ports[name][0])}" for name in failed)
        raise ServerError(
            f'{", ".join(failed.values())}: choose another with {others} (make serve ARGS="{others}")'
        )


def as_clients_name(host: str, port: int) -> str:
    """`host:port` of what listens on `host`; `localhost` where that is every address of this machine."""
    name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"{name}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`; an unknown name counts as reachable."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def _trouble(host: str, port: int) -> str:
    """Why a port cannot be listened on; empty where it can."""
    reason = _bind_error(host, port)
    return "" if reason is None else f"port {port} on {host} can't be used ({reason})"


def _bind_error(host: str, port: int) -> str | None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As tritonserver does: a port whose last connections are still closing counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            return str(error)
    return None
