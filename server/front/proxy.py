"""Pass checked gRPC calls on to a Triton, and refuse the others."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import grpc.aio

from server.errors import ServerError
from server.front.checks import Model, check_request, read_model
from server.front.wire import BYTES, Request, WireError, read_request
from server.ports import check_port

logger = logging.getLogger(__name__)

LINE = "%(asctime)s %(message)s"
"""Format of the log."""
TRITON = "/inference.GRPCInferenceService/"
INFER = f"{TRITON}ModelInfer"
CONFIG = f"{TRITON}ModelConfig"
OPEN = {
    "/grpc.health.v1.Health/Check",
    CONFIG,
    *(f"{TRITON}Server{name}" for name in ("Live", "Ready", "Metadata")),
    *(f"{TRITON}Model{name}" for name in ("Ready", "Metadata", "Statistics")),
}
ADMIN = {f"{TRITON}{name}" for name in ("RepositoryIndex", "TraceSetting", "LogSettings")}
"""Passed on where that is asked for; Triton wants its token. Models can't be loaded, nor memory shared."""
CONFIG_SECONDS = 30.0
"""How long a model's configuration is remembered."""
READS = 2
"""How many requests of one client are received at a time."""
Tls = Literal["off", "server", "mutual"]


@dataclass(frozen=True)
class Settings:
    """Where the front listens and what it lets through.

    Attributes:
        listen, upstream: host:port of the front and of Triton, which speaks plain gRPC.
        tls, certs: as TLS and CERTS of deploy/base/start.sh.
        in_flight: the most requests in flight of one client, a certificate's name at an address.
        mebibytes: the most that they hold together, so also of one message.
        connections: the most connections, all clients together.
        admin: pass the calls of `ADMIN` on.
        grace: seconds for requests in flight to finish at the end.

    Raises:
        ServerError: an address or a limit that can't be meant.
    """

    listen: str
    upstream: str
    tls: Tls = "off"
    certs: Path = Path("/certs")
    in_flight: int = 32
    mebibytes: int = 1300
    connections: int = 256
    admin: bool = False
    grace: float = 60

    def __post_init__(self) -> None:
        for name, address in (("listen", self.listen), ("upstream", self.upstream)):
            if not re.fullmatch(r".+:\d{1,5}", address):
                raise ServerError(f"--{name} is {address!r}: give host:port")
        if min(self.in_flight, self.connections) < 1:
            raise ServerError("--in-flight and --connections are at least 1")
        if not 1 <= self.mebibytes < 2048:
            raise ServerError(f"--mebibytes is {self.mebibytes}: give 1 to 2047, the most of a gRPC message")
        if not 0 <= self.grace <= 3600:
            raise ServerError(f"--grace is {self.grace:g}: give 0 to 3600 seconds")


@dataclass
class Load:
    """What one client has in flight."""

    requests: int = 0
    held: int = 0
    reads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(READS))


class Refused(Exception):
    """A call that is not passed on; one line."""

    def __init__(self, code: grpc.StatusCode, why: str) -> None:
        super().__init__(why)
        self.code = code


