"""Slides that the benchmarks and the tests write: read back by OpenSlide and tifffile."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray

from tests.support.pyramid import shrink, split_tables, take, write_pyramid


@pytest.fixture(scope="module")
def picture() -> NDArray[np.uint8]:
    """A smooth picture, 512 x 384 px, that JPEG keeps to a few grey levels."""
    y, x = np.mgrid[:384, :512]
    channels = [128 + 100 * np.sin(x / 40), 128 + 100 * np.cos(y / 30), 128 + 60 * np.sin((x + y) / 50)]
    return np.stack(channels, axis=2).astype(np.uint8)


def test_a_large_slide_repeats_the_picture(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    path = write_pyramid(
        tmp_path / "a.tif",
        picture,
        size=(5000, 3001),
        tile=128,
        mpp=(0.25, 0.26),
        levels=(1, 2, 8),
        bigtiff=True,
    )
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((5000, 3001), (2500, 1501), (625, 376))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.26)
        for x, y in [(0, 0), (512 * 9, 384 * 7), (4000, 2000)]:
            read = np.asarray(slide.read_region((x, y), 0, (300, 200)).convert("RGB")).astype(int)
            assert np.abs(read - take(picture, x, y, 300)[:200]).max() < 12
        coarse = np.asarray(slide.read_region((0, 0), 2, (64, 48)).convert("RGB")).astype(int)
        assert (
            np.abs(coarse - shrink(picture, 8)).mean() < 8
        )  # a coarse level is busier, JPEG keeps less of it


@pytest.mark.parametrize("photometric", ["ycbcr", "rgb"])
def test_tags_say_what_is_stored(tmp_path: Path, picture: NDArray[np.uint8], photometric: str) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture, photometric=photometric, subsampling="422", tables=True)  # type: ignore[arg-type]
    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        assert page.photometric == tifffile.PHOTOMETRIC[photometric.upper()]
        assert page.subsampling == ((2, 1) if photometric == "ycbcr" else (1, 1))
        assert page.jpegtables is not None
        assert np.abs(page.asarray().astype(int) - picture).max() < 20


def test_missing_tiles_take_no_bytes(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture, tile=128, missing=[(1, 2)])
    with tifffile.TiffFile(path) as file:
        assert np.flatnonzero(np.array(file.pages[0].databytecounts) == 0).tolist() == [2 * 4 + 1]


def test_a_description_makes_it_aperios(tmp_path: Path, picture: NDArray[np.uint8]) -> None:
    text = "Aperio Image Library v11\r\n|AppMag = 40|MPP = 0.2527"
    path = write_pyramid(tmp_path / "a.svs", picture, mpp=None, description=text)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.2527)


def test_tables_and_the_rest_make_the_whole(picture: NDArray[np.uint8]) -> None:
    whole = imagecodecs.jpeg8_encode(picture, level=80)
    tables, rest = split_tables(bytes(whole))
    assert len(tables) + len(rest) == len(whole) + 4
    assert np.array_equal(imagecodecs.jpeg8_decode(rest, tables=tables), imagecodecs.jpeg8_decode(whole))
