"""Requests to Triton over gRPC: a bounded number in flight, retried where it helps, cancelled together."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import numpy as np
import tenacity
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from ..arrays import Array
from ..errors import Cancelled, ClientError, DeadlineExceeded, NonFiniteAnswer, ServerUnavailable
from .endpoint import Endpoint
from .failures import is_transient, missed_deadline, to_client_error
from .joined_requests import Answer, JoinedRequests
from .shared_memory import SharedInputs

logger = logging.getLogger(__name__)

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

_SETTLE_S = 5.0  # how long a server that just failed is passed over, unless all have failed
_PROBE_S = 10.0  # after a missed deadline: how long a server may take to say that it is live


class Connection:
    """Open channels to the servers of an endpoint, used by any number of threads.

    At most `in_flight` requests per server are in flight at a time, over all threads and slides. `cancel`
    makes every request, also one that waits for a retry, end with `Cancelled`. `interruptions` counts the
    failures after which a server may have been started again.

    Raises:
        ClientError: a TLS file cannot be read. No server is contacted yet.

    Example::

        with Connection(Endpoint("127.0.0.1:8001")) as connection:
            answer = connection.infer("tile_encoder", {"TILES": tiles}, ["EMBEDDINGS"])
    """

    def __init__(self, endpoint: Endpoint, *, in_flight: int = 4) -> None:
        self.endpoint = endpoint
        self.in_flight = in_flight * len(endpoint.servers)
        credentials = endpoint.credentials()
        self._clients = {
            server: InferenceServerClient(
                server, creds=credentials, channel_args=endpoint.channel_arguments()
            )
            for server in endpoint.servers
        }
        self._headers = dict(endpoint.headers)
        self._failures = itertools.count(1)
        self.interruptions = 0
        self._failed_at = dict.fromkeys(endpoint.servers, -_SETTLE_S)
        self._rotation = itertools.cycle(endpoint.servers)
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._joined: dict[object, JoinedRequests] = {}
        self._turn, self._room, self._reserved = threading.Lock(), threading.Condition(), 0
        self._pool = ThreadPoolExecutor(self.in_flight, thread_name_prefix="request")
        self._shared = SharedInputs() if endpoint.shared_memory else None

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self) -> None:
        """End every request now; the connection can only be closed afterwards."""
        self._cancelled.set()
        for client in self._clients.values():
            client.close()

    def close(self) -> None:
        """Close the channels; requests that are still in flight end with `Cancelled`.

        With shared memory, what a server computes at the moment is waited for: it looks into the regions.
        """
        self._cancelled.set()  # ends waiting for a retry
        self._pool.shutdown(wait=self._shared is not None, cancel_futures=True)
        if self._shared:
            self._shared.close(next(iter(self._clients.values())), self._headers)
        self.cancel()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        *,
        version: int | None = None,
        check_finite: bool = True,
    ) -> dict[str, Array]:
        """One inference: named arrays in, the named outputs back (read-only arrays).

        Args:
            model: the served model's name.
            inputs: an array per input, batch dimension first where the model has one.
            outputs: names of the outputs to return.
            version: the model's version; None lets the server choose.
            check_finite: refuse an answer with NaN or infinite values.

        Raises:
            NonFiniteAnswer: see `check_finite`.
            ServerUnavailable: no server could be reached within the endpoint's `retry_for`.
            DeadlineExceeded: a server that can be reached did not answer in time, whenever it was asked.
            RequestRefused: the server rejected the request.
            Cancelled: the connection was cancelled meanwhile.
        """
        wanted = [InferRequestedOutput(name) for name in outputs]

        def request(client: InferenceServerClient) -> dict[str, Array]:
            result = client.infer(
                model,
                self._inputs(client, inputs),
                model_version=_text(version),
                outputs=wanted,
                headers=self._headers,
                timeout=int(self.endpoint.timeout * 1e6),
                client_timeout=self.endpoint.timeout,
            )
            return {name: result.as_numpy(name) for name in outputs}

        answer = self._try(model, request)
        if check_finite:
            _check_finite(model, answer)
        return answer

    def infer_stream(
        self,
        model: str,
        requests: Iterable[Mapping[str, Array]],
        outputs: Sequence[str],
        *,
        version: int | None = None,
        window: int | None = None,
    ) -> Iterator[dict[str, Array]]:
        """The answers to a stream of requests, in the requests' order; see `map_ordered`.

        Raises as `infer` does.
        """
        return self.map_ordered(
            lambda inputs: self.infer(model, inputs, outputs, version=version), requests, window=window
        )

    def map_ordered(
        self, function: Callable[[S], T], items: Iterable[S], *, window: int | None = None
    ) -> Iterator[T]:
        """The results of `function` for each item, computed by the connection's threads; see `in_order`."""
        begun = ((item, self._submit(function, item)) for item in items)
        with contextlib.closing(self.in_order(begun, window=window)) as futures:
            for _, future in futures:
                yield result_of(future)

    def in_order(
        self, begun: Iterable[tuple[S, Future[T]]], *, window: int | None = None
    ) -> Generator[tuple[S, Future[T]]]:
        """Yield items in order with their futures, each to be waited for before the next is taken.

        At most `window` (default: `in_flight`) items are in work at a time, and an item is taken only when
        there is room for it, so memory stays constant however long the stream is. Where one fails, the
        later ones are given up.
        """
        pending: deque[tuple[S, Future[T]]] = deque()
        try:
            for one in begun:
                pending.append(one)
                if len(pending) >= (window or self.in_flight):
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            for _, future in pending:
                future.cancel()

    def infer_rows(
        self,
        model: str,
        name: str,
        rows: Array,
        outputs: Sequence[str],
        *,
        version: int | None = None,
        most_rows: int,
    ) -> Future[Answer]:
        """The outputs of a batching model for `rows` [B, ...] of its only input `name`, some time later.

        Rows of several callers that wait for one of the connection's threads share a request of up to
        `most_rows` rows, see `JoinedRequests`. The future raises as `infer` does.
        """
        key = (model, name, tuple(outputs), version, most_rows)
        with self._lock:
            if key not in self._joined:
                self._joined[key] = JoinedRequests(
                    lambda joined: self.infer(model, {name: joined}, outputs, version=version),
                    self._submit,
                    most_rows,
                )
        return self._joined[key].send(rows)

    @contextlib.contextmanager
    def room(self, requests: int) -> Iterator[None]:
        """Wait, first come, first served, until the work for `requests` requests may begin.

        The work of all callers that have begun is at most that for twice `in_flight` requests:
        enough to keep them in flight, and little memory however many callers wait.
        """
        wanted = min(requests, self.in_flight)
        with self._turn, self._room:
            self._room.wait_for(lambda: self._reserved + wanted <= 2 * self.in_flight)
            self._reserved += wanted
        try:
            yield
        finally:
            with self._room:
                self._reserved -= wanted
                self._room.notify_all()

    def _submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        try:
            return self._pool.submit(function, *args, **kwargs)
        except RuntimeError as error:  # the pool was shut down
            raise Cancelled("cancelled") from error

    def for_each_server(
        self, call: Callable[[InferenceServerClient], T], *, model: str | None = None, retry: bool = True
    ) -> dict[str, T]:
        """The answer of each server to one call of tritonclient's; `model` is named in errors.

        Raises as `infer` does; with `retry` False at the first failure.
        """
        return {server: self._try(model, call, server=server, retry=retry) for server in self._clients}

    def model_configs(self, model: str) -> dict[str, Any]:
        """A model's configuration (a `ModelConfig` message) by server; raises as `infer` does."""
        return self.for_each_server(self._config(model), model=model)

    def reachable_configs(
        self,
        model: str,
        version: int | None = None,
        missing: Callable[[str, ClientError], None] = lambda server, error: None,
    ) -> dict[str, Any]:
        """The same of those servers that can be reached, with retries until one can.

        `missing` is called at once with a server that can't be, and why.
        """
        briefly = min(self.endpoint.timeout, _PROBE_S)
        call, answers = self._config(model, version, briefly), dict[str, Any]()
        # A single server that isn't waited for is named by the error below alone.
        waits = len(self._clients) > 1 or self.endpoint.retry_for > 0
        for server in filter(self._has_settled, self._clients if waits else ()):
            try:
                answers[server] = self._try(model, call, server=server, retry=False)
            except (ServerUnavailable, DeadlineExceeded) as error:
                missing(server, error)
        return answers or {self.endpoint.url: self._try(model, self._config(model, version))}

    def _config(
        self, model: str, version: int | None = None, timeout: float | None = None
    ) -> Callable[[InferenceServerClient], Any]:
        timeout = timeout or self.endpoint.timeout
        return lambda client: (
            client.get_model_config(
                model, _text(version), headers=self._headers, client_timeout=timeout
            ).config
        )

    def server_versions(self) -> dict[str, str]:
        """Triton's version by server; raises as `infer` does."""
        answers = self.for_each_server(
            lambda client: client.get_server_metadata(self._headers, client_timeout=self.endpoint.timeout)
        )
        return {server: answer.version for server, answer in answers.items()}

    def models_ready(self, model: str, version: int) -> dict[str, bool]:
        """Whether a version of a model is ready, by server; raises as `infer` does."""
        return self.for_each_server(
            lambda client: client.is_model_ready(
                model, _text(version), headers=self._headers, client_timeout=self.endpoint.timeout
            ),
            model=model,
        )

    def _inputs(self, client: InferenceServerClient, inputs: Mapping[str, Array]) -> list[InferInput]:
        if self._shared:
            return self._shared.place(client, inputs, self._headers)
        tensors = []
        for name, array in inputs.items():
            tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensors.append(tensor.set_data_from_numpy(np.ascontiguousarray(array)))
        return tensors

    def _try(
        self,
        model: str | None,
        request: Callable[[InferenceServerClient], T],
        *,
        server: str | None = None,
        retry: bool = True,
    ) -> T:
        """Send a request to a server, by default to one after another, until the time for retries is over."""
        only, server = server, ""

        def attempt() -> T:
            nonlocal server
            server = only or self._next_server()
            try:
                return request(self._clients[server])
            except InferenceServerException as error:
                if self._note_failure(server, error):
                    raise InferenceServerException(
                        "it stopped answering", "StatusCode.UNAVAILABLE"
                    ) from error
                raise

        retries = tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda error: retry and (is_transient(error) or missed_deadline(error))
            ),
            wait=tenacity.wait_exponential_jitter(multiplier=0.1, max=5.0, jitter=0.5),
            stop=lambda state: self._cancelled.is_set() or self._is_over(state),
            sleep=tenacity.sleep_using_event(self._cancelled),
            before_sleep=lambda state: logger.info("%s: %s, trying again", server, _message(state)),
            reraise=True,
        )
        try:
            return retries(attempt)
        except InferenceServerException as error:
            raise self._to_client_error(error, server, model) from error
        except ValueError as error:  # what grpc raises for a channel that was closed meanwhile
            if self._cancelled.is_set():
                raise Cancelled("cancelled") from error
            raise

    def _note_failure(self, server: str, error: InferenceServerException) -> bool:
        """Note that a server failed; whether it stopped answering at all."""
        if self._shared:
            self._shared.forget(self._clients[server], self._headers)
        stopped = missed_deadline(error) and not self._is_live(server)
        if stopped or is_transient(error):
            self.interruptions = next(self._failures)
        if stopped or error.status() == "StatusCode.UNAVAILABLE":
            self._failed_at[server] = time.monotonic()
        return stopped

    def _is_over(self, state: tenacity.RetryCallState) -> bool:
        """Whether the time for retries is over. A request that missed its deadline is sent twice at least."""
        error = state.outcome.exception() if state.outcome else None
        if error is not None and missed_deadline(error):
            return state.attempt_number > 1 and (state.seconds_since_start or 0) >= self.endpoint.retry_for
        # Only the pauses count: a request that failed after minutes of computing is still retried.
        return state.idle_for >= self.endpoint.retry_for

    def _is_live(self, server: str) -> bool:
        """Whether a server that missed a deadline still answers at all."""
        try:
            self._clients[server].is_server_live(self._headers, client_timeout=_PROBE_S)
        except InferenceServerException as error:
            return not (missed_deadline(error) or is_transient(error))
        return True

    def _next_server(self) -> str:
        with self._lock:
            for server in itertools.islice(self._rotation, len(self._clients)):
                if self._has_settled(server):
                    return server
            return next(self._rotation)

    def _has_settled(self, server: str) -> bool:
        """Whether a server has not failed for some seconds."""
        return time.monotonic() - self._failed_at[server] >= _SETTLE_S

    def _to_client_error(
        self, error: InferenceServerException, server: str, model: str | None = None
    ) -> ClientError:
        if self._cancelled.is_set():
            return Cancelled("cancelled")
        return to_client_error(error, self.endpoint, server, model)


def _text(version: int | None) -> str:
    """A version as tritonclient takes it; "" lets the server choose."""
    return "" if version is None else str(version)


def _check_finite(model: str, answer: Mapping[str, Array]) -> None:
    for output, array in answer.items():
        if not np.isfinite(array).all():
            rows = ~np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
            raise NonFiniteAnswer(model, output, np.flatnonzero(rows).tolist(), len(array))


def result_of(future: Future[T]) -> T:
    """The future's result; Cancelled where it was given up."""
    try:
        return future.result()
    except CancelledError as error:
        raise Cancelled("cancelled") from error


def _message(state: tenacity.RetryCallState) -> str:
    error = state.outcome.exception() if state.outcome else None
    return error.message() if isinstance(error, InferenceServerException) else str(error)
