"""Failed requests: which ones to retry, and the message for the user."""

from __future__ import annotations

from tritonclient.utils import InferenceServerException

from ..errors import ClientError, DeadlineExceeded, RequestRefused, ServerUnavailable
from .endpoint import Endpoint
from .shared_memory import is_lost_region


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later.

    UNAVAILABLE stands for a full queue, a timeout in it, a server that shuts down and a refused connection,
    all of which pass, but also for a restricted protocol and a failed TLS handshake, which don't. A server
    that shuts down may answer CANCELLED too, and one whose backend died INTERNAL, before it is started again.
    While it unloads its models it has none of their versions: NOT_FOUND. A front answers RESOURCE_EXHAUSTED
    while this client, or others at its address, have too much in flight.
    For a missed deadline see `missed_deadline`. All else (INVALID_ARGUMENT, NOT_FOUND …) is permanent.
    """
    if not isinstance(error, InferenceServerException):
        return False
    message = (error.message() or "").lower()
    if error.status() == "StatusCode.UNAVAILABLE":
        return not any(sign in message for sign in ("protocol is restricted", "ssl_error", "certificate"))
    if error.status() == "StatusCode.INTERNAL" and "is not healthy" in message:
        return True
    if error.status() == "StatusCode.RESOURCE_EXHAUSTED" and "in flight" in message:
        return True
    if _is_unloading(error):
        return True
    return error.status() == "StatusCode.CANCELLED" or is_lost_region(error)


def _is_unloading(error: InferenceServerException) -> bool:
    """Whether a server has a model and, while it starts or stops, none of its versions."""
    message = (error.message() or "").lower()
    return error.status() == "StatusCode.NOT_FOUND" and "has no available versions" in message


def missed_deadline(error: BaseException) -> bool:
    """Whether a request took longer than its deadline: it is large, or the server busy with others."""
    return isinstance(error, InferenceServerException) and error.status() == "StatusCode.DEADLINE_EXCEEDED"


def to_client_error(
    error: InferenceServerException, endpoint: Endpoint, server: str, model: str | None = None
) -> ClientError:
    """One line that says which server failed at what, and what helps."""
    message = " ".join((error.message() or "no reason given").split())
    status = (error.status() or "").removeprefix("StatusCode.")
    of_model = f" ({model})" if model else ""
    if "protocol is restricted" in message.lower():
        return RequestRefused(f"{server} wants a header for this{of_model}: {message}; give it with --header")
    if status == "UNAVAILABLE" or _is_unloading(error):
        hint = _hint(message.lower(), endpoint)
        return ServerUnavailable(f"no answer from the Triton server at {server}{of_model}: {message}; {hint}")
    if status == "DEADLINE_EXCEEDED":
        return DeadlineExceeded(
            f"the Triton server at {server}{of_model} took over {endpoint.timeout:g} s; raise --timeout"
        )
    return RequestRefused(
        f"the Triton server at {server} refused the request{of_model}: {message} [{status}]"
    )


def _hint(message: str, endpoint: Endpoint) -> str:
    """What to look at where no connection comes about."""
    # On a handshake, without a word.
    closed = "all backends failing" in message and "socket closed" in message
    if not endpoint.secure:
        return "does it want TLS? give --tls-ca or --tls" if closed else "is it running, at this --url?"
    if "wrong_version_number" in message:
        return "is it running, with this TLS? it answers in plain text: leave --tls and --tls-ca out"
    if closed and endpoint.tls_cert is None:
        return "does it want a client's certificate? give --tls-cert and --tls-key"
    return "is it running, with this TLS?"
