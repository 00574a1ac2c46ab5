"""The front before a real Triton: what it refuses, what it passes on, and what one client can hold."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import trustme
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from server.front.proxy import INFER
from server.local import LOOPBACK, RunningServer, run_triton
from server.ports import free_port
from tests.support.fronted import fronted
from tests.support.served import counted, suspended, wait_for_queue, wait_until

ROOT = Path(__file__).resolve().parents[3]
HEALTH = "/grpc.health.v1.Health/Check"
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def server(toy_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A Triton whose models have no contract."""
    with run_triton(toy_repository, log=tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def url(server: RunningServer) -> Iterator[str]:
    with fronted(server.url) as listening:
        yield listening


def slide(tiles: int = 3, width: int = 128) -> Arrays:
    return {"EMBEDDINGS": np.ones((tiles, width), np.float32), "COORDS": np.zeros((tiles, 2), np.int64)}


def message(arrays: Arrays, model: str = "slide_encoder") -> bytes:
    built = service_pb2.ModelInferRequest(model_name=model)
    for name, array in arrays.items():
        built.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        built.raw_input_contents.append(array.tobytes())
    return bytes(built.SerializeToString())


def call(url: str, method: str, data: bytes, **options: Any) -> bytes:
    with grpc.insecure_channel(url) as channel:
        answer: bytes = channel.unary_unary(method)(data, timeout=30, **options)
        return answer


def refusal(url: str, data: bytes, method: str = INFER) -> tuple[str, str]:
    """The status and the one line with which a call is refused."""
    with pytest.raises(grpc.RpcError) as error:
        call(url, method, data)
    assert "\n" not in error.value.details()
    return error.value.code().name, error.value.details()


def infers(channel: grpc.Channel) -> Any:
    """`ModelInfer` of a channel that is connected: calls arrive in the order in which they are made."""
    channel.unary_unary(HEALTH)(b"", timeout=30)
    return channel.unary_unary(INFER)


def test_an_answer_is_the_servers_to_the_byte(server: RunningServer, url: str) -> None:
    tiles = np.random.default_rng(0).integers(0, 199, (64, 224, 224, 3), np.uint8)
    for data in (message(slide(1000)), message({"TILES": tiles}, "tile_encoder")):
        assert call(url, INFER, data) == call(server.url, INFER, data)


@pytest.mark.parametrize(
    ("model", "inputs", "raw", "why"),
    [
        (
            "slide_encoder",
            [("EMBEDDINGS", "FP32", [1 << 62, 128])],
            [b""],
            "has 2361183241434822606848 bytes",
        ),
        ("slide_encoder", [("EMBEDDINGS", "FP32", [-1, 128])], [b""], r"is \[-1, 128\], not \[any, 128\]"),
        ("slide_encoder", [("EMBEDDINGS", "FP32", [0, 128])], [b""], r"is \[0, 128\], not \[any, 128\]"),
        ("slide_encoder", [("EMBEDDINGS", "FP32", [1, 127])], [bytes(508)], r"not \[any, 128\]"),
        ("slide_encoder", [("EMBEDDINGS", "FP32", [1])], [bytes(4)], r"is \[1\], not \[any, 128\]"),
        ("slide_encoder", [("EMBEDDINGS", "FP16", [1, 128])], [bytes(256)], "is FP16, not FP32"),
        ("slide_encoder", [("EMBEDDINGS", "FP32", [1, 128])], [bytes(511)], "has 512 bytes, 511 came"),
        ("slide_encoder", [("EMBEDDINGS", "FP32", [1, 128])], [], "1 inputs but data of 0"),
        ("slide_encoder", [("EMBEDDINGS", "FP32", [1, 128])] * 2, [bytes(512)] * 2, "a second input EMBEDD"),
        ("slide_encoder", [("OTHER", "FP32", [1, 128])], [bytes(512)], "unknown input OTHER"),
        ("tile_encoder", [("TILES", "UINT8", [1 << 56, 224, 224, 3])], [b""], "bytes, 0 came"),
        ("tile_encoder", [("TILES", "BYTES", [1, 224, 224, 3])], [bytes(8)], "is BYTES, not UINT8"),
    ],
)
def test_a_request_that_contradicts_itself_or_the_model_is_refused(
    url: str, model: str, inputs: list[tuple[str, str, list[int]]], raw: list[bytes], why: str
) -> None:
    built = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=raw)
    for name, datatype, shape in inputs:
        built.inputs.add(name=name, datatype=datatype, shape=shape)
    code, said = refusal(url, built.SerializeToString())
    assert code == "INVALID_ARGUMENT"
    assert re.search(why, said)


