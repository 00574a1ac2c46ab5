"""`client benchmark` against the real server: its figures, files, and what it makes of a user's mistakes."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from client.benchmark.baseline import local_sessions
from client.benchmark.measure import Trial, measure_trial, summarise
from client.benchmark.workloads import WORKLOADS
from client.cli import app
from client.errors import ClientError
from client.triton.connection import Connection
from client.triton.statistics import ModelStatistics, read_statistics, wait_for_statistics
from gigapath_contract.schema import Contract
from server.local import run_triton
from tests.support.served import wait_until

ROOT = Path(__file__).resolve().parents[3]
PERF_ANALYZER = (
    "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency"
)
QUICK = ["--seconds", "0", "--rounds", "1", "--concurrency", "1,2", "--chunk", "2", "--slide-tiles", "9"]


@pytest.fixture(scope="module")
def second_url(demo_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of another Triton with the same repository."""
    with run_triton(demo_repository, log=tmp_path_factory.mktemp("second") / "log") as server:
        yield server.url


@pytest.fixture
def settled(connection: Connection) -> None:
    """Triton counts an answer only after it was sent: wait until it has counted those of earlier tests."""

    def counts() -> list[ModelStatistics]:
        models = ("tile_encoder", "slide_encoder", "slide_occlusion")
        return [read_statistics(connection, model) for model in models]

    def steady() -> bool:
        before = counts()
        time.sleep(0.2)
        return counts() == before

    wait_until(steady)


def run(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "client", "benchmark", *arguments, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kind", WORKLOADS)
def test_a_trial_is_what_the_server_counted(connection: Connection, contract: Contract, kind: str) -> None:
    workload = WORKLOADS[kind](contract, 3)
    measured = measure_trial(connection, workload, concurrency=2, seconds=0.2)
    first, count = measured.statistics[0], len(measured.latencies)
    assert all(step.requests == count >= 8 for step in measured.statistics)
    assert all(step.executed_rows == step.rows for step in measured.statistics)
    rows_per_request = 3 if kind in ("tiles", "ensemble") else 1
    assert first.rows == first.requests * rows_per_request
    assert first.executions <= first.requests
    seconds = sum(step.compute_infer_s for step in measured.statistics)
    assert 0 < seconds < 2 * measured.seconds * len(workload.steps)
    assert measured.seconds >= max(measured.latencies)


@pytest.mark.usefixtures("settled")
def test_every_execution_is_of_the_trial_that_it_belongs_to(
    connection: Connection, contract: Contract
) -> None:
    """One request at a time is one execution each: none of the warm-up's is left to be counted."""
    workload = WORKLOADS["tiles"](contract, 3)
    for _ in range(3):
        measured = measure_trial(connection, workload, concurrency=1, seconds=0)
        (counted,) = measured.statistics
        assert counted.executions == counted.requests == len(measured.latencies)
        assert counted.rows == 3 * len(measured.latencies)


def test_counts_are_waited_for(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has counted a batch's rows has still to count its execution."""
    states = [(0, 0, 0, 0), (1, 3, 0, 0), (2, 6, 0, 0), (2, 6, 1, 3), (2, 6, 2, 6)]
    counted = [ModelStatistics(*state) for state in states]
    reads = iter(counted)
    monkeypatch.setattr("client.triton.statistics.read_statistics", lambda *_: next(reads))
    none = {"tile_encoder": ModelStatistics()}
    assert wait_for_statistics(connection, ["tile_encoder"], none, 2) == {"tile_encoder": counted[-1]}
    assert next(reads, None) is None


def test_a_result_is_computed_from_its_trials(contract: Contract) -> None:
    workload = WORKLOADS["tiles"](contract, 4)
    counted = ModelStatistics(requests=4, rows=16, executions=2, queue_s=0.4, compute_infer_s=0.8)
    trials = [Trial((0.1, 0.2, 0.3, 0.4), seconds, (counted,)) for seconds in (1.0, 2.0, 4.0)]
    result = summarise("here", workload, 2, trials, baseline=16.0)
    assert result.rate == 4 * 4 / 2.0  # the median round
    assert result.spread == (4.0, 16.0)
    assert [result.p50_us, result.mean_us] == pytest.approx([250e3, 250e3])
    assert result.p99_us == pytest.approx(np.percentile([1e5, 2e5, 3e5, 4e5] * 3, 99))
    assert [result.queue_us, result.compute_infer_us] == pytest.approx([1e5, 2e5])
    assert (result.batch, result.requests) == (8.0, 12)


@pytest.mark.usefixtures("settled")
def test_requests_are_in_flight_together(connection: Connection, contract: Contract) -> None:
    """At concurrency 8 the batcher joins what it never sees together at 1."""
    workload = WORKLOADS["tiles"](contract, 2)
    alone, together = (measure_trial(connection, workload, c, 0.3).statistics[0] for c in (1, 8))
    assert alone.rows / alone.executions == pytest.approx(2)
    assert together.rows / together.executions > 3


def test_the_baseline_computes_what_is_served(
    connection: Connection, contract: Contract, demo_repository: Path
) -> None:
    rate = local_sessions(demo_repository, contract)
    for kind in WORKLOADS:
        workload = WORKLOADS[kind](contract, 5)
        began = time.perf_counter()
        items = rate(workload, 0.05)
        assert workload.items / (time.perf_counter() - began) <= items < 1e6


def test_command_writes_every_file(triton_url: str, demo_repository: Path, tmp_path: Path) -> None:
    done = run(
        *("--url", triton_url, "--bare", str(demo_repository), "--price-per-hour", "3.6", *QUICK),
        out=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "benchmark.csv").open()))
    assert ",".join(rows[0]).endswith(PERF_ANALYZER)
    assert [(row["Kind"], row["Concurrency"]) for row in rows] == [(k, c) for k in WORKLOADS for c in "12"]
    about = json.loads((tmp_path / "benchmark.json").read_text())
    assert len(about["results"]) == len(rows)
    assert set(about["exports"]) == set(about["triton"]) == {triton_url}
    for row, result in zip(rows, about["results"], strict=True):
        assert float(row["Inferences/Second"]) == pytest.approx(result["rate"], rel=1e-3)
        assert 0 < float(row["p50 latency"]) <= float(row["p99 latency"])
        assert result["baseline"] > 0
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    (best,) = (max(p["rate"] for p in about["results"] if p["kind"] == "tiles"),)
    (slide,) = (max(p["rate"] for p in about["results"] if p["kind"] == "slides"),)
    seconds = 9 / best + 1 / slide
    said = (
        f"a slide of 9 tiles takes {seconds:.3g} s and costs {seconds / 1000:.3g}, all its servers together"
    )
    assert said in done.stdout
    assert (
        about["client"]["cpu"] in Path("/proc/cpuinfo").read_text()
        or about["client"]["cpu"] == platform.machine()
    )


