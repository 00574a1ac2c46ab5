"""The command line as a whole: its version, its log, and errors of the operating system."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client import __version__

Run = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def level_kept() -> Any:
    """Put the client's log level back after a test."""
    yield
    logging.getLogger("client").setLevel(logging.NOTSET)


HOLD = """
import sys, time

def hold(event, _):
    if event == "import" and "{loaded}" in sys.modules:
        print("held", flush=True)
        time.sleep(600)

sys.addaudithook(hold)
"""


@pytest.mark.parametrize(
    "loaded", ["numpy._core._multiarray_umath", "grpc._cython.cygrpc", "openslide._convert"]
)
def test_ctrl_c_while_starting_leaves_no_traceback(loaded: str, tmp_path: Path) -> None:
    """It is held at its next import: else it may be past its start when the signal comes."""
    (tmp_path / "sitecustomize.py").write_text(HOLD.format(loaded=loaded))
    command = [sys.executable, "-m", "client", "timings", str(tmp_path)]
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (-signal.SIGINT, "")


def test_the_version(run_client: Run) -> None:
    done = run_client("--version")
    assert (done.code, done.out) == (0, f"gigapath-client {__version__}\n")


@pytest.mark.parametrize(
    ("options", "level"), [((), "WARNING"), (("-v",), "INFO"), (("--verbose", "-v"), "DEBUG")]
)
def test_verbose_shows_more_of_the_log(run_client: Run, options: tuple[str, ...], level: str) -> None:
    run_client(*options, "timings", "nowhere")
    assert logging.getLevelName(logging.getLogger("client").level) == level


def test_verbose_says_how_a_slide_is_read(
    run_client: Run, slides: Path, triton_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ("score", slides / "a.tif", "--out", tmp_path, "--url", triton_url)
    assert run_client(*arguments).code == 0
    assert "tiles through" not in caplog.text
    assert run_client("-v", *arguments, "--overwrite").code == 0
    assert "a.tif: tiles through jpeg tiles" in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [("benchmark", "--out", "/dev/null/x"), ("verify", "--report", "/dev/null/x.json")],
    ids=lambda arguments: arguments[0],
)
def test_a_path_that_cannot_be_is_one_line_before_any_request(
    run_client: Run, arguments: tuple[str, ...]
) -> None:
    done = run_client(*arguments, "--url", "127.0.0.1:1", "--retry-for", 0)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert "/dev/null" in done.err
    assert re.search("Not a directory|not a folder", done.err)


def test_any_other_error_of_the_system_is_one_line_too(run_client: Run, tmp_path: Path) -> None:
    (tmp_path / "records").symlink_to(tmp_path / "records")
    done = run_client("timings", tmp_path)
    assert done.code == 1
    assert "Traceback" not in done.err
    assert done.err.count("\n") == 1