@pytest.mark.parametrize("changed", [{"id": "a\nb"}, {"id": "x" * 128}, {"model_version": "\x1b[31m"}])
def test_what_logs_repeat_is_short_and_printable(url: str, changed: dict[str, str]) -> None:
    built = service_pb2.ModelInferRequest.FromString(message(slide()))
    built.id = "0c7e-1"
    assert call(url, INFER, built.SerializeToString())
    for name, value in changed.items():
        setattr(built, name, value)
    code, said = refusal(url, built.SerializeToString())
    assert (code, said) == (
        "INVALID_ARGUMENT",
        "a name is longer than 127 characters or not plain ASCII",
    )


def test_what_is_no_request_is_refused(url: str) -> None:
    assert refusal(url, b"\xff" * 20) == (
        "INVALID_ARGUMENT",
        "the message is no protobuf: a number doesn't end",
    )
    assert refusal(url, message({}, "no_model"))[0] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("tiles", "masks", "change", "why"),
    [
        (50, 100_000, {}, "100000 masks of 50 tiles are 5100000 tokens, this export takes"),
        (200_001, 0, {}, "a slide of 200001 tiles: this export takes 1 to 200000"),
        (3, 2, {"KEEP": np.ones((2, 4), np.bool_)}, "N is 3 in EMBEDDINGS, 4 in KEEP"),
        (3, 0, {"COORDS": np.full((3, 2), 256_000)}, r"COORDS of tile 0 are \(256000, 256000\), out of data"),
        (3, 0, {"EMBEDDINGS": np.full((3, 96), np.nan, np.float32)}, "EMBEDDINGS of tile 0 are not finite"),
    ],
)
def test_the_contracts_limits_hold_before_the_server(
    triton_url: str, caplog: pytest.LogCaptureFixture, tiles: int, masks: int, change: Arrays, why: str
) -> None:
    arrays = slide(tiles, 96) | ({"KEEP": np.ones((masks, tiles), np.bool_)} if masks else {})
    model = "slide_occlusion" if masks else "slide_encoder"
    with caplog.at_level("INFO"), fronted(triton_url) as url:
        code, said = refusal(url, message(arrays | change, model))
    assert (code, bool(re.search(why, said))) == ("INVALID_ARGUMENT", True), said
    assert f"INVALID_ARGUMENT ({said})" in caplog.text, "it was the server that refused"


def test_positions_of_the_pipeline_are_looked_at_too(triton_url: str) -> None:
    """On a GPU the graph takes one outside the grid for another tile's."""
    arrays = {"TILES": np.zeros((2, 224, 224, 3), np.uint8), "COORDS": np.array([[0, 0], [0, -1]])}
    with fronted(triton_url) as url:
        _, said = refusal(url, message(arrays, "slide_pipeline"))
    assert "COORDS of tile 1 are (0, -1)" in said


@pytest.mark.parametrize(
    "name",
    [
        *("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings"),
        *(
            f"{kind}SharedMemory{what}"
            for kind in ("System", "Cuda")
            for what in ("Status", "Register", "Unregister")
        ),
        *("ModelStreamInfer", "Other"),
    ],
)
def test_calls_that_no_client_needs_are_not_passed_on(url: str, name: str) -> None:
    method = f"/inference.GRPCInferenceService/{name}"
    assert refusal(url, b"", method) == ("PERMISSION_DENIED", f"{method} is not passed on")


