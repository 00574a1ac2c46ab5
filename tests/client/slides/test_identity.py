"""The identity of a slide: the content of exactly the files that make it up, whatever they are called."""

from __future__ import annotations

import warnings
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate_extended, generate_frames

from client.arrays import Pixels
from client.errors import SlideError
from client.slides.detect import fault_of_frames, has_slide_content, read_instance
from client.slides.fingerprint import file_fingerprint, slide_files, slide_sha256
from client.slides.slide import open_slide
from tests.support.dicom import write_segmentation, write_series
from tests.support.pyramid import write_pyramid


@pytest.mark.parametrize("suffix", [".dcm", ".DCM", ""])
def test_a_dicom_slide_is_its_series_and_nothing_else(tmp_path: Path, picture: Pixels, suffix: str) -> None:
    one = write_series(tmp_path, "one", picture[1000:1512, 700:1212], levels=(1, 2), suffix=suffix)
    other = write_series(tmp_path, "other", picture[1500:2012, 700:1212], levels=(1, 2), suffix=suffix)
    write_segmentation(tmp_path / f"0{suffix}", "segments")
    (tmp_path / "note.dcm").write_text("not DICOM")
    assert slide_files(one[0]) == slide_files(one[1]) == sorted(one)
    digests = {path: slide_sha256(path) for path in one + other}
    assert len(set(digests.values())) == 2
    with open_slide(one[1]) as slide:
        assert slide.dimensions == (512, 512)
        assert slide.level_downsamples == (1.0, 2.0)
    before = file_fingerprint(one[0])
    with other[0].open("ab") as file:
        file.write(b"\0\0")
    assert file_fingerprint(one[0]) == before
    assert slide_sha256(one[0]) == digests[one[0]]
    assert slide_sha256(other[1]) != digests[other[1]]
    for path in one:  # the same bytes elsewhere, by other names
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / "moved" / f"IM{path.stem[-1]}").write_bytes(path.read_bytes())
    assert slide_sha256(tmp_path / "moved" / "IM1") == digests[one[0]]


def test_labels_and_segmentations_are_no_levels(tmp_path: Path, picture: Pixels) -> None:
    [label] = write_series(tmp_path, "label", picture[:256, :256], levels=(1,), flavour="LABEL")
    write_segmentation(tmp_path / "seg.dcm", "segments")
    instances = [read_instance(path) for path in (label, tmp_path / "seg.dcm")]
    assert [instance and instance.is_level for instance in instances] == [False, False]
    assert read_instance(Path(__file__)) is None


@pytest.mark.parametrize("kind", ["Virtual Microscope Specimen", "Uncompressed Virtual Microscope Specimen"])
def test_a_hamamatsu_slide_is_what_its_index_names(tmp_path: Path, kind: str) -> None:
    index = tmp_path / "a.vms"
    index.write_text(
        f"[{kind}]\nImageFile=a.jpg\nImageFile(1,0)=b.jpg\nMapFile=../c.jpg\nMacroImage=gone.jpg\n"
    )
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_text(name)
    assert [path.name for path in slide_files(index)] == ["a.vms", "a.jpg", "b.jpg"]
    digest = slide_sha256(index)
    (tmp_path / "c.jpg").write_text("another")
    assert slide_sha256(index) == digest
    (tmp_path / "b.jpg").write_text("another")
    assert slide_sha256(index) != digest


def test_a_mirax_slide_is_its_index_and_its_folder(tmp_path: Path) -> None:
    index, part = tmp_path / "A.MRXS", tmp_path / "A" / "Data0001.dat"
    part.parent.mkdir()
    index.write_text("index")
    part.write_text("data")
    digest = slide_sha256(index)
    part.write_text("other")
    assert slide_sha256(index) != digest


def test_what_a_file_is_does_not_depend_on_its_name(tmp_path: Path, picture: Pixels) -> None:
    assert has_slide_content(write_pyramid(tmp_path / "slide", picture[:256, :256]))
    assert not has_slide_content(Path(__file__))
    assert not has_slide_content(tmp_path / "missing")


