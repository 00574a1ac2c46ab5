"""What reads a slide's levels: OpenSlide, or another library where it gives the same view of a slide."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openslide

from ..arrays import Pixels
from ..errors import SlideError
from .address import RemotePath, extra_of
from .damage import one_line
from .mpp import Properties
from .slide_file import check_content, open_file
from .tiff import Page


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


def open_handle(path: Path) -> SlideHandle:
    """Open a slide with what reads its format.

    Raises:
        SlideError, SlideServerError: it is missing, damaged or no slide, or its server does not give it.
    """
    if not isinstance(path, RemotePath):
        return open_file(path)
    with extra_of(path):
        if path.series:
            from .dicomweb import open_series

            return open_series(path)
        from .remote_file import RemoteFile

        return RemoteFile(path)


def slide_pages(path: Path) -> list[Page]:
    """The pages of a slide that is a tiled TIFF, after checks that must come before it is opened.

    Raises:
        SlideError, SlideServerError: as `open_handle`.
    """
    if not isinstance(path, RemotePath):
        return check_content(path)
    if path.series:
        return []
    with extra_of(path):
        from .remote_file import RemoteFile

        return RemoteFile(path).pages


class Handles:
    """A handle per thread: one of OpenSlide that met an error refuses everything, and is replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handles: dict[int, SlideHandle] = {}

    def get(self) -> SlideHandle:
        """This thread's handle.

        Raises:
            SlideError: the slide cannot be opened.
        """
        thread = threading.get_ident()
        if thread not in self._handles:
            self._handles[thread] = open_handle(self._path)
        return self._handles[thread]

    def read(self, position: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """`read_region` with this thread's handle.

        Raises:
            SlideError: the slide cannot be opened, or the region not decoded.
        """
        handle = self.get()
        try:
            return read_region(handle, position, level, size)
        except SlideError:
            del self._handles[threading.get_ident()]
            handle.close()
            raise

    def close(self) -> None:
        """Close every handle; no thread may be reading."""
        while self._handles:
            self._handles.popitem()[1].close()


def read_region(handle: SlideHandle, position: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
    """One region as RGB uint8 [h, w, 3]; what is transparent or outside the slide is white.

    Raises:
        SlideError: it cannot be decoded; the handle is of no use any more.
    """
    try:
        return flatten_alpha(np.asarray(handle.read_region(position, level, size)))
    except openslide.OpenSlideError as error:
        raise SlideError(f"cannot decode level {level} at {position} ({one_line(error)})") from None


def flatten_alpha(rgba: Pixels) -> Pixels:
    """Lay RGBA uint8 [..., 4] on white: RGB uint8 [..., 3], rounded to nearest; RGB stays as it is."""
    alpha = rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        return rgba[..., :3]
    opacity = alpha.astype(np.uint32)
    return ((rgba[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