def test_restricted_calls_that_are_passed_on_need_tritons_token(server: RunningServer) -> None:
    with fronted(server.url, admin=True) as url, triton.InferenceServerClient(url) as client:
        for call in (client.get_model_repository_index, client.get_trace_settings, client.get_log_settings):
            with pytest.raises(InferenceServerException, match="protocol is restricted"):
                call()
        with pytest.raises(InferenceServerException, match="not passed on"):
            client.load_model("tile_encoder")


def test_health_and_what_a_client_asks_are_passed_on(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tile_encoder")
        assert client.get_model_config("tile_encoder").config.name == "tile_encoder"
        assert client.get_server_metadata().name == "triton"
        assert client.get_inference_statistics("tile_encoder").model_stats
    assert call(url, HEALTH, b"") == b"\x08\x01"  # SERVING


def test_metadata_reaches_the_server_and_comes_back(server: RunningServer, url: str) -> None:
    """Triton's answer to a header says that it got it: its token of the restricted calls."""
    with fronted(server.url, admin=True) as through:
        headers = (("triton-grpc-protocol-admin", "wrong"), ("x-bin", b"\x00\xff"))
        method = "/inference.GRPCInferenceService/LogSettings"
        with pytest.raises(grpc.RpcError) as direct:
            call(server.url, method, b"", metadata=headers)
        with pytest.raises(grpc.RpcError) as behind:
            call(through, method, b"", metadata=headers)
    assert (behind.value.code(), behind.value.details()) == (direct.value.code(), direct.value.details())


def test_a_compressed_message_is_refused(url: str) -> None:
    """A kilobyte may become a gigabyte."""
    with pytest.raises(grpc.RpcError) as error:
        call(url, INFER, message(slide()), compression=grpc.Compression.Gzip)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_one_client_can_hold_only_so_many_requests(server: RunningServer, tmp_path: Path) -> None:
    data = message(slide())
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    identity = authority.issue_cert("localhost")
    identity.private_key_pem.write_to_path(tmp_path / "tls.key")
    identity.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")

    def channel(name: str) -> grpc.Channel:
        own = authority.issue_cert(f"{name}.test", common_name=name)
        credentials = grpc.ssl_channel_credentials(
            authority.cert_pem.bytes(), own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()
        )
        return grpc.secure_channel(through.replace(LOOPBACK, "localhost"), credentials)

    with (
        fronted(server.url, in_flight=2, tls="mutual", certs=tmp_path) as through,
        channel("one") as one,
        channel("other") as other,
    ):
        infer = infers(one)
        with suspended(server.pid, "slide_encoder"):
            held = [infer.future(data, timeout=60) for _ in range(2)]
            with pytest.raises(grpc.RpcError) as error:
                infer(data, timeout=30)
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.value.details().endswith("/one has 2 requests in flight")
            assert one.unary_unary(HEALTH)(b"", timeout=30)
            held.append(other.unary_unary(INFER).future(data, timeout=60))
        assert len({bytes(answer.result()) for answer in held}) == 1
        assert infer(data, timeout=30)


def test_one_client_can_hold_only_so_many_bytes(server: RunningServer) -> None:
    data = message(slide(800))  # 0.4 MiB
    with fronted(server.url, mebibytes=1) as url, grpc.insecure_channel(url) as channel:
        infer = infers(channel)
        with suspended(server.pid, "slide_encoder"):
            held = [infer.future(data, timeout=60) for _ in range(2)]
            wait_for_queue(server, "slide_encoder", 1)  # and the other one is computed
            with pytest.raises(grpc.RpcError, match="has 0 MiB in flight and sends 0 MiB") as error:
                infer(data, timeout=30)
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert all(answer.result() for answer in held)
        assert infer(data, timeout=30)
        code, said = refusal(url, message(slide(3000)))
        assert (code, "larger than max" in said) == ("RESOURCE_EXHAUSTED", True)


@pytest.mark.parametrize("end", ["cancelled", "late"])
def test_a_call_that_its_client_gave_up_ends_at_the_server_too(
    server: RunningServer, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    # Two of them don't fit into one batch.
    data = message({"TILES": np.zeros((33, 224, 224, 3), np.uint8)}, "tile_encoder")
    ended = r'nv_inference_request_failure\{model="tile_encoder",reason="CANCELED"'
    before = counted(server, ended)
    with (
        caplog.at_level("INFO"),
        fronted(server.url, in_flight=8) as url,
        grpc.insecure_channel(url) as channel,
    ):
        infer = infers(channel)
        with suspended(server.pid, "tile_encoder"):
            held = [infer.future(data, timeout=60) for _ in range(7)]
            wait_for_queue(server, "tile_encoder", 6)
            queued = infer.future(data, timeout=60 if end == "cancelled" else 8)
            wait_for_queue(server, "tile_encoder", 7)
            with pytest.raises(grpc.RpcError, match="has 8 requests in flight"):
                infer(data, timeout=30)
            if end == "cancelled":
                queued.cancel()
            wait_until(lambda: bool(re.search(r"\] (CANCELLED|DEADLINE_EXCEEDED) \d+ ms", caplog.text)))
            held.append(infer.future(data, timeout=60))  # its place is free
        assert len({bytes(answer.result()) for answer in held}) == 1
    wait_until(lambda: counted(server, ended) == before + 1)


def test_connections_are_limited(server: RunningServer) -> None:
    own = [("grpc.use_local_subchannel_pool", 1)]
    with fronted(server.url, connections=3) as url, ExitStack() as opened:
        channels = [opened.enter_context(grpc.insecure_channel(url, own)) for _ in range(6)]
        for channel in channels[:3]:
            channel.unary_unary(HEALTH)(b"", timeout=30)
        for channel in channels[3:]:
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary(HEALTH)(b"", timeout=30)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_server_that_ends_and_comes_back_is_found_again(toy_repository: Path, tmp_path: Path) -> None:
    data = message(slide())
    port = free_port(LOOPBACK)

    def answers() -> bool:
        try:
            return bool(call(through, INFER, data))
        except grpc.RpcError:
            return False

    with fronted(f"{LOOPBACK}:{port}") as through:
        for _ in range(2):
            assert refusal(through, data)[0] == "UNAVAILABLE"
            with run_triton(toy_repository, log=tmp_path / "log", grpc_port=port):
                wait_until(answers)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            ["--tls", "server", "--certs", "/nowhere"],
            "/nowhere/tls.key can't be read (No such file or directory)",
        ),
        (["--listen", "8003"], "--listen is '8003': give host:port"),
        (["--in-flight", "0"], "--in-flight and --connections are at least 1"),
        (["--mebibytes", "2048"], "--mebibytes is 2048: give 1 to 2047"),
        (["--grace", "nan"], "--grace is nan: give 0 to 3600 seconds"),
        (["--listen", "127.0.0.1:99999"], "port 99999 on 127.0.0.1 can't be used"),
    ],
)
def test_a_mistake_on_the_fronts_command_line_is_one_line(options: list[str], why: str) -> None:
    command = [sys.executable, "-m", "server.front", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"error: {why}" in done.stderr.splitlines()[-1]


def test_the_command_line_logs_every_inference_and_ends_in_order(server: RunningServer) -> None:
    listen = f"{LOOPBACK}:{free_port(LOOPBACK)}"
    command = [sys.executable, "-m", "server.front", "--listen", listen, "--upstream", server.url]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert f"{listen} before {server.url}, TLS off" in process.stderr.readline()
        with triton.InferenceServerClient(listen) as client:
            assert client.is_server_live()
        call(listen, INFER, message(slide()))
        line = process.stderr.readline()
        assert re.search(
            r"ipv4:127\.0\.0\.1 slide_encoder EMBEDDINGS\[3, 128\] COORDS\[3, 2\] OK \d+ ms$", line
        )
        process.terminate()
        assert process.wait(timeout=120) == 0
