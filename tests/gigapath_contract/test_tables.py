"""Ids and tables of slides: training takes what the client takes, and calls a slide by the same id."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.batch.manifest import read_work_list
from client.errors import ManifestError
from gigapath_contract.errors import TableError
from gigapath_contract.slides import SLIDE_SUFFIXES, slide_id
from gigapath_contract.tables import read_table
from training.data.tables import Table
from training.errors import TrainingError

NAMES = {
    f"{letter}{suffix}": letter
    for letter, suffix in zip("abcdefghijklmnop", sorted(SLIDE_SUFFIXES), strict=True)
}
IDS = NAMES | {
    "sub/g.svs": "g",
    "A.SVS": "A",
    "TCGA-05-4244-01Z.d4ff32cd": "TCGA-05-4244-01Z.d4ff32cd",
    "slide.ome.tif": "slide.ome",
    "plain": "plain",
    "features.h5": "features",
    "photo.png": "photo",  # convert made a slide of it
}

TABLES = {
    "commas": "slide_id,label\ns1.svs,0\ns2.czi,1\n",
    "tabs": "slide_id\tlabel\ns1\t0\ns2\t1\n",
    "semicolons, a byte order mark and Windows lines": "\ufeffSlide_ID;Label\r\ns1;0\r\ns2;1\r\n",
    "paths alone": "file_name,label\nsub/s1.svs,0\ns2.vmu,1\n",
    "a path where the id is missing": "slide_id,path,label\n,sub/s1.svs,0\ns2,x.svs,1\n",
    "names with spaces": "Slide ID,label\ns1.svs,0\ns2.svs,1\n",
    "two columns of ids": "wsi,filename,label\nother.svs,s1.svs,0\nother.svs,s2.svs,1\n",
    "empty lines and padding": "\nslide_id , label\n\n s1 ,0\n,\ns2, 1\n",
    "cells in quotes with a line break and a separator": 'slide_id,note,label\ns1,"a\nb, c",0\ns2,"",1\n',
    "a line separator that is not one": "slide_id,note,label\ns1,a\u2028b\x0bc,0\ns2,,1\n",
}


@pytest.mark.parametrize("name", sorted(IDS))
def test_a_slide_has_one_id_whoever_reads_its_name(name: str, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"slide_id,label\n{name},1\n")
    assert slide_id(name) == IDS[name]
    assert Table(table).slide_ids() == [IDS[name]]
    assert [slide.slide_id for slide in read_work_list(table).slides] == [IDS[name]]


@pytest.mark.parametrize("name", TABLES)
def test_training_takes_the_tables_that_the_client_takes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(TABLES[name], encoding="utf-8", newline="")
    found = read_work_list(path)
    assert not found.bad
    assert [slide.slide_id for slide in found.slides] == Table(path).slide_ids() == ["s1", "s2"]
    assert [row["label"] for row in Table(path).rows] == ["0", "1"]


def test_rows_know_their_line(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('\nslide_id,note\ns1,"a\nb"\n\ns2,c,d\n')
    assert [(row.line, len(row.cells)) for row in read_table(path).rows] == [(4, 2), (6, 3)]
    with pytest.raises(TrainingError, match="line 6 has 3 values for 2 columns"):
        Table(path)
    assert [bad.reason for bad in read_work_list(path).bad] == [
        f"line 6 of {path} has too many or too few cells"
    ]


def test_what_is_no_table_is_one_line_on_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    for content in (b"slide_id\n\xff\n", b"slide_id\n" + b"x" * 200_000, b"slide_id\na\0\n"):
        path.write_bytes(content)
        with pytest.raises(TableError):
            read_table(path)
        with pytest.raises(ManifestError, match="not a readable CSV or TSV file"):
            read_work_list(path)
        with pytest.raises(TrainingError, match="is not a CSV file in UTF-8"):
            Table(path)