def test_dicom_without_the_places_of_its_frames_is_refused(tmp_path: Path, picture: Pixels) -> None:
    """OpenSlide 4.0.1 ends the process with a segmentation fault."""
    path = write_series(tmp_path, "a", picture[:512, :512])[1]
    data = pydicom.dcmread(path)
    data.DimensionOrganizationType = "TILED_SPARSE"
    data.ExtendedOffsetTable = bytes(8)
    data.save_as(path, enforce_file_format=True)
    with pytest.raises(SlideError, match=r"a-4\.dcm: does not say where its frames lie"):
        open_slide(tmp_path / "a-1.dcm")
    content = path.read_bytes()
    table = content.index(b"\xe0\x7f\x01\x00OV") + 4  # a sequence without an end hides nothing before it
    path.write_bytes(content[:table] + b"SQ\0\0\xff\xff\xff\xff" + content[table + 8 :])
    assert fault_of_frames(path)


def test_dicom_of_several_optical_paths_is_refused(tmp_path: Path, picture: Pixels) -> None:
    """OpenSlide would show one of them."""
    [path] = write_series(tmp_path, "a", picture[:512, :512], levels=(1,))
    data = pydicom.dcmread(path)
    data.OpticalPathSequence = [pydicom.Dataset(), pydicom.Dataset()]
    data.save_as(path, enforce_file_format=True)
    with pytest.raises(SlideError, match=r"a-1\.dcm: holds 2 optical paths: export one$"):
        open_slide(path)


def test_dicom_with_two_pictures_of_a_size_is_not_called_damaged(tmp_path: Path, picture: Pixels) -> None:
    """As focal planes in an instance each are."""
    path, other = (write_series(tmp_path, name, picture[:512, :512], levels=(1,))[0] for name in "ab")
    data = pydicom.dcmread(other)
    data.SeriesInstanceUID = pydicom.dcmread(path).SeriesInstanceUID
    data.save_as(other, enforce_file_format=True)
    with pytest.raises(SlideError, match=r"kind that OpenSlide does not read \(Slide contains unexpected"):
        open_slide(path)


@pytest.mark.parametrize("table", ["basic", "extended"])
def test_dicom_that_misplaces_frames_is_refused(tmp_path: Path, picture: Pixels, table: str) -> None:
    """OpenSlide 4.0.1 ends the process with a segmentation fault where it reads such a frame."""
    [path] = write_series(tmp_path, "a", picture[:768, :768], levels=(1,))
    data = pydicom.dcmread(path)
    frames = list(generate_frames(data.PixelData, number_of_frames=9))
    if table == "basic":
        pixels = bytearray(data.PixelData)
        pixels[8 + 4 * 8 : 8 + 4 * 9] = path.stat().st_size.to_bytes(4, "little")  # the last of nine
        data.PixelData = bytes(pixels)
    else:
        data.PixelData, offsets, data.ExtendedOffsetTableLengths = encapsulate_extended(frames)
        data.ExtendedOffsetTable = offsets[:-8] + (1 << 40).to_bytes(8, "little")
    data.save_as(path, enforce_file_format=True)
    with pytest.raises(SlideError, match=r"a-1\.dcm: does not say where its frames lie"):
        open_slide(path)


def test_a_dicom_file_may_be_cut_off_anywhere_in_its_header(tmp_path: Path, picture: Pixels) -> None:
    whole = write_series(tmp_path, "a", picture[:256, :256], levels=(1,))[0].read_bytes()
    path = tmp_path / "cut"
    for size in range(132, 600):
        path.write_bytes(whole[:size])
        read_instance(path)  # none of the cuts ends a batch
        fault_of_frames(path)


@pytest.mark.parametrize("name", ["CT_small.dcm", "SC_rgb_jpeg.dcm"])
def test_another_kind_of_dicom_is_called_so_without_a_warning(name: str) -> None:
    """The first begins as a TIFF does, and pydicom warns of the second's odd value."""
    with (
        warnings.catch_warnings(record=True) as warned,
        pytest.raises(SlideError, match="no slide that"),
    ):
        open_slide(Path(str(get_testdata_file(name))))
    assert not warned
