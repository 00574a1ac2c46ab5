"""What start.sh closes, what stays open, and what the probe says."""

from __future__ import annotations

import dataclasses
import queue
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from server.local import run_triton
from server.ports import free_port
from tests.deploy.conftest import Deployment
from tests.support.served import suspended

ADMIN = {"triton-grpc-protocol-admin": "token-of-the-tests"}
START = Path(__file__).resolve().parents[2] / "deploy" / "base" / "start.sh"

RESTRICTED: dict[str, Callable[..., Any]] = {
    "register shared memory": lambda c, **h: c.register_system_shared_memory("r", "/r", 64, **h),
    "shared memory status": lambda c, **h: c.get_system_shared_memory_status(**h),
    "load a model": lambda c, **h: c.load_model("tile_encoder", **h),
    "unload a model": lambda c, **h: c.unload_model("tile_encoder", **h),
    "list the repository": lambda c, **h: c.get_model_repository_index(**h),
    "trace settings": lambda c, **h: c.get_trace_settings(**h),
    "log settings": lambda c, **h: c.update_log_settings({"log_verbose_level": 1}, **h),
}


@pytest.fixture(scope="module")
def client(deployment: Any) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(deployment.url)


@pytest.mark.parametrize("call", RESTRICTED.values(), ids=RESTRICTED)
@pytest.mark.parametrize("headers", [{}, {"triton-grpc-protocol-admin": "wrong"}], ids=["without", "wrong"])
def test_restricted_calls_are_refused(
    client: triton.InferenceServerClient, call: Callable[..., Any], headers: dict[str, str]
) -> None:
    with pytest.raises(InferenceServerException, match="protocol is restricted"):
        call(client, headers=headers)


