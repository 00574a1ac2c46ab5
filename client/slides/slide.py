"""A slide: its scale, levels that can be trusted, bounds and pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

import cv2
import numpy as np

from gigapath_contract.slides import slide_id as id_of

from ..arrays import Pixels
from ..errors import MppError, SlideError
from .handles import RegionReader, SlideHandle, check_slide
from .levels import SPOT, misfit, spots
from .mpp import Mpp, Properties, contradictions, find_mpp
from .overview import Overview, OverviewReader
from .regions import LevelRegions
from .slide_file import SlideFile
from .stored_tiles import OME_TIFF, StoredLevel, StoredTiles
from .tiff import Page

MOST_OVERVIEW_PIXELS = 2e10  # of a level to look through: larger ones come with smaller ones
MOST_DIFFERENT = 40  # grey values, of 255, by which the mean colour of a spot may differ between two levels
ROUNDING = 1.001  # levels' sizes are whole pixels: 1/4.0004 still serves where 1/4 is wanted


class Slide:
    """An open slide; a context manager.

    Attributes:
        dimensions: (width, height) of level 0 in pixels; `level_dimensions` of every level.
        level_downsamples: level-0 pixels per pixel of each level.
        mpp: (x, y) microns per level-0 pixel; `mpp_source` says where they were found.
        bounds: (x, y, width, height) in level-0 pixels of what was scanned.
        vendor: OpenSlide's name of the format.
        notes: what is odd about the slide and was dealt with, such as a level that is not used.

    Example::

        with open_slide(Path("CMU-1.svs")) as slide:
            pixels = slide.read(level=0, position=(1000, 2000), size=(256, 256))
    """

    def __init__(self, file: SlideFile, reader: RegionReader, mpp: Mpp) -> None:
        handle = reader.handle()
        properties = handle.properties
        self.file = file
        self.path = file.path
        self.slide_id = id_of(file.path.name)
        self.dimensions: tuple[int, int] = handle.dimensions
        self.level_dimensions: tuple[tuple[int, int], ...] = handle.level_dimensions
        self.level_downsamples: tuple[float, ...] = handle.level_downsamples
        self.mpp = (mpp.x, mpp.y)
        self.mpp_source = mpp.source
        self.bounds = _bounds(properties, self.dimensions)
        self.vendor: str = properties["openslide.vendor"]
        self.notes: list[str] = []
        self._reader = reader
        self._overview: Overview | None = None
        self._misfits = {0: ""} | {
            level: reason
            for level in range(1, len(self.level_dimensions))
            if (reason := misfit(level, self.level_dimensions, self.level_downsamples, file.pages))
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        self._reader.close()

    def read(self, level: int, position: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """Read one region as RGB uint8 [h, w, 3], on white.

        Args:
            level: the level to read from.
            position: (x, y) of the top-left corner in level-0 pixels, as in OpenSlide.
            size: (width, height) in pixels of that level.

        Raises:
            SlideError: it cannot be decoded; the rest of the slide can still be read.
        """
        try:
            return self._reader.read(position, level, size)
        except SlideError as error:
            raise SlideError(f"{self.path}: {error}: copy the slide again") from None

    def stored_tiles(self, level: int) -> StoredTiles | str:
        """A level's tiles in the file, or why they are read through OpenSlide."""
        return self.file.stored_tiles(self.vendor, self.level_dimensions[level])

    def overview(self, downsample: float) -> Overview:
        """Shrink the slide by about `downsample`, block by block: little memory, with a pyramid or without.

        A pixel is the mean of k x k pixels of one level, so the overview's own downsample is exact.
        """
        level = self.level_for(downsample * ROUNDING)
        self._overview = self._downsample(level, max(1, round(downsample / self.level_downsamples[level])))
        return self._overview

    def thumbnail(self, max_px: int) -> Pixels:
        """RGB uint8 [h, w, 3] of the whole slide on white.

        Its longer side is at most `max_px`, and at least half of that where the slide has as many.
        """
        made = self._overview
        if made is not None and max(made.pixels.shape) >= max_px:  # once through the slide is enough
            factor = max_px / max(made.pixels.shape)
            height, width = (max(1, round(side * factor)) for side in made.pixels.shape[:2])
            return np.asarray(
                cv2.resize(made.pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8
            )
        level = self.level_for(2 * max(self.dimensions) / max_px)
        return self._downsample(level, math.ceil(max(self.level_dimensions[level]) / max_px)).pixels

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is still as fine as `downsample` and shows what level 0 shows, else 0."""
        fine = (i for i, factor in enumerate(self.level_downsamples) if factor <= downsample)
        for level in sorted(fine, key=lambda level: -self.level_downsamples[level]):
            if not (reason := self._misfit(level)):
                return level
            width, height = self.level_dimensions[level]
            note = f"level {level} ({width}x{height} px) is not used: {reason}"
            if note not in self.notes:
                self.notes.append(note)
        return 0

    def _misfit(self, level: int) -> str:
        """Why a level can't be level 0 made smaller; empty where it can."""
        if level not in self._misfits:
            self._misfits[level] = self._compare(level)
        return self._misfits[level]

    def _compare(self, level: int) -> str:
        """The same, judged by some spots of it and of the next finer level that passed itself."""
        coarsest_first = sorted(range(level), key=lambda i: -self.level_downsamples[i])
        finer = next(i for i in coarsest_first if not self._misfit(i))
        ratio = self.level_downsamples[level] / self.level_downsamples[finer]
        side = math.ceil(SPOT * ratio)
        with closing(self._regions(level)) as coarse, closing(self._regions(finer)) as fine:
            for x, y in spots(self.level_dimensions[level]):
                try:
                    here = coarse.read((x, y), (SPOT, SPOT))
                except SlideError:
                    return "it can't be decoded"
                try:
                    there = fine.read((round(x * ratio), round(y * ratio)), (side, side))
                except SlideError:
                    continue  # damage there is found tile by tile
                if np.abs(np.subtract(cv2.mean(here), cv2.mean(there))).max() > MOST_DIFFERENT:
                    return "it shows something else than level 0"
        return ""

    def _regions(self, level: int) -> LevelRegions:
        """Regions of a level from its stored tiles, whose pixels may differ from OpenSlide's."""
        stored = self.stored_tiles(level)
        direct = StoredLevel(self.path, stored) if isinstance(stored, StoredTiles) else None
        return LevelRegions(self._reader, level, self.level_downsamples[level], direct)

    def _downsample(self, level: int, factor: int) -> Overview:
        """The slide at `level`, each `factor` x `factor` pixels averaged into one."""
        width, height = self.level_dimensions[level]
        if width * height > MOST_OVERVIEW_PIXELS:
            raise SlideError(
                f"{self.path}: has no level small enough to find tissue on, only {width}x{height} px: "
                "convert it to a pyramid"
            )
        with closing(self._regions(level)) as regions:
            regions.drop_other_pixels(interpolates=self.vendor != OME_TIFF)
            reader = OverviewReader(self.file, regions, (width, height), factor)
            return reader.read(self.level_downsamples[level])


def open_slide(path: Path, mpp: float | tuple[float, float] | None = None) -> Slide:
    """Open a slide in any format OpenSlide knows.

    Args:
        path: the slide file; of a MIRAX slide the .mrxs, of a DICOM series any instance.
        mpp: microns per level-0 pixel, or (x, y), to be used in place of the file's own.

    Raises:
        SlideError: the file is missing, empty, cut off, unreadable or no slide.
        MppError: the file holds no plausible scale and `mpp` is not given.
    """
    file = check_slide(path)
    reader = RegionReader(file)
    try:
        properties = _properties(reader.handle(), file.pages)
        slide = Slide(file, reader, find_mpp(properties, mpp))
    except MppError as error:
        reader.close()
        raise MppError(f"{path}: {error}") from None
    if 0 in slide.bounds[2:]:
        slide.close()
        raise SlideError(f"{path}: holds no tile of its full resolution: copy it again")
    slide.notes += contradictions(properties, slide.mpp)
    slide.notes += _finer(properties, slide.dimensions, file.pages)
    return slide


def _finer(properties: Properties, level0: tuple[int, int], pages: Sequence[Page]) -> list[str]:
    """A line if the slide has a finer picture than level 0, by which others may count pixels."""
    if properties.get("dicom.ImageType[3]") == "RESAMPLED":
        return ["its finest level was made from a finer one: copy all files of the DICOM series"]
    width, height = max((page.size for page in pages), key=math.prod, default=level0)
    if properties["openslide.vendor"] == "generic-tiff" and width * height > math.prod(level0):
        return [f"level 0 is not its largest page, {width}x{height} px: convert it (gigapath-client convert)"]
    return []


def _properties(handle: SlideHandle, pages: Sequence[Page]) -> Properties:
    """OpenSlide's properties; where another page than the first is level 0, with that one's resolution."""
    properties = dict(handle.properties)
    level0 = next((page for page in pages if page.size == handle.dimensions), None)
    if level0 and not level0.first and properties["openslide.vendor"] == "generic-tiff":
        for axis, name in enumerate(("openslide.mpp-x", "openslide.mpp-y")):
            properties.pop(f"tiff.{'XY'[axis]}Resolution", None)
            properties[name] = str(level0.mpp[axis]) if level0.mpp else ""
    return properties


def _bounds(properties: Properties, dimensions: tuple[int, int]) -> tuple[int, int, int, int]:
    names = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
    if any(name not in properties for name in names):
        return (0, 0, *dimensions)
    x, y, width, height = (int(properties[name]) for name in names)
    return x, y, width, height
