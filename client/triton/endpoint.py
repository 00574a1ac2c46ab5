"""Where the servers are and how to speak to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import grpc

from ..errors import ClientError

DEFAULT_URL = "127.0.0.1:8001"
_LARGEST_MESSAGE = 2**31 - 1  # the server's own limit, 14,266 tiles

_LONGEST_S = 30 * 24 * 3600
_HEADER_NAME, _HEADER_VALUE = re.compile("[0-9a-z_.-]+"), re.compile("[ -~]*")


@dataclass(frozen=True)
class Endpoint:
    """One or several Triton servers that serve the same export; picklable, so that it can travel to a worker.

    Attributes:
        url: `host:port`; several with commas (the client rotates over them and skips one that is down); or a
            gRPC name such as `dns:///triton:8001` (gRPC rotates over the addresses behind the name).
        tls: encrypt; implied by the PEM files `tls_ca` (the authority to trust) and `tls_cert` with `tls_key`
            (the client's certificate, for mutual TLS).
        headers: (name, value) pairs sent with every request.
        timeout: deadline of one request in seconds.
        retry_for: seconds of pauses after which a transient failure is no longer retried.
        shared_memory: send inputs through system shared memory; one server, on this host.

    Raises:
        ClientError: options that contradict each other.

    Examples:
        Endpoint()                                            # 127.0.0.1:8001
        Endpoint("gpu1:8001,gpu2:8001", retry_for=300)
        Endpoint("triton:8001", tls_ca=Path("ca.pem"), headers=(("authorization", "Bearer …"),))
    """

    url: str = DEFAULT_URL
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    headers: tuple[tuple[str, str], ...] = ()
    timeout: float = 300.0
    retry_for: float = 30.0
    shared_memory: bool = False

    def __post_init__(self) -> None:
        if not self.servers:
            raise ClientError("no server: --url takes host:port, host:port,host:port or dns:///name:port")
        for server in self.servers:
            _check_port(server)
        if not 0 < self.timeout <= _LONGEST_S or not 0 <= self.retry_for <= _LONGEST_S:
            raise ClientError(
                "--timeout must be positive and --retry-for must not be negative, and both at most "
                f"{_LONGEST_S} seconds"
            )
        for name, value in self.headers:
            if (
                not _HEADER_NAME.fullmatch(name)
                or name.endswith("-bin")
                or not _HEADER_VALUE.fullmatch(value)
            ):
                raise ClientError(
                    f"--header {name!a} can't be sent: gRPC takes name=value in printable ASCII"
                )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ClientError("--tls-cert and --tls-key belong together: give both or neither")
        if self.shared_memory and (len(self.servers) > 1 or self.balanced_by_grpc):
            raise ClientError("--shared-memory needs one server on this very host: give a single host:port")

    @property
    def servers(self) -> tuple[str, ...]:
        """The single addresses in `url`."""
        return tuple(part.strip() for part in self.url.split(",") if part.strip())

    @property
    def balanced_by_grpc(self) -> bool:
        """Whether gRPC itself spreads the requests of one name over several servers."""
        return any("://" in server for server in self.servers) or any(
            server.startswith(("dns:", "ipv4:", "ipv6:")) for server in self.servers
        )

    @property
    def secure(self) -> bool:
        """Whether the channel is encrypted."""
        return self.tls or self.tls_ca is not None or self.tls_cert is not None

    def credentials(self) -> grpc.ChannelCredentials | None:
        """gRPC credentials from the PEM files, None for a plain channel.

        Raises:
            ClientError: a file can't be read.
        """
        if not self.secure:
            return None
        try:
            ca, key, cert = (
                p.read_bytes() if p else None for p in (self.tls_ca, self.tls_key, self.tls_cert)
            )
        except OSError as error:
            raise ClientError(f"cannot read the TLS file {error.filename}: {error.strerror}") from error
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)

    @staticmethod
    def channel_arguments() -> list[tuple[str, int | str]]:
        """Arguments of every channel. They replace tritonclient's, so its message sizes are named again."""
        return [
            ("grpc.max_send_message_length", _LARGEST_MESSAGE),
            ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
            ("grpc.service_config", '{"loadBalancingConfig":[{"round_robin":{}}]}'),
            # A restarted server is found again within seconds; gRPC's own pause would grow to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]


def _check_port(server: str) -> None:
    """Refuse an address without a port, or with one that doesn't exist; gRPC takes it modulo 65,536."""
    if server.startswith(("unix:", "unix-abstract:")):
        return
    port = server.rpartition(":")[2]
    if not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535):
        raise ClientError(f"--url {server}: has no port from 1 to 65535: give host:port")