@pytest.mark.parametrize(
    "path", ["systemsharedmemory/status", "trace/setting", "logging", "repository/index"]
)
def test_restricted_calls_are_refused_over_http_too(deployment: Any, path: str) -> None:
    def status(headers: dict[str, str]) -> int:
        body = b"{}" if path == "repository/index" else None
        request = urllib.request.Request(f"{deployment.http_url}/v2/{path}", body, headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert status({}) == 403
    assert status({"admin": "wrong"}) == 403
    assert status({"admin": "token-of-the-tests"}) == 200


def test_no_front_end_but_grpc_http_and_metrics_runs(deployment: Any) -> None:
    command = psutil.Process(deployment.pid).cmdline()
    assert {"--allow-sagemaker=false", "--allow-vertex-ai=false"} <= set(command)


def test_python_shared_memory_is_its_users_alone(deployment: Any) -> None:
    stubs = [process.cmdline() for process in psutil.Process(deployment.pid).children()]
    regions = [Path("/dev/shm", command[2].lstrip("/")) for command in stubs if len(command) > 7]
    assert len(regions) == 3
    assert {region.stat().st_mode & 0o777 for region in regions} == {0o600}


@pytest.mark.parametrize(
    ("known", "passed"),
    [
        (["--allow-vertex-ai"], ["--allow-vertex-ai=false"]),
        (
            ["--allow-sagemaker", "--allow-client-shm", "--grpc-max-response-pool-size"],
            ["--grpc-max-response-pool-size=64", "--allow-client-shm=false", "--allow-sagemaker=false"],
        ),
    ],
)
def test_a_flag_is_passed_to_releases_that_know_it(
    demo_repository: Path, tmp_path: Path, known: list[str], passed: list[str]
) -> None:
    """The shell's decision alone: a program that lists `known` as its options and prints what it is given."""
    program = tmp_path / "tritonserver"
    listed = "".join(f"  {name} <boolean>\n" for name in known)
    program.write_text(f'#!/bin/sh\n[ "$1" != --help ] || {{ echo "{listed}" >&2; exit 1; }}\necho "$@"\n')
    program.chmod(0o755)
    settings = {"MODELS": str(demo_repository), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["/bin/sh", str(START)], env=settings, capture_output=True, text=True, check=True)
    given = done.stdout.split()
    optional = ("--allow-sagemaker", "--allow-vertex", "--allow-client-shm", "--grpc-max-response")
    assert [flag for flag in given if flag.startswith(optional)] == passed


def test_the_token_opens_them(client: triton.InferenceServerClient) -> None:
    index = client.get_model_repository_index(headers=ADMIN)
    assert {model.name for model in index.models} >= {"tile_encoder", "slide_encoder", "slide_pipeline"}


def test_models_can_not_be_loaded_or_unloaded_with_the_token_either(
    client: triton.InferenceServerClient,
) -> None:
    with pytest.raises(InferenceServerException, match="explicit model load / unload is not allowed"):
        client.unload_model("tile_encoder", headers=ADMIN)
    assert client.is_model_ready("tile_encoder")


def test_what_a_client_needs_stays_open(client: triton.InferenceServerClient) -> None:
    assert client.is_server_ready()
    assert "contract" in client.get_model_config("tile_encoder").config.parameters
    assert client.get_inference_statistics("tile_encoder").model_stats


def test_a_container_serves_as_the_local_server_does() -> None:
    """What run_triton always says, start.sh says too."""
    local = set(re.findall(r'"(--[a-z-]+(?:=\w+)?)"', (START.parents[2] / "server" / "local.py").read_text()))
    assert {"--model-config-name=onnxruntime", "--model-control-mode=none"} < local
    text = START.read_text().replace('"$config"', "onnxruntime")
    assert "config=${MODEL_CONFIG:-onnxruntime}" in text
    assert local <= set(re.findall(r"--[a-z-]+(?:=\w+)?", text))


def test_http_listens_on_loopback_only(deployment: Any) -> None:
    """gRPC and metrics are put on loopback by these tests; HTTP's address comes from start.sh alone."""
    port = int(deployment.http_url.rpartition(":")[2])
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    addresses = {address for address in listening if int(address.split(":")[1], 16) == port}
    assert addresses == {f"0100007F:{port:04X}"}
    with socket.create_connection(("127.0.0.1", port)):
        pass


def test_the_probe_says_yes(deployment: Any) -> None:
    assert deployment.probe("live").returncode == 0
    assert deployment.probe("infer").returncode == 0


def test_the_probe_refuses_a_cpu_where_a_gpu_is_required(
    deployment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU", "required")
    refused = deployment.probe("infer")
    assert refused.returncode == 1
    assert refused.stderr.startswith("probe: GPU is 'required' and tile_encoder runs on the CPU: ")
    assert refused.stderr.count("\n") == 1
    assert deployment.probe("live").returncode == 0


@pytest.mark.parametrize("mode", ["live", "infer"])
def test_the_probe_finds_a_server_that_hangs(deployment: Any, mode: str) -> None:
    server = psutil.Process(deployment.pid)
    server.suspend()
    try:
        hanging = deployment.probe(mode, "--timeout", "0.5")
    finally:
        server.resume()
    assert (hanging.returncode, hanging.stderr) == (1, "probe: timed out\n")
    assert deployment.probe(mode).returncode == 0


@pytest.mark.parametrize("model", ["tile_encoder", "slide_encoder"])
def test_the_probe_finds_a_model_that_hangs_while_the_other_works(deployment: Any, model: str) -> None:
    with suspended(deployment.pid, model):
        first, second = (deployment.probe("infer", "--timeout", "2") for _ in range(2))
    assert (first.returncode, first.stderr) == (1, "probe: timed out\n")
    assert (second.returncode, second.stderr) == (
        1,
        f"probe: {model} did nothing in 2 s while requests wait for it\n",
    )
    assert deployment.probe("infer").returncode == 0


def test_the_probe_takes_a_busy_server_for_one_that_serves(
    deployment: Any, client: triton.InferenceServerClient
) -> None:
    """A queue at the second step delays the probe beyond its patience, while requests get done."""
    tiles = 2000  # so that a request takes long against the probe's own start
    width = client.get_model_config("slide_encoder").config.input[0].dims[1]
    inputs = [
        triton.InferInput("EMBEDDINGS", [tiles, width], "FP32"),
        triton.InferInput("COORDS", [tiles, 2], "INT64"),
    ]
    inputs[0].set_data_from_numpy(np.zeros((tiles, width), np.float32))
    inputs[1].set_data_from_numpy(np.zeros((tiles, 2), np.int64))
    client.infer("slide_encoder", inputs)
    began = time.perf_counter()
    client.infer("slide_encoder", inputs)
    one = time.perf_counter() - began
    answers: queue.Queue[Exception | None] = queue.Queue()
    # The machine may be a few times as fast or as slow by now.
    for _ in range(16):
        client.async_infer("slide_encoder", inputs, lambda result, error: answers.put(error))
    began = time.perf_counter()
    busy = deployment.probe("infer", "--timeout", f"{3 * one}")
    took, waiting = time.perf_counter() - began, 16 - answers.qsize()
    assert [answers.get(timeout=300) for _ in range(16)] == [None] * 16  # they would keep other tests waiting
    assert busy.returncode == 0, busy.stderr
    assert took > 3 * one
    assert waiting > 0, "the queue was empty before the probe gave up"


@pytest.mark.parametrize(("model", "output"), [("tile_encoder", "EMBEDDINGS"), ("slide_encoder", "SLIDE")])
def test_the_probe_finds_a_server_that_computes_wrong_numbers(
    demo_repository: Path, tmp_path: Path, model: str, output: str
) -> None:
    """Its weights are off by a thousandth, as in another precision; every answer is finite."""
    models = shutil.copytree(demo_repository, tmp_path / "models", symlinks=True)
    path = models / model / "1" / "model.onnx"
    graph = onnx.load(path)
    for tensor in graph.graph.initializer:
        if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            noise = np.random.default_rng(0).normal(1, 1e-3, values.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array((values * noise).astype(np.float32), tensor.name))
    onnx.save(graph, path)
    port = free_port("127.0.0.1")
    with run_triton(models, log=tmp_path / "log", http_port=port) as server:
        served = Deployment(
            url=server.url,
            http_url=f"http://127.0.0.1:{port}",
            metrics_address=server.metrics_url.split("/")[2],
            pid=server.pid,
            models=models,
        )
        found = served.probe("infer")
        assert found.returncode == 1
        assert found.stderr.startswith(
            f"probe: {model} computes wrong numbers: {output} differs from the export's"
        )
        assert found.stderr.count("\n") == 1
        unknown = dataclasses.replace(served, models=tmp_path).probe("infer")
        assert unknown.returncode == 0
        assert "the numbers are not compared" in unknown.stderr


@pytest.mark.parametrize("timeout", ["nan", "inf", "-1"])
def test_the_probe_refuses_a_timeout_that_is_none(deployment: Any, timeout: str) -> None:
    refused = deployment.probe("live", f"--timeout={timeout}")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert refused.stderr.startswith(f"probe: --timeout is {timeout}: ")


def test_the_probe_names_what_is_wrong(deployment: Any) -> None:
    wrong = dataclasses.replace(deployment, http_url=f"http://127.0.0.1:{free_port('127.0.0.1')}").probe(
        "infer"
    )
    assert (wrong.returncode, wrong.stderr) == (1, "probe: <urlopen error [Errno 111] Connection refused>\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TLS": "yes"}, "start.sh: TLS is 'yes': use off, server or mutual\n"),
        (
            {"TLS": "server", "CERTS": "/nowhere"},
            "start.sh: TLS is 'server' but /nowhere/tls.crt can't be read\n",
        ),
        (
            {"MODEL_CONFIG": "tensorrt"},
            "start.sh: {models}/slide_encoder/ has no configs/tensorrt.pbtxt: "
            "run make export, for tensorrt make engines\n",
        ),
        (
            {"MODELS": "/nowhere"},
            "start.sh: /nowhere/*/ has no configs/onnxruntime.pbtxt: "
            "run make export, for tensorrt make engines\n",
        ),
    ],
    ids=["unknown", "no certificates", "no engines", "no models"],
)
def test_a_wrong_setting_is_one_line(demo_repository: Path, settings: dict[str, str], message: str) -> None:
    settings = {"MODELS": str(demo_repository), **settings}
    done = subprocess.run(["/bin/sh", str(START)], env=settings, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, message.replace("{models}", str(demo_repository)))


