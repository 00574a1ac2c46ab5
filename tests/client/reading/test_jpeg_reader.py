"""Stored JPEG tiles, read directly: OpenSlide's bytes in every layout, each tile once; or OpenSlide."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tifffile

from client.arrays import Pixels
from client.reading import jpeg_reader
from client.reading.handle_reader import HandleReader
from client.reading.jpeg_reader import JpegReader
from client.reading.stream import resize
from client.reading.tile_reader import open_reader
from client.slides.slide_file import OPENSLIDE
from tests.support.pyramid import write_pyramid

LAYOUTS: dict[str, dict[str, Any]] = {
    "ycbcr 420": {},
    "ycbcr 422": {"subsampling": "422"},
    "ycbcr 444": {"subsampling": "444"},
    "rgb": {"photometric": "rgb"},
    "rgb, tables": {"photometric": "rgb", "tables": True},
    "ycbcr 420, tables": {"tables": True},
    "big": {"bigtiff": True},
    "missing": {"missing": [(0, 0), (1, 2), (3, 3)]},
    "aperio": {"description": "Aperio Image Library v11\r\n|AppMag = 20|MPP = 0.5", "photometric": "rgb"},
}


SCALE: dict[str, Any] = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER", "metadata": None}


@pytest.mark.parametrize("stored", [240, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_openslides_bytes(
    tmp_path: Path,
    picture: Pixels,
    layout: str,
    stored: int,
    reading: SimpleNamespace,
) -> None:
    options = LAYOUTS[layout]
    path = write_pyramid(tmp_path / "a.tif", picture[900:1871, 500:1531], tile=stored, **options)
    tiles = reading.plan(path)
    pixels, valid, readers = reading.collect(tiles)
    assert readers == {JpegReader.name}
    assert valid.all()
    for index, expected in enumerate(reading.plainly(tiles)):
        assert np.array_equal(pixels[index], expected), index


def test_random_plans_on_random_layouts(tmp_path: Path, picture: Pixels, reading: SimpleNamespace) -> None:
    """Both readers give the same bytes for random plans of randomly stored slides."""
    rng = np.random.default_rng(7)
    levels_read: set[int] = set()
    resampled: set[bool] = set()
    for turn in range(24):
        levels = ((1,), (1, 2), (1, 4), (1, 2, 4))[turn % 4]
        own = float(rng.choice([0.25, 0.2527, 0.499, 0.5, 0.52])) if turn % 8 < 7 else 0.125
        width, height = (4 * int(rng.integers(150, 300)) for _ in range(2))
        top, left = int(rng.integers(2967 - height)), int(rng.integers(2220 - width))
        path = write_pyramid(
            tmp_path / f"{turn}.tif",
            picture[top : top + height, left : left + width],
            tile=int(rng.choice([128, 240, 256, 496])),
            mpp=own,
            levels=levels,
            photometric=("ycbcr", "rgb")[rng.integers(2)],
            subsampling=("444", "422", "420")[rng.integers(3)],
            tables=bool(rng.integers(2)),
            bigtiff=bool(rng.integers(2)),
            missing=[(int(rng.integers(6)), int(rng.integers(6)))],
            quality=int(rng.integers(30, 96)),
        )
        tile_px = int(rng.integers(32, 300))
        tiles = reading.plan(
            path,
            tile_px=tile_px,
            crop_px=int(rng.integers(16, tile_px + 1)),
            mpp=float(rng.choice([0.5, 0.55, 1.0])) if turn % 8 < 7 else 0.5,
        )
        keep = np.sort(rng.choice(len(tiles), min(20, len(tiles)), replace=False))
        tiles = dataclasses.replace(tiles, coords=tiles.coords[keep])
        pixels, valid, readers = reading.collect(
            tiles, workers=int(rng.integers(1, 4)), batch=int(rng.integers(1, 40))
        )
        assert readers == {JpegReader.name}, turn
        assert valid.all()
        reference = HandleReader(tiles)
        region = np.empty((*tiles.read_size[::-1], 3), np.uint8)
        with closing(reference):
            for index in range(len(tiles)):
                assert reference.read(index, region)
                expected = resize(region, (tiles.crop_px, tiles.crop_px))
                assert np.array_equal(pixels[index], expected), (turn, index)
        levels_read.add(tiles.level)
        resampled.add(tiles.resampled)
    assert levels_read == {0, 1, 2}
    assert resampled == {False, True}


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("stored", [240, 256, 512])
def test_each_stored_tile_is_decoded_once(
    tmp_path: Path,
    picture: Pixels,
    monkeypatch: pytest.MonkeyPatch,
    stored: int,
    workers: int,
    reading: SimpleNamespace,
) -> None:
    tiles = reading.plan(write_pyramid(tmp_path / "a.tif", picture[:1500, :1500], tile=stored))
    decode = simplejpeg.decode_jpeg
    calls: list[int] = []

    def counting(*arguments: object, **options: object) -> object:
        calls.append(1)
        return decode(*arguments, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counting)
    with closing(open_reader(tiles)):
        probes = len(calls)
    assert reading.collect(tiles, workers=workers, batch=8)[2] == {JpegReader.name}
    assert len(calls) - 2 * probes == math.ceil(1500 / stored) ** 2


def test_a_full_store_costs_time_not_bytes(
    real_slide: Path, monkeypatch: pytest.MonkeyPatch, reading: SimpleNamespace
) -> None:
    tiles = reading.plan(real_slide)
    expected = reading.collect(tiles)[0]
    monkeypatch.setattr(jpeg_reader, "CACHE_BYTES", 3 * 3 * 240 * 240)
    assert np.array_equal(reading.collect(tiles, workers=4)[0], expected)


def jpeg2000(path: Path, picture: Pixels) -> str:
    aperio: dict[str, Any] = {
        "compression": "APERIO_JP2000_RGB",
        "description": "Aperio x\r\n|AppMag = 20|MPP = 0.5",
    }
    tifffile.imwrite(path, picture, tile=(256, 256), photometric="rgb", metadata=None, **aperio)
    return "not 8-bit JPEG"


def grey(path: Path, picture: Pixels) -> str:
    tifffile.imwrite(
        path, picture[..., 0], tile=(256, 256), photometric="minisblack", compression="jpeg", **SCALE
    )
    return "not RGB or YCbCr"


def uneven_level(path: Path, picture: Pixels) -> str:
    """Level 1 of 501 px is 251 px wide: OpenSlide's positions fall between its pixels."""
    write_pyramid(path, picture[:501, :501], mpp=0.25, levels=(1, 2))
    return "OpenSlide interpolates level 1"


