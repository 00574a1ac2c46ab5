"""Readers of strangers' files stand damaged ones: `make fuzz` tries ten minutes, the tests the same few."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tests.fuzz.readers import FEWEST, KEPT, READERS, ROOT

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
SEED = int(time.time()) if "FUZZ_SECONDS" in os.environ else 0


@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_in_one_line(name: str) -> None:
    """No traceback, at most 10 seconds a file, at most 1 GB."""
    command = [sys.executable, "-m", "tests.fuzz.readers", name, str(SECONDS / len(READERS)), str(SEED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr[-6000:]}\nthe file: {KEPT / name}"
    assert int(done.stdout.split()[0]) >= FEWEST
