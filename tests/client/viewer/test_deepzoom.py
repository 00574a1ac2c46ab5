"""Slides as Deep Zoom tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tifffile
from numpy.typing import NDArray

from client.slides.overview import Overview
from client.slides.slide import open_slide
from client.viewer import deepzoom
from client.viewer.deepzoom import DeepZoom
from tests.support.pyramid import write_pyramid


@pytest.fixture(scope="module")
def pyramid(picture: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 1100x1300 px with levels 1 and 4, whose tiles are 256 px."""
    path = tmp_path_factory.mktemp("deepzoom") / "pyramid.tif"
    return write_pyramid(path, picture[:1300, 700:1800], levels=(1, 4), tables=True)


def test_stored_tiles_are_passed_on_and_the_edge_is_cut(pyramid: Path) -> None:
    tiles = DeepZoom(open_slide(pyramid))
    full = tiles.levels - 1
    with tifffile.TiffFile(pyramid) as file, pyramid.open("rb") as raw:
        page = file.pages[0]
        raw.seek(page.dataoffsets[1])
        stored = raw.read(page.databytecounts[1])
    sent = tiles.read(full, 1, 0)
    assert sent is not None
    assert sent.endswith(stored[2:])
    assert simplejpeg.decode_jpeg(tiles.read(full, 4, 5)).shape == (1300 - 5 * 256, 1100 - 4 * 256, 3)
    assert tiles.read(full, 5, 0) is None
    assert tiles.read(tiles.levels, 0, 0) is None


@pytest.mark.parametrize("overview", [False, True])
def test_every_tile_shows_its_part_of_the_slide(
    pyramid: Path, picture: NDArray[np.uint8], overview: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overview:
        monkeypatch.setattr(deepzoom, "SHRINK", 1.5)
    tiles = DeepZoom(open_slide(pyramid))
    checked = 0
    for level, column, row in tiles.places():
        factor, side = tiles.downsample(level), tiles.tile
        shown = simplejpeg.decode_jpeg(tiles.read(level, column, row)).astype(float)
        top, left = row * side * factor, column * side * factor
        part = picture[:1300, 700:1800][top : top + side * factor, left : left + side * factor]
        rows, columns = (length // factor for length in part.shape[:2])
        if min(rows, columns) < 16:
            continue
        wanted = part[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
        # Grey: JPEG halves the resolution of colours.
        assert abs(shown[:rows, :columns].mean(axis=2) - wanted.mean(axis=(1, 3, 4))).mean() < 6
        checked += 1
    assert checked > 30


def test_a_slide_without_a_pyramid_is_shrunk_once(real_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(real_slide)
    made: list[float] = []
    overview = slide.overview

    def counted(factor: float) -> Overview:
        made.append(factor)
        return overview(factor)

    monkeypatch.setattr(slide, "overview", counted)
    tiles = DeepZoom(slide)
    for level in range(tiles.levels - 3):
        assert tiles.read(level, 0, 0)
    assert made == [8]
