"""Write slides of any size, and as scanners do: tiled, pyramidal JPEG TIFFs."""

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
    """Write RGB `pixels` uint8 [h, w, 3] as a slide; the bytes depend on the arguments alone.

    Args:
        path: the file.
        pixels: the picture.
        size: (w, h) px of the slide, filled by repeating the picture. Where the picture's sides are multiples
            of `tile` each distinct tile is encoded once, so a gigapixel takes seconds. None is one picture.
        tile: side of a stored tile in px, a multiple of 16.
        mpp: micrometres per pixel of level 0, or (x, y), for TIFF's resolution tags; None leaves them out.
        levels: whole downsamples, in the order of the file.
        photometric, subsampling, quality: how JPEG stores colours.
        tables: whether the JPEG tables go into their TIFF tag, as scanners have it.
        missing: level-0 tiles (column, row) that are left empty.
        bigtiff: whether offsets have 64 bits.
        description: of level 0; one that starts with "Aperio" makes it an Aperio slide.
    """
    repeat = size is not None
    width, height = size or (pixels.shape[1], pixels.shape[0])
    pictures = _shrunk(pixels, levels)
    scale = mpp if isinstance(mpp, tuple) else (mpp, mpp) if mpp else None
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as file:
        for factor in levels:
            picture = pictures[factor]
            shape = (math.ceil(height / factor), math.ceil(width / factor))
            encode = _Encoder(photometric, subsampling, quality, tables)
            holes = set(missing) if factor == 1 else set()
            file.write(
                _tiles(picture if repeat else _padded(picture, tile), shape, tile, encode, holes),
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
                software="gigapath-triton",
            )
    return path


def _shrunk(pixels: Pixels, levels: Sequence[int]) -> dict[int, Pixels]:
    """The picture at every level, each from the coarsest finer one that it is a whole downsample of."""
    pictures = {1: pixels}
    for factor in sorted(set(levels) - {1}):
        finer = max(done for done in pictures if factor % done == 0)
        pictures[factor] = shrink(pictures[finer], factor // finer)
    return pictures


def _padded(picture: Pixels, tile: int) -> Pixels:
    """The picture with black to the right and below, up to whole tiles."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, -height % tile), (0, -width % tile), (0, 0)))


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
    inside = picture[y : y + side, x : x + side]
    if inside.shape[:2] == (side, side):
        return np.ascontiguousarray(inside)
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