class Front(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Serves every method as a stream of requests: so a client's load is counted before its data is read."""

    def __init__(self, settings: Settings, channel: grpc.aio.Channel) -> None:
        self._settings = settings
        self._channel = channel
        self._loads: dict[tuple[str, bool], Load] = {}
        self._models: dict[str, tuple[float, Model]] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """How one call is answered; messages stay bytes."""
        method = handler_call_details.method

        async def serve(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
            try:
                return await self._pass(method, messages, context)
            except Refused as error:
                await context.abort(error.code, str(error))
            except grpc.aio.AioRpcError as error:
                metadata = tuple(error.trailing_metadata() or ())
                await context.abort(error.code(), error.details() or "", metadata)

        return grpc.stream_unary_rpc_method_handler(serve)

    async def _pass(
        self, method: str, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> bytes:
        """Triton's answer to a call that may be passed on, and a line in the log if it infers or fails."""
        began, client, seen, code = time.monotonic(), client_of(context), method, "CANCELLED"
        try:
            if not (method == INFER or method in OPEN or (method in ADMIN and self._settings.admin)):
                raise Refused(grpc.StatusCode.PERMISSION_DENIED, f"{method} is not passed on")
            with self._admit(client, method == INFER) as load:
                async with load.reads:
                    message = await _only(messages)
                with self._hold(client, load, len(message)):
                    if method == INFER:
                        request = _read_request(message)
                        seen = " ".join(
                            [request.model, *(f"{i.name}{list(i.shape)}" for i in request.inputs)]
                        )
                        await self._check(request)
                    answer = await self._forward(method, message, context)
            code = "OK"
            return answer
        except Refused as error:
            code = f"{error.code.name} ({error})"
            raise
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            raise
        finally:
            if method == INFER or code != "OK":
                logger.info("%s %s %s %.0f ms", client, seen, code, 1e3 * (time.monotonic() - began))

    @contextmanager
    def _admit(self, client: str, infers: bool) -> Iterator[Load]:
        """Count a request of a client until it is answered; those that infer don't block the others."""
        load = self._loads.setdefault((client, infers), Load())
        if load.requests >= self._settings.in_flight:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{client} has {load.requests} requests in flight"
            )
        load.requests += 1
        try:
            yield load
        finally:
            load.requests -= 1
            if not load.requests:
                del self._loads[client, infers]

    @contextmanager
    def _hold(self, client: str, load: Load, size: int) -> Iterator[None]:
        """Count a request's bytes until it is answered."""
        if load.held + size > self._settings.mebibytes << 20:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{client} has {load.held >> 20} MiB in flight and sends {size >> 20} MiB",
            )
        load.held += size
        try:
            yield
        finally:
            load.held -= size

    async def _check(self, request: Request) -> None:
        """Raise Refused unless Triton can be given this request."""
        # In a thread: to look at a slide's values takes a second for a gigabyte.
        try:
            await asyncio.to_thread(check_request, request, await self._model(request.model))
        except ValueError:
            self._models.pop(request.model, None)  # another export may be served by now
            try:
                await asyncio.to_thread(check_request, request, await self._model(request.model))
            except ValueError as error:
                raise Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None

    async def _model(self, name: str) -> Model:
        """A model by its configuration; AioRpcError where Triton doesn't give it."""
        until, model = self._models.get(name, (0.0, None))
        if model is None or until < time.monotonic():
            query = bytes([1 << 3 | BYTES, len(name)]) + name.encode()
            answer = await self._channel.unary_unary(CONFIG)(query, timeout=10)
            try:
                model = read_model(answer)
            except (ValueError, KeyError) as error:
                why = f"the configuration of {name} can't be read: {error!r}"
                raise Refused(grpc.StatusCode.FAILED_PRECONDITION, why) from error
            self._models[name] = time.monotonic() + CONFIG_SECONDS, model
        return model

    async def _forward(self, method: str, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Triton's answer; when the client's call ends, so does the one to Triton."""
        call = self._channel.unary_unary(method)(
            message,
            timeout=context.time_remaining(),
            metadata=[(k, v) for k, v in context.invocation_metadata() or () if k != "user-agent"],
        )
        answer: bytes = await call
        context.set_trailing_metadata(tuple(await call.trailing_metadata()))
        return answer


def client_of(context: grpc.aio.ServicerContext) -> str:
    """A client's address, and its certificate's name where it shows one."""
    address = context.peer().rpartition(":")[0]
    names = context.auth_context().get("x509_common_name", ())
    return "/".join([address, *(name.decode("ascii", "replace").replace(" ", "_") for name in names)])


def _read_request(message: bytes) -> Request:
    try:
        return read_request(message)
    except WireError as error:
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None


async def _only(messages: AsyncIterator[bytes]) -> bytes:
    async for message in messages:
        return message
    raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "a call without a message")


@asynccontextmanager
async def front(settings: Settings) -> AsyncIterator[None]:
    """Serve until the block ends.

    Raises:
        ServerError: the address can't be listened on, or a certificate can't be read.
    """
    options = [
        ("grpc.max_receive_message_length", settings.mebibytes << 20),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", 2 * settings.in_flight),
        ("grpc.max_allowed_incoming_connections", settings.connections),
        ("grpc.max_connection_age_ms", 300_000),  # clients that connect again find new servers
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message can't become a large one
        ("grpc.so_reuseport", 0),
    ]
    to_triton = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 500),
    ]
    server = grpc.aio.server(options=options)
    async with grpc.aio.insecure_channel(settings.upstream, options=to_triton) as channel:
        server.add_generic_rpc_handlers((Front(settings, channel),))
        host, _, port = settings.listen.rpartition(":")
        check_port(host.strip("[]"), int(port), "--listen")  # gRPC listens on what it can, and says nothing
        if settings.tls == "off":
            server.add_insecure_port(settings.listen)
        else:
            server.add_secure_port(settings.listen, _credentials(settings))
        await server.start()
        try:
            yield
        finally:
            await server.stop(settings.grace)


@contextmanager
def run_front(settings: Settings) -> Iterator[None]:
    """`front` in a thread of this process."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="front", daemon=True)
    thread.start()
    serving = front(settings)
    try:
        asyncio.run_coroutine_threadsafe(serving.__aenter__(), loop).result()
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(serving.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _credentials(settings: Settings) -> grpc.ServerCredentials:
    key, chain = (_read(settings.certs / name) for name in ("tls.key", "tls.crt"))
    mutual = settings.tls == "mutual"
    root = _read(settings.certs / "ca.crt") if mutual else None
    return grpc.ssl_server_credentials([(key, chain)], root, require_client_auth=mutual)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServerError(f"{path} can't be read ({error.strerror}): the front's TLS needs it") from error
