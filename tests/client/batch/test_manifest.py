"""Folders and tables of slides, with the names that people already use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import pydicom
import pytest

from client.arrays import Pixels
from client.batch.manifest import read_work_list
from client.errors import ManifestError
from client.files import write_csv
from tests.support.dicom import write_segmentation, write_series
from tests.support.pyramid import write_pyramid


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Empty files by slides' names: a work list opens none."""
    for name in (
        "s1.svs",
        "s2.tiff",
        "sub/s3.ndpi",
        "series/1.dcm",
        "series/2.dcm",
        ".hidden.svs",
        "note.txt",
    ):
        (tmp_path / "slides" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "slides" / name).touch()
    return tmp_path / "slides"


def manifest(folder: Path, text: str, name: str = "m.csv") -> Path:
    path = folder.parent / name
    path.write_text(text)
    return path


def test_a_cell_holds_what_is_no_line_break_to_csv(folder: Path) -> None:
    text = 'slide_id,path,note\ns1,s1.svs,"two\nlines"\ns2,s2.tiff,a\u2028b\x0cc\x85d\n'
    work_list = read_work_list(manifest(folder, text), folder)
    assert {name: columns["note"] for name, columns in work_list.columns.items()} == {
        "s1": "two\nlines",
        "s2": "a\u2028b\x0cc\x85d",
    }


