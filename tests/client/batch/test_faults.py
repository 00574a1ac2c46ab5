"""Batches whose servers are slow, hang, die or come back: no slide fails for another's fault."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from client.batch.job import BatchJob
from client.batch.manifest import BadRow, WorkList
from client.batch.run import run_batch
from client.batch.schedule import Watch, run
from client.errors import DeadlineExceeded
from client.outputs.records import FAILED, OK, Fault, SlideRecord
from client.scoring.embedding import Throughput
from client.scoring.score import SlideSource, TilingOptions
from client.triton.connection import Connection
from client.triton.endpoint import Endpoint
from client.triton.statistics import read_statistics
from gigapath_contract.schema import Contract
from server.local import RunningServer, run_triton
from tests.support.pyramid import write_pyramid
from tests.support.served import suspended, wait_until

Run = Callable[..., Any]
ROOT = Path(__file__).parents[3]
SLOWLY = ("--chunk", 1, "--in-flight", 1, "--workers", 1)


@pytest.fixture(scope="module")
def server(demo_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A Triton of these tests alone, which they may stop for a while."""
    with run_triton(demo_repository, log=tmp_path_factory.mktemp("log") / "triton.log") as running:
        yield running


@pytest.fixture(scope="module")
def three(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest with two slides, and as the last one a slide without tissue, which needs no server."""
    folder = tmp_path_factory.mktemp("three")
    write_pyramid(folder / "blank.tif", np.full((1024, 1024, 3), 240, np.uint8), levels=(1, 4))
    rows = [f"a,{slides / 'a.tif'}", f"b,{slides / 'b.tif'}", f"blank,{folder / 'blank.tif'}"]
    (folder / "three.csv").write_text("\n".join(["slide_id,path", *rows]))
    return folder / "three.csv"


def status(out: Path) -> dict[str, dict[str, str]]:
    [table] = out.glob("*/status.csv")
    with table.open() as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


@contextmanager
def slow_request(server: RunningServer, contract: Contract) -> Iterator[None]:
    """A slide of 5,000 tiles whose client has gone away: the server begins with it when the block ends."""
    inputs: dict[str, np.ndarray] = {
        "EMBEDDINGS": np.zeros((5_000, contract.tile_encoder.embed_dim), np.float32),
        "COORDS": np.zeros((5_000, 2), np.int64),
    }
    impatient = Connection(Endpoint(server.url, timeout=1, retry_for=0))
    with suspended(server.pid, "slide_encoder"):
        with impatient, pytest.raises(DeadlineExceeded):
            impatient.infer("slide_encoder", inputs, ["SLIDE"])
        yield


def test_another_clients_slow_request_fails_no_slide(
    server: RunningServer,
    slides: Path,
    contract: Contract,
    run_client: Run,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Its client has long gone; the slides' own requests miss their deadline until it is computed."""
    missed = threading.Event()

    def occupy() -> None:
        with slow_request(server, contract):
            missed.set()
            wait_until(lambda: "Deadline Exceeded" in caplog.text)

    other = threading.Thread(target=occupy, daemon=True)
    other.start()
    assert missed.wait(120)
    options = ("--url", server.url, "--timeout", 1, "--slides", 3, *SLOWLY)
    done = run_client("-v", "batch", slides, "--out", tmp_path, *options)
    other.join()
    assert done.code == 0, done.err
    assert {row["status"] for row in status(tmp_path).values()} == {OK}
    assert "Deadline Exceeded" in caplog.text


def test_a_slide_that_is_too_slow_fails_alone_with_the_cause(
    server: RunningServer, three: Path, run_client: Run, tmp_path: Path
) -> None:
    command = ("batch", three, "--out", tmp_path, "--url", server.url, "--slides", 1, *SLOWLY)
    with suspended(server.pid, "slide_encoder"):
        done = run_client(*command, "--timeout", 1, "--retry-for", 0)
    assert done.code == 1
    ended = status(tmp_path)
    for name in ("a", "b"):
        assert ended[name]["status"] == FAILED
        assert "(slide_encoder) took over 1 s; raise --timeout" in ended[name]["reason"]
        assert f"later    {name}  tried again alone" in done.err
    assert ended["blank"]["reason"].startswith("no tissue found")
    assert run_client(*command).code == 0
    assert all(int(status(tmp_path)[name]["resumed_tiles"]) > 0 for name in ("a", "b"))


def test_a_batch_waits_for_its_server_and_continues(
    demo_repository: Path, three: Path, run_client: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with ExitStack() as stack:
        first = stack.enter_context(run_triton(demo_repository, log=tmp_path / "first.log"))
        port = int(first.url.rpartition(":")[2])

        def restart_late() -> None:
            while not list(out.glob(".partial/*")):
                time.sleep(0.005)
            first.kill()
            time.sleep(3)
            stack.enter_context(run_triton(demo_repository, log=tmp_path / "second.log", grpc_port=port))

        restarter = threading.Thread(target=restart_late, daemon=True)
        restarter.start()
        done = run_client("batch", three, "--out", out, "--url", first.url, *SLOWLY, "--retry-for", 0.2)
        restarter.join()
    assert done.code == 0, done.err
    assert "waiting  for a server, 8 h at most (--wait-for): no answer from" in done.err
    assert "back     there is a server again" in done.err
    assert [row["status"] for row in status(out).values()] == [OK, OK, "degraded"]


def test_an_orderly_restart_fails_no_slide(
    demo_repository: Path, three: Path, contract: Contract, run_client: Run, tmp_path: Path
) -> None:
    """While the server unloads, which a request in flight prolongs, its models have no available versions."""
    out, restarted = tmp_path / "out", threading.Event()

    def unloading(client: triton.InferenceServerClient) -> bool:
        try:
            client.get_model_config("tile_encoder", client_timeout=1)
        except InferenceServerException as error:
            return "has no available versions" in error.message()
        return False

    with ExitStack() as stack:
        first = stack.enter_context(run_triton(demo_repository, log=tmp_path / "first.log", grace=120))
        port = int(first.url.rpartition(":")[2])

        def restart() -> None:
            while not list(out.glob(".partial/*")):
                time.sleep(0.005)
            with slow_request(first, contract), triton.InferenceServerClient(first.url) as client:
                os.kill(first.pid, signal.SIGTERM)
                wait_until(lambda: unloading(client))
            assert first.process.wait(timeout=120) == 0
            stack.enter_context(run_triton(demo_repository, log=tmp_path / "second.log", grpc_port=port))
            restarted.set()

        restarter = threading.Thread(target=restart, daemon=True)
        restarter.start()
        done = run_client("batch", three, "--out", out, "--url", first.url, *SLOWLY)
        restarter.join()
    assert restarted.is_set()
    assert done.code == 0, done.err
    assert [row["status"] for row in status(out).values()] == [OK, OK, "degraded"]


def test_a_server_that_stays_away_is_reported_once(
    demo_repository: Path, three: Path, run_client: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with run_triton(demo_repository, log=tmp_path / "log") as server:

        def kill_once_busy() -> None:
            while not list(out.glob(".partial/*")):
                time.sleep(0.005)
            server.kill()

        killer = threading.Thread(target=kill_once_busy, daemon=True)
        killer.start()
        briefly = ("--retry-for", 0.2, "--slides", 1, "--wait-for", 1)
        done = run_client("batch", three, "--out", out, "--url", server.url, *SLOWLY, *briefly)
        killer.join()
    assert done.code == 1
    assert done.err.count("not started: no answer from") == 1
    assert "stopped  2 slides not started" in done.err
    ended = status(out)
    assert ended["a"]["reason"].startswith("no answer from")
    assert all(ended[name]["reason"].startswith("not started: no answer") for name in ("b", "blank"))


def test_a_model_swapped_meanwhile_is_refused_before_the_work_and_once(
    demo_repository: Path, three: Path, contract: Contract, run_client: Run, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(demo_repository, other)
    for path in other.rglob("*"):
        if path.suffix in (".json", ".pbtxt"):
            path.write_text(path.read_text().replace(contract.export_id, "0123456789abcdef"))
    with ExitStack() as stack:
        first = stack.enter_context(run_triton(demo_repository, log=tmp_path / "first.log"))
        port = int(first.url.rpartition(":")[2])

        def swap() -> None:
            with suspended(first.pid, "slide_encoder"):  # so that the first slide does not end before
                while not list(out.glob(".partial/*")):
                    time.sleep(0.005)
                first.kill()
            stack.enter_context(run_triton(other, log=tmp_path / "second.log", grpc_port=port))

        swapper = threading.Thread(target=swap, daemon=True)
        swapper.start()
        done = run_client("batch", three, "--out", out, "--url", first.url, *SLOWLY, "--slides", 1)
        swapper.join()
        with Connection(Endpoint(first.url)) as connection:
            embedded = read_statistics(connection, "tile_encoder").rows
    assert done.code == 1
    reason = f"the server changed from export {contract.export_id} to 0123456789abcdef"
    assert done.err.count(f"not started: {reason}") == 1
    ended = status(out)
    assert ended["a"]["reason"].startswith(reason)
    assert all(ended[name]["reason"].startswith(f"not started: {reason}") for name in ("b", "blank"))
    assert embedded < 5  # that of the server's own start, and what was in flight
    assert not list(out.glob(".partial/*"))


def test_a_server_that_is_down_at_the_start_is_named_at_once(
    server: RunningServer, three: Path, run_client: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retrying it would be silent for 300 seconds; a server that accepts and says nothing is down as well."""
    monkeypatch.setattr("client.triton.connection._PROBE_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = f"127.0.0.1:{mute.getsockname()[1]}"
        urls = ",".join([server.url, "127.0.0.1:1", silent])
        began = time.monotonic()
        done = run_client("batch", three, "--out", tmp_path, "--url", urls, "--timeout", 2)
    assert done.code == 0, done.err
    assert time.monotonic() - began < 250
    for url in ("127.0.0.1:1", silent):
        assert done.err.count(f"nothing is sent to {url} until it answers") == 1
    assert [row["status"] for row in status(tmp_path).values()] == [OK, OK, "degraded"]


class Scripted:
    """A pool whose slides end as written: the faults of each, one after the other, then success."""

    size = 2

    def __init__(self, script: dict[str, list[Fault]]) -> None:
        self.script = {name: list(faults) for name, faults in script.items()}
        self.started: list[str] = []
        self.most = 0
        self.closed = False

    def submit(self, source: SlideSource, *, isolated: bool = False) -> str:
        self.started.append(source.slide_id.upper() if isolated else source.slide_id)
        return source.slide_id

    def wait(self, handles: list[str]) -> list[str]:
        self.most = max(self.most, len(handles))
        return handles[:1]

    def result(self, handle: str, source: SlideSource) -> SlideRecord:
        faults = self.script.get(handle, [])
        if not faults:
            return SlideRecord(handle, str(source.path), OK)
        fault = faults.pop(0)
        return SlideRecord(handle, str(source.path), FAILED, str(fault), fault=fault)

    def close(self) -> None:
        self.closed = True


class Reachable(Watch):
    """The servers answer whenever they are asked."""

    def __init__(self) -> None:
        pass

    def answered(self) -> None:
        pass

    def wait(self, fault: Fault, reason: str) -> str:
        return ""


class Silent:
    """Reports nothing."""

    def end(self, record: SlideRecord) -> None:
        pass

    def late(self, record: SlideRecord) -> None:
        pass

    def wait(self, what: str, reason: str, seconds: float) -> None:
        pass

    def back(self, what: str) -> None:
        pass

    def give_up(self, slides: int, reason: str) -> None:
        pass


@pytest.mark.parametrize(
    ("script", "started", "failed"),
    [
        ({"b": [Fault.SERVER_LOST]}, "cdABB", ""),
        ({"b": [Fault.PROCESS_DIED]}, "cdABB", ""),
        ({"a": [Fault.PROCESS_DIED] * 2}, "cdABA", "a"),
        ({"a": [Fault.NONE]}, "cdAB", "a"),
    ],
)
def test_what_was_begun_when_a_run_died_comes_last_and_isolated(
    script: dict[str, list[Fault]], started: str, failed: str
) -> None:
    pool, ended = Scripted(script), list[SlideRecord]()
    slides = [SlideSource(Path(f"{name}.tif")) for name in "abcd"]
    run(pool, slides, Reachable(), Silent(), ended.append, {"a", "b"})
    assert "".join(pool.started) == started
    assert sorted(record.slide_id for record in ended) == list("abcd")
    assert "".join(record.slide_id for record in ended if record.status == FAILED) == failed
    assert pool.most == pool.size


@pytest.mark.parametrize(
    ("script", "started", "failed"),
    [
        ({}, "abcd", ""),
        ({"a": [Fault.DEADLINE]}, "abcda", ""),
        ({"a": [Fault.DEADLINE] * 2}, "abcda", "a"),
        ({"a": [Fault.DEADLINE], "b": [Fault.DEADLINE]}, "abcdab", ""),
        ({"b": [Fault.SERVER_LOST]}, "abcbd", ""),
        # What brings the server down each time ends alone, after all others.
        ({"b": [Fault.SERVER_LOST] * 9}, "abcbdbbb", "b"),
        ({"a": [Fault.DEADLINE, Fault.SERVER_LOST]}, "abcdaa", ""),
        ({"b": [Fault.DISK_FULL, Fault.SERVER_LOST]}, "abcbdb", ""),
    ],
)
def test_what_is_tried_again_and_when(script: dict[str, list[Fault]], started: str, failed: str) -> None:
    pool, ended = Scripted(script), list[SlideRecord]()
    slides = [SlideSource(Path(f"{name}.tif")) for name in "abcd"]
    left = run(pool, slides, Reachable(), Silent(), ended.append)
    assert not left.slides
    assert "".join(pool.started) == started
    assert sorted(record.slide_id for record in ended) == list("abcd")
    assert "".join(record.slide_id for record in ended if record.status == FAILED) == failed
    assert pool.closed


class Ballast(Silent):
    """Fills a folder's disk when a slide ends, and makes room once a batch waits for it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "ballast"

    def end(self, record: SlideRecord) -> None:
        with suppress(OSError), self._file.open("ab", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass

    def wait(self, what: str, reason: str, seconds: float) -> None:
        assert "status.csv" in reason
        self._file.unlink()


def run_on_full_disk(out: Path) -> None:
    """A batch after whose only slide, which failed, the disk is full."""
    contract = Contract.parse((ROOT / "tests" / "gigapath_contract" / "contract.json").read_text())
    job = BatchJob(out, Endpoint("127.0.0.1:1"), contract, TilingOptions(), Throughput())
    bad = WorkList([], [BadRow("a", "a.tif", "no such file")])
    run_batch(bad, job, Scripted({}), Ballast(out), wait_for=60)


def test_tables_wait_for_space_on_the_disk(tmp_path: Path) -> None:
    """On a file system of 16 MB, in a mount namespace that ends with the batch."""
    out = tmp_path / "out"
    out.mkdir()
    script = f'mount -t tmpfs -o size=16m full "$0"; "$@"; code=$?; cp -a "$0" {tmp_path}/kept; exit $code'
    body = "import sys; from pathlib import Path; from tests.client.batch import test_faults as one; "
    python = [sys.executable, "-c", body + "one.run_on_full_disk(Path(sys.argv[1]))", str(out)]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(out), *python]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "kept").rglob("status.csv"))) == 1
    assert len(list((tmp_path / "kept").rglob("scores.csv"))) == 1