def test_command_compares_two_servers(triton_url: str, second_url: str, tmp_path: Path) -> None:
    done = run(
        *("--url", triton_url, "--against", second_url, "--kind", "tiles", "--bare", "100", *QUICK),
        out=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    best = {url: max(p["rate"] for p in results if p["target"] == url) for url in (triton_url, second_url)}
    ratio = best[second_url] / best[triton_url]
    assert f"tiles, 2 tiles: {second_url} makes {ratio:.2f} times the tiles of {triton_url}" in done.stdout
    assert {r["baseline"] for r in results} == {100.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunk", "65"], "--chunk 65 is more than the 64 tiles a request may hold"),
        (["--chunk", "0"], "--chunk takes whole numbers from 1, with commas, not '0'"),
        (["--concurrency", "two"], "--concurrency takes whole numbers from 1, with commas, not 'two'"),
        (
            ["--kind", "cells"],
            "--kind 'cells' is unknown: choose from tiles, slides, ensemble, occlusion",
        ),
        (
            ["--kind", "occlusion", "--slide-tiles", "9999999"],
            "--slide-tiles 9999999: the server takes no",
        ),
        (["--bare", "/nowhere", *QUICK], "--bare: no /nowhere/tile_encoder/1/model.onnx"),
        (["--bare", "100"], "--bare 100: a rate is that of one kind of request"),
        (
            ["--kind", "slides", "--slide-tiles", "9,20", "--bare", "100"],
            "--bare 100: a rate is that of one kind of request",
        ),
        (["--kind", "slides", "--price-per-hour", "1"], "--price-per-hour needs the rate of tiles"),
        (["--url", "dns:///triton:8001"], "--url: name the servers (host:port)"),
        (["--out", "/dev/null/x"], "cannot write /dev/null/x: Not a directory"),
        (["--against", "dns:///triton:8001"], "--against: name the servers (host:port)"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(triton_url: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    arguments = ["benchmark", "--url", triton_url, "--out", str(tmp_path), *arguments]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, ClientError)
    assert str(error).startswith(message)


@pytest.mark.parametrize("against", ["a:8001,b:8001", "b:8001, a:8001"])
def test_a_server_is_not_measured_against_itself(tmp_path: Path, against: str) -> None:
    arguments = ["benchmark", "--url", "a:8001,b:8001", "--against", against, "--out", str(tmp_path)]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, ClientError)
    assert str(error).startswith("--against names the same server as --url")
