"""Files appear whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gigapath_contract.files import NO_SUCH
from training.errors import TrainingError
from training.files import make_folder, write_csv, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]


def test_what_json_has_no_word_for_is_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"nan": float("nan"), "list": [1.5, (float("inf"),)]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"nan": None, "list": [1.5, [None]]}


def test_a_table_is_written_with_its_header(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ("slide_id", "note"), [("s1", "a, b"), ("s2", "")])
    assert (tmp_path / "a.csv").read_bytes() == b'slide_id,note\ns1,"a, b"\ns2,\n'


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"cannot write .*file/a\.txt: "):
        write_text(tmp_path / "file" / "a.txt", "text")
    with pytest.raises(TrainingError, match="cannot make folder"):
        make_folder(tmp_path / "file")


def test_the_command_line_ends_with_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "slide.svs").touch()
    command = [sys.executable, "-m", "training", "make-cohort", "--source", str(tmp_path / "none.svs")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "cohort")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.strip() and "drawing" not in line]
    assert line == f"error: {tmp_path / 'none.svs'}: {NO_SUCH}"
