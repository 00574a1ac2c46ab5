"""The commands of `python -m export`, as typed: what they print and how they fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tritonclient.grpc as triton

from export.cli import main
from export.configs import read_config
from export.repository import read_contract, serve_version, served_version
from server.local import run_triton
from training.models.presets import Preset

ROOT = Path(__file__).resolve().parents[2]


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run_export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run_export("serve", 1)` runs the command line in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        written = capsys.readouterr()
        return Outcome(end.value.code if isinstance(end.value.code, int) else 0, written.out, written.err)

    return run


def one_line(outcome: Outcome) -> str:
    """The error of a failed command, which wrote nothing else."""
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    return outcome.err.removeprefix("error: ").strip()


def test_without_arguments_there_is_help_and_no_export() -> None:
    before = sorted((ROOT / "model_repository").rglob("*"))
    done = subprocess.run([sys.executable, "-m", "export"], cwd=ROOT, capture_output=True, text=True)
    text = done.stdout + done.stderr
    for command in ("run", "versions", "serve", "remove", "engines", "check-engines"):
        assert f"│ {command} " in text
    assert sorted((ROOT / "model_repository").rglob("*")) == before


@pytest.mark.usefixtures("slide_graphs_traced")
def test_run_exports_or_says_that_nothing_has_changed(
    run_export: Run, tiny: Preset, tiny_repository: Path, real_slide: Path
) -> None:
    command = ("run", "--preset", tiny.name, "--slide", real_slide, "--repository", tiny_repository)
    first = run_export(*command, "--precision", "fp16")
    assert first.code == 0
    assert "Parity with PyTorch float32 (fp16)" in first.out
    assert first.out.count(" EMBEDDINGS ") == first.out.count(" LAYERS ") == 1, (
        "each output once, at its worst"
    )
    assert "exported: tiny fp16" in first.out
    assert "is version 2" in first.out
    assert "untrained" in first.out
    again = run_export(*command)
    assert again.code == 0
    assert "unchanged: tiny fp32" in again.out
    assert "is version 1" in again.out
    assert served_version(tiny_repository) == 1


def test_an_earlier_version_is_served_again(run_export: Run, two_versions: Path, tmp_path: Path) -> None:
    """By a real Triton, after it was restarted."""

    def served() -> tuple[int, np.ndarray]:
        with (
            run_triton(two_versions, log=tmp_path / "triton.log") as server,
            triton.InferenceServerClient(server.url) as client,
        ):
            config = client.get_model_config("tile_encoder").config
            tiles = triton.InferInput("TILES", [1, 224, 224, 3], "UINT8")
            tiles.set_data_from_numpy(np.full((1, 224, 224, 3), 128, np.uint8))
            embeddings = client.infer("tile_encoder", [tiles]).as_numpy("EMBEDDINGS")
        assert embeddings is not None
        return json.loads(config.parameters["contract"].string_value)["version"], embeddings

    number, half = served()
    assert number == 2
    outcome = run_export("serve", 1, "--repository", two_versions)
    assert outcome.code == 0
    assert outcome.out.startswith("version 1 is served: tiny fp32, export ")
    number, full = served()
    assert number == 1
    assert 0 < np.abs(half - full).max() < 0.1, "the graphs of another version answer"
    assert run_export("serve", 2, "--repository", two_versions).code == 0
    assert served_version(two_versions) == 2


def test_the_served_configuration_has_the_batches_of_the_machine_that_the_export_is_for(
    two_versions: Path,
) -> None:
    contracts = {number: read_contract(two_versions, number) for number in (1, 2)}
    for number, batch in ((2, 128), (1, 64)):
        serve_version(two_versions, number)
        config = read_config(two_versions / "tile_encoder" / "configs" / "onnxruntime.pbtxt")
        assert contracts[number].tile.max_batch == config.max_batch_size == batch
        assert list(config.dynamic_batching.preferred_batch_size) == [batch]
    cpu, gpu = (contracts[number].occlusion.max_mask_tokens for number in (1, 2))
    assert gpu / cpu == pytest.approx(80 / 3 / 8, rel=1e-3), "a third of 80 GiB instead of 8 GiB"


def test_versions_marks_the_one_served(run_export: Run, two_versions: Path) -> None:
    outcome = run_export("versions", "--repository", two_versions)
    assert outcome.code == 0
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in outcome.out.splitlines()
        if "tiny" in line
    ]
    assert [(row[0], row[1], row[3], row[4], row[5]) for row in rows] == [
        ("", "1", "tiny", "fp32", "no"),
        ("served", "2", "tiny", "fp16", "no"),
    ]


def test_remove_takes_what_is_not_served(run_export: Run, two_versions: Path) -> None:
    option = ("--repository", two_versions)
    error = one_line(run_export("remove", 2, *option))
    assert "version 2 is the one being served" in error
    assert "python -m export serve VERSION" in error
    assert run_export("remove", 1, *option).out == "removed version 1\n"
    assert not list(two_versions.glob("*/1"))
    assert "there is no version 1" in one_line(run_export("remove", 1, *option))


def test_what_cannot_be_served_leaves_what_is(run_export: Run, two_versions: Path) -> None:
    error = one_line(run_export("serve", 3, "--repository", two_versions))
    assert error.endswith("(installed: 1, 2)")
    graph = two_versions / "slide_encoder" / "1" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    error = one_line(run_export("serve", 1, "--repository", two_versions))
    assert "version 1 is damaged" in error
    assert "slide_encoder/1/model.onnx" in error
    shutil.rmtree(graph.parent)
    error = one_line(run_export("serve", 1, "--repository", two_versions))
    assert error.endswith("(installed: 2)")
    assert served_version(two_versions) == 2


@pytest.mark.parametrize(
    "command", [("versions",), ("serve", 1), ("remove", 1), ("run", "--preset", "demo")], ids=lambda c: c[0]
)
def test_what_is_no_repository_is_one_line(
    run_export: Run, tmp_path: Path, command: tuple[object, ...]
) -> None:
    error = one_line(run_export(*command, "--repository", tmp_path / "typo"))
    assert "typo is no model repository" in error
    assert not (tmp_path / "typo").exists()


def test_engines_without_a_gpu_is_one_line(
    run_export: Run, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for options in ((), ("--check",), ("--check", "--tensorrt", "10.13")):
        error = one_line(run_export("engines", "--repository", tiny_repository, *options))
        assert error.startswith("no NVIDIA GPU here: run this on the machine that is to serve")


def test_check_engines_builds_every_graph(
    run_export: Run, tiny_repository: Path, empty_repository: Path
) -> None:
    error = one_line(run_export("check-engines", "--repository", empty_repository))
    assert error == f"nothing is exported into {empty_repository}: run make export"
    outcome = run_export(
        "check-engines", "--repository", tiny_repository, "--max-tiles", 2000, "--max-masks", 4
    )
    assert outcome.code == 0
    for model in ("tile_encoder", "slide_encoder", "slide_occlusion"):
        for capability in ("SM80", "SM89"):
            assert any(model in line and capability in line for line in outcome.out.splitlines())


def test_a_folder_that_cannot_be_written_is_one_line(run_export: Run, two_versions: Path) -> None:
    lock = two_versions / "slide_pipeline" / ".lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    assert str(lock) in one_line(run_export("serve", 1, "--repository", two_versions))


def test_the_checkout_is_the_default() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "export", "serve", "999999"], cwd="/", env={"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: there is no version 999999 in {ROOT / 'model_repository'}")
