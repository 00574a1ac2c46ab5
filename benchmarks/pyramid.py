"""Write slides: tiled, pyramidal TIFFs of any size, layout and scale, made by repeating one picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

Pixels = npt.NDArray[np.uint8]
Subsampling = Literal["444", "422", "420"]

_FACTORS: dict[Subsampling, tuple[int, int]] = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}


def write_pyramid(
    path: Path,
    pixels: Pixels,
    *,
    size: tuple[int, int] | None = None,
    tile: int = 256,
    mpp: float | tuple[float, float] | None = 0.5,
    levels: Sequence[int] = (1,),
    photometric: Literal["ycbcr", "rgb"] = "ycbcr",
    subsampling: Subsampling = "420",
    quality: int = 85,
    tables: bool = False,
    missing: Sequence[tuple[int, int]] = (),
    bigtiff: bool = False,
    description: str | None = None,
) -> Path:
    """Write a tiled JPEG TIFF of `size` (w, h) pixels, made of `pixels` RGB uint8 [h, w, 3] side by side.

    Where the picture's sides are multiples of `tile` each distinct tile is encoded once, so a slide of a
    gigapixel takes seconds. `levels` are whole downsamples, `mpp` (x, y) goes into TIFF's resolution (None
    leaves it out), `tables` moves the JPEG tables into the TIFF tag as scanners do, `missing` lists level-0
    tiles (column, row) to leave empty, and a `description` that starts with "Aperio" makes it an Aperio
    slide.
    """
    width, height = size or (pixels.shape[1], pixels.shape[0])
    scale = mpp if isinstance(mpp, tuple) else (mpp, mpp) if mpp else None
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as file:
        for factor in levels:
            picture = shrink(pixels, factor)
            shape = (math.ceil(height / factor), math.ceil(width / factor))
            encode = _Encoder(photometric, subsampling, quality, tables)
            holes = set(missing) if factor == 1 else set()
            file.write(
                _tiles(picture, shape, tile, encode, holes),
                shape=(*shape, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                photometric="rgb",  # of the picture; what is stored says outcolorspace
                compression="jpeg",
                compressionargs={"outcolorspace": photometric.upper()},
                subsampling=_FACTORS[subsampling] if photometric == "ycbcr" else (1, 1),
                jpegtables=encode.tables(picture, tile),
                subfiletype=0 if factor == 1 else 1,
                resolution=(1e4 / (scale[0] * factor), 1e4 / (scale[1] * factor)) if scale else None,
                resolutionunit="CENTIMETER" if scale else None,
                description=description if factor == 1 else None,
                metadata=None,
                software=False,
            )
    return path


def shrink(pixels: Pixels, factor: int) -> Pixels:
    """The picture at 1/`factor` of its size, by area means."""
    if factor == 1:
        return pixels
    size = (max(1, pixels.shape[1] // factor), max(1, pixels.shape[0] // factor))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


class _Encoder:
    def __init__(self, photometric: str, subsampling: Subsampling, quality: int, split: bool) -> None:
        self._stored = photometric.upper()
        self._subsampling = subsampling if photometric == "ycbcr" else "444"
        self._quality = quality
        self._split = split

    def __call__(self, pixels: Pixels) -> bytes:
        data = self._encode(pixels)
        return split_tables(data)[1] if self._split else data

    def tables(self, picture: Pixels, tile: int) -> bytes | None:
        return split_tables(self._encode(take(picture, 0, 0, tile)))[0] if self._split else None

    def _encode(self, pixels: Pixels) -> bytes:
        return bytes(
            imagecodecs.jpeg8_encode(
                pixels,
                level=self._quality,
                colorspace="RGB",
                outcolorspace=self._stored,
                subsampling=self._subsampling,
            )
        )


def _tiles(
    picture: Pixels, shape: tuple[int, int], tile: int, encode: _Encoder, missing: set[tuple[int, int]]
) -> Iterator[bytes]:
    encoded: dict[tuple[int, int], bytes] = {}
    for row in range(math.ceil(shape[0] / tile)):
        for column in range(math.ceil(shape[1] / tile)):
            if (column, row) in missing:
                yield b""
                continue
            key = (column * tile % picture.shape[1], row * tile % picture.shape[0])
            if key not in encoded:
                encoded[key] = encode(take(picture, *key, tile))
            yield encoded[key]


def take(picture: Pixels, x: int, y: int, side: int) -> Pixels:
    """A square of the endlessly repeated picture."""
    rows = np.arange(y, y + side) % picture.shape[0]
    columns = np.arange(x, x + side) % picture.shape[1]
    return np.ascontiguousarray(picture[rows][:, columns])


def split_tables(data: bytes) -> tuple[bytes, bytes]:
    """Part a JPEG stream into its tables (DQT, DHT) and the rest, each a stream as TIFF wants it."""
    tables, rest, position = bytearray(b"\xff\xd8"), bytearray(b"\xff\xd8"), 2
    while data[position + 1] != 0xDA:  # start of scan: the coded pixels follow
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        (tables if data[position + 1] in (0xDB, 0xC4) else rest).extend(data[position:end])
        position = end
    return bytes(tables + b"\xff\xd9"), bytes(rest + data[position:])
