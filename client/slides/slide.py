"""A slide file through OpenSlide: the reference for properties, levels, bounds and pixels."""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import cv2
import numpy as np
import openslide
import tifffile

from ..arrays import Bool, Pixels
from ..errors import MppError, SlideError
from .mpp import Mpp, Properties, find_mpp, objective_power

# A longer side is a damaged header: no scanner comes near.
LONGEST_SIDE = 2_000_000
BLOCK = 2048  # pixels a side that an overview reads at once ...
FINEST_BLOCK = 256  # ... and at least, where something in a block cannot be decoded ...
MOST_FAILURES = 300  # ... which happens so often at most: more is a slide to copy again


@dataclass(frozen=True, eq=False)
class Overview:
    """A whole slide made small: RGB uint8 [h, w, 3]; a pixel is `downsample` (x, y) level-0 pixels wide.

    Where `unreadable` bool [h, w], the slide could not be decoded and the pixels are white.
    """

    pixels: Pixels
    downsample: tuple[float, float]
    unreadable: Bool


class Slide:
    """An open slide; a context manager.

    Sizes and positions are (x, y) pixels, `mpp` is (x, y) microns per level-0 pixel, and `bounds` is (x, y,
    width, height) of the part of level 0 that was scanned.
    """

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
        self.vendor: str = properties["openslide.vendor"]
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
        """RGB uint8 [h, w, 3] of `size` level pixels at level-0 `position`, on white.

        Raises:
            SlideError: it cannot be decoded; the rest of the slide can still be read.
        """
        try:
            return read_region(self._handle, position, level, size)
        except SlideError as error:
            fresh = open_handle(self.path)
            self._handle.close()
            self._handle = fresh
            raise SlideError(f"{self.path}: {error}: copy the slide again") from None

    def overview(self, downsample: float) -> Overview:
        """Shrink the slide by about `downsample`, block by block: little memory, with a pyramid or without.

        A pixel is the mean of k x k pixels of one level, so the overview's own downsample is exact.
        """
        level = self._level_for(downsample)
        return self._shrink(level, max(1, round(downsample / self.level_downsamples[level])))

    def thumbnail(self, max_px: int) -> Pixels:
        """RGB uint8 [h, w, 3] of the whole slide on white, its longer side at most `max_px`."""
        level = self._level_for(max(self.dimensions) / max_px)
        return self._shrink(level, math.ceil(max(self.level_dimensions[level]) / max_px)).pixels

    def _level_for(self, downsample: float) -> int:
        return max(
            (i for i, own in enumerate(self.level_downsamples) if own <= downsample * 1.001), default=0
        )

    def _shrink(self, level: int, factor: int) -> Overview:
        width, height = self.level_dimensions[level]
        own = self.level_downsamples[level]
        shape = (math.ceil(height / factor), math.ceil(width / factor))
        pixels, unreadable = np.full((*shape, 3), 255, np.uint8), np.zeros(shape, np.bool_)
        side = max(1, BLOCK // factor)
        blocks = [
            (top, left, min(side, shape[0] - top), min(side, shape[1] - left))
            for top in range(0, shape[0], side)
            for left in range(0, shape[1], side)
        ]
        failures = 0
        while blocks:
            top, left, rows, columns = blocks.pop()
            part = slice(top, top + rows), slice(left, left + columns)
            position = (round(left * factor * own), round(top * factor * own))
            try:
                block = self.read(level, position, (columns * factor, rows * factor))
            except SlideError:
                failures += 1
                if failures > MOST_FAILURES:
                    raise
                if max(rows, columns) * factor > FINEST_BLOCK and max(rows, columns) > 1:
                    blocks += _halves(top, left, rows, columns)  # the damage may be a small part of it
                else:
                    unreadable[part] = True
            else:
                pixels[part] = cv2.resize(block, (columns, rows), interpolation=cv2.INTER_AREA)
        return Overview(pixels, (factor * own, factor * own), unreadable)


def open_slide(path: Path, mpp: float | tuple[float, float] | None = None) -> Slide:
    """Open a slide in any format OpenSlide knows; `mpp` overrules what the file says of its scale.

    Raises:
        SlideError: the file is missing, empty, cut off, unreadable or no slide.
        MppError: the file does not tell its scale and `mpp` is not given.
    """
    handle = open_handle(path)
    try:
        _check_complete(path, handle)
        return Slide(path, handle, find_mpp(handle.properties, mpp))
    except MppError as error:
        handle.close()
        raise MppError(f"{path}: {error}") from None
    except SlideError:
        handle.close()
        raise


def open_handle(path: Path) -> openslide.OpenSlide:
    """OpenSlide's own handle, or a SlideError that says in one line what is wrong with the file."""
    _check_file(path)
    try:
        handle = openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        if _is_cut_tiff(path):
            raise SlideError(f"{path}: cut off, its directory is missing: copy it again") from None
        raise SlideError(
            f"{path}: no slide that OpenSlide knows, or damaged: copy it again or convert it to tiled TIFF"
        ) from None
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path}: damaged, copy it again (OpenSlide: {_one_line(error)})") from None
    width, height = handle.dimensions
    if max(width, height) > LONGEST_SIDE:
        handle.close()
        raise SlideError(f"{path}: its header claims {width}x{height} px: damaged, copy it again")
    return handle


