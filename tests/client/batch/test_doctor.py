"""The doctor: what is fine, what is not, and the exit code."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from client.arrays import Pixels
from client.batch.doctor import WARN, check_slide, describe_device
from client.scoring.score import SlideSource
from client.slides.tiling import NO_TILES
from gigapath_contract.schema import Contract
from tests.support.pyramid import write_pyramid

Run = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[3]


def test_all_is_well(
    slides: Path, triton_url: str, contract: Contract, run_client: Run, tmp_path: Path
) -> None:
    done = run_client("doctor", slides, "--url", triton_url, "--out", tmp_path / "out")
    assert done.code == 0, done.out
    assert f"ok   server {triton_url}: Triton 2.51.0" in done.out
    assert f"export {contract.export_id}" in done.out
    models = "tile_encoder, slide_encoder, slide_occlusion"
    assert f"ok   devices: {models} on CPU (onnxruntime) of {triton_url}" in done.out
    assert "ok   slide a: 1280 x 1024 px, mpp 0.5 x 0.5 (" in done.out
    [planned] = re.findall(r"slide a: .*, level 0 at 0.5 mpp, \d+% tissue, (\d+) tiles", done.out)
    assert re.search(r"time: at least \d.*: \d+ tiles at .* tiles per second", done.out)
    out = tmp_path / "scored"
    assert run_client("batch", slides / "a.tif", "--out", out, "--url", triton_url).code == 0
    [record] = out.glob("*/records/a.json")
    assert json.loads(record.read_text())["tiles"] == int(planned)
    sparse = run_client("doctor", slides / "a.tif", "--url", triton_url, "--min-tissue", 0.9)
    assert int(re.findall(r"(\d+) tiles", sparse.out)[0]) < int(planned)
    assert not (tmp_path / "out").exists()
    assert done.out.endswith(
        f"\nnext: gigapath-client batch {slides} --out {tmp_path / 'out'} --url {triton_url}\n"
    )


def test_each_fault_is_listed(slides: Path, run_client: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.tif").touch()
    (tmp_path / "a.tif").symlink_to(slides / "a.tif")
    spoilt = bytearray((slides / "b.tif").read_bytes())
    spoilt[2000:-20000] = bytes(len(spoilt) - 22000)
    (tmp_path / "b.tif").write_bytes(spoilt)
    (tmp_path / "c.csv").write_text("slide_id,path,mpp\nc,c.tif,0.25\n")
    (tmp_path / "c.tif").symlink_to(slides / "c.tif")
    done = run_client("doctor", tmp_path, "--url", "127.0.0.1:1", "--out", tmp_path)
    assert done.code == 1
    assert "FAIL slide b: " in done.out
    assert "left out: 1 files that are no slides (c.csv)" in done.out
    assert "copy it again" in done.out
    done = run_client("doctor", tmp_path / "c.csv", "--url", "127.0.0.1:1", "--out", tmp_path)
    assert "warn slide c: 1280 x 1024 px, mpp 0.25 x 0.25 (explicit)" in done.out
    assert "0.25 mpp is used, the file says 0.5 (openslide.mpp)" in done.out
    done = run_client("doctor", tmp_path, "--url", "127.0.0.1:1", "--out", tmp_path)
    assert "FAIL server: no answer from the Triton server at 127.0.0.1:1" in done.out
    assert "FAIL slide empty: " in done.out
    assert "ok   slide a: " in done.out
    assert "FAIL slides: " in run_client("doctor", tmp_path / "none.csv", "--url", "127.0.0.1:1").out


@pytest.mark.parametrize(
    ("colour", "said"),
    [
        ((1, 0.35, 1), "100% of the slide is taken for tissue: give a mask, if it is not"),  # magenta
        ((0.3, 1, 1), "100% of what is coloured is taken for pen: give a mask, if it is a stain"),  # cyan
    ],
)
def test_an_implausible_colour_is_said_before_a_run_and_in_its_status(
    picture: Pixels, triton_url: str, run_client: Run, tmp_path: Path, colour: tuple[float, ...], said: str
) -> None:
    pixels = (picture[:512, 700:1212] * np.array(colour)).astype(np.uint8)
    slide = write_pyramid(tmp_path / "tinted.tif", pixels, levels=(1, 4))
    doctor = run_client("doctor", slide, "--url", triton_url)
    [line] = [line for line in doctor.out.splitlines() if "slide tinted" in line]
    assert line.startswith("warn")
    assert said in line
    run_client("batch", slide, "--out", tmp_path / "out", "--url", triton_url)
    [table] = (tmp_path / "out").glob("*/status.csv")
    with table.open() as file:
        [row] = csv.DictReader(file)
    assert said in f"{row['reason']} {row['notes']}"


@pytest.mark.parametrize(
    ("config", "device"),
    [
        ('backend: "onnxruntime" instance_group { kind: KIND_CPU count: 1 }', "CPU (onnxruntime)"),
        ('backend: "tensorrt" instance_group { kind: KIND_GPU gpus: [ 0, 1 ] }', "GPU 0, 1 (tensorrt)"),
        ('backend: "onnxruntime" instance_group { kind: KIND_GPU gpus: 0 }', "GPU 0 (onnxruntime, TF32)"),
        (
            'backend: "onnxruntime" instance_group { kind: KIND_GPU gpus: 0 } optimization { '
            'execution_accelerators { gpu_execution_accelerator { name: "cuda" '
            'parameters { key: "use_tf32" value: "0" } } } }',
            "GPU 0 (onnxruntime)",
        ),
    ],
)
def test_a_device_is_described_by_the_configuration_that_triton_loaded(config: str, device: str) -> None:
    parsed = text_format.Parse(config, model_config_pb2.ModelConfig())
    assert describe_device(parsed) == device


def test_no_damaged_tag_ends_the_check_of_a_cohort(picture: Pixels, tmp_path: Path) -> None:
    """Sixty slides with damaged directories: a line each, no traceback, nothing that kills the process."""
    slide = write_pyramid(tmp_path / "a.tif", picture[900:1412, 700:1212], levels=(1, 2))
    command = [sys.executable, "-m", "tests.support.fuzzed", str(slide), "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 60
    assert {line.split()[0] for line in lines} == {"good", "warn", "bad"}
    assert sum(line.startswith("bad") for line in lines) > 20


def test_a_slide_without_room_for_a_tile_is_a_warning(picture: Pixels, tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "speck.tif", picture[1000:1010, 1000:1010])
    check, tiles = check_slide(SlideSource(path), None)
    assert (check.state, tiles) == (WARN, 0)
    assert ", 0 tiles; " in check.detail
    assert check.detail.endswith(f"; {NO_TILES}")
