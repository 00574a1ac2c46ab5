"""Damaged slides: a tile that cannot be decoded is not valid, spoils no other and never becomes a picture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile

from client.arrays import Pixels
from client.errors import SlideError
from client.reading.jpeg_reader import JpegReader
from client.reading.stream import read_tiles
from client.slides.slide import open_slide
from client.slides.slide_file import OPENSLIDE
from client.slides.tiling import plan_tiles
from client.slides.tissue import tissue_mask
from tests.support.pyramid import write_pyramid


def damage(path: Path, column: int, row: int, how: str) -> None:
    """Spoil one stored tile of level 0."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        index = row * -(-page.imagewidth // page.tilewidth) + column
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    data = bytearray(path.read_bytes())
    part = slice(offset, offset + count) if how == "all" else slice(offset + count // 2, offset + count)
    data[part] = bytes(len(data[part]))
    path.write_bytes(data)


@pytest.mark.parametrize(("layout", "how"), [("jpeg", "all"), ("jpeg", "half"), ("deflate", "all")])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_damaged_tile_is_not_valid_and_spoils_no_other(
    tmp_path: Path, picture: Pixels, layout: str, how: str, workers: int, reading: SimpleNamespace
) -> None:
    path = tmp_path / "a.tif"
    crop = np.ascontiguousarray(picture[900:1924, 500:1524])
    if layout == "deflate":
        reading.write_deflate(path, crop)
    else:
        write_pyramid(path, crop)
    tiles = reading.plan(path)
    whole = reading.collect(tiles)[0]
    damage(path, 2, 1, how)
    pixels, valid, readers = reading.collect(tiles, workers=workers, batch=5)
    assert readers == {OPENSLIDE if layout == "deflate" else JpegReader.name}
    assert np.flatnonzero(~valid).tolist() == [4 + 2]
    assert not pixels[6].any()
    assert np.array_equal(np.delete(pixels, 6, axis=0), np.delete(whole, 6, axis=0))


def test_damage_does_not_hide_from_the_plan(tmp_path: Path, picture: Pixels) -> None:
    """A slide of one level: the overview meets the damage first. Its tile is planned, and not valid."""
    path = write_pyramid(tmp_path / "a.tif", picture[1900:2924, 600:1624])
    with open_slide(path) as slide:
        clean, thumbnail = tissue_mask(slide), slide.thumbnail(128)
    damage(path, 2, 1, "all")
    with open_slide(path) as slide:
        tissue = tissue_mask(slide)
        tiles = plan_tiles(slide, tissue)
        spoilt = slide.thumbnail(128)
    hidden = np.zeros_like(tissue.mask)
    hidden[16:32, 32:48] = True  # 16 px a mask pixel
    assert tissue.mask[hidden].all()
    assert (tissue.mask | hidden)[~hidden].mean() == pytest.approx(clean.mask[~hidden].mean(), abs=0.02)
    assert [512, 256] in tiles.coords.tolist()
    invalid = np.concatenate([tiles.coords[b.start :][: len(b.valid)][~b.valid] for b in read_tiles(tiles)])
    assert invalid.tolist() == [[512, 256]]
    assert (spoilt[32:64, 64:96] == 255).all()
    spoilt[32:64, 64:96] = thumbnail[32:64, 64:96]
    assert np.array_equal(spoilt, thumbnail)


def test_a_slide_of_damage_alone_is_refused(tmp_path: Path, picture: Pixels) -> None:
    path = write_pyramid(tmp_path / "a.tif", picture[:2560, :2048], size=(8192, 7680), tile=128)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        start, end = min(page.dataoffsets), max(page.dataoffsets)
    data = bytearray(path.read_bytes())
    with open_slide(path) as slide:
        data[start + 100_000 : end] = bytes(end - start - 100_000)
        path.write_bytes(data)
        with pytest.raises(SlideError, match=r"cannot decode level 0 at .* copy the slide again"):
            tissue_mask(slide)


def test_damage_across_tiles(tmp_path: Path, picture: Pixels, reading: SimpleNamespace) -> None:
    """A stored tile of 240 px lies under up to four tiles of 256: all of them, and no other."""
    path = write_pyramid(tmp_path / "a.tif", picture[900:2100, 500:1700], tile=240)
    tiles = reading.plan(path)
    damage(path, 2, 3, "all")
    _, valid, _ = reading.collect(tiles, workers=4)
    low, high = np.array([480, 720]), np.array([720, 960])
    start = tiles.coords + 16
    under = ((start < high) & (start + 224 > low)).all(axis=1)
    assert under.sum() == 4
    assert np.array_equal(valid, ~under)


def test_bit_rot_is_noticed(tmp_path: Path, picture: Pixels, reading: SimpleNamespace) -> None:
    """Random flipped bits: what is valid is OpenSlide's bytes, what OpenSlide refuses is not valid."""
    rng = np.random.default_rng(4)
    path = write_pyramid(tmp_path / "a.tif", picture[900:1412, 500:1012])
    tiles = reading.plan(path)
    clean = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        spans = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    outcomes = set()
    for _ in range(60):
        data = bytearray(clean)
        for offset, count in spans[1:]:  # one good tile to prove the reader on
            data[offset + int(rng.integers(count))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        pixels, valid, readers = reading.collect(tiles)
        for index, expected in enumerate(reading.plainly(tiles)):
            assert not valid[index] or np.array_equal(pixels[index], expected)
            outcomes.add((bool(valid[index]), expected is not None, *readers))
    # Harmless, refused by both, and shown by OpenSlide though the stream is not right.
    assert outcomes == {
        (True, True, JpegReader.name),
        (False, False, JpegReader.name),
        (False, True, JpegReader.name),
    }