def read_region(
    handle: openslide.OpenSlide, position: tuple[int, int], level: int, size: tuple[int, int]
) -> Pixels:
    """One region as RGB uint8 [h, w, 3]; what is transparent or outside the slide is white.

    Raises:
        SlideError: OpenSlide cannot decode it; the handle is of no use any more.
    """
    try:
        return flatten_alpha(np.asarray(handle.read_region(position, level, size)))
    except openslide.OpenSlideError as error:
        raise SlideError(f"cannot decode level {level} at {position} ({_one_line(error)})") from None


def flatten_alpha(rgba: Pixels) -> Pixels:
    """Lay RGBA uint8 [..., 4] on white: RGB uint8 [..., 3], rounded to nearest."""
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return rgba[..., :3]
    opacity = alpha.astype(np.uint32)
    return ((rgba[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)


def _check_file(path: Path) -> None:
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise SlideError(f"{path}: a pipe or device, not a slide: give a file")
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        raise SlideError(f"{path}: no such file: check the path") from None
    except IsADirectoryError:
        raise SlideError(
            f"{path}: a folder, not a slide: give a file (of a DICOM series, any one of its files)"
        ) from None
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}): check path and permissions") from None
    if empty:
        raise SlideError(f"{path}: an empty file: copy it again")


def _check_complete(path: Path, handle: openslide.OpenSlide) -> None:
    """Find a TIFF slide that ends before its tiles do: its directory may be whole and OpenSlide opens it."""
    if handle.properties["openslide.vendor"] not in ("aperio", "generic-tiff"):
        return
    try:
        with tifffile.TiffFile(path) as file:
            needed = max(_end(page) for page in file.pages)
    except (tifffile.TiffFileError, ValueError, IndexError, KeyError):
        return  # OpenSlide opened it: that counts
    if needed > (size := path.stat().st_size):
        raise SlideError(f"{path}: cut off, {size} of at least {needed} bytes are there: copy it again")


def _end(page: tifffile.TiffPage | tifffile.TiffFrame) -> int:
    starts, lengths = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    return int((starts + lengths)[lengths > 0].max(initial=0))


def _is_cut_tiff(path: Path) -> bool:
    """Whether a classic or big TIFF's first directory would lie beyond the file's end."""
    with path.open("rb") as file:
        head = file.read(16)
    if head[:2] not in (b"II", b"MM"):
        return False
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    first = {42: head[4:8], 43: head[8:16]}.get(int.from_bytes(head[2:4], order), b"")
    return int.from_bytes(first, order) >= path.stat().st_size


def _halves(top: int, left: int, rows: int, columns: int) -> list[tuple[int, int, int, int]]:
    """A block in two, across its longer side."""
    if rows >= columns:
        half = rows // 2
        return [(top, left, half, columns), (top + half, left, rows - half, columns)]
    half = columns // 2
    return [(top, left, rows, half), (top, left + half, rows, columns - half)]


def _bounds(properties: Properties, dimensions: tuple[int, int]) -> tuple[int, int, int, int]:
    names = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
    if any(name not in properties for name in names):
        return (0, 0, *dimensions)
    x, y, width, height = (int(properties[name]) for name in names)
    return x, y, width, height


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
