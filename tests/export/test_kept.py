"""The exports that the tests keep in build/tests: when they are made again, and what a kill does to them."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from pathlib import Path

from tests.support.kept import copy_of_kept


def fill(kept: Path) -> None:
    """Leave one line for every call, and a file of this process."""
    kept.mkdir(exist_ok=True)
    with (kept / "calls").open("a") as calls:
        calls.write("filled\n")
    (kept / str(os.getpid())).touch()


def fill_and_die(kept: Path) -> None:
    fill(kept)
    os.kill(os.getpid(), signal.SIGKILL)


def in_another_process(root: Path, key: str, name: str, kill: bool = False) -> int:
    """What a second test run does; its exit code."""
    process = get_context("spawn").Process(
        target=copy_of_kept, args=(root / "kept", key, fill_and_die if kill else fill, root / name)
    )
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


def test_unchanged_input_finds_what_was_kept(tmp_path: Path) -> None:
    first = copy_of_kept(tmp_path / "kept", "key", fill, tmp_path / "first")
    (first / "scribble").touch()
    second = copy_of_kept(tmp_path / "kept", "key", fill, tmp_path / "second")
    assert (calls(first), calls(second)) == (1, 2), "the second run found what the first one had kept"
    assert not (second / "scribble").exists(), "a test that writes does so in its own copy"


def test_changed_input_starts_from_nothing(tmp_path: Path) -> None:
    first = copy_of_kept(tmp_path / "kept", "key", fill, tmp_path / "first")
    assert in_another_process(tmp_path, "other key", "second") == 0
    assert calls(tmp_path / "second") == 1
    assert not (tmp_path / "second" / str(os.getpid())).exists(), "what was kept before is gone"
    assert calls(first) == 1, "a running session's copy stays"


def test_a_killed_run_leaves_nothing_that_is_taken_for_complete(tmp_path: Path) -> None:
    assert in_another_process(tmp_path, "key", "first", kill=True) == -signal.SIGKILL
    assert calls(tmp_path / "kept") == 1
    assert calls(copy_of_kept(tmp_path / "kept", "key", fill, tmp_path / "second")) == 1
    assert in_another_process(tmp_path, "key", "third", kill=True) == -signal.SIGKILL
    assert calls(copy_of_kept(tmp_path / "kept", "key", fill, tmp_path / "fourth")) == 3, "all of one key"
