"""OME-TIFF pyramids: their smaller levels lie in SubIFDs of the first page, where OpenSlide does not look."""

from __future__ import annotations

import re
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import openslide
import tifffile
from tifffile import PHOTOMETRIC, PLANARCONFIG, RESUNIT

from gigapath_contract.errors import one_line

from ..arrays import Pixels
from ..errors import SlideError
from .detect import slide_format
from .levels import downsamples_of
from .mpp import Properties
from .stored_tiles import OME_TIFF, TileGrid
from .tiff import DAMAGE, LARGEST_TILE

CACHE_BYTES = 32 << 20  # of decoded tiles, per handle
_SIZES = re.compile(r'<(?:\w+:)?Pixels\b[^>]*?\bSize[XY]="(\d{1,9})"[^>]*?\bSize[XY]="(\d{1,9})"')
_UNITS = {int(RESUNIT.INCH): "inch", int(RESUNIT.CENTIMETER): "centimeter"}


def open_ome_tiff(path: Path, stream: BinaryIO | None = None) -> OmeTiff | None:
    """The levels of an OME-TIFF, those in SubIFDs too; None where it has one that OpenSlide can read.

    `stream` is what the pixels are read through, by default the file itself.

    Raises:
        SlideError: each of its pages is one channel, of which OpenSlide would show the first alone, or it
            holds more than one slide.
    """
    if slide_format(path) != "generic-tiff":
        return None
    try:
        file = tifffile.TiffFile(stream or path)
    except DAMAGE:
        return None
    try:
        first = file.pages.first
        areas = [int(x) * int(y) for x, y in _SIZES.findall(first.description)] if first.is_ome else []
        if any(area > areas[0] / 2 for area in areas[1:]):  # a label or an overview is smaller
            file.close()
            raise SlideError(f"{path}: an OME-TIFF of {len(areas)} large images: export the slide alone")
        below = (first.pages or ()) if first.is_ome else ()
        levels = [page for page in (first, *(page.aspage() for page in below)) if _is_rgb(page)]
        mislabelled = [page for page in levels if _is_planar(page) and page.photometric == PHOTOMETRIC.YCBCR]
        for page in mislabelled:
            page.photometric = PHOTOMETRIC.RGB
        needed = len(levels) > 1 or mislabelled or openslide.OpenSlide.detect_format(path) is None
        if needed and levels and max(levels, key=lambda page: page.imagewidth) is first:
            return OmeTiff(file, levels)
        single = first.is_ome and first.samplesperpixel == 1
    except DAMAGE:
        single = False
    file.close()
    if single:
        raise SlideError(f"{path}: an OME-TIFF with a channel per page: export it with RGB in each page")
    return None


def _is_rgb(page: tifffile.TiffPage) -> bool:
    """Whether a page is a picture in RGB.

    Bio-Formats calls JPEG of a plane per channel YCbCr, though its planes are red, green and blue.
    """
    ycbcr = not _is_planar(page) or page.software.startswith("OME Bio-Formats")
    return bool(
        page.is_tiled
        and page.dtype == np.uint8
        and page.samplesperpixel == 3
        and (page.photometric == PHOTOMETRIC.RGB or (ycbcr and page.photometric == PHOTOMETRIC.YCBCR))
    )


def _is_planar(page: tifffile.TiffPage) -> bool:
    return bool(page.planarconfig == PLANARCONFIG.SEPARATE)


class OmeTiff:
    """An open OME-TIFF as `handles.SlideHandle`, with tifffile's pixels; for one thread.

    A position between a level's pixels is rounded to the nearest one.
    """

    library = "tifffile"

    def __init__(self, file: tifffile.TiffFile, levels: list[tifffile.TiffPage]) -> None:
        self._file = file
        self._pages = sorted(levels, key=lambda page: -page.imagewidth)
        self._grids = [
            TileGrid((page.tilewidth, page.tilelength), (page.imagewidth, page.imagelength))
            for page in self._pages
        ]
        self.level_dimensions = tuple(grid.size for grid in self._grids)
        self.dimensions = self.level_dimensions[0]
        self.level_downsamples = downsamples_of(self.level_dimensions)
        self.properties = _properties(self._pages[0])
        room = CACHE_BYTES // max(3 * grid.tile[0] * grid.tile[1] for grid in self._grids)
        self._tile = lru_cache(max(1, room))(self._decode)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """RGB uint8 [h, w, 3], tiles that the file leaves out in white; arguments as OpenSlide's.

        Raises:
            SlideError: a tile cannot be decoded.
        """
        out = np.empty((*size[::-1], 3), np.uint8)
        downsample = self.level_downsamples[level]
        position = round(location[0] / downsample), round(location[1] / downsample)
        try:
            self._grids[level].fill(out, position, partial(self._tile, level))
        except DAMAGE as error:
            raise SlideError(f"cannot decode level {level} at {location} ({one_line(error)})") from None
        return out

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _decode(self, level: int, key: int) -> Pixels:
        page, (width, height) = self._pages[level], self._grids[level].tile
        planes = 3 if _is_planar(page) else 1
        out = np.full((height, width, 3), 255, np.uint8)
        for plane in range(planes):
            segment = self._segment(page, plane * (len(page.dataoffsets) // planes) + key)
            if segment is not None:
                channels = slice(plane, plane + 1) if planes == 3 else slice(None)
                out[: segment.shape[0], : segment.shape[1], channels] = segment
        return out

    def _segment(self, page: tifffile.TiffPage, index: int) -> Pixels | None:
        """A stored tile [h, w, 1 or 3], or None where it is left out."""
        count = page.databytecounts[index]
        if count == 0:
            return None
        if count > LARGEST_TILE:
            raise ValueError(f"a tile of {count} bytes")
        self._file.filehandle.seek(page.dataoffsets[index])
        data = self._file.filehandle.read(count)
        decoded = page.decode(data, index, jpegtables=page.jpegtables)[0]
        return None if decoded is None else decoded[0]


def _properties(page: tifffile.TiffPage) -> Properties:
    """What a file says of its scale, under OpenSlide's names."""
    found = {"openslide.vendor": OME_TIFF, "tiff.ImageDescription": page.description}
    if (unit := _UNITS.get(page.resolutionunit)) and min(page.resolution) > 0:
        x, y = page.resolution
        found |= {"tiff.ResolutionUnit": unit, "tiff.XResolution": str(x), "tiff.YResolution": str(y)}
    return found
