"""Run a real tritonserver on this machine for the duration of a `with` block."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import tritonclient.grpc as triton

from server.assemble import TRITON, assemble_backends, tritonserver
from server.diagnosis import diagnose
from server.errors import ServerError
from server.ports import check_ports, free_port
from server.readiness import check_models

RESTRICTED = ("model-repository", "trace", "logging")
SHARED_MEMORY = "shared-memory"
"""What nobody but this process may call, the second unless it is asked for; as in deploy/base/start.sh."""
GUARD = Path(__file__).resolve().parent / "guard.py"
LOOPBACK = "127.0.0.1"
START_TIMEOUT = 300
"""Seconds for the models to load and, each, to answer."""


@dataclass(frozen=True)
class RunningServer:
    """A tritonserver that answers requests to every model of its repository."""

    url: str
    """host:port of gRPC."""
    metrics_url: str
    models: tuple[str, ...]
    pid: int
    """Process number of tritonserver itself."""
    log: Path
    process: subprocess.Popen[str]

    def kill(self) -> None:
        """Kill tritonserver as a crash would (for tests)."""
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> int:
        """Block until tritonserver ends by itself; returns its exit code."""
        return self.process.wait()


@contextmanager
def run_triton(
    repository: Path,
    *,
    log: Path,
    host: str = LOOPBACK,
    grpc_port: int | None = None,
    http_port: int | None = None,
    metrics_port: int | None = None,
    flags: Sequence[str] = (),
    grace: float = 0,
    client_shared_memory: bool = False,
    triton_home: Path = TRITON,
) -> Iterator[RunningServer]:
    """Serve `repository`, and yield once every model has answered a real request.

    When the block ends, or this process dies for any reason, the server stops and leaves no process behind.

        with run_triton(Path("model_repository"), log=Path("triton.log")) as server:
            client = tritonclient.grpc.InferenceServerClient(server.url)

    Args:
        repository: a model repository into which an export was made.
        log: file for the server's output; replaced.
        host: address to listen on.
        grpc_port, metrics_port: None takes a free port.
        http_port: None serves no HTTP.
        flags: passed to tritonserver after our own.
        grace: seconds for requests in flight to finish when the block ends.
        client_shared_memory: let clients on this machine register shared memory.
        triton_home: folder with the unpacked wheel of tritonserver.

    Raises:
        ServerError: the server cannot start, a port is in use, or a model does not answer; the message has
            the reason.
    """
    program = tritonserver(triton_home)
    check_repository(repository)
    ports = {"grpc": grpc_port or free_port(host), "metrics": metrics_port or free_port(host)}
    if http_port is not None:
        ports["http"] = http_port
    check_ports({name: (host, port) for name, port in ports.items()})
    token = secrets.token_hex()
    restricted = ",".join(RESTRICTED if client_shared_memory else (SHARED_MEMORY, *RESTRICTED))
    shm_prefix = f"triton_{os.getpid()}_{ports['grpc']}_"
    command = [
        str(program),
        f"--model-repository={repository.resolve()}",
        f"--backend-directory={assemble_backends(triton_home).resolve()}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        "--model-config-name=onnxruntime",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--exit-on-error=true",
        "--strict-readiness=true",
        f"--exit-timeout-secs={int(grace)}",
        "--allow-sagemaker=false",
        "--allow-vertex-ai=false",
        f"--grpc-restricted-protocol={restricted}:admin={token}",
        f"--http-restricted-api={restricted}:admin={token}",
        f"--allow-http={str('http' in ports).lower()}",
        *(f"--{name}-address={host}" for name in ports),
        *(f"--{name}-port={port}" for name, port in ports.items()),
        *flags,
    ]
    # Triton takes about 2 s more to unload its models; without grace it is killed at once.
    kill_after = grace + 5 if grace else 0
    with open_log(log) as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), shm_prefix, str(kill_after), *command],
            env=server_environment(triton_home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal reaches this process alone, which ends the guard
        )
    with process:
        try:
            assert process.stdout is not None
            pid = process.stdout.readline()
            if not pid:
                raise ServerError(diagnose(log, process.wait()))
            wait_for_port(process, host, ports["grpc"], log, START_TIMEOUT)
            for name in ports.keys() - {"grpc"}:  # these listen a moment later, unless `flags` say otherwise
                if not any(flag.startswith((f"--allow-{name}", f"--{name}-")) for flag in flags):
                    wait_for_port(process, host, ports[name], log, START_TIMEOUT)
            url = f"{host}:{ports['grpc']}"
            with triton.InferenceServerClient(url) as client:
                models = tuple(check_models(client, START_TIMEOUT, {"triton-grpc-protocol-admin": token}))
            yield RunningServer(
                url=url,
                metrics_url=f"http://{host}:{ports['metrics']}/metrics",
                models=models,
                pid=int(pid),
                log=log,
                process=process,
            )
        finally:
            process.terminate()
            process.wait()


def open_log(path: Path) -> TextIO:
    """Open an empty log file; ServerError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")
    except OSError as error:
        raise ServerError(f"can't write the log {path}: {error.strerror}") from error


def check_repository(repository: Path) -> None:
    """Raise ServerError unless every model of `repository` has a version to serve."""
    models = sorted(path.parent for path in repository.glob("*/config.pbtxt"))
    if not models:
        raise ServerError(f"{repository} is no model repository: no <model>/config.pbtxt in it")
    empty = [model.name for model in models if not any(path.name.isdigit() for path in model.iterdir())]
    if empty:
        raise ServerError(f"nothing is exported for {', '.join(empty)} in {repository}: run `make export`")


def server_environment(triton_home: Path) -> dict[str, str]:
    """The environment in which tritonserver and its stubs find this interpreter and its packages."""
    libraries = [
        str((triton_home / "nvidia_pytriton.libs").resolve()),
        sysconfig.get_config_var("LIBDIR"),
        *filter(None, [os.environ.get("LD_LIBRARY_PATH")]),
    ]
    return {
        "NVIDIA_TF32_OVERRIDE": "0",  # float32 is float32, unless the caller's environment says otherwise
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "LD_LIBRARY_PATH": ":".join(libraries),
    }


def wait_for_port(process: subprocess.Popen[str], host: str, port: int, log: Path, timeout: float) -> None:
    """Wait until tritonserver listens, which it does once its models are loaded."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None:
            raise ServerError(diagnose(log, code))
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise ServerError(f"tritonserver did not load its models within {timeout:.0f} s: see {log}")
