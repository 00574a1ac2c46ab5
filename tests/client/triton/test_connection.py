"""Requests over real gRPC channels to a real Triton."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import trustme
from tritonclient.utils import InferenceServerException

from client.errors import (
    Cancelled,
    ClientError,
    ContractMismatch,
    DeadlineExceeded,
    RequestRefused,
    ServerUnavailable,
)
from client.triton.connection import Connection
from client.triton.contract import check_same, read_contract
from client.triton.endpoint import Endpoint
from client.triton.failures import is_transient
from client.triton.shared_memory import SharedInputs, unregister
from client.triton.statistics import available_statistics
from gigapath_contract.schema import Contract
from server.assemble import BACKENDS, TRITON, assemble_backends, tritonserver
from server.local import RunningServer, run_triton, server_environment
from server.ports import free_port
from tests.support.served import suspended, wait_for_queue

TILES = np.random.default_rng(0).integers(0, 256, (7, 224, 224, 3), np.uint8)
DEAD = "127.0.0.1:1"
LOOPBACK = "127.0.0.1"


def embed(connection: Connection, tiles: np.ndarray = TILES) -> np.ndarray:
    return connection.infer("tile_encoder", {"TILES": tiles}, ["EMBEDDINGS"])["EMBEDDINGS"]


@pytest.fixture(scope="module")
def guarded(demo_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The endpoint of a Triton with mutual TLS whose configuration is restricted to a header."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    server, ours = authority.issue_cert(LOOPBACK), authority.issue_cert("client.test")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, issued in (("server", server), ("client", ours)):
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    endpoint = Endpoint(
        f"{LOOPBACK}:{free_port(LOOPBACK)}",
        tls_ca=folder / "ca.pem",
        tls_cert=folder / "client.pem",
        tls_key=folder / "client.key",
        headers=(("triton-grpc-protocol-admin", "sesame"),),
        retry_for=0.5,
    )
    command = [
        str(tritonserver(TRITON)),
        f"--model-repository={demo_repository}",
        f"--backend-directory={assemble_backends(TRITON, BACKENDS).resolve()}",
        f"--backend-config=python,shm-region-prefix-name=tls_{folder.name}_",
        "--model-config-name=onnxruntime",
        "--allow-http=false",
        "--allow-metrics=false",
        f"--grpc-address={LOOPBACK}",
        f"--grpc-port={endpoint.url.rpartition(':')[2]}",
        "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={folder / 'server.pem'}",
        f"--grpc-server-key={folder / 'server.key'}",
        f"--grpc-root-cert={folder / 'ca.pem'}",
        "--grpc-restricted-protocol=model-config,statistics:admin=sesame",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=server_environment(TRITON), stdout=log, stderr=log)
    try:
        with Connection(replace(endpoint, retry_for=300)) as connection:
            connection.reachable_configs("tile_encoder")
        yield endpoint
    finally:
        process.kill()
        process.wait()


def test_work_for_more_requests_waits_for_room() -> None:
    """Two large slides at a time, then whoever came first."""
    entered = [threading.Event(), threading.Event()]

    def enter(number: int) -> None:
        with connection.room(3):
            entered[number].set()

    with Connection(Endpoint(DEAD), in_flight=2) as connection, ThreadPoolExecutor(2) as threads:
        with connection.room(100):
            with connection.room(2):
                threads.submit(enter, 0)
                assert not entered[0].wait(0.2)
                threads.submit(enter, 1)
            assert entered[0].wait(60)
            assert entered[1].wait(60)
        with connection.room(1), connection.room(1), connection.room(1), connection.room(1):
            pass


@pytest.mark.parametrize(
    ("status", "message", "passes"),
    [
        ("UNAVAILABLE", "Exceeds maximum queue size", True),
        ("UNAVAILABLE", "Request timeout expired", True),
        ("UNAVAILABLE", "Server is stopping, scheduler for model has stopped accepting", True),
        ("UNAVAILABLE", "failed to connect to all addresses; Connection refused", True),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'triton-grpc-protocol-x'", False),
        ("UNAVAILABLE", "Ssl handshake failed: SSL_ERROR_SSL: CERTIFICATE_VERIFY_FAILED", False),
        ("CANCELLED", "request is cancelled", True),
        ("INVALID_ARGUMENT", "batch-size must be <= 64", False),
        ("NOT_FOUND", "Request for unknown model: 'nobody' is not found", False),
        ("NOT_FOUND", "Request for unknown model: 'tile_encoder' version 9 is not found", False),
        ("NOT_FOUND", "Request for unknown model: 'tile_encoder' has no available versions", True),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", False),
        ("RESOURCE_EXHAUSTED", "ipv4:10.1.2.3 has 32 requests in flight", True),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (9 vs. 8)", False),
        ("INTERNAL", "onnx runtime error", False),
        ("INTERNAL", "Stub process 'tile_encoder_0_0' is not healthy.", True),
    ],
)
def test_errors_that_pass_are_told_from_those_that_stay(status: str, message: str, passes: bool) -> None:
    assert is_transient(InferenceServerException(message, f"StatusCode.{status}")) is passes


def test_every_way_to_the_server_gives_the_same_bytes(triton_url: str, connection: Connection) -> None:
    plain = embed(connection)
    for endpoint in (
        Endpoint(triton_url, shared_memory=True),
        Endpoint(f"{triton_url},{triton_url}"),
        Endpoint(f"dns:///{triton_url}"),
        Endpoint(f"{DEAD},{triton_url}"),
    ):
        with Connection(endpoint) as other:
            np.testing.assert_array_equal(embed(other), plain)


def registered(connection: Connection) -> set[str]:
    """The regions that the server knows."""
    (status,) = connection.for_each_server(lambda client: client.get_system_shared_memory_status()).values()
    return set(status.regions)


def test_shared_memory_leaves_nothing_behind(triton_url: str) -> None:
    with Connection(Endpoint(triton_url, shared_memory=True)) as connection:
        for tiles in (1, 7, 3):  # grows, then fits
            assert len(embed(connection, TILES[:tiles])) == tiles
        mapped = Path("/proc/self/maps").read_text()  # others' regions come and go
        mine = {Path(path) for path in re.findall(r"/dev/shm/psm_\w+", mapped)}
        assert mine
        assert len({region.name for region in mine} & registered(connection)) == 1
    assert not any(region.exists() for region in mine)
    with Connection(Endpoint(triton_url)) as other:
        assert not {region.name for region in mine} & registered(other)


def test_a_region_that_the_server_lost_is_registered_again(triton_url: str) -> None:
    with Connection(Endpoint(triton_url, shared_memory=True, retry_for=5), in_flight=1) as connection:
        first = embed(connection)
        (region,) = registered(connection)
        connection.for_each_server(lambda client: unregister(client, region, {}))
        np.testing.assert_array_equal(embed(connection), first)


def test_a_region_in_use_is_let_go_of_with_the_answer(
    triton_server: RunningServer, contract: Contract
) -> None:
    tiles, client, answers = 40, triton.InferenceServerClient(triton_server.url), queue.Queue[Any]()
    inputs: dict[str, np.ndarray] = {
        "EMBEDDINGS": np.zeros((tiles, contract.tile_encoder.embed_dim), np.float32),
        "COORDS": np.zeros((tiles, 2), np.int64),
    }
    regions = SharedInputs()
    tensors = regions.place(client, inputs, {})
    (name,) = regions._all
    with suspended(triton_server.pid, "slide_encoder"):
        for _ in range(2):
            client.async_infer("slide_encoder", tensors, lambda result, error: answers.put(error))
        wait_for_queue(triton_server, "slide_encoder", 1)  # the other one is in work
        with pytest.raises(InferenceServerException, match="in use"):
            client.unregister_system_shared_memory(name)
        assert answers.empty()
    regions.close(client, {})
    assert [answers.get(timeout=60) for _ in range(2)] == [None, None]
    assert name not in client.get_system_shared_memory_status().regions


def test_answers_come_in_order_and_requests_are_taken_one_by_one(connection: Connection) -> None:
    taken: list[int] = []

    def requests() -> Iterator[dict[str, np.ndarray]]:
        for i in range(12):
            taken.append(i)
            yield {"TILES": TILES[i % 7 : i % 7 + 1]}

    whole = embed(connection)
    for i, answer in enumerate(connection.infer_stream("tile_encoder", requests(), ["EMBEDDINGS"], window=3)):
        np.testing.assert_array_equal(answer["EMBEDDINGS"][0], whole[i % 7])
        assert len(taken) <= i + 3
    assert len(taken) == 12


def test_what_the_server_refuses_is_not_asked_again(triton_url: str, connection: Connection) -> None:
    began = time.monotonic()
    with Connection(Endpoint(triton_url, retry_for=60)) as patient:
        with pytest.raises(RequestRefused, match=rf"{triton_url} refused .*tile_encoder.*<= 64"):
            embed(patient, np.zeros((65, 224, 224, 3), np.uint8))
        with pytest.raises(RequestRefused, match="nobody"):
            patient.infer("nobody", {"TILES": TILES}, ["EMBEDDINGS"])
        with pytest.raises(RequestRefused, match="version"):
            patient.infer("tile_encoder", {"TILES": TILES}, ["EMBEDDINGS"], version=999)
    assert time.monotonic() - began < 60


def test_a_dead_server_is_named_once_its_time_is_over() -> None:
    expected = pytest.raises(ServerUnavailable, match=f"no answer from .*{DEAD}.*refused")
    with Connection(Endpoint(DEAD, retry_for=0.3)) as connection, expected:
        embed(connection)


def test_the_contract_is_read_with_retries(
    triton_url: str, caplog: pytest.LogCaptureFixture, run_client: Callable[..., Any], real_slide: Path
) -> None:
    done = run_client("-v", "score", real_slide, "--url", DEAD, "--retry-for", 1)
    assert (done.code, done.err.count("error: no answer from")) == (1, 1)
    assert done.err.count(f"nothing is sent to {DEAD} until it answers") == 1  # said at once
    assert "trying again" in caplog.text


def test_while_one_of_two_servers_is_away_the_other_is_checked(triton_url: str, contract: Contract) -> None:
    with Connection(Endpoint(f"{DEAD},{triton_url}", retry_for=0)) as connection:
        check_same(connection, contract)
        with pytest.raises(ContractMismatch, match="changed from export other"):
            check_same(connection, replace(contract, export_id="other"))


def test_a_deadline_names_its_option(triton_url: str) -> None:
    expected = pytest.raises(DeadlineExceeded, match=r"took over 0\.001 s; raise --timeout")
    with Connection(Endpoint(triton_url, timeout=0.001, retry_for=0)) as connection, expected:
        embed(connection)


def test_a_server_that_hangs_counts_as_lost(
    demo_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline that a server misses which answers nothing at all is not the request's."""
    monkeypatch.setattr("client.triton.connection._PROBE_S", 1)
    with run_triton(demo_repository, log=tmp_path / "log") as server:
        with Connection(Endpoint(server.url, timeout=1, retry_for=0.2)) as connection:
            os.kill(server.pid, signal.SIGSTOP)
            try:
                with pytest.raises(ServerUnavailable, match="it stopped answering"):
                    embed(connection)
            finally:
                os.kill(server.pid, signal.SIGCONT)
        with Connection(Endpoint(server.url)) as connection:
            assert embed(connection).shape[0] == 7