def contradictory(path: Path, picture: Pixels) -> str:
    """TIFF says RGB, the stream's JFIF marker says YCbCr: OpenSlide believes TIFF, others don't."""
    write_pyramid(path, picture, photometric="rgb")
    jfif = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        stored = [
            data[:2] + jfif + data[2:]
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
            for data in [path.read_bytes()[offset : offset + count]]
        ]
        shape = page.shape
    tifffile.imwrite(
        path,
        iter(stored),
        shape=shape,
        dtype=np.uint8,
        tile=(256, 256),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"outcolorspace": "RGB"},
        **SCALE,
    )
    return "don't give OpenSlide's pixels"


@pytest.mark.parametrize("make", [jpeg2000, grey, uneven_level, contradictory])
def test_the_rest_goes_through_openslide(
    tmp_path: Path,
    picture: Pixels,
    make: Callable[[Path, Pixels], str],
    reading: SimpleNamespace,
) -> None:
    reason = make(tmp_path / "a.tif", np.ascontiguousarray(picture[1000:1512, 600:1112]))
    tiles = reading.plan(tmp_path / "a.tif")
    with closing(open_reader(tiles)) as reader:
        assert reader.name == OPENSLIDE
        assert reason in reader.reason
    pixels, valid, readers = reading.collect(tiles)
    assert readers == {OPENSLIDE}
    assert valid.all()
    for index, expected in enumerate(reading.plainly(tiles)):
        assert np.array_equal(pixels[index], expected), index


def test_a_vendors_own_composition_goes_through_openslide(
    leica_slide: Path, reading: SimpleNamespace
) -> None:
    tiles = reading.plan(leica_slide)
    with closing(open_reader(tiles)) as reader:
        assert (reader.name, reader.reason) == (OPENSLIDE, "regions of leica slides are composed")
    pixels, _, _ = reading.collect(tiles)
    assert np.array_equal(pixels[5], list(reading.plainly(tiles))[5])
