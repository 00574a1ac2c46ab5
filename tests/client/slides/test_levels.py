"""No level is trusted by its name: its size and a look decide, else a finer one is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile

from client.arrays import Pixels
from client.errors import SlideError
from client.slides.slide import open_slide
from client.slides.tiling import plan_tiles
from client.slides.tissue import tissue_mask
from tests.support.dicom import write_series
from tests.support.pyramid import shrink, write_pyramid

REDUCED, MASK = 1, 4


def write_pages(path: Path, *pages: tuple[Pixels, int, float], tile: int = 256) -> Path:
    """A TIFF of tiled pages, each of pixels, NewSubfileType and microns per pixel."""
    with tifffile.TiffWriter(path) as file:
        for pixels, subfile, mpp in pages:
            file.write(
                pixels,
                tile=(tile, tile),
                photometric="rgb" if pixels.ndim == 3 else "minisblack",
                compression="deflate",
                subfiletype=subfile & REDUCED,
                resolution=(1e4 / mpp, 1e4 / mpp),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    with tifffile.TiffFile(path, mode="r+") as file:
        for page, (_, subfile, _) in zip(file.pages, pages, strict=True):
            page.aspage().tags["NewSubfileType"].overwrite(subfile)
    return path


def padded(pixels: Pixels, tile: int = 256) -> Pixels:
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, -height % tile), (0, -width % tile), (0, 0)), constant_values=255)


@pytest.mark.parametrize("size", [(2000, 1500), (2000, 1000)])  # the second: both axes by the same part
def test_a_level_padded_to_whole_tiles_is_not_used(
    tmp_path: Path, picture: Pixels, size: tuple[int, int]
) -> None:
    whole = picture[: size[1], : size[0]]
    small = padded(shrink(whole, 4))
    with open_slide(write_pages(tmp_path / "a.tif", (whole, 0, 0.125), (small, REDUCED, 0.5))) as slide:
        assert slide.level_dimensions[1] == (512, 512 if size[1] == 1500 else 256)
        tiles = plan_tiles(slide, tissue_mask(slide))
        assert (tiles.level, tiles.downsample) == (0, 1.0)
        assert len(slide.notes) == 1
        assert "level 1 (512x" in slide.notes[0]
    good = write_pages(tmp_path / "b.tif", (whole, 0, 0.125), (shrink(whole, 4), REDUCED, 0.5))
    with open_slide(good) as slide:
        assert plan_tiles(slide, None).level == 1
        assert not slide.notes


def test_the_scale_is_that_of_the_largest_page_wherever_it_is(tmp_path: Path, picture: Pixels) -> None:
    whole = picture[:1024, :1024]
    with open_slide(
        write_pages(tmp_path / "a.tif", (shrink(whole, 4), 0, 2.0), (whole, REDUCED, 0.5))
    ) as slide:
        assert slide.dimensions == (1024, 1024)
        assert slide.mpp == pytest.approx((0.5, 0.5))


def test_a_finer_picture_than_level_0_is_named(tmp_path: Path, picture: Pixels) -> None:
    """OpenSlide takes the first page of a generic TIFF and those that are flagged as reduced."""
    whole = picture[:512, :512]
    path = write_pages(tmp_path / "a.tif", (shrink(whole, 2), 0, 0.5), (whole, 0, 0.25))
    with open_slide(path) as slide:
        assert slide.dimensions == (256, 256)
        [note] = slide.notes
    assert note.startswith("level 0 is not its largest page, 512x512 px")
    files = write_series(tmp_path, "a", picture[:512, :512], levels=(1, 2))
    for file in files:
        data = pydicom.dcmread(file)
        data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE" if file == files[0] else "RESAMPLED"]
        data.save_as(file, enforce_file_format=True)
    with open_slide(files[1]) as slide:
        assert not slide.notes
    files[0].unlink()
    with open_slide(files[1]) as slide:
        assert slide.notes == [
            "its finest level was made from a finer one: copy all files of the DICOM series"
        ]


def test_a_label_that_calls_itself_a_level_is_not_used(tmp_path: Path, picture: Pixels) -> None:
    whole, label = picture[1500:2012, 700:1212], np.full((256, 256, 3), 250, np.uint8)
    label[40:220:8] = 0
    with open_slide(write_pages(tmp_path / "a.tif", (whole, 0, 0.25), (label, REDUCED, 0.5))) as slide:
        assert plan_tiles(slide, tissue_mask(slide), mpp=0.5).level == 0
        assert slide.notes == ["level 1 (256x256 px) is not used: it shows something else than level 0"]


def test_levels_that_agree_with_each_other_alone_are_not_used(tmp_path: Path, picture: Pixels) -> None:
    """As a converter leaves them that takes RGB for YCbCr where it makes levels."""
    whole = picture[1500:2012, 700:1212]
    other = whole[..., ::-1] // 2
    pages = ((shrink(other, factor), REDUCED, 0.25 * factor) for factor in (2, 4))
    with open_slide(write_pages(tmp_path / "a.tif", (whole, 0, 0.25), *pages)) as slide:
        assert slide.level_for(4) == 0
        assert [note.partition(" is not used")[0][:7] for note in slide.notes] == ["level 2", "level 1"]


@pytest.mark.parametrize("first", [True, False])
def test_a_mask_of_a_cloud_optimised_tiff_is_no_level(tmp_path: Path, picture: Pixels, first: bool) -> None:
    whole = picture[1000:2024, 700:1724]
    pages = [(shrink(whole, 2), REDUCED, 0.5), (np.full((512, 512), 255, np.uint8), REDUCED | MASK, 0.5)]
    path = write_pages(tmp_path / "a.tif", (whole, 0, 0.25), *(pages[::-1] if first else pages))
    with open_slide(path) as slide:
        assert slide.level_dimensions == ((1024, 1024), (512, 512), (512, 512))
        tiles = plan_tiles(slide, tissue_mask(slide), mpp=0.5)
        assert tiles.level == (2 if first else 1)
        assert np.array_equal(slide.read(tiles.level, (0, 0), (512, 512)), shrink(whole, 2))
        word = "level 1 (512x512 px) is not used: it is a mask, or stored otherwise than level 0"
        assert slide.notes == [word] * first


def test_a_level_that_cannot_be_decoded_is_not_used(tmp_path: Path, picture: Pixels) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture[1000:2024, 700:1724], mpp=0.25, levels=(1, 2))
    with tifffile.TiffFile(path) as file:
        page = file.pages[1].aspage()
        start, end = min(page.dataoffsets), max(page.dataoffsets)
    data = bytearray(path.read_bytes())
    data[start : end + 1000] = bytes(end + 1000 - start)
    path.write_bytes(data)
    with open_slide(path) as slide:
        assert plan_tiles(slide, None, mpp=0.5).level == 0
        assert slide.notes == ["level 1 (512x512 px) is not used: it can't be decoded"]


def test_a_slide_without_its_full_resolution_is_refused(tmp_path: Path, picture: Pixels) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture[1000:2024, 700:1724], levels=(1, 4))
    with tifffile.TiffFile(path, mode="r+") as file:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = file.pages.first.tags[name]
            tag.overwrite([0] * len(tag.value))
    with pytest.raises(SlideError, match="holds no tile of its full resolution: copy it again"):
        open_slide(path)


@pytest.mark.parametrize(
    ("page", "tag", "value", "said"),
    [
        (0, "TileWidth", 1 << 24, "in tiles of 16777216x256 px, which no scanner writes: damaged"),
        (0, "TileLength", 1 << 30, "which no scanner writes: damaged"),
        (1, "ImageLength", 1 << 30, "but lists 1 of 4194304 tiles: damaged"),
        (0, "ImageWidth", 1_000_000, "but lists 16 of 15628 tiles: damaged"),
        (0, "TileByteCounts", (1 << 32) - 1, "cut off"),
        (0, "Orientation", 3, "turned or mirrored by TIFF's orientation 3"),
    ],
)
def test_what_a_damaged_directory_claims_is_refused_before_it_is_allocated(
    tmp_path: Path, picture: Pixels, page: int, tag: str, value: int, said: str
) -> None:
    whole = picture[1000:2024, 700:1724]
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for pixels in (whole, shrink(whole, 4)):
            file.write(
                pixels,
                tile=(256, 256),
                photometric="rgb",
                compression="deflate",
                subfiletype=int(len(pixels) < 1024),
                extratags=[("Orientation", "H", 1, 1, True)],
                metadata=None,
            )
    open_slide(path, 0.5).close()
    with tifffile.TiffFile(path, mode="r+") as file:
        found = file.pages[page].aspage().tags[tag]
        values = list(found.value) if isinstance(found.value, tuple) else [found.value]
        kind = "H" if tag == "Orientation" else "I"
        found.overwrite([value, *values[1:]] if len(values) > 1 else value, dtype=kind)
    with pytest.raises(SlideError) as error:
        open_slide(path, 0.5)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
