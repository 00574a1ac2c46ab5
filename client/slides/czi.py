"""Zeiss CZI that OpenSlide refuses, in JPEG XR above all, through Zeiss's own library (the extra `czi`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openslide

from gigapath_contract.errors import one_line

from ..arrays import Pixels
from ..errors import SlideError
from .detect import first_bytes

CACHE_BYTES = 128 << 20  # of decoded subblocks, per handle: ten of 2,048 px a side
_DAMAGE = (
    *(ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError),
    ElementTree.ParseError,
)


def open_czi(path: Path) -> Czi | None:
    """A CZI that OpenSlide refuses; None for any other file, which may be OpenSlide's.

    Raises:
        SlideError: it is damaged, no 8-bit RGB, or the extra is not installed.
    """
    if first_bytes(path, 10) != b"ZISRAWFILE":
        return None
    try:
        openslide.OpenSlide(path).close()
        return None
    except openslide.OpenSlideError as error:
        reason = one_line(error)
    try:
        from pylibCZIrw.czi import CacheOptions, CacheType, CziReader
    except ImportError:
        raise SlideError(
            f"{path}: a CZI that OpenSlide does not read ({reason}): pip install 'gigapath-triton[czi]', or "
            "convert it to tiled JPEG TIFF"
        ) from None
    try:
        reader = CziReader(str(path), cache_options=CacheOptions(CacheType.Standard, CACHE_BYTES, None))
        # Of the first channel alone: a damaged file can claim billions.
        if (kind := reader.get_channel_pixel_type(0)) != "Bgr24":
            raise SlideError(f"{path}: its pixels are {kind}, not 8-bit RGB: give a brightfield slide")
        return Czi(reader)
    except _DAMAGE as error:
        raise SlideError(f"{path}: damaged, copy it again (libCZI: {one_line(error)})") from None


class Czi:
    """An open CZI as `handles.SlideHandle`, with libCZI's pixels; all scenes, of a stack the first plane.

    The levels are those that are stored. A position between a level's pixels is rounded to the nearest one.
    """

    library = "libCZI"

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._left, self._top, *size = reader.total_bounding_rectangle_no_pyramid
        if min(size) < 1:
            raise ValueError("nothing was scanned")
        factors, widths, heights = {1}, {0}, {0}

        def note(_index: int, block: Any) -> bool:
            factors.add(round(1 / block.get_zoom()))
            widths.add(block.physicalSize.w)
            heights.add(block.physicalSize.h)
            return True

        reader.enumerate_subblocks(note)
        self._factors = [factor for factor in sorted(factors) if factor <= min(size)]
        self.dimensions: tuple[int, int] = (size[0], size[1])
        self.level_dimensions = tuple((size[0] // factor, size[1] // factor) for factor in self._factors)
        self.level_downsamples = tuple(map(float, self._factors))
        self.properties = _properties(reader.raw_metadata) | {
            "openslide.level[0].tile-width": str(max(widths)),
            "openslide.level[0].tile-height": str(max(heights)),
        }

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """RGB uint8 [h, w, 3], white where nothing was scanned; arguments as OpenSlide's.

        Raises:
            SlideError: it cannot be decoded.
        """
        factor = self._factors[level]
        x, y = (round(side / factor) * factor for side in location)
        # A pixel more than is wanted: libCZI rounds the size down, and 1/3 is no number of the machine's.
        width, height = ((side + 1) * factor for side in size)
        try:
            bgr = self._reader.read(
                roi=(self._left + x, self._top + y, width, height),
                zoom=1 / factor,
                background_pixel=(1.0, 1.0, 1.0),
            )
        except _DAMAGE as error:
            raise SlideError(f"cannot decode level {level} at {location} ({one_line(error)})") from None
        return np.ascontiguousarray(bgr[: size[1], : size[0], ::-1])

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


def _properties(metadata: str) -> dict[str, str]:
    """What a file says of its scale, under OpenSlide's names."""
    root = ElementTree.fromstring(metadata)
    found = {"openslide.vendor": "zeiss"}
    for axis in "XY":
        if metres := root.findtext(f".//Scaling/Items/Distance[@Id='{axis}']/Value"):
            found[f"openslide.mpp-{axis.lower()}"] = str(float(metres) * 1e6)
    if power := root.findtext(".//Objectives/Objective/NominalMagnification"):
        found["openslide.objective-power"] = power
    return found