def test_a_spreadsheet_runs_nothing_out_of_a_table(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", ["a", "b", "c"], [["=cmd|' /C calc'!A0", "-1.5", -2], ["@x", " +y", "a=b"]])
    text = (tmp_path / "t.csv").read_text()
    assert text == "a,b,c\n'=cmd|' /C calc'!A0,-1.5,-2\n'@x,' +y,a=b\n"


def test_a_folder_with_its_subfolders(folder: Path) -> None:
    work_list = read_work_list(folder)
    assert [slide.slide_id for slide in work_list.slides] == ["s1", "s2", "1", "s3"]
    assert not work_list.bad
    assert read_work_list(folder / "s1.svs").slides[0].path == folder / "s1.svs"
    assert work_list.omission() == "1 files that are no slides (note.txt)"
    for name in ("a.isyntax", "b.JPG", "c.jpg", "README"):
        (folder / name).touch()
    kinds = "2 .jpg, 1 without a suffix, 1 .isyntax, 1 .txt"
    assert read_work_list(folder).omission() == f"5 files that are no slides ({kinds})"


def test_every_dicom_series_of_a_folder_is_a_slide(tmp_path: Path, picture: Pixels) -> None:
    for number, stem in enumerate(("b", "c")):
        write_series(tmp_path, stem, picture[number * 512 :][:512, :512], levels=(1, 2))
    write_segmentation(tmp_path / "a.dcm", "segments")
    write_series(tmp_path, "aa", picture[:256, :256], levels=(1,), flavour="LABEL")
    work_list = read_work_list(tmp_path)
    assert [slide.slide_id for slide in work_list.slides] == ["b-1", "c-1"]
    assert [path.name for path in work_list.left_out] == ["a.dcm", "aa-1.dcm"]


def test_dicom_slides_whose_files_have_the_same_names_are_called_like_their_folders(
    tmp_path: Path, picture: Pixels
) -> None:
    for number, case in enumerate(("case1", "case2")):
        (tmp_path / case).mkdir()
        write_series(tmp_path / case, case, picture[number * 512 :][:512, :512], levels=(1,))
        (tmp_path / case / f"{case}-1.dcm").rename(tmp_path / case / "DCM_0.dcm")
    write_pyramid(tmp_path / "case1" / "plain.tif", picture[:256, :256])
    write_pyramid(tmp_path / "plain.tif", picture[:256, :256])
    work_list = read_work_list(tmp_path)
    assert [slide.slide_id for slide in work_list.slides] == ["case1", "plain", "case2"]
    assert "give each an id of its own in a manifest" in work_list.bad[0].reason


def test_a_manifest_names_a_dicom_slide_by_its_folder_or_its_uid(tmp_path: Path, picture: Pixels) -> None:
    for number, name in enumerate(("case1", "case2", "case3")):
        (tmp_path / name).mkdir()
        for level, path in enumerate(
            write_series(tmp_path / name, name, picture[number * 512 :][:512, :512])
        ):
            path.rename(path.with_name(f"1.2.840.{level}"))  # as archives store them
    write_pyramid(tmp_path / "case3.tif", picture[:256, :256])
    uid = str(pydicom.dcmread(tmp_path / "case2" / "1.2.840.0").SeriesInstanceUID)
    work_list = read_work_list(manifest(tmp_path / "x", f"slide_id\ncase1\n{uid}\ncase3\n"))
    assert [(slide.slide_id, slide.path.parent.name) for slide in work_list.slides] == [
        ("case1", "case1"),
        (uid, "case2"),
    ]
    assert "case3 is the name of 2 slides" in work_list.bad[0].reason
    work_list = read_work_list(manifest(tmp_path / "x", "path\ncase1/1.2.840.0\ncase1/1.2.840.1\n"))
    assert [slide.slide_id for slide in work_list.slides] == ["1.2.840.0"]
    assert re.search(r"of the DICOM series of .*case1/1\.2\.840\.0: name", work_list.bad[0].reason)


def test_links_are_followed_and_content_is_looked_at(tmp_path: Path, picture: Pixels) -> None:
    folder, elsewhere = tmp_path / "slides", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for name in ("a.tif", "b.qptiff", "c.unknown", "d"):
        write_pyramid(elsewhere / name, picture[:256, :256])
    (elsewhere / "e.tmp").write_bytes(b"II*\0 and no more")
    for name in ("one", "two"):  # the same folder twice, and a way back up
        (folder / name).symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(folder)
    (folder / "gone.svs").symlink_to(tmp_path / "unmounted" / "gone.svs")
    work_list = read_work_list(folder)
    assert [slide.path for slide in work_list.slides] == [
        folder / "one" / name for name in ("a.tif", "b.qptiff", "c.unknown", "d")
    ]
    assert [path.name for path in work_list.left_out] == ["e.tmp"]
    [bad] = work_list.bad
    assert re.search(r"gone\.svs: a link to .*unmounted/gone\.svs, which is not there", bad.reason)
    assert read_work_list(elsewhere / "d").slides[0].path == elsewhere / "d"


def test_an_id_that_two_files_have_is_refused(folder: Path) -> None:
    (folder / "sub" / "s1.svs").touch()
    work_list = read_work_list(manifest(folder, "slide_id\ns1\ns2\ns1.svs\n"), folder)
    assert [slide.slide_id for slide in work_list.slides] == ["s2"]
    assert [bad.slide_id for bad in work_list.bad] == ["s1", "s1"]
    assert "s1 is the name of 2 slides" in work_list.bad[0].reason
    assert "add a column `path`" in work_list.bad[0].reason


@pytest.mark.parametrize(
    "text",
    [
        "wsi\ns1.svs\n",  # TRIDENT
        "wsi,mpp\ns1.svs,0.25\n",
        "case_id,slide_id,label\np,s1,x\n",  # CLAM
        "slide_id,label\ns1.svs,x\n",  # prov-gigapath
        "image_id,data_provider,isup_grade\ns1,karolinska,1\n",  # PANDA
        "PATIENT,FILENAME\np,s1.svs\n",  # STAMP
        "sample_id,image_path\ns1,s1.svs\n",
        "\ufeffSlide_ID;Path\ns1;s1.svs\n",  # Excel
        "slide_id\tpath\ns1\ts1.svs\n",
        "file_name\ns1.svs\n\n",
        "wsi\ns1.svs,\n",
        "wsi;mpp\ns1.svs;0,25\n",
        ",slide_id,path\n7,s1,s1.svs\n",  # pandas with its index
        "Unnamed: 0,slide_id,label\n7,s1.svs,x\n",  # prov-gigapath's splits, read and written again
        "Unnamed: 0.1,Unnamed: 0,slide_id\n0,7,s1.svs\n",  # ... twice
        "PATIENT,FILENAME\np,s1.h5\n",  # STAMP, of features
        "slide_id,path\ns1,nan\n",  # a path that pandas did not have
        "slide_id,slide_path\ns1,s1.svs\n",
        "filepath\ns1.svs\n",
        "wsi_path\ns1.svs\n",
        "slide_id,process,status\ns2.tiff,0,tbp\ns1.svs,1,tbp\n",  # CLAM's process_list
        "slide_id,process\ns2.tiff,False\ns1.svs,True\n",
    ],
)
def test_the_column_names_that_people_have(folder: Path, text: str) -> None:
    work_list = read_work_list(manifest(folder, text), folder)
    assert [(slide.slide_id, slide.path) for slide in work_list.slides] == [("s1", folder / "s1.svs")]
    assert not work_list.bad
    assert work_list.slides[0].mpp == (0.25 if "mpp" in text else None)
    assert work_list.slides[0].mask is None
    assert not [name for name in work_list.columns["s1"] if not name or name.startswith("Unnamed")]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("slide_id,filename", "column filename is not read: slide_id is"),
        ("slide_id,path,image_path", "column path is not read: image_path is"),
        ("slide_id,mpp_x", "column mpp_x is not read: to have it read call it mpp"),
        ("slide_id,tissue_mask", "column tissue_mask is not read: to have it read call it mask_path"),
        ("slide_id,side,stage,patient", None),
    ],
)
def test_a_column_that_looks_like_ours_is_named(
    folder: Path, caplog: pytest.LogCaptureFixture, header: str, said: str | None
) -> None:
    cells = ",".join(["s1.svs"] * header.count(","))
    read_work_list(manifest(folder, f"{header}\ns1,{cells}\n"), folder)
    assert [record.message.rpartition("m.csv: ")[2] for record in caplog.records] == [said] * bool(said)


