"""The front reads from a request what Triton's parser will read, or refuses it."""

from __future__ import annotations

import contextlib
import time

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from server.front.wire import MAX_NAME, MAX_RANK, WireError, read_request

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12)
SHAPES = st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=MAX_RANK)
TENSORS = st.lists(st.tuples(NAMES, NAMES, SHAPES, st.binary(max_size=9)), max_size=3)


@st.composite
def messages(draw: st.DrawFn) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name=draw(NAMES), model_version=draw(NAMES), id=draw(NAMES))
    message.parameters["priority"].int64_param = draw(st.integers(0, 9))
    for name, datatype, shape, raw in draw(TENSORS):
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(raw)
    for name in draw(st.lists(NAMES, max_size=3)):
        message.outputs.add(name=name)
    return message


def agrees(data: bytes, message: service_pb2.ModelInferRequest) -> None:
    found = read_request(data)
    assert found.model == message.model_name
    assert [(one.name, one.datatype, list(one.shape)) for one in found.inputs] == [
        (one.name, one.datatype, list(one.shape)) for one in message.inputs
    ]
    assert [bytes(one) for one in found.raw] == list(message.raw_input_contents)


@given(messages())
def test_a_request_is_read_as_protobuf_reads_it(message: service_pb2.ModelInferRequest) -> None:
    agrees(message.SerializeToString(), message)


@given(messages(), st.data())
@settings(max_examples=400)
def test_a_damaged_request_is_refused_or_read_as_protobuf_reads_it(
    message: service_pb2.ModelInferRequest, data: st.DataObject
) -> None:
    """Bytes replaced, inserted and taken out: nothing may pass the front as other than Triton sees it."""
    damaged = bytearray(message.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(damaged)))
        damaged[start : start + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    refused_or_agreed(bytes(damaged))


@given(st.binary(max_size=64))
@example(b"\x2a\x0b\x1a\x09" + b"\x80\x80\x80\x80\x80\x80\x80\x80\x08")  # a packed 2^59, as in the attack
@example(b"\x2a\x0c\x1a\x0a" + b"\xff" * 9 + b"\x7f")  # bits beyond the 64th
@example(b"\x2a\x04\x18\x01\x18\x02")  # a shape that is not packed
@example(b"\x0a\x01a\x0a\x01b")  # two names: the last counts
@example(b"\x0b\x0c")  # a group
@example(b"\x00\x00")  # the field 0
def test_any_bytes_are_refused_or_read_as_protobuf_reads_them(data: bytes) -> None:
    refused_or_agreed(data)


def refused_or_agreed(data: bytes) -> None:
    message = service_pb2.ModelInferRequest()
    try:
        message.ParseFromString(data)
    except DecodeError:
        message.Clear()
        message.model_name = "no message"  # Triton refuses it: what the front finds harms nobody
    with contextlib.suppress(WireError):
        read_request(data)
        if message.model_name != "no message":
            agrees(data, message)


def tensor(**fields: object) -> bytes:
    return bytes(service_pb2.ModelInferRequest(model_name="m", inputs=[fields]).SerializeToString())


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (tensor(name="x", contents={"fp32_contents": [1.0]}), "data outside raw_input_contents"),
        (tensor(name="x", parameters={"shared_memory_region": {"string_param": "r"}}), "shared memory"),
        (tensor(name="x", shape=[1] * (MAX_RANK + 1)), "more than 8 dimensions"),
        (tensor(name="x y"), "plain ASCII"),
        (tensor(name="x" * (MAX_NAME + 1)), "longer than 127"),
        (
            service_pb2.ModelInferRequest(
                outputs=[{"name": "x", "parameters": {"classification": {"int64_param": 9}}}]
            ).SerializeToString(),
            "classification",
        ),
        (service_pb2.ModelInferRequest(outputs=[{"name": "x"}] * 10_000).SerializeToString(), "256 fields"),
    ],
)
def test_what_is_not_passed_on_is_named(data: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        read_request(data)


def test_a_hostile_request_takes_no_longer_than_a_small_one() -> None:
    """A shape of 10 million numbers, ten million empty fields, names of 10 MB."""
    hostile = [tensor(shape=[1] * 10_000_000), tensor(name="x" * 10_000_000), b"\x3a\x00" * 10_000_000]
    began = time.process_time()
    for data in hostile:
        with pytest.raises(WireError):
            read_request(data)
    assert time.process_time() - began < 0.5
