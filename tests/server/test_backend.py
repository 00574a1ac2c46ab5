"""The onnxruntime backend inside a real Triton: exact values, odd shapes, errors kept to their request."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from server.local import RunningServer, run_triton
from tests.support.served import stub_of, suspended, wait_for_queue, wait_until

Arrays = dict[str, np.ndarray]
Infer = Callable[..., Arrays]
InferLater = Callable[..., Future[Arrays]]


def tiles(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (count, 224, 224, 3), np.uint8)


def slide(count: int, masks: int) -> Arrays:
    rng = np.random.default_rng(count)
    return {
        "EMBEDDINGS": rng.normal(size=(count, 128)).astype(np.float32),
        "COORDS": rng.integers(0, 1000, (count, 2)),
        "KEEP": rng.random((masks, count)) > 0.5,
    }


def bare(repository: Path, model: str, **inputs: np.ndarray) -> Arrays:
    session = ort.InferenceSession(repository / model / "1" / "model.onnx")
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize("count", [1, 64])
def test_batches_equal_the_bare_session(
    toy_server: RunningServer, toy_repository: Path, infer: Infer, count: int
) -> None:
    served = infer(toy_server.url, "tile_encoder", TILES=tiles(count))
    expected = bare(toy_repository, "tile_encoder", TILES=tiles(count))
    np.testing.assert_array_equal(served["EMBEDDINGS"], expected["EMBEDDINGS"], strict=True)


@pytest.mark.parametrize(("count", "masks"), [(5, 3), (1, 1), (4, 0), (0, 2)])
def test_whole_tensors_equal_the_bare_session_even_empty_ones(
    toy_server: RunningServer, toy_repository: Path, infer: Infer, count: int, masks: int
) -> None:
    inputs = slide(count, masks)
    served = infer(toy_server.url, "slide_occlusion", **inputs)
    for name, expected in bare(toy_repository, "slide_occlusion", **inputs).items():
        np.testing.assert_array_equal(served[name], expected, strict=True)


def test_an_error_reaches_its_request_alone(
    toy_server: RunningServer, toy_repository: Path, infer_later: InferLater
) -> None:
    good, bad, other = tiles(30, seed=1), tiles(30, seed=2), tiles(4, seed=3)
    bad[7, 0, 0, 0] = 255
    before = stubs(toy_server)
    with triton.InferenceServerClient(toy_server.url) as client:
        with suspended(toy_server.pid, "tile_encoder"):
            # 30 + 30 + 4 wait for one that runs and one that is to run next: they fill one batch.
            for _ in range(2):
                infer_later(client, "tile_encoder", TILES=tiles(64))
            wait_for_queue(toy_server, "tile_encoder", 1)
            good_answer, bad_answer, other_answer = (
                infer_later(client, "tile_encoder", TILES=batch) for batch in (good, bad, other)
            )
            wait_for_queue(toy_server, "tile_encoder", 4)
        with pytest.raises(InferenceServerException, match="out of data bounds") as error:
            bad_answer.result(60)
        assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
        for answer, batch in ((good_answer, good), (other_answer, other)):
            expected = bare(toy_repository, "tile_encoder", TILES=batch)
            served = answer.result(60)["EMBEDDINGS"]
            np.testing.assert_array_equal(served, expected["EMBEDDINGS"], strict=True)
    assert "a batch failed, its requests are run one by one" in toy_server.log.read_text()
    assert stubs(toy_server) == before


def test_a_slide_that_does_not_fit_itself_is_refused_and_the_next_one_served(
    toy_server: RunningServer, infer: Infer
) -> None:
    before = stubs(toy_server)
    inputs = slide(5, 3)
    with pytest.raises(InferenceServerException, match="dimension mismatch"):
        infer(toy_server.url, "slide_occlusion", **{**inputs, "COORDS": inputs["COORDS"][:4]})
    assert infer(toy_server.url, "slide_occlusion", **inputs)["LOGITS"].shape == (3, 2)
    assert stubs(toy_server) == before


def test_only_the_wanted_outputs_are_sent(toy_server: RunningServer) -> None:
    inputs = slide(5, 1)
    with triton.InferenceServerClient(toy_server.url) as client:
        sent = [
            triton.InferInput("EMBEDDINGS", (5, 128), "FP32").set_data_from_numpy(inputs["EMBEDDINGS"]),
            triton.InferInput("COORDS", (5, 2), "INT64").set_data_from_numpy(inputs["COORDS"]),
        ]
        result = client.infer("slide_encoder", sent, outputs=[triton.InferRequestedOutput("SLIDE")])
    assert [output.name for output in result.get_response().outputs] == ["SLIDE"]


def test_the_log_names_each_session_s_providers(toy_server: RunningServer) -> None:
    log = toy_server.log.read_text()
    for model in ("tile_encoder", "slide_encoder", "slide_occlusion"):
        assert f"{model}: ONNX Runtime {ort.__version__} on CPUExecutionProvider" in log


def test_the_log_stays_quiet_over_answers(toy_server: RunningServer, infer: Infer) -> None:
    wait_until(lambda: "Started Metrics Service" in toy_server.log.read_text())  # the last line of the start
    before = toy_server.log.read_text()
    infer(toy_server.url, "slide_occlusion", **slide(5, 3))
    assert toy_server.log.read_text() == before


def test_a_stub_that_stalls_for_seconds_answers_late_but_right(
    toy_server: RunningServer, toy_repository: Path, infer: Infer
) -> None:
    """Triton by itself gives it up after a second, and crashes over what the stub still does."""
    batches = [tiles(64, seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool, suspended(toy_server.pid, "tile_encoder"):
        answers = [pool.submit(infer, toy_server.url, "tile_encoder", TILES=batch) for batch in batches]
        wait_for_queue(toy_server, "tile_encoder", 2)
        time.sleep(2.5)
    for answer, batch in zip(answers, batches, strict=True):
        expected = bare(toy_repository, "tile_encoder", TILES=batch)
        np.testing.assert_array_equal(answer.result()["EMBEDDINGS"], expected["EMBEDDINGS"], strict=True)


def test_a_stub_that_dies_ends_the_server_at_once(toy_repository: Path, tmp_path: Path) -> None:
    """Triton starts no other one: the server's supervisor has to restart it."""
    with run_triton(toy_repository, log=tmp_path / "log", grace=30) as server:
        regions = set(regions_of(server))
        assert len(regions) == 3
        stub = stub_of(server.pid, "tile_encoder")
        stub.kill()
        # Asked to end, it would finish: killed, it waits neither for requests nor for models to unload.
        assert server.process.wait(timeout=120) == 128 + signal.SIGKILL
    lines = server.log.read_text().splitlines()
    assert [line for line in lines if "died" in line] == [
        f"model 'tile_encoder': its process {stub.pid} died, so the server ends, to be started again"
    ]
    assert not any("successfully unloaded" in line for line in lines)
    assert not any(region.exists() for region in regions)


def test_a_server_that_is_stopped_says_nothing_of_dead_stubs(toy_repository: Path, tmp_path: Path) -> None:
    with run_triton(toy_repository, log=tmp_path / "log", grace=120) as server:
        pass
    log = server.log.read_text()
    assert "died" not in log
    assert log.count("successfully unloaded") == 4


def regions_of(server: RunningServer) -> list[Path]:
    """The shared memory of the server's stubs."""
    commands = [process.cmdline() for process in psutil.Process(server.pid).children()]
    return [Path("/dev/shm", command[2].lstrip("/")) for command in commands]


def stubs(server: RunningServer) -> set[int]:
    return {process.pid for process in psutil.Process(server.pid).children()}