def test_a_slide_named_by_id_is_found_below_the_folder(folder: Path) -> None:
    work_list = read_work_list(manifest(folder, "slide_id\ns3\n"), folder)
    assert work_list.slides[0].path == folder / "sub" / "s3.ndpi"


def test_masks_scales_and_further_columns(folder: Path) -> None:
    text = (
        "slide_id,path,spacing_at_level_0,mask_path,case_id,label\n"
        "s1,s1.svs,0.5,m.png,p1,tumour\ns2,s2.tiff,,,p2,\n"
    )
    work_list = read_work_list(manifest(folder, text), folder)
    assert (work_list.slides[0].mpp, work_list.slides[0].mask) == (0.5, folder / "m.png")
    assert (work_list.slides[1].mpp, work_list.slides[1].mask) == (None, None)
    assert work_list.columns == {
        "s1": {"case_id": "p1", "label": "tumour"},
        "s2": {"case_id": "p2", "label": ""},
    }


@pytest.mark.parametrize("word", ["NA", "nan", "<NA>", "None", "n/a", "NULL"])
def test_what_stands_for_nothing_is_nothing(folder: Path, word: str) -> None:
    text = f"slide_id,path,mpp,mask_path\ns1,s1.svs,{word},{word}\ns2.tiff,{word},,\n"
    slides = read_work_list(manifest(folder, text), folder).slides
    assert [(slide.path.name, slide.mpp, slide.mask) for slide in slides] == [
        ("s1.svs", None, None),
        ("s2.tiff", None, None),
    ]


