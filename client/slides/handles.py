"""What reads a slide's levels: OpenSlide, or another library where it gives the same view of a slide."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openslide

from gigapath_contract.errors import one_line

from ..arrays import Pixels
from ..errors import SlideError
from .address import RemotePath, extra_of
from .mpp import Properties
from .slide_file import SlideFile, check_content, open_file


class SlideHandle(Protocol):
    """An open slide as `openslide.OpenSlide` shows it: a new format is a class and a line in `open_file`.

    Those of other libraries say in `library` which it is.

    `properties` has OpenSlide's names: `openslide.vendor`, and where known `openslide.mpp-x` and -y,
    `openslide.objective-power` and `openslide.bounds-*`.
    """

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height) of level 0."""

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of every level, the finest first."""

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """Level-0 pixels per pixel of each level."""

    @property
    def properties(self) -> Properties:
        """What the file says, by name."""

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Any:
        """RGB or RGBA, as a picture or an array: `size` pixels of a level at `location` in level-0 pixels.

        Raises:
            SlideError, OpenSlideError: it cannot be decoded; the handle is not used any more.
        """

    def close(self) -> None:
        """Close the slide."""


def check_slide(path: Path) -> SlideFile:
    """Check what must be before a slide is opened.

    Raises:
        SlideError, SlideServerError: it is missing, damaged or no slide, or its server does not give it.
    """
    if not isinstance(path, RemotePath):
        return check_content(path)
    if path.series:
        return SlideFile(path)
    with extra_of(path):
        from .remote_file import check_remote

        return check_remote(path)


def open_handle(file: SlideFile) -> SlideHandle:
    """Open a slide with what reads its format; raises as `check_slide` does."""
    path = file.path
    if not isinstance(path, RemotePath):
        return open_file(file)
    with extra_of(path):
        if path.series:
            from .dicomweb import open_series

            return open_series(path)
        from .remote_file import RemoteFile, RemoteSlide

        assert isinstance(file, RemoteSlide)  # as `check_slide` makes them
        return RemoteFile(file)


class RegionReader:
    """Reads a slide through one handle, for one thread at a time.

    It is opened when it is needed. One of OpenSlide that met an error refuses everything, and is replaced.
    """

    def __init__(self, file: SlideFile) -> None:
        self._file = file
        self._handle: SlideHandle | None = None
        self._closed = False

    def handle(self) -> SlideHandle:
        """The handle.

        Raises:
            SlideError: the slide cannot be opened.
            ValueError: this is closed.
        """
        if self._closed:
            raise ValueError(f"{self._file.path}: closed")
        if self._handle is None:
            self._handle = open_handle(self._file)
        return self._handle

    def read(self, position: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """One region as RGB uint8 [h, w, 3]; what is transparent or outside the slide is white.

        Raises:
            SlideError: the slide cannot be opened, or the region not decoded.
        """
        try:
            return flatten_alpha(np.asarray(self.handle().read_region(position, level, size)))
        except (SlideError, openslide.OpenSlideError) as error:
            self._drop()
            if isinstance(error, SlideError):
                raise
            raise SlideError(f"cannot decode level {level} at {position} ({one_line(error)})") from None

    def close(self) -> None:
        """Close the handle for good; no thread may be reading."""
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


class RegionReaders:
    """A `RegionReader` per thread."""

    def __init__(self, file: SlideFile) -> None:
        self._file = file
        self._readers: dict[int, RegionReader] = {}

    def handle(self) -> SlideHandle:
        """This thread's handle; raises as `RegionReader`."""
        return self._own().handle()

    def read(self, position: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """A region, see `RegionReader`."""
        return self._own().read(position, level, size)

    def close(self) -> None:
        """Close every handle; no thread may be reading."""
        while self._readers:
            self._readers.popitem()[1].close()

    def _own(self) -> RegionReader:
        return self._readers.setdefault(threading.get_ident(), RegionReader(self._file))


def flatten_alpha(rgba: Pixels) -> Pixels:
    """Lay RGBA uint8 [..., 4] on white: RGB uint8 [..., 3], rounded to nearest; RGB stays as it is."""
    alpha = rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        return rgba[..., :3]
    opacity = alpha.astype(np.uint32)
    return ((rgba[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
