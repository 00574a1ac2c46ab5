"""A slide file at https:// or s3:// through OpenSlide, without downloading what is not looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from tifffile import PLANARCONFIG

from gigapath_contract.errors import one_line

from ..arrays import Int64
from ..errors import SlideError
from .address import RemotePath
from .detect import is_dicom, slide_format
from .mirror import Mirror, open_mirror
from .slide_file import SlideFile, check_content, library_of, open_file
from .stored_tiles import VENDORS
from .tiff import DAMAGE, all_pages


@dataclass(frozen=True, eq=False)
class _Tiles:
    """Where a level's tiles lie in the file."""

    offsets: Int64
    counts: Int64
    tile: tuple[int, int]
    grid: tuple[int, int]  # columns, rows


@dataclass(frozen=True, eq=False, kw_only=True)
class RemoteSlide(SlideFile):
    """One version of a slide at https:// or s3://, as it was when it was checked.

    `tiles` are the levels' by their size (w, h); none where the file was fetched whole.
    """

    mirror: Mirror
    tiles: dict[tuple[int, int], _Tiles]


class RemoteFile:
    """A remote slide as a `SlideHandle`: the tiles under a region are fetched before OpenSlide reads it.

    They are known of tiled TIFFs whose levels are single pages, Aperio's and generic ones. Other single files
    are fetched whole.

    Raises:
        SlideServerError: the server does not give it, or the cache has no room.
        SlideError: it is damaged or no slide.
    """

    def __init__(self, slide: RemoteSlide) -> None:
        self._mirror = slide.mirror
        with _naming(slide.path, self._mirror.path):
            # tifffile keeps what it read around a tile, which may not have been fetched; OpenSlide does not.
            self._handle = open_file(SlideFile(self._mirror.path, slide.pages), self._mirror.open())
        self.library = library_of(self._handle)
        self.dimensions = self._handle.dimensions
        self.level_dimensions = self._handle.level_dimensions
        self.level_downsamples = self._handle.level_downsamples
        self.properties = self._handle.properties
        self._levels = [slide.tiles[size] for size in self.level_dimensions if size in slide.tiles]
        if len(self._levels) < len(self.level_dimensions):
            self._mirror.fetch_all()
            self._levels = []

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Any:
        """See `SlideHandle`."""
        self._fetch(location, level, size)
        return self._handle.read_region(location, level, size)

    def close(self) -> None:
        """Close OpenSlide's handle."""
        self._handle.close()

    def _fetch(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> None:
        if not self._levels:
            return
        stored, downsample = self._levels[level], self.level_downsamples[level]
        spans = []
        for place, side, tile, count in zip(location, size, stored.tile, stored.grid, strict=True):
            first = math.floor(place / downsample) - 1  # OpenSlide may interpolate between two pixels
            last = math.ceil(place / downsample) + side
            spans.append(np.arange(max(0, first // tile), min(count, last // tile + 1)))
        keys = (spans[1][:, None] * stored.grid[0] + spans[0]).ravel()
        stored_there = stored.counts[keys] > 0
        there, missing = keys[stored_there], keys[~stored_there]
        self._mirror.fetch(stored.offsets[there].tolist(), stored.counts[there].tolist())
        if level and len(missing) and self.properties["openslide.vendor"] == "aperio":
            # OpenSlide makes tiles that are left out from the finer level.
            rows, columns = np.divmod(missing, stored.grid[0])
            low = np.array((columns.min(), rows.min())) * stored.tile
            high = np.array((columns.max() + 1, rows.max() + 1)) * stored.tile
            left, top = np.floor(low * downsample).astype(int).tolist()
            ratio = downsample / self.level_downsamples[level - 1]
            width, height = np.ceil((high - low) * ratio).astype(int).tolist()
            self._fetch((left, top), level - 1, (width + 1, height + 1))


def check_remote(path: RemotePath) -> RemoteSlide:
    """Fetch what OpenSlide opens a slide by, and check it; raises as `RemoteFile`."""
    mirror = open_mirror(path)
    with _naming(path, mirror.path):
        tiles = _fetch_directories(path, mirror)
        return RemoteSlide(path, check_content(mirror.path).pages, mirror=mirror, tiles=tiles)


def _fetch_directories(path: RemotePath, mirror: Mirror) -> dict[tuple[int, int], _Tiles]:
    with mirror.open() as file:
        head = file.read(132)
    if is_dicom(head):
        raise SlideError(
            f"{path}: one file of a DICOM series: download its folder, or give a DICOMweb series"
        )
    tiles = {}
    if head[:2] in (b"II", b"MM"):
        try:
            tiles = _read_directories(mirror)
        except DAMAGE as error:
            raise SlideError(f"{path}: damaged, copy it again (TIFF: {one_line(error)})") from None
    elif not head.startswith(b"ZISRAWFILE"):
        raise SlideError(f"{path}: of a kind that is not read from a server, or no slide: download it")
    if slide_format(mirror.path) not in VENDORS:
        mirror.fetch_all()
        return {}
    return tiles


def _read_directories(mirror: Mirror) -> dict[tuple[int, int], _Tiles]:
    """Fetch all directories of a TIFF with their values; the tiles of the pages that a level can be."""
    found: dict[tuple[int, int], list[_Tiles | None]] = {}
    with tifffile.TiffFile(mirror.open()) as file:
        for page in all_pages(file):
            mirror.fetch(*zip(*((tag.valueoffset, tag.valuebytecount) for tag in page.tags), strict=True))
            if page.is_tiled:
                size, tile = (page.imagewidth, page.imagelength), (page.tilewidth, page.tilelength)
                found.setdefault(size, []).append(_tiles_of(page, size, tile))
    return {size: tiles[0] for size, tiles in found.items() if len(tiles) == 1 and tiles[0]}


def _tiles_of(page: tifffile.TiffPage, size: tuple[int, int], tile: tuple[int, int]) -> _Tiles | None:
    offsets, counts = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    grid = (-(-size[0] // tile[0]), -(-size[1] // tile[1])) if min(tile) > 0 else (0, 0)
    if page.planarconfig != PLANARCONFIG.CONTIG or not len(offsets) == len(counts) == grid[0] * grid[1]:
        return None
    return _Tiles(offsets, counts, tile, grid)


@contextmanager
def _naming(path: Path, local: Path) -> Iterator[None]:
    """Have errors about the mirror name the slide's address."""
    try:
        yield
    except SlideError as error:
        raise SlideError(str(error).replace(str(local), str(path))) from None