@pytest.mark.parametrize("text", ["slide_id\nFälle\n", "path\nGröße/Fälle.svs\n"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_accent_is_an_accent_however_it_is_stored(
    folder: Path, text: str, form: Literal["NFC", "NFD"]
) -> None:
    stored = folder / normalize("NFD", "Größe") / normalize("NFD", "Fälle.svs")
    stored.parent.mkdir()
    stored.touch()
    work_list = read_work_list(manifest(folder, normalize(form, text)), folder)
    assert [slide.path for slide in work_list.slides] == [stored]


def test_bad_rows_leave_the_others_alone(folder: Path) -> None:
    text = (
        "slide_id,path,mpp\ns1,s1.svs,half\ns1,s1.svs,0.5\ns1,s2.tiff,0.5\nx/y,s2.tiff,0.5\ns2,s2.tiff,-1\n"
        "s2,s2.tiff,inf\ns3,s2.tiff\ns4,s2.tiff,0.5,more\ns5,s2.tiff,0.5\n"
    )
    work_list = read_work_list(manifest(folder, text), folder)
    assert [slide.slide_id for slide in work_list.slides] == ["s1", "s5"]
    parts = ["line 2 .*'half'", "already", "can't name", "'-1'", "'inf'", "line 8 .*cells", "line 9 .*cells"]
    assert len(work_list.bad) == len(parts)
    for bad, part in zip(work_list.bad, parts, strict=True):
        assert re.search(part, bad.reason), bad


@pytest.mark.parametrize("name", ["a" * 300, "=1+1", "+s", "-s", "@s", "a\u2028b", "ä" * 91])
def test_an_id_that_cannot_name_files_is_found_before_any_work(folder: Path, name: str) -> None:
    work_list = read_work_list(manifest(folder, f"slide_id,path\n{name},s1.svs\ns2,s2.tiff\n"), folder)
    assert [slide.slide_id for slide in work_list.slides] == ["s2"]
    [bad] = work_list.bad
    assert re.search(
        r"can't name files( \(File name too long: \d+ bytes, at most 180\))?: rename it", bad.reason
    )
    assert len(bad.reason) < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('slide_id,path\ns1,s1.svs\ns2,"s2.tiff\ns3,s3.ndpi\n', "line 3: a quote is not closed"),
        ("slide_id,path\ns1,s1.svs\ns2," + "x" * 200_000 + "\n", "line 3: field larger"),
        ("", "is empty"),
        ("slide_id,mpp,MPP\ns1,0.5,0.25\n", "column mpp is there twice: rename one"),
        ("slide_id,path\n", "has no row: add one per slide"),
        ("slide_id,process\ns1,0\ns2,0\n", "every row has CLAM's process 0: set it to 1"),
        ("Name,age\na,1\n", "no column names the slides .has Name, age."),
    ],
)
def test_tables_that_are_no_manifest(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_work_list(manifest(folder, text))


def test_what_is_left_out_or_names_nothing_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "slide_id,path,process\ns1,s1.svs,1\ns2,s2.tiff,0\n,,1\n"
    work_list = read_work_list(manifest(folder, rows))
    assert [slide.slide_id for slide in work_list.slides] == ["s1"]
    assert "CLAM's process 0 leaves out 1 of 3 rows" in caplog.text
    [bad] = work_list.bad
    assert re.fullmatch(r"line 4 of .*m\.csv names no slide", bad.reason)


def test_rows_without_a_label_are_named_and_scored(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "slide_id,path,label\na,s1.svs,lesion\nb,s1.svs,\nc,s1.svs,nan\n"
    assert len(read_work_list(manifest(folder, rows)).slides) == 3
    assert "2 of 3 rows have no label (line 3): training will refuse the table" in caplog.text
    caplog.clear()
    read_work_list(manifest(folder, "slide_id,path,label\na,s1.svs,\n"))  # not labelled at all
    assert not caplog.text


def test_what_is_not_there_or_not_text(folder: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        read_work_list(folder / "missing.csv")
    (folder / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ManifestError, match="not a readable CSV"):
        read_work_list(folder / "binary.csv")
    (folder / "none").mkdir()
    with pytest.raises(ManifestError, match=r"holds no slides .*\.svs"):
        read_work_list(folder / "none")
