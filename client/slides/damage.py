"""Find out, before a slide is used, that its file is missing, empty, cut off or claims what no slide has."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from ..errors import SlideError
from .tiff import LARGEST_TILE

# A header that claims more is damaged, or made to keep its reader busy: no scanner comes near.
LONGEST_SIDE = 2_000_000
MOST_PIXELS = 4e11  # two inches by three at 0.1 mpp
MOST_PIXELS_PER_BYTE = 20_000  # of one file; JPEG comes to 350 on bare glass
SEVERAL_FILES = ("mirax", "dicom", "hamamatsu")  # whose pixels may lie in other files than the one named


def check_file(path: Path) -> None:
    """Check that there is a file with something in it.

    Raises:
        SlideError: it is missing, a folder, a pipe or device, unreadable or empty.
    """
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


def check_claims(path: Path, sizes: Sequence[tuple[int, int]], properties: Mapping[str, str]) -> None:
    """Check that a header claims no more than a slide, and this file, can hold.

    `sizes` are those of all levels, `properties` have OpenSlide's names.

    Raises:
        SlideError: level 0, or a stored tile of any level, is too large.
    """
    (width, height), held = sizes[0], ""
    too_large = max(width, height) > LONGEST_SIDE or width * height > MOST_PIXELS
    if properties["openslide.vendor"] not in SEVERAL_FILES:
        size = path.stat().st_size
        held = f" in {size} bytes"
        too_large |= width * height > MOST_PIXELS_PER_BYTE * size
    if too_large:
        raise SlideError(f"{path}: its header claims {width}x{height} px{held}: damaged, copy it again")
    for level in range(len(sizes)):
        names = [f"openslide.level[{level}].tile-{side}" for side in ("width", "height")]
        tile_width, tile_height = (int(properties.get(name, 0)) for name in names)
        if 4 * tile_width * tile_height > LARGEST_TILE:
            raise SlideError(f"{path}: its tiles claim {tile_width}x{tile_height} px: damaged, copy it again")


def is_truncated_tiff(path: Path) -> bool:
    """Whether a classic or big TIFF's first directory would lie beyond the file's end."""
    with path.open("rb") as file:
        head = file.read(16)
    if head[:2] not in (b"II", b"MM"):
        return False
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    directory = {42: head[4:8], 43: head[8:16]}.get(int.from_bytes(head[2:4], order), b"")
    return int.from_bytes(directory, order) >= path.stat().st_size