def test_cancelling_ends_also_what_waits_for_a_retry() -> None:
    connection = Connection(Endpoint(DEAD, retry_for=600))
    threading.Timer(0.3, connection.cancel).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        embed(connection)
    assert time.monotonic() - began < 60
    with pytest.raises(Cancelled):
        embed(connection)
    connection.close()


def test_mutual_tls_and_headers(guarded: Endpoint, contract: Contract, connection: Connection) -> None:
    with Connection(guarded) as secure:
        assert read_contract(secure) == contract
        np.testing.assert_array_equal(embed(secure), embed(connection))
        assert available_statistics(secure, "tile_encoder") is not None


def test_a_restricted_protocol_asks_for_its_header(guarded: Endpoint) -> None:
    with Connection(replace(guarded, headers=(), retry_for=60)) as connection:
        with pytest.raises(RequestRefused, match=r"triton-grpc-protocol-admin.*--header"):
            read_contract(connection)
        with pytest.raises(RequestRefused, match="--header"):
            connection.reachable_configs("tile_encoder")
        assert available_statistics(connection, "tile_encoder") is None
        assert embed(connection).shape[0] == 7


def test_what_the_server_wants_of_tls_is_named(guarded: Endpoint, triton_url: str) -> None:
    for endpoint, hint in (
        (Endpoint(guarded.url, retry_for=0.2), "does it want TLS. give --tls-ca or --tls$"),
        (
            replace(guarded, tls_cert=None, tls_key=None, retry_for=0.2),
            "does it want a client's certificate. give --tls-cert and --tls-key$",
        ),
        (
            replace(guarded, url=triton_url, retry_for=0.2),
            "answers in plain text: leave --tls and --tls-ca out",
        ),
        (Endpoint(DEAD, retry_for=0.2), "is it running, at this --url.$"),
    ):
        with Connection(endpoint) as connection, pytest.raises(ServerUnavailable, match=hint):
            embed(connection)


