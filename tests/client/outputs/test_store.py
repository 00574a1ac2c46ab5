"""A slide is scored once, and what lies in the folder is taken only where it is that result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.errors import OutputError, SlideError
from client.outputs.layout import Layout
from client.outputs.records import OK, SlideRecord
from client.outputs.store import Outputs, SingleFile, TridentFiles, score_to
from client.scoring.score import SlideSource, TilingOptions
from client.triton.connection import Connection
from gigapath_contract.schema import Contract

Run = Callable[..., Any]


def test_a_folder_that_cannot_be_is_refused_before_the_slide_is_opened(
    connection: Connection, contract: Contract, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    source = SlideSource(tmp_path / "gone.svs")
    with pytest.raises(OutputError, match="file is not a folder"):
        score_to(SingleFile(tmp_path / "file" / "out"), source, connection, contract)


def test_a_result_is_reused_only_from_the_same_options_and_the_same_files(
    slides: Path, connection: Connection, contract: Contract, tmp_path: Path
) -> None:
    single, trident = SingleFile(tmp_path), TridentFiles(Layout(tmp_path, contract))

    def store(outputs: Outputs, min_tissue: float, *, overwrite: bool = False) -> SlideRecord:
        record, scored = score_to(
            outputs,
            SlideSource(slides / "a.tif", "a"),
            connection,
            contract,
            TilingOptions(min_tissue=min_tissue),
            overwrite=overwrite,
        )
        assert (scored is None) == record.reused
        return record

    first = store(single, 0.1)
    assert not first.reused
    assert first.outputs == ["a.h5", "a-tiles.png"]
    assert store(single, 0.1).reused
    assert not store(single, 0.1, overwrite=True).reused
    # The record now names another layout's files: the single file, of other options, is not taken for them.
    other = store(trident, 0.5)
    assert not other.reused
    assert other.tiles < first.tiles
    assert not store(single, 0.5).reused
    assert not list(tmp_path.glob(".partial/*"))
    # The record is right, but a file is missing.
    (tmp_path / "a-tiles.png").unlink()
    assert not store(single, 0.5).reused
    assert store(single, 0.5).reused


def test_a_slide_does_not_overwrite_another_of_the_same_name(
    slides: Path, triton_url: str, run_client: Run, tmp_path: Path
) -> None:
    one, other = tmp_path / "one" / "s.tif", tmp_path / "other" / "s.tif"
    for path, name in ((one, "a.tif"), (other, "b.tif")):
        path.parent.mkdir()
        path.write_bytes((slides / name).read_bytes())
    out = ("--out", tmp_path / "out", "--url", triton_url)
    assert run_client("score", one, *out).code == 0
    first = (tmp_path / "out" / "s.h5").read_bytes()
    for command in ("score", "attribute"):
        done = run_client(command, other, *out)
        assert (done.code, done.err.count("\n")) == (1, 1), done.err
        assert f"another slide called s ({one})" in done.err
    assert (tmp_path / "out" / "s.h5").read_bytes() == first
    other.write_bytes(one.read_bytes())  # the same slide, moved
    assert run_client("score", other, *out).code == 0
    other.write_bytes((slides / "b.tif").read_bytes())  # another, in the place of the one that was scored
    assert run_client("score", other, *out).code == 0


def test_a_slide_that_is_replaced_while_it_is_read_gives_no_result(
    slides: Path, connection: Connection, contract: Contract, tmp_path: Path
) -> None:
    path, outputs = tmp_path / "s.tif", TridentFiles(Layout(tmp_path / "out", contract))
    path.write_bytes((slides / "a.tif").read_bytes())

    def replace(done: int, total: int) -> None:
        path.write_bytes((slides / "b.tif").read_bytes())

    with pytest.raises(SlideError, match=r"s\.tif: was changed while it was read"):
        score_to(outputs, SlideSource(path), connection, contract, progress=replace)
    assert not list((tmp_path / "out").rglob("*.h5"))
    assert not list((tmp_path / "out" / ".partial").glob("*"))
    record, _ = score_to(outputs, SlideSource(path), connection, contract)
    assert record.status == OK