@pytest.mark.parametrize(
    ("known", "settings", "code"),
    [
        ("", {"BIND": "0.0.0.0"}, 2),
        ("", {"BIND": "10.1.2.3"}, 2),
        ("", {"BIND": "127.0.0.1"}, 0),
        ("", {}, 0),
        ("  --allow-client-shm <boolean>", {"BIND": "10.1.2.3"}, 0),
    ],
)
def test_an_old_release_is_not_published_beyond_loopback(
    demo_repository: Path, tmp_path: Path, known: str, settings: dict[str, str], code: int
) -> None:
    program = tmp_path / "tritonserver"
    program.write_text(f'#!/bin/sh\necho "{known}"\n')
    program.chmod(0o755)
    settings = {"MODELS": str(demo_repository), "PATH": f"{tmp_path}:/usr/bin:/bin", **settings}
    done = subprocess.run(["/bin/sh", str(START)], env=settings, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (code != 0)
    assert ("BIND_FRONT" in done.stderr) == (code != 0)


def test_another_config_is_served_by_its_name(
    deploy: Callable[..., Any], demo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    models = shutil.copytree(demo_repository, tmp_path_factory.mktemp("models") / "models", symlinks=True)
    for served in models.glob("*/configs/onnxruntime.pbtxt"):
        text = served.read_text().replace("preferred_batch_size: 64", "preferred_batch_size: 32")
        served.with_name("other.pbtxt").write_text(text)
    client = triton.InferenceServerClient(deploy(MODELS=str(models), MODEL_CONFIG="other").url)
    config = client.get_model_config("tile_encoder").config
    assert config.dynamic_batching.preferred_batch_size == [32]
