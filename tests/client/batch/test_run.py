"""Batches: the same outputs however they came about, nothing computed twice, nothing lost."""

from __future__ import annotations

import contextlib
import csv
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from client.outputs.layout import Layout
from gigapath_contract.schema import Contract
from server.local import RunningServer, run_triton
from tests.support.served import suspended

Run = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[3]
# Small requests, one at a time: a kill finds most of a slide still to do.
SLOWLY = ("--chunk", "1", "--in-flight", "1", "--workers", "1")


def outputs(out: Path) -> dict[str, bytes]:
    """Every file whose bytes must not depend on how the run went."""
    apart = {".keys", "records", ".partial", ".begun", ".lock", "status.csv"}
    files = (path for path in out.rglob("*") if path.is_file())
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in files
        if apart.isdisjoint(path.relative_to(out).parts)
    }


def status(out: Path) -> dict[str, dict[str, str]]:
    [table] = out.glob("*/status.csv")
    with table.open() as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def undisturbed(slides: Path, triton_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a batch over three slides that nothing disturbed, in a process of its own."""
    out = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(slides, out, triton_url), check=True, cwd=ROOT, capture_output=True)
    return out


@contextmanager
def started(slides: Path, out: Path, url: str, least: int) -> Iterator[subprocess.Popen[str]]:
    """A batch in its own process, once its checkpoints hold at least `least` tiles."""
    process = subprocess.Popen(
        command(slides, out, url, *SLOWLY), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    with process:
        while sum(tiles_in(path) for path in out.glob(".partial/*")) < least:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        yield process


def tiles_in(path: Path) -> int:
    """Complete one-tile records of a checkpoint."""
    try:
        with path.open("rb") as file:
            header = file.readline()
            size: int = 8 + 1 + 4 * json.loads(header)["dim"]
            return (path.stat().st_size - len(header)) // size
    except (FileNotFoundError, json.JSONDecodeError):  # just finished, or just started
        return 0


def command(slides: Path, out: Path, url: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "client", "batch", str(slides), "--out", str(out), "--url", url, *options]


def test_the_layout_and_the_tables(undisturbed: Path, contract: Contract) -> None:
    job = undisturbed / "20x_256px_0px_overlap"
    names = [f"{name}.h5" for name in "abc"]
    assert sorted(p.name for p in (job / "patches").iterdir()) == [f"{name}_patches.h5" for name in "abc"]
    [features] = job.glob("features_*")
    [slide_features] = undisturbed.glob("*/slide_features_*")
    assert sorted(p.name for p in features.iterdir()) == names
    assert sorted(p.name for p in slide_features.iterdir()) == names
    with h5py.File(slide_features / "a.h5") as file:
        embedding, scores = file["features"][:], file["scores"][:]
        assert all(isinstance(file[key], h5py.Dataset) for key in file)
    assert embedding.shape == (contract.slide_encoder.embed_dim,)
    contours = json.loads((undisturbed / "contours_geojson" / "a.geojson").read_text())
    assert contours["type"] == "FeatureCollection"
    assert {f["properties"]["objectType"] for f in contours["features"]} == {"annotation"}
    assert {row["status"] for row in status(undisturbed).values()} == {"ok"}
    export = Layout(undisturbed, contract).export
    table = pq.read_table(export / "scores.parquet").to_pydict()
    assert table["slide_id"] == ["a", "b", "c"]
    assert contract.head
    for name, score in zip(contract.head.classes, scores, strict=True):
        assert table[f"score_{name}"][0] == score
    vectors = pq.read_table(export / "slide_embeddings.parquet")
    first = [column[0].as_py() for column in vectors.columns[1:]]
    np.testing.assert_array_equal(np.array(first, np.float32), embedding)
    with (export / "scores.csv").open() as file:
        assert [row["prediction"] for row in csv.DictReader(file)] == table["prediction"]


def test_identical_runs_compute_nothing_and_changed_ones_everything(
    slides: Path, triton_server: RunningServer, run_client: Run, tmp_path: Path
) -> None:
    triton_url = triton_server.url

    def run(*options: object) -> tuple[int, list[str]]:
        assert run_client("batch", slides, "--out", tmp_path, "--url", triton_url, *options).code == 0
        rows = status(tmp_path).values()
        return sum(int(row["tiles"]) for row in rows), [row["reused"] for row in rows]

    first, reused = run()
    assert first > 30
    assert reused == ["False"] * 3
    kept = outputs(tmp_path)
    with suspended(triton_server.pid, "tile_encoder"), suspended(triton_server.pid, "slide_encoder"):
        assert run("--workers", 4, "--slides", 1) == (first, ["True"] * 3)
    assert outputs(tmp_path) == kept
    more, reused = run("--min-tissue", 0.5)
    assert 0 < more < first
    assert reused == ["False"] * 3
    # One slide's bytes change, then its features are lost: each time it alone is computed again.
    changed = tmp_path / "slides"
    changed.mkdir()
    for slide in slides.iterdir():
        (changed / slide.name).write_bytes(slide.read_bytes())
    assert run_client("batch", changed, "--out", tmp_path, "--url", triton_url).code == 0
    with (changed / "b.tif").open("ab") as file:
        file.write(b"\0")
    assert run_client("batch", changed, "--out", tmp_path, "--url", triton_url).code == 0
    assert {name: row["reused"] for name, row in status(tmp_path).items()} == {
        "a": "True",
        "b": "False",
        "c": "True",
    }
    next(tmp_path.glob("*/features_*/c.h5")).unlink()
    assert run_client("batch", changed, "--out", tmp_path, "--url", triton_url).code == 0
    assert {name: row["reused"] for name, row in status(tmp_path).items()} == {
        "a": "True",
        "b": "True",
        "c": "False",
    }


def test_killed_and_resumed(
    slides: Path, triton_url: str, undisturbed: Path, run_client: Run, tmp_path: Path
) -> None:
    for least in (5, 15):
        with started(slides, tmp_path, triton_url, least) as process:
            process.kill()
        assert not list(tmp_path.glob("*/scores.csv"))
    assert run_client("batch", slides, "--out", tmp_path, "--url", triton_url, *SLOWLY).code == 0
    assert sum(int(row["resumed_tiles"]) for row in status(tmp_path).values()) > 0
    assert outputs(tmp_path) == outputs(undisturbed)
    assert not list(tmp_path.glob(".partial/*"))


def isolated(process: psutil.Process) -> list[psutil.Process]:
    """The processes that a batch has started for slides that may kill them."""
    found = []
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def leave_marks(out: Path, *slides: str) -> Path:
    """What a run leaves that died while it processed these slides."""
    (out / ".begun").mkdir()
    for name in slides:
        (out / ".begun" / name).touch()
    return out / ".begun"


def test_a_slide_that_kills_its_process_fails_alone(
    slides: Path, triton_url: str, undisturbed: Path, run_client: Run, tmp_path: Path
) -> None:
    """The run that it killed leaves its mark; the next one tries it last, in a process that may die."""
    begun = leave_marks(tmp_path, "a")

    def kill_whatever_scores_a() -> None:
        killed = set[int]()
        while len(killed) < 2:
            time.sleep(0.002)
            for child in isolated(psutil.Process()):
                if child.pid not in killed and (tmp_path / ".partial" / "a.part").exists():
                    killed.add(child.pid)
                    child.send_signal(signal.SIGABRT)

    killer = threading.Thread(target=kill_whatever_scores_a, daemon=True)
    killer.start()
    done = run_client("batch", slides, "--out", tmp_path, "--url", triton_url, *SLOWLY)
    killer.join()
    assert done.code == 1
    assert "a  tried again alone after the others: its process died (signal SIGABRT)" in done.err
    ended = status(tmp_path)
    assert ended["a"]["reason"].startswith("its process died (signal SIGABRT)")
    assert (ended["b"]["status"], ended["c"]["status"]) == ("ok", "ok")
    assert [path.name for path in begun.iterdir()] == ["a"]
    assert run_client("batch", slides, "--out", tmp_path, "--url", triton_url, *SLOWLY).code == 0
    assert not list(begun.iterdir())
    assert outputs(tmp_path) == outputs(undisturbed)


@pytest.mark.parametrize(("how", "marked"), [(signal.SIGINT, []), (signal.SIGKILL, ["a", "b"])])
def test_isolated_slides_end_with_their_batch(
    slides: Path, triton_url: str, tmp_path: Path, how: signal.Signals, marked: list[str]
) -> None:
    """Else they would write the same files as the next run. Ctrl-C leaves no suspects."""
    begun = leave_marks(tmp_path, "a", "b", "c")
    with started(slides, tmp_path, triton_url, 3) as process:
        while len(children := isolated(psutil.Process(process.pid))) < 2:
            time.sleep(0.002)
        process.send_signal(how)
        process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert sorted({path.name for path in begun.iterdir()} & {"a", "b"}) == marked


def test_interrupted_by_ctrl_c(slides: Path, triton_url: str, tmp_path: Path) -> None:
    with started(slides, tmp_path, triton_url, 3) as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command resumes" in err
    assert "Traceback" not in err
    assert list(tmp_path.glob("*/status.csv"))
    assert len(list(tmp_path.glob(".partial/*"))) > 0


def test_a_server_stopped_and_started_again(
    slides: Path, demo_repository: Path, undisturbed: Path, run_client: Run, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(run_triton(demo_repository, log=tmp_path / "first.log"))
        port = int(server.url.rpartition(":")[2])

        def restart_once_busy() -> None:
            while not list((tmp_path / "out").glob(".partial/*")):
                time.sleep(0.005)
            server.kill()
            stack.enter_context(run_triton(demo_repository, log=tmp_path / "second.log", grpc_port=port))

        restarter = threading.Thread(target=restart_once_busy, daemon=True)
        restarter.start()
        done = run_client("batch", slides, "--out", tmp_path / "out", "--url", server.url, *SLOWLY)
        restarter.join()
    assert done.code == 0, done.err
    assert outputs(tmp_path / "out") == outputs(undisturbed)


def test_through_ray(
    slides: Path, triton_url: str, undisturbed: Path, run_client: Run, tmp_path: Path
) -> None:
    options = ["--ray", "local", "--workers", 1]
    for _ in range(3):  # Ray gives itself 30 s to start, which are too few for a busy machine
        done = run_client("batch", slides, "--out", tmp_path, "--url", triton_url, *options)
        if "timed out during startup" not in done.err:
            break
    assert done.code == 0, done.err
    assert outputs(tmp_path) == outputs(undisturbed)


def test_further_files(
    slides: Path, triton_url: str, undisturbed: Path, run_client: Run, tmp_path: Path
) -> None:
    options = ["--layout", "clam", "--pt", "--geojson"]
    first = run_client("batch", slides / "a.tif", "--out", tmp_path, "--url", triton_url)
    assert first.code == 0
    done = run_client("batch", slides / "a.tif", "--out", tmp_path, "--url", triton_url, *options)
    assert "was done" in done.err  # made from the stored features, nothing was embedded again
    [stored] = tmp_path.glob("*/features_*/a.h5")
    with h5py.File(stored) as file:
        features, coords = file["features"][:], file["coords"][:]
    [clam] = (tmp_path / "clam").iterdir()
    for path in (clam / "pt_files" / "a.pt", stored.with_suffix(".pt")):
        np.testing.assert_array_equal(torch.load(path, weights_only=True).numpy(), features)
    with h5py.File(clam / "h5_files" / "a.h5") as file:
        np.testing.assert_array_equal(file["features"][:], features)
        np.testing.assert_array_equal(file["coords"][:], coords)
    with h5py.File(clam / "patches" / "a.h5") as file:
        attributes = file["coords"].attrs
        assert (attributes["patch_level"], attributes["patch_size"]) == (0, 256)
    tiles = json.loads((tmp_path / "tiles_geojson" / "a.geojson").read_text())["features"]
    assert len(tiles) == len(coords)
    assert tiles[0]["properties"]["objectType"] == "tile"
    assert tiles[0]["geometry"]["coordinates"][0][0] == [coords[0, 0], coords[0, 1]]


def test_a_manifests_own_columns_stand_beside_the_scores(
    slides: Path, triton_url: str, contract: Contract, run_client: Run, tmp_path: Path
) -> None:
    manifest = tmp_path / "cohort.csv"
    manifest.write_text("case_id,slide_id,label,split\np1,b,tumour,train\n")
    done = run_client("batch", manifest, "--wsi_dir", slides, "--out", tmp_path / "out", "--url", triton_url)
    assert done.code == 0, done.err
    with Layout(tmp_path / "out", contract).scores.open() as file:
        [row] = csv.DictReader(file)
    assert (row["slide_id"], row["case_id"], row["label"], row["split"]) == ("b", "p1", "tumour", "train")


def test_two_batches_do_not_share_a_folder(
    slides: Path, triton_url: str, run_client: Run, tmp_path: Path
) -> None:
    from client.batch.run import exclusive_output

    with exclusive_output(tmp_path):
        done = run_client("batch", slides, "--out", tmp_path, "--url", triton_url)
    assert done.code == 1
    assert "another batch is writing to" in done.err
