"""The classes of published weaknesses of Triton that a client can try (docs/security.md): `make cve`.

Everything goes to servers on loopback that these tests start, as start.sh deploys them.
"""

from __future__ import annotations

import dataclasses
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from server.local import run_triton
from tests.support.fronted import fronted

ADMIN = {"triton-grpc-protocol-admin": "token-of-the-tests"}
Tensors = dict[str, tuple[str, list[int], bytes]]


def request(model: str, tensors: Tensors) -> service_pb2.ModelInferRequest:
    built = service_pb2.ModelInferRequest(model_name=model)
    for name, (data_type, shape, data) in tensors.items():
        built.inputs.add(name=name, datatype=data_type).shape.extend(shape)
        built.raw_input_contents.append(data)
    return built


def infer(url: str, built: service_pb2.ModelInferRequest) -> grpc.StatusCode:
    with grpc.insecure_channel(url) as channel:
        try:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(built, timeout=120)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def slide(tiles: int = 1) -> Tensors:
    return {
        "EMBEDDINGS": ("FP32", [tiles, 96], bytes(tiles * 96 * 4)),
        "COORDS": ("INT64", [tiles, 2], bytes(tiles * 16)),
    }


@pytest.fixture(params=["triton", "front"])
def unharmed(deployment: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The deployed server, directly or behind a front; the same processes have to serve afterwards."""

    def processes() -> set[int]:
        return {process.pid for process in psutil.Process(deployment.pid).children()}

    before = processes()
    if request.param == "front":
        with fronted(deployment.url, admin=True) as url:
            yield dataclasses.replace(deployment, url=url)
    else:
        yield deployment
    done = deployment.probe("infer")
    assert done.returncode == 0, done.stderr
    assert processes() == before


WRAPPING: dict[str, tuple[str, Tensors]] = {
    "embeddings": ("slide_encoder", {**slide(), "EMBEDDINGS": ("FP32", [1 << 59, 96], b"")}),
    "coordinates": ("slide_encoder", {**slide(), "COORDS": ("INT64", [1 << 60, 2], b"")}),
    "masks": ("slide_occlusion", {**slide(4), "KEEP": ("BOOL", [1 << 62, 4], b"")}),
}


@pytest.mark.parametrize(("model", "tensors"), WRAPPING.values(), ids=WRAPPING)
def test_a_shape_whose_bytes_wrap_is_refused_or_ends_the_server_with_a_line(
    demo_repository: Path, tmp_path: Path, model: str, tensors: Tensors
) -> None:
    """CVE-2026-24173, -24210. Triton 2.51 ends: the stub builds the array before our backend is called."""
    with run_triton(demo_repository, log=tmp_path / "log", grace=30) as server:
        if infer(server.url, request(model, tensors)) == grpc.StatusCode.INVALID_ARGUMENT:
            assert infer(server.url, request("slide_encoder", slide())) == grpc.StatusCode.OK
        else:
            server.process.wait(timeout=120)
            assert f"model '{model}': its process" in server.log.read_text()


@pytest.mark.parametrize(("model", "tensors"), WRAPPING.values(), ids=WRAPPING)
def test_a_front_refuses_a_shape_whose_bytes_wrap(deployment: Any, model: str, tensors: Tensors) -> None:
    before = psutil.Process(deployment.pid).create_time()
    with fronted(deployment.url) as url:
        assert infer(url, request(model, tensors)) == grpc.StatusCode.INVALID_ARGUMENT
        assert infer(url, request("slide_encoder", slide())) == grpc.StatusCode.OK
    assert psutil.Process(deployment.pid).create_time() == before


@pytest.mark.parametrize(
    ("model", "tensors"),
    [
        ("slide_encoder", {**slide(), "EMBEDDINGS": ("FP32", [-1, 96], b"")}),
        ("slide_encoder", {**slide(), "EMBEDDINGS": ("FP32", [1 << 40, 96], b"")}),
        ("slide_encoder", {**slide(), "EMBEDDINGS": ("FP32", [1, 96, 1], bytes(384))}),
        ("slide_encoder", {**slide(), "COORDS": ("FP64", [1, 2], bytes(16))}),
        ("slide_encoder", {**slide(), "EMBEDDINGS": ("FP32", [1, 96], bytes(383))}),
        ("tile_encoder", {"TILES": ("UINT8", [(1 << 32) + 1, 224, 224, 3], b"")}),
        ("tile_encoder", {"TILES": ("UINT8", [1 << 56, 224, 224, 3], b"")}),
        ("tile_encoder", {"TILES": ("BYTES", [1, 224, 224, 3], bytes(8))}),
    ],
)
def test_shapes_types_and_sizes_that_contradict_are_refused(
    unharmed: Any, model: str, tensors: Tensors
) -> None:
    """CVE-2025-23323, -23324, -23326, -23327 (integer overflow), -23321 (division by zero)."""
    assert infer(unharmed.url, request(model, tensors)) == grpc.StatusCode.INVALID_ARGUMENT


def test_thousands_of_outputs_take_no_memory(unharmed: Any) -> None:
    """CVE-2026-24146, CVE-2025-23331."""
    server = psutil.Process(unharmed.pid)
    before = server.memory_info().rss
    built = request("slide_encoder", slide())
    for _ in range(10_000):
        built.outputs.add(name="SLIDE")
    infer(unharmed.url, built)
    assert server.memory_info().rss - before < 200e6


def test_streams_that_are_cancelled_before_they_are_processed_do_no_harm(unharmed: Any) -> None:
    """CVE-2025-23322, CVE-2026-24266."""
    with grpc.insecure_channel(unharmed.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for number in range(50):
            call = stub.ModelStreamInfer(iter([request("slide_encoder", slide(100))] * 4))
            time.sleep(0.002 * (number % 5))
            call.cancel()


@pytest.mark.parametrize("length", ["-1", "999999999999999999999", "abc", "4294967297"])
def test_a_header_that_is_no_length_is_refused(unharmed: Any, length: str) -> None:
    """CVE-2026-24175; HTTP is reached from inside the container alone."""
    connection = http.client.HTTPConnection(unharmed.http_url.removeprefix("http://"), timeout=120)
    path = "/v2/models/slide_encoder/infer"
    connection.request("POST", path, b"{}", {"Inference-Header-Content-Length": length})
    assert connection.getresponse().status in (400, 500)


MODEL_CONTROL: dict[str, Callable[[triton.InferenceServerClient], Any]] = {
    "CVE-2025-23316": lambda client: client.load_model("x'; import os", headers=ADMIN),
    "CVE-2026-24208": lambda client: client.load_model("../../etc", headers=ADMIN),
    "CVE-2026-24147": lambda client: client.load_model("m", config="{}", headers=ADMIN),
    "CVE-2024-0087": lambda client: client.update_log_settings({"log_file": "/tmp/log"}, headers=ADMIN),
    "CVE-2024-0095": lambda client: client.update_trace_settings(
        settings={"trace_file": "/tmp/trace"}, headers=ADMIN
    ),
}


@pytest.mark.parametrize("call", MODEL_CONTROL.values(), ids=MODEL_CONTROL)
def test_no_call_loads_a_model_or_names_a_file_even_with_the_token(
    unharmed: Any, call: Callable[[triton.InferenceServerClient], Any]
) -> None:
    with (
        triton.InferenceServerClient(unharmed.url) as client,
        pytest.raises(InferenceServerException),
    ):
        call(client)


def test_error_texts_do_not_name_shared_memory(unharmed: Any) -> None:
    """CVE-2025-23319, -23320, -23334 began with the name of a region in an error's text."""
    commands = [process.cmdline() for process in psutil.Process(unharmed.pid).children()]
    regions = [command[2].lstrip("/") for command in commands if len(command) > 7]
    assert len(regions) == 3
    with triton.InferenceServerClient(unharmed.url) as client:
        for tiles, coords in ((1, 2), (0, 0), (200_001, 200_001)):
            inputs = [
                triton.InferInput("EMBEDDINGS", [tiles, 96], "FP32").set_data_from_numpy(
                    np.zeros((tiles, 96), np.float32)
                ),
                triton.InferInput("COORDS", [coords, 2], "INT64").set_data_from_numpy(
                    np.zeros((coords, 2), np.int64)
                ),
            ]
            with pytest.raises(InferenceServerException) as error:
                client.infer("slide_encoder", inputs)
            assert not any(region in str(error.value) for region in regions)


def test_clients_that_never_finish_a_call_block_nobody(unharmed: Any) -> None:
    """CVE-2026-47476, -47479 (resources held by open calls), for as many connections as a test may open."""
    stop = threading.Event()

    def never() -> Iterator[service_pb2.ModelInferRequest]:
        stop.wait(120)
        yield from ()

    channels = [
        grpc.insecure_channel(unharmed.url, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(50)
    ]
    try:
        for channel in channels:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(never())
        assert infer(unharmed.url, request("slide_encoder", slide())) == grpc.StatusCode.OK
    finally:
        stop.set()
        for channel in channels:
            channel.close()