def test_a_server_of_another_authority_is_refused_at_once(guarded: Endpoint, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    began = time.monotonic()
    expected = pytest.raises(ServerUnavailable, match="CERTIFICATE_VERIFY_FAILED")
    with Connection(replace(guarded, tls_ca=tmp_path / "other.pem", retry_for=60)) as connection, expected:
        embed(connection)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": ""}, "no server"),
        ({"timeout": 0}, "--timeout must be positive"),
        ({"timeout": float("nan")}, "--timeout must be positive"),
        ({"timeout": float("inf")}, "at most 2592000 seconds"),
        ({"retry_for": float("nan")}, "--retry-for must not be negative"),
        ({"url": "127.0.0.1:99999"}, "127.0.0.1:99999: has no port from 1 to 65535"),
        ({"url": "a:8001,b"}, "--url b: has no port"),
        ({"url": "a:" + "9" * 5000}, "has no port"),
        ({"headers": (("name", "ü"),)}, "--header 'name' can't be sent"),
        ({"headers": (("n\u00e4me", "x"),)}, "--header 'n.*me' can't be sent"),
        ({"tls_cert": Path("c.pem")}, "--tls-key belong together"),
        ({"url": "a:1,b:1", "shared_memory": True}, "--shared-memory needs one server"),
        ({"url": "dns:///a:1", "shared_memory": True}, "--shared-memory needs one server"),
    ],
)
def test_endpoints_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ClientError, match=message):
        Endpoint(**options)  # type: ignore[arg-type]


def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"missing\.pem"):
        Connection(Endpoint(tls_ca=tmp_path / "missing.pem"))
