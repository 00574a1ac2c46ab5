"""A slide file through OpenSlide: the reference for properties, levels, bounds and pixels."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np
import numpy.typing as npt
import openslide

from client.errors import MppError, SlideError
from client.mpp import Mpp, Properties, find_mpp, objective_power

Pixels = npt.NDArray[np.uint8]

# Longer sides are a damaged header: the largest scanners stay under half of this.
MAX_SIDE = 2_000_000
BLOCK = 2048


@dataclass(frozen=True)
class Overview:
    """A whole slide made small: RGB uint8 [h, w, 3]; one of its pixels is `downsample` (x, y) level-0 pixels wide."""

    pixels: Pixels
    downsample: tuple[float, float]


class Slide:
    """An open slide; a context manager. Sizes and positions are (x, y) pixels, mpp is microns per level-0 pixel."""

    def __init__(self, path: Path, handle: openslide.OpenSlide, mpp: Mpp) -> None:
        properties = handle.properties
        self.path = path
        self.slide_id = path.stem
        self.dimensions: tuple[int, int] = handle.dimensions
        self.level_dimensions: tuple[tuple[int, int], ...] = handle.level_dimensions
        self.level_downsamples: tuple[float, ...] = handle.level_downsamples
        self.mpp = (mpp.x, mpp.y)
        self.mpp_source = mpp.source
        self.bounds = _bounds(properties, self.dimensions)
        self.objective_power = objective_power(properties)
        self.vendor: str = properties.get("openslide.vendor", "unknown")
        self._quickhash: str = properties.get("openslide.quickhash-1", "")
        self._handle = handle

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back; reading afterwards is an error."""
        self._handle.close()

    def read(self, level: int, position: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """Read RGB uint8 [h, w, 3] at level-0 `position`, `size` level pixels; transparent and outside is white.

        Raises:
            SlideError: the file cannot be decoded there. OpenSlide then refuses every further read of this handle.
        """
        return read_region(self._handle, position, level, size)

    def overview(self, downsample: float) -> Overview:
        """Shrink the slide by about `downsample`, block by block: memory stays small without a pyramid too.

        Every pixel is the mean of k x k pixels of one level, so the overview's own scale is exact.
        """
        level = self._level_for(downsample)
        return self._shrink(level, max(1, round(downsample / self.level_downsamples[level])))

    def thumbnail(self, max_px: int) -> Pixels:
        """RGB uint8 [h, w, 3] of the whole slide on white, its longer side at most `max_px`."""
        level = self._level_for(max(self.dimensions) / max_px)
        return self._shrink(level, math.ceil(max(self.level_dimensions[level]) / max_px)).pixels

    def digest(self) -> str:
        """16 hex digits that name the file's content: its size, both ends and OpenSlide's quick hash, not its name."""
        size = self.path.stat().st_size
        digest = hashlib.sha256(f"{size} {self._quickhash}".encode())
        with self.path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
        return digest.hexdigest()[:16]

    def _level_for(self, downsample: float) -> int:
        fine = [i for i, own in enumerate(self.level_downsamples) if own <= downsample * 1.001]
        return fine[-1] if fine else 0

    def _shrink(self, level: int, factor: int) -> Overview:
        width, height = self.level_dimensions[level]
        own = self.level_downsamples[level]
        pixels = np.empty((math.ceil(height / factor), math.ceil(width / factor), 3), np.uint8)
        step = max(1, BLOCK // factor)  # output pixels a block
        for row in range(0, pixels.shape[0], step):
            for column in range(0, pixels.shape[1], step):
                out = pixels[row : row + step, column : column + step]
                size = (out.shape[1] * factor, out.shape[0] * factor)
                position = (round(column * factor * own), round(row * factor * own))
                block = self.read(level, position, size)
                out[:] = cv2.resize(block, (out.shape[1], out.shape[0]), interpolation=cv2.INTER_AREA)
        return Overview(pixels, (factor * own, factor * own))


def open_slide(path: Path, mpp: float | tuple[float, float] | None = None) -> Slide:
    """Open a slide in any format OpenSlide knows; `mpp` overrules what the file says of its scale.

    Raises:
        SlideError: the file is missing, empty, cut off, unreadable or no slide.
        MppError: the file does not tell its scale and `mpp` is not given.
    """
    handle = open_handle(path)
    try:
        return Slide(path, handle, find_mpp(handle.properties, mpp))
    except MppError as error:
        handle.close()
        raise MppError(f"{path}: {error}") from None


def open_handle(path: Path) -> openslide.OpenSlide:
    """OpenSlide's own handle, or a SlideError that says in one line what is wrong with the file."""
    _check_file(path)
    try:
        handle = openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        raise SlideError(
            f"{path}: not a slide that OpenSlide can read: convert it, for example to a tiled TIFF"
        ) from None
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path}: damaged, copy it again (OpenSlide: {_one_line(error)})") from None
    width, height = handle.dimensions
    if max(width, height) > MAX_SIDE:
        handle.close()
        raise SlideError(f"{path}: its header claims {width}x{height} px: damaged, copy it again")
    return handle


def read_region(
    handle: openslide.OpenSlide, position: tuple[int, int], level: int, size: tuple[int, int]
) -> Pixels:
    """One region as RGB uint8 [h, w, 3]; what is transparent or outside the slide is white."""
    try:
        rgba = np.asarray(handle.read_region(position, level, size))
    except openslide.OpenSlideError as error:
        raise SlideError(f"cannot decode level {level} at {position}: {_one_line(error)}") from None
    return on_white(rgba)


def on_white(rgba: Pixels) -> Pixels:
    """Lay RGBA uint8 [..., 4] on white: RGB uint8 [..., 3], rounded to nearest."""
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    opacity = alpha.astype(np.uint32)
    return ((rgba[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise SlideError(f"{path}: no such file: check the path") from None
    except OSError as error:
        raise SlideError(f"{path}: cannot be reached ({error.strerror})") from None
    if path.is_dir():
        raise SlideError(f"{path}: a folder, not a slide: give a file (of a DICOM series, one of its files)")
    if not os.access(path, os.R_OK):
        raise SlideError(f"{path}: no permission to read it: change its permissions")
    if size == 0:
        raise SlideError(f"{path}: an empty file: copy it again")


def _bounds(properties: Properties, dimensions: tuple[int, int]) -> tuple[int, int, int, int]:
    keys = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
    if any(key not in properties for key in keys):
        return (0, 0, *dimensions)
    x, y, width, height = (int(properties[key]) for key in keys)
    return x, y, width, height


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
