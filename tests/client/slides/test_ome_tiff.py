"""OME-TIFF pyramids in SubIFDs: tifffile's pixels on every level, and OpenSlide's on level 0."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile

from client.arrays import Pixels
from client.errors import SlideError
from client.reading.stream import read_tiles
from client.slides.slide import open_slide
from client.slides.tiff import all_pages
from client.slides.tiling import plan_tiles
from client.slides.tissue import tissue_mask
from tests.support.pyramid import shrink

MPP = 0.25


def write_ome(
    path: Path, levels: list[Pixels], *, planar: bool = False, byteorder: Any = "<", **options: Any
) -> Path:
    """An OME-TIFF as Bio-Formats and QuPath write it: the smaller levels in SubIFDs of the first."""
    size = {f"PhysicalSize{axis}": MPP for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    axes = "SYX" if planar else "YXS"
    with tifffile.TiffWriter(path, ome=True, byteorder=byteorder) as file:
        for number, pixels in enumerate(levels):
            file.write(
                np.ascontiguousarray(pixels.transpose(2, 0, 1)) if planar else pixels,
                **{"photometric": "rgb", "tile": (128, 128), "compression": "deflate"} | options,
                planarconfig="separate" if planar else "contig",
                subfiletype=min(number, 1),
                subifds=None if number else len(levels) - 1,
                metadata=None if number else {"axes": axes, **size},
            )
    return path


def halvings(pixels: Pixels) -> list[Pixels]:
    return [pixels, *(shrink(pixels, factor) for factor in (2, 4))]


@pytest.mark.parametrize("levels", [1, 3])
def test_big_endian_files_are_read(tmp_path: Path, picture: Pixels, levels: int) -> None:
    """As QuPath writes them. OpenSlide 4.0.1 does not know those below 4 GB."""
    pixels = picture[:555, 700:1120]
    path = write_ome(tmp_path / "a.ome.tif", halvings(pixels)[:levels], byteorder=">")
    assert openslide.OpenSlide.detect_format(path) is None
    with open_slide(path) as slide:
        assert (slide.vendor, slide.mpp, len(slide.level_dimensions)) == ("ome-tiff", (MPP, MPP), levels)
        assert np.array_equal(slide.read(0, (0, 0), slide.dimensions), pixels)


@pytest.mark.parametrize("levels", [1, 3])
def test_planes_of_rgb_that_bio_formats_calls_ycbcr_are_rgb(
    tmp_path: Path, picture: Pixels, levels: int
) -> None:
    """As bfconvert writes JPEG; libtiff, and so OpenSlide, does not decode them."""
    path = tmp_path / "a.ome.tif"
    software = "OME Bio-Formats 7.3.1"
    write_ome(
        path, halvings(picture[:555, 700:1120])[:levels], planar=True, compression="jpeg", software=software
    )
    expected = tifffile.imread(path, level=0).transpose(1, 2, 0)
    with tifffile.TiffFile(path, mode="r+") as file:
        for page in all_pages(file):
            page.tags["PhotometricInterpretation"].overwrite(6)
    with open_slide(path) as slide:
        assert len(slide.level_dimensions) == levels
        assert np.array_equal(slide.read(0, (0, 0), slide.dimensions), expected)


CODECS = ("jpeg", "jpeg2000", "lzw", "deflate", "zstd")


@pytest.mark.parametrize(
    ("codec", "planar"),
    [*itertools.product(CODECS, (False, True)), ("webp", False)],  # WebP has no single channels
)
def test_every_level_has_tifffiles_pixels(tmp_path: Path, picture: Pixels, codec: str, planar: bool) -> None:
    path = write_ome(
        tmp_path / "a.ome.tif", halvings(picture[:555, 700:1120]), planar=planar, compression=codec
    )
    with open_slide(path) as slide:
        assert (slide.vendor, slide.mpp, slide.mpp_source) == ("ome-tiff", (MPP, MPP), "ome.PhysicalSize")
        assert slide.level_dimensions == ((420, 555), (210, 277), (105, 138))
        for level, downsample in enumerate(slide.level_downsamples):
            stored = tifffile.imread(path, level=level)
            stored = stored.transpose(1, 2, 0) if planar else stored
            height, width = stored.shape[:2]
            assert np.array_equal(slide.read(level, (0, 0), (width, height)), stored)
            x, y = width // 3, height // 2  # across tiles and beyond the edge
            part = slide.read(level, (round(x * downsample), round(y * downsample)), (width, height))
            assert np.array_equal(part[: height - y, : width - x], stored[y:, x:])
            assert (part[height - y :] == 255).all()
            assert (part[:, width - x :] == 255).all()
        assert (slide.read(1, (-20, -20), (10, 10)) == 255).all()
        level0 = slide.read(0, (0, 0), slide.dimensions)
    try:
        with openslide.OpenSlide(path) as reference:
            theirs = np.asarray(reference.read_region((0, 0), 0, reference.dimensions).convert("RGB"))
    except openslide.OpenSlideError:
        assert codec in ("jpeg2000", "webp")
    else:
        assert np.array_equal(level0, theirs)


@pytest.mark.parametrize(("codec", "reader"), [("jpeg", "jpeg tiles"), ("zstd", "tifffile")])
def test_tiles_and_tissue_come_from_the_small_levels(
    tmp_path: Path, picture: Pixels, codec: str, reader: str
) -> None:
    levels = halvings(picture)
    path = write_ome(tmp_path / "a.ome.tif", levels, compression=codec)
    with open_slide(path) as slide:
        tissue = tissue_mask(slide)
        assert tissue.downsample == pytest.approx((32, 32), rel=0.001)
        plan = plan_tiles(slide, tissue)
        assert (plan.level, len(plan), slide.notes) == (1, 17, [])
        batches = list(read_tiles(plan))
        assert {batch.reader for batch in batches} == {reader}
        pixels = np.concatenate([batch.pixels for batch in batches])
        assert np.concatenate([batch.valid for batch in batches]).all()
        stored = np.pad(tifffile.imread(path, level=1), ((0, 224), (0, 224), (0, 0)), constant_values=255)
        for (x, y), tile in zip(plan.level_positions(), pixels, strict=True):
            assert np.array_equal(tile, stored[y : y + 224, x : x + 224])


def test_levels_are_held_to_level_0(tmp_path: Path, picture: Pixels) -> None:
    whole = picture[:2048, :2048]
    other = np.full((512, 512, 3), 30, np.uint8)
    with open_slide(write_ome(tmp_path / "a.ome.tif", [whole, shrink(whole, 2), other])) as slide:
        assert slide.level_for(4) == 1
        assert slide.notes == ["level 2 (512x512 px) is not used: it shows something else than level 0"]
    with open_slide(write_ome(tmp_path / "b.ome.tif", [whole, shrink(whole, 2)[:900]])) as slide:
        assert slide.level_for(4) == 0
        assert "its width is 1/2 of level 0's, its height 1/2.2756" in slide.notes[0]
    wide = np.pad(shrink(whole[:1900, :1900], 2), ((0, 74), (0, 74), (0, 0)))
    with open_slide(write_ome(tmp_path / "c.ome.tif", [whole[:1900, :1900], wide])) as slide:
        assert slide.level_for(4) == 0
        assert "it is padded to whole tiles" in slide.notes[0]


def test_damage_is_limited_to_its_tile_and_claims_are_checked(tmp_path: Path, picture: Pixels) -> None:
    whole = picture[:1024, :1024]
    path = write_ome(tmp_path / "a.ome.tif", halvings(whole))
    with tifffile.TiffFile(path) as file:
        offset = all_pages(file)[1].dataoffsets[1]
    content = path.read_bytes()
    path.write_bytes(content[:offset] + bytes(64) + content[offset + 64 :])
    with open_slide(path) as slide:
        with pytest.raises(SlideError, match=r"cannot decode level 1 at \(256, 0\).*copy the slide again"):
            slide.read(1, (256, 0), (128, 128))
        assert np.array_equal(slide.read(1, (0, 0), (128, 128)), shrink(whole, 2)[:128, :128])
    with tifffile.TiffFile(path, mode="r+") as file:
        for name in ("TileWidth", "TileLength"):
            all_pages(file)[1].tags[name].overwrite(60_000)
    with pytest.raises(SlideError, match="in tiles of 60000x60000 px, which no scanner writes: damaged"):
        open_slide(path)


def test_an_ome_tiff_without_subifds_is_left_to_openslide(tmp_path: Path, picture: Pixels) -> None:
    with open_slide(write_ome(tmp_path / "a.ome.tif", [picture[:600, :600]])) as slide:
        assert (slide.vendor, len(slide.level_dimensions)) == ("generic-tiff", 1)


def test_a_channel_per_page_is_refused(tmp_path: Path, picture: Pixels) -> None:
    """As raw2ometiff writes RGB unless it is asked not to: OpenSlide would show the red channel in grey."""
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        channels = np.ascontiguousarray(picture[:600, :600].transpose(2, 0, 1))
        file.write(channels, tile=(256, 256), photometric="minisblack", metadata={"axes": "CYX"})
    with openslide.OpenSlide(tmp_path / "a.ome.tif") as slide:
        shown = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        assert np.array_equal(shown, np.repeat(picture[:600, :600, :1], 3, axis=2))
    with pytest.raises(SlideError, match="a channel per page: export it with RGB in each page"):
        open_slide(tmp_path / "a.ome.tif", 0.5)


def test_of_several_slides_none_is_dropped_in_silence(tmp_path: Path, picture: Pixels) -> None:
    path, small, large = tmp_path / "a.ome.tif", picture[:300, :400], picture[:600, :800]
    for images in ([small, large], [large, large], [large, small]):
        with tifffile.TiffWriter(path, ome=True) as file:
            for pixels in images:
                size = {f"PhysicalSize{axis}": MPP for axis in "XY"}
                file.write(pixels, photometric="rgb", tile=(128, 128), metadata={"axes": "YXS", **size})
        if images[0] is large and images[1] is small:
            with open_slide(path) as slide:
                assert slide.dimensions == (800, 600)
        else:
            with pytest.raises(SlideError, match="an OME-TIFF of 2 large images: export the slide alone"):
                open_slide(path)
