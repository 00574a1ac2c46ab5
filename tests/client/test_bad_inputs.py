"""Mistakes and mishaps: each ends in one clear line, no trace, and the other slides are finished."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import h5py
import pytest
import tifffile
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from client.arrays import Pixels
from server.local import run_triton
from tests.support.pyramid import write_pyramid

Run = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
DEAD = "127.0.0.1:1"


def damaged(path: Path, pixels: Pixels) -> None:
    """A slide whose directory is whole and whose tiles are all zeros."""
    write_pyramid(path, pixels)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for start, size in zip(file.pages.first.dataoffsets, file.pages.first.databytecounts, strict=True):
            content[start : start + size] = bytes(size)
    path.write_bytes(content)


def claiming(path: Path, side: int, tile: int) -> None:
    """An empty slide of `side` px whose tiles, `tile` px wide, are all left out."""
    tiles = (-(-side // tile)) ** 2
    head = b"II*\0" + struct.pack("<I", 8 + 4 * tiles + 16) + bytes(4 * tiles)
    rational, table = len(head), 8
    head += struct.pack("<II", 40_000, 1) + bytes(8)
    tags = [
        (256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 7), (262, 3, 1, 1), (277, 3, 1, 1),
        (282, 5, 1, rational), (283, 5, 1, rational), (296, 3, 1, 3), (322, 4, 1, tile), (323, 4, 1, tile),
        (324, 4, tiles, table), (325, 4, tiles, table),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    path.write_bytes(head + directory + bytes(50_000))


def cut(path: Path, pixels: Pixels, share: float) -> None:
    whole = write_pyramid(path, pixels).read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


# What lies at the path of a row, and what the status says of it.
SLIDES: dict[str, tuple[Callable[[Path, Pixels], object], str]] = {
    "missing": (lambda path, pixels: None, "no such file: check the path"),
    "empty": (lambda path, pixels: path.touch(), "empty file"),
    "cut_header": (lambda path, pixels: path.write_bytes(b"II*\0\x00\xff\xff\x0f"), "cut off|damaged"),
    "cut_tiles": (lambda path, pixels: cut(path, pixels, 0.6), "cut off|damaged"),
    "text": (lambda path, pixels: path.write_text("slide_id,label\n"), "no slide"),
    "noise": (lambda path, pixels: path.write_bytes(b"II*\0\x08\0\0\0" + bytes(range(256))), "slide|damaged"),
    "photo": (lambda path, pixels: tifffile.imwrite(path, pixels), "mpp|no slide"),
    "huge_header": (lambda path, pixels: claiming(path, 2_000_000_000, 2**24), "page claims"),
    "huge_empty": (lambda path, pixels: claiming(path, 1_000_000, 2**13), "header claims"),
    "huge_tiles": (lambda path, pixels: claiming(path, 30_000, 2**14), "in tiles of 16384x16384 px"),
    "all_damaged": (damaged, "decode|damaged"),
    "no_mpp": (lambda path, pixels: write_pyramid(path, pixels, mpp=None), "--mpp or an mpp column"),
    "absurd_mpp": (lambda path, pixels: write_pyramid(path, pixels, mpp=353.0), "mpp"),
    "too_coarse": (lambda path, pixels: write_pyramid(path, pixels, mpp=2.0), "magnified"),
    "folder": (lambda path, pixels: path.mkdir(), "not a file"),
    "pipe": (lambda path, pixels: os.mkfifo(path), "not a file"),
    "loop": (lambda path, pixels: path.symlink_to(path), "symbolic links"),
}
# The mask of a good slide.
MASKS: dict[str, tuple[str, Callable[[Path, Pixels], object], str]] = {
    "mask_missing": ("png", lambda path, pixels: None, "mask"),
    "mask_no_image": ("png", lambda path, pixels: path.write_text("no image"), "mask"),
    "mask_of_another_shape": ("png", lambda path, pixels: cv2.imwrite(str(path), pixels[:100, :20]), "shape"),
    "mask_no_json": ("geojson", lambda path, pixels: path.write_text("{"), "JSON"),
    "mask_without_area": ("geojson", lambda path, pixels: path.write_text('{"features": []}'), "area"),
}
# Whole rows: id, path, mpp.
ROWS: dict[str, tuple[str, str]] = {
    "mpp_no_number": ("good.tif,half,", "'half'"),
    "mpp_negative": ("good.tif,-1,", "'-1'"),
    "mpp_of_a_metre": ("good.tif,1000000,", "1000000"),
    "sub/folder": ("good.tif,,", "can't name"),
    "x" * 300: ("good.tif,,", "File name too long"),
    "too_few_cells": ("good.tif", "cells"),
    "good": ("other.tif,,", "already"),
}


def test_bad_slides_masks_and_rows_stop_nobody_else(
    picture: Pixels, triton_url: str, run_client: Run, tmp_path: Path
) -> None:
    pixels = picture[:512, 700:1212]
    write_pyramid(tmp_path / "good.tif", pixels)
    lines, expected = ["slide_id,path,mpp,mask_path", "good,good.tif,,"], {}
    for name, (make, message) in SLIDES.items():
        make(tmp_path / f"{name}.tif", pixels)
        lines.append(f"{name},{name}.tif,,")
        expected[name] = message
    for name, (suffix, make, message) in MASKS.items():
        make(tmp_path / f"{name}.{suffix}", pixels)
        lines.append(f"{name},good.tif,,{name}.{suffix}")
        expected[name] = message
    for name, (row, message) in ROWS.items():
        lines.append(f"{name},{row}")
        expected[name] = message
    lines.append("last,good.tif,0.5,")
    (tmp_path / "cohort.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    done = run_client("batch", tmp_path / "cohort.csv", "--out", out, "--url", triton_url)
    assert done.code == 1
    assert "Traceback" not in done.err
    [table] = out.glob("*/status.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(expected) + 2
    assert [line["slide_id"] for line in rows if line["status"] != "failed"] == ["good", "last"]
    for line in rows:
        if line["status"] == "failed":
            reason = line["reason"]
            assert re.search(expected[line["slide_id"]], reason), line
            assert "\n" not in reason
            assert "unexpected error" not in reason


def test_a_folder_with_a_name_of_foreign_bytes(
    picture: Pixels, triton_url: str, run_client: Run, tmp_path: Path
) -> None:
    write_pyramid(tmp_path / "good.tif", picture[:512, 700:1212])
    shutil.copy(tmp_path / "good.tif", tmp_path / os.fsdecode(b"\xff.tif"))
    done = run_client("batch", tmp_path, "--out", tmp_path / "out", "--url", triton_url)
    assert (done.code, "Traceback" in done.err) == (1, False)
    assert "can't name files: rename it" in done.err
    assert "ok       good" in done.err


def in_a_process(*arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The client in a process of its own, started by `prefix`."""
    command = [*prefix, sys.executable, "-m", "client", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_file_without_permission(picture: Pixels, triton_url: str, tmp_path: Path) -> None:
    for name in ("closed", "good"):
        write_pyramid(tmp_path / f"{name}.tif", picture[:512, 700:1212])
    (tmp_path / "closed.tif").chmod(0)
    # Root reads everything unless its capabilities are taken away.
    prefix = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    done = in_a_process("batch", tmp_path, "--out", tmp_path / "out", "--url", triton_url, prefix=prefix)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert re.search(r"failed   closed +.*closed\.tif: Permission denied", done.stderr)
    assert re.search(r"ok       good", done.stderr)


@pytest.mark.parametrize("command", ["score", "batch"])
@pytest.mark.parametrize("size", ["4k", "200k"])
def test_a_full_disk(picture: Pixels, triton_url: str, tmp_path: Path, command: str, size: str) -> None:
    """Outputs go to a file system of `size`, in a mount namespace that ends with the client."""
    slide = write_pyramid(tmp_path / "a.tif", picture[:1024, 700:1980])
    out, kept = tmp_path / "out", tmp_path / "kept"
    out.mkdir()
    script = f'mount -t tmpfs -o size={size} full "$0"; "$@"; code=$?; cp -a "$0" {kept}; exit $code'
    prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c", script, str(out))
    options = ["--wait-for", 0] if command == "batch" else []
    done = in_a_process(command, slide, "--out", out, "--url", triton_url, *options, prefix=prefix)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    message = r"cannot write .*: No space left on device; free some space"
    assert re.search(message, " ".join(done.stderr.split())), done.stderr
    for path in kept.rglob("*.h5"):  # what fitted is whole
        with h5py.File(path) as file:
            assert all(len(array[:]) for array in file.values())
    assert not [path for path in kept.rglob("*.part") if path.parent.name != ".partial"]


def test_a_batch_that_is_started_on_a_full_disk_waits(
    picture: Pixels, triton_url: str, tmp_path: Path
) -> None:
    """As after a night's crash, where something restarts it; the space comes once it waits."""
    slide, out = write_pyramid(tmp_path / "a.tif", picture[:1024, 700:1980]), tmp_path / "out"
    out.mkdir()
    script = (
        'mount -t tmpfs -o size=32m full "$0"; cat /dev/zero > "$0/ballast"; '
        f"(until grep -q waiting {tmp_path}/err; do sleep 0.1; done; rm $0/ballast) & "
        f'"$@" 2> {tmp_path}/err; code=$?; cat {tmp_path}/err >&2; exit $code'
    )
    prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c", script, str(out))
    done = in_a_process("batch", slide, "--out", out, "--url", triton_url, "--wait-for", 60, prefix=prefix)
    assert done.returncode == 0, done.stderr
    assert "waiting  for space on the disk" in done.stderr
    assert "there is space on the disk again" in done.stderr


COMMANDS: dict[str, tuple[list[object], str]] = {
    "no such manifest": (["batch", "missing.csv"], "no such file or folder"),
    "an empty manifest": (["batch", "empty.csv"], "is empty"),
    "wrong columns": (["batch", "wrong.csv"], "no column names the slides"),
    "a manifest that is no text": (["batch", "binary.csv"], "not a readable CSV"),
    "a folder without slides": (["batch", "nothing"], "holds no slides"),
    "a dead server": (["score", "good.tif", "--url", DEAD, "--retry-for", 0], f"no answer .*{DEAD}"),
    "a server without a port": (
        ["score", "good.tif", "--url", "localhost:nonsense"],
        "localhost:nonsense: has no port",
    ),
    "a device for a folder": (["score", "good.tif", "--out", "/dev/null", "--url", DEAD], "not a folder"),
    "a device for a batch": (["batch", "good.tif", "--out", "/dev/null", "--url", DEAD], "not a folder"),
    "a timeout that is no number": (
        ["score", "good.tif", "--timeout", "nan"],
        "--timeout must be positive",
    ),
    "a port that does not exist": (["score", "good.tif", "--url", "127.0.0.1:99999"], "no port from 1"),
    "a header that is not ASCII": (["score", "good.tif", "--header", "a=ü"], "printable ASCII"),
    "an unknown layout": (["batch", "good.tif", "--layout", "mine"], "trident or clam"),
    "a header without a value": (["score", "good.tif", "--header", "secret"], "--header takes name=value"),
    "a certificate that is missing": (["score", "good.tif", "--tls-ca", "none.pem"], r"none\.pem"),
    "no Ray cluster": (
        ["batch", "good.tif", "--url", "{url}", "--ray", "127.0.0.1:1"],
        "no Ray cluster at",
    ),
    "a folder for the outputs that is a file": (
        ["batch", "good.tif", "--url", "{url}", "--out", "empty.csv"],
        "cannot write",
    ),
    "an mpp that makes no sense": (
        ["score", "good.tif", "--url", "{url}", "--mpp", 5000],
        "5000.0 is not plausible",
    ),
    "a slide that is missing": (["score", "gone.tif", "--url", "{url}"], "no such file"),
    "no timings": (["timings", "nothing"], "holds no records"),
    "a report where no file can be": (
        ["verify", "--report", "empty.csv/report.json"],
        r"cannot write into empty\.csv: .*choose another",
    ),
    "a benchmark's folder that is a file": (
        ["benchmark", "--out", "empty.csv", "--seconds", 0.1],
        r"empty\.csv: ",
    ),
    "a share beyond one": (["score", "good.tif", "--min-tissue", 2], "--min-tissue"),
    "no slide named": (["score"], "Missing argument"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_cannot_be_done(
    name: str,
    picture: Pixels,
    triton_url: str,
    run_client: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pyramid(tmp_path / "good.tif", picture[:512, 700:1212])
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.csv").touch()
    (tmp_path / "wrong.csv").write_text("name,age\na,1\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    arguments, message = COMMANDS[name]
    done = run_client(*(str(part).format(url=triton_url) for part in arguments))
    assert done.code == 1, done.err
    assert re.search(message, done.err), done.err
    assert "Traceback" not in done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in done.err.splitlines()) == 1


def test_a_model_of_which_nobody_knows_what_it_computes(
    demo_repository: Path, slides: Path, run_client: Run, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(demo_repository, repository, symlinks=True)
    path = repository / "tile_encoder" / "configs" / "onnxruntime.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    contract = json.loads(config.parameters["contract"].string_value)
    del config.parameters["contract"]
    path.write_text(text_format.MessageToString(config))
    path = repository / "slide_encoder" / "configs" / "onnxruntime.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    config.parameters["contract"].string_value = json.dumps({**contract, "schema": 2})
    path.write_text(text_format.MessageToString(config))
    with run_triton(repository, log=tmp_path / "log") as server:
        done = run_client("score", slides / "a.tif", "--url", server.url, "--out", tmp_path / "out")
    assert done.code == 1
    assert done.err.startswith(f"error: tile_encoder at {server.url} carries no contract")
    assert not (tmp_path / "out").exists()
