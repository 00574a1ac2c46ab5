"""Read Triton's messages off protobuf's wire format without copying a payload.

Only what the front has to know is read, and whatever protobuf could read in more than one way is refused, so
that Triton's parser can't find anything else in a request than was checked. The work is bounded: a request of
a gigabyte takes no longer than a small one.
Field numbers: grpc_service.proto and model_config.proto of the KServe protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_FIELDS = 256
"""The most fields of one message; ours have 20."""
MAX_RANK = 8
MAX_NAME = 127


class WireError(ValueError):
    """A message that the front doesn't pass on; one line."""


@dataclass(frozen=True)
class Input:
    """An input tensor of a request, without its data."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """A ModelInferRequest: `raw` has the bytes of each of the `inputs`, as views into the message."""

    model: str
    inputs: tuple[Input, ...]
    raw: tuple[memoryview, ...]


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at `at`, modulo 2^64 as protobuf reads it, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise WireError("the message is no protobuf: a number doesn't end")


def fields(data: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """Number, wire type, value of a number and bytes of each field."""
    at, end = 0, len(data)
    for _ in range(MAX_FIELDS):
        if at == end:
            return
        key, at = read_varint(data, at)
        kind, value, start = key & 7, 0, at
        if kind == VARINT:
            value, at = read_varint(data, at)
        elif kind == BYTES:
            length, start = read_varint(data, at)
            at = start + length
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        else:
            raise WireError(f"the message is no protobuf: wire type {kind}")
        if at > end:
            raise WireError("the message is no protobuf: a field is longer than what holds it")
        yield key >> 3, kind, value, data[start:at]
    if at != end:
        raise WireError(f"the message has over {MAX_FIELDS} fields")


def read_request(message: bytes) -> Request:
    """What a ModelInferRequest asks for.

    Raises:
        WireError: it is no such message, has fields that the protocol doesn't know, data that is not raw, or
            parameters of a tensor (shared memory).
    """
    model = ""
    inputs, raw = [], []
    for number, kind, _, data in fields(memoryview(message)):
        if kind != BYTES or not 1 <= number <= 7:
            raise WireError(f"the request has a field {number} that the protocol doesn't know")
        if number == 1:
            model = _text(data)
        elif number in (2, 3):
            _text(data)  # version and id, which Triton's log and answers repeat
        elif number == 5:
            inputs.append(_input(data))
        elif number == 6:
            _check_output(data)
        elif number == 7:
            raw.append(data)
    return Request(model, tuple(inputs), tuple(raw))


def _input(data: memoryview) -> Input:
    name = datatype = ""
    shape: list[int] = []
    for number, kind, value, content in fields(data):
        if (number, kind) == (1, BYTES):
            name = _text(content)
        elif (number, kind) == (2, BYTES):
            datatype = _text(content)
        elif (number, kind) == (3, VARINT):
            shape.append(value)
        elif (number, kind) == (3, BYTES):
            shape += numbers(content)
        elif (number, kind) == (4, BYTES):
            raise WireError("parameters of an input (shared memory) are not passed on")
        elif (number, kind) == (5, BYTES):
            raise WireError("data outside raw_input_contents is not passed on")
        else:
            raise WireError(f"an input has a field {number} that the protocol doesn't know")
        if len(shape) > MAX_RANK:
            raise WireError(f"an input has more than {MAX_RANK} dimensions")
    return Input(name, datatype, tuple(dim - (dim >> 63 << 64) for dim in shape))


def _check_output(data: memoryview) -> None:
    if any((number, kind) != (1, BYTES) for number, kind, _, _ in fields(data)):
        raise WireError("parameters of an output (shared memory, classification) are not passed on")


def numbers(packed: memoryview) -> list[int]:
    """A packed field of unsigned numbers, as many as a shape may have, and one more where there are more."""
    found: list[int] = []
    at = 0
    while at < len(packed) and len(found) <= MAX_RANK:
        value, at = read_varint(packed, at)
        found.append(value)
    return found


def _text(data: memoryview) -> str:
    """A name; it goes into the log."""
    text = bytes(data[: MAX_NAME + 1]).decode("ascii", "replace")
    if len(text) > MAX_NAME or not (text.isascii() and text.isprintable()) or " " in text:
        raise WireError(f"a name is longer than {MAX_NAME} characters or not plain ASCII")
    return text
