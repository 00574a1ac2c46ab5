"""A local Triton's life: it starts or says why not, and never leaves a process behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from server import ports
from server.errors import ServerError
from server.local import run_triton
from server.ports import as_clients_name, check_ports, free_port, is_loopback

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
CLOSED_OVER_HTTP = [
    ("repository/index", "POST"),
    ("repository/models/slide_encoder/unload", "POST"),
    ("systemsharedmemory/status", "GET"),
    ("cudasharedmemory/status", "GET"),
    ("trace/setting", "GET"),
    ("logging", "GET"),
]


def test_a_taken_port_is_named(toy_repository: Path, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind((LOOPBACK, 0))
        holder.listen()
        port = holder.getsockname()[1]
        with (
            pytest.raises(ServerError, match=f"port {port} on 127.0.0.1 .* choose another with --grpc-port"),
            run_triton(toy_repository, log=tmp_path / "log", grpc_port=port),
        ):
            pass


def test_a_free_port_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was given one does not listen on it yet."""
    few = [free_port(LOOPBACK) for _ in range(4)]
    monkeypatch.setattr(ports, "FREE_PORTS", few)
    monkeypatch.setattr(ports, "_GIVEN", set())
    with socket.create_server((LOOPBACK, few[0])):
        assert {free_port(LOOPBACK) for _ in range(3)} == set(few[1:])
        with pytest.raises(ServerError, match=r"no free port on 127\.0\.0\.1 between"):
            free_port(LOOPBACK)


def test_all_taken_ports_are_named_at_once_with_free_ones() -> None:
    with socket.create_server((LOOPBACK, 0)) as one, socket.create_server((LOOPBACK, 0)) as two:
        taken = [one.getsockname()[1], two.getsockname()[1]]
        with pytest.raises(ServerError) as refused:
            check_ports(
                {"grpc": (LOOPBACK, taken[0]), "metrics": (LOOPBACK, taken[1]), "http": (LOOPBACK, 0)}
            )
    line = str(refused.value)
    assert all(f"port {port} on {LOOPBACK} can't be used" in line for port in taken)
    others = re.search(r"another with (--grpc-port (\d+) --metrics-port (\d+)) \(make serve", line)
    assert others, line
    assert f'ARGS="{others[1]}"' in line
    check_ports({name: (LOOPBACK, int(port)) for name, port in zip("gm", others.groups()[1:], strict=True)})


@pytest.mark.parametrize(
    ("host", "named"),
    [("0.0.0.0", "localhost:9001"), ("::", "localhost:9001"), ("gpu", "gpu:9001"), ("::1", "[::1]:9001")],
)
def test_clients_are_given_an_address_that_they_can_reach(host: str, named: str) -> None:
    assert as_clients_name(host, 9001) == named


def test_a_missing_wheel_names_the_remedy(toy_repository: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match="run `make triton`"),
        run_triton(toy_repository, log=tmp_path / "log", triton_home=tmp_path),
    ):
        pass


def test_a_missing_export_names_the_models_and_the_remedy(toy_copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(toy_copy / "slide_encoder" / "1")
    with (
        pytest.raises(ServerError, match=r"nothing is exported for slide_encoder in .* run `make export`"),
        run_triton(toy_copy, log=tmp_path / "log"),
    ):
        pass


def test_a_log_that_can_not_be_written_is_named(toy_repository: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"can't write the log .*: Is a directory"),
        run_triton(toy_repository, log=tmp_path),
    ):
        pass


def test_an_empty_folder_is_no_repository(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match="is no model repository"),
        run_triton(tmp_path, log=tmp_path / "log"),
    ):
        pass


def garble_graph(repository: Path) -> None:
    (repository / "tile_encoder/1/model.onnx").write_bytes(b"not a graph")


def garble_config(repository: Path) -> None:
    (repository / "slide_encoder/configs/onnxruntime.pbtxt").write_text("nonsense {")


def open_dims(repository: Path) -> None:
    (repository / "tile_encoder/configs/onnxruntime.pbtxt").unlink()


def drop_member(repository: Path) -> None:
    shutil.rmtree(repository / "slide_encoder")


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (garble_graph, "model 'tile_encoder' failed to load: .*Protobuf parsing failed"),
        (garble_config, "model 'slide_encoder' has no usable configuration: .*onnxruntime.pbtxt"),
        (open_dims, r"'tile_encoder' failed to load: .*\[-1, 128\] in the graph but TYPE_FP32 \[-1, -1\]"),
        (drop_member, "ensemble slide_pipeline contains models that are not available .*slide_encoder"),
    ],
)
def test_a_repository_that_does_not_load_is_explained_in_one_line(
    toy_copy: Path, tmp_path: Path, break_it: Callable[[Path], None], sentence: str
) -> None:
    break_it(toy_copy)
    log = tmp_path / "triton.log"
    with pytest.raises(ServerError, match=sentence) as error, run_triton(toy_copy, log=log):
        pass
    assert "\n" not in str(error.value)
    assert str(log) in str(error.value)
    assert children_left() == []


def test_flags_reach_the_server_and_unknown_ones_are_named(toy_repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with run_triton(toy_repository, log=log, flags=["--id=toy"], http_port=free_port(LOOPBACK)) as server:
        with triton.InferenceServerClient(server.url) as client:
            assert client.get_server_metadata().name == "toy"
        port = re.search(r"Started HTTPService at 127.0.0.1:(\d+)", log.read_text())
        assert port is not None
        with urllib.request.urlopen(f"http://{LOOPBACK}:{port[1]}/v2/health/ready") as answer:
            assert answer.status == 200
        with urllib.request.urlopen(server.metrics_url) as answer:
            assert b'nv_inference_request_success{model="tile_encoder"' in answer.read()
    with (
        pytest.raises(ServerError, match="unrecognized option '--no-such-flag'"),
        run_triton(toy_repository, log=log, flags=["--no-such-flag"]),
    ):
        pass


def http_status(url: str, method: str = "GET", headers: dict[str, str] | None = None) -> int:
    request = urllib.request.Request(url, b"{}" if method == "POST" else None, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_calls_that_no_client_needs_are_closed_on_both_doors(toy_repository: Path, tmp_path: Path) -> None:
    port = free_port(LOOPBACK)
    with run_triton(toy_repository, log=tmp_path / "log", http_port=port) as server:
        with triton.InferenceServerClient(server.url) as client:
            for call in (
                client.get_model_repository_index,
                client.get_trace_settings,
                client.get_log_settings,
                client.get_system_shared_memory_status,
            ):
                with pytest.raises(InferenceServerException, match="protocol is restricted"):
                    call()
            assert client.get_model_config("slide_encoder").config.name == "slide_encoder"
        base = f"http://{LOOPBACK}:{port}/v2"
        for path, method in CLOSED_OVER_HTTP:
            assert http_status(f"{base}/{path}", method) == 403, path
        assert http_status(f"{base}/models/slide_encoder/config") == 200
        modes = {path.stat().st_mode & 0o777 for path in shared_memory(os.getpid(), server.url.split(":")[1])}
        assert modes == {0o600}


def test_shared_memory_is_open_to_clients_where_it_is_asked_for(toy_repository: Path, tmp_path: Path) -> None:
    with (
        run_triton(toy_repository, log=tmp_path / "log", client_shared_memory=True) as server,
        triton.InferenceServerClient(server.url) as client,
    ):
        assert not client.get_system_shared_memory_status().regions
        with pytest.raises(InferenceServerException, match="protocol is restricted"):
            client.get_log_settings()


def test_a_crash_of_the_server_leaves_nothing(toy_repository: Path, tmp_path: Path) -> None:
    with run_triton(toy_repository, log=tmp_path / "log") as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert {process.pid for process in family} > {server.pid}
        server.kill()
        assert gone(family)
        with (
            triton.InferenceServerClient(server.url) as client,
            pytest.raises(InferenceServerException, match="UNAVAILABLE"),
        ):
            client.is_server_live()
    assert shared_memory(os.getpid(), server.url.split(":")[1]) == []


@contextmanager
def server_process(repository: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`python -m server`, once it says that it serves."""
    with subprocess.Popen(
        [sys.executable, "-m", "server", "--repository", repository, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert (
            "serving slide_encoder, slide_occlusion, slide_pipeline, tile_encoder"
            in process.stdout.readline()
        )
        try:
            yield process
        finally:
            process.kill()  # where a test has failed; its guard ends the rest


def free_ports() -> list[str]:
    return ["--grpc-port", str(free_port(LOOPBACK)), "--metrics-port", str(free_port(LOOPBACK))]


@pytest.mark.parametrize(
    ("number", "grace", "code"),
    [(signal.SIGINT, "5", 0), (signal.SIGTERM, "0", 0), (signal.SIGKILL, "10", -signal.SIGKILL)],
)
def test_the_end_of_the_foreground_server_leaves_nothing(
    toy_repository: Path, tmp_path: Path, number: int, grace: str, code: int
) -> None:
    log = tmp_path / "log" / "triton.log"
    with server_process(toy_repository, *free_ports(), "--log", str(log), "--grace", grace) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        assert {"tritonserver", "triton_python_backend_stub"} <= {member.name() for member in family}
        process.send_signal(number)
        assert process.wait(timeout=120) == code
        assert gone(family)
    assert "Started GRPCInferenceService" in log.read_text()
    assert shared_memory(process.pid) == []


@pytest.mark.parametrize("front", [[], ["--front"]], ids=["alone", "behind a front"])
def test_a_foreground_server_that_dies_is_started_again(
    toy_repository: Path, tmp_path: Path, infer: Callable[..., Any], front: list[str]
) -> None:
    log = tmp_path / "triton.log"
    addresses = free_ports()
    with server_process(toy_repository, *addresses, *front, "--log", str(log)) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        stub = next(member for member in family if "slide_encoder_0_0" in member.cmdline())
        stub.kill()
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == (
            f"model 'slide_encoder': its process {stub.pid} died (log: {log}.previous); "
            "starting it again in 1 s\n"
        )
        assert gone(family)
        assert "metrics" in process.stdout.readline()
        assert "next, in another terminal" in process.stdout.readline()
        assert "serving slide_encoder" in process.stdout.readline()
        slide = {"EMBEDDINGS": np.ones((3, 128), np.float32), "COORDS": np.zeros((3, 2), np.int64)}
        url = f"{LOOPBACK}:{addresses[1]}"
        with grpc.insecure_channel(url) as channel:  # a front connects again within half a second
            live = service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive
            while not answers(live):
                time.sleep(0.05)
        assert infer(url, "slide_encoder", **slide)["SLIDE"].shape == (128,)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    assert shared_memory(process.pid) == []


def answers(live: Callable[..., Any]) -> bool:
    try:
        return bool(live(service_pb2.ServerLiveRequest()).live)
    except grpc.RpcError:
        return False


def test_a_server_behind_its_front_outlives_a_request_that_ends_triton(
    toy_repository: Path, tmp_path: Path, infer: Callable[..., Any]
) -> None:
    addresses = free_ports()
    options = ["--host", "0.0.0.0", "--front", "--log", str(tmp_path / "triton.log")]
    with server_process(toy_repository, *addresses, *options) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        url = f"{LOOPBACK}:{addresses[1]}"
        hostile = service_pb2.ModelInferRequest(
            model_name="slide_encoder", raw_input_contents=[b"", bytes(16)]
        )
        hostile.inputs.add(name="EMBEDDINGS", datatype="FP32", shape=[1 << 57, 128])
        hostile.inputs.add(name="COORDS", datatype="INT64", shape=[1, 2])
        with grpc.insecure_channel(url) as channel, pytest.raises(grpc.RpcError, match="0 came"):
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(hostile)
        slide = {"EMBEDDINGS": np.ones((3, 128), np.float32), "COORDS": np.zeros((3, 2), np.int64)}
        assert infer(url, "slide_encoder", **slide)["SLIDE"].shape == (128,)
        assert all(member.is_running() for member in family)
        (triton_itself,) = (member for member in family if member.name() == "tritonserver")
        exposed = [c.laddr for c in triton_itself.net_connections() if c.status == "LISTEN"]
        assert exposed
        assert all(address.ip.endswith(LOOPBACK) for address in exposed)
        lines = (tmp_path / "front.log").read_text().splitlines()
        assert ["INVALID_ARGUMENT" in line for line in lines] == [True, False]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0


def test_the_end_of_the_guard_leaves_nothing(toy_repository: Path, tmp_path: Path) -> None:
    with server_process(toy_repository, *free_ports(), "--log", str(tmp_path / "log")) as process:
        (guard,) = psutil.Process(process.pid).children()
        family = guard.children(recursive=True)
        guard.kill()
        assert gone(family)
        assert process.wait(timeout=120) == 1
        assert process.stderr is not None
        assert "error: tritonserver ended by itself" in process.stderr.read()


def test_the_command_line_prints_one_line_and_fails(toy_copy: Path, tmp_path: Path) -> None:
    garble_graph(toy_copy)
    options = ["--repository", str(toy_copy), *free_ports(), "--log", str(tmp_path / "log")]
    command = [sys.executable, "-m", "server", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: model 'tile_encoder' failed to load: ")
    assert result.stderr.count("\n") == 1


def test_the_server_stays_on_loopback_unless_a_front_is_named(toy_repository: Path, tmp_path: Path) -> None:
    options = ["--repository", str(toy_repository), *free_ports(), "--log", str(tmp_path / "log")]
    for host in ("0.0.0.0", "::", "no-such-host.invalid"):
        command = [sys.executable, "-m", "server", *options, "--host", host]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert "or give --front" in result.stderr
    for options, why in (
        (["--tls", "server"], "--tls is the front's"),
        (["--grace", "nan"], "--grace is nan: give 0 to 3600 seconds"),
        (["--front", "--shared-memory"], "--front passes no shared memory on"),
        (["--front", "--tls", "server", "--certs", "/nowhere"], "/nowhere/tls.key can't be read"),
    ):
        command = [sys.executable, "-m", "server", "--repository", str(toy_repository), *free_ports()]
        command += ["--log", str(tmp_path / "log"), *options]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert f"error: {why}" in result.stderr
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")


def gone(family: list[psutil.Process]) -> bool:
    """Whether all of these processes end by themselves."""
    return not psutil.wait_procs(family, timeout=120)[1]


def children_left() -> list[str]:
    return [process.name() for process in psutil.Process().children() if "guard.py" in process.cmdline()]


def shared_memory(pid: int, port: str = "") -> list[Path]:
    """What the servers that process `pid` started (the one at `port`) left in shared memory."""
    return list(Path("/dev/shm").glob(f"triton_{pid}_{port}*"))
