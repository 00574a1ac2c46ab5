"""Find out, before a slide is used, that its file is missing, empty or cut off."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Literal

from ..errors import SlideError


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


def is_truncated_tiff(path: Path) -> bool:
    """Whether a classic or big TIFF's first directory would lie beyond the file's end."""
    with path.open("rb") as file:
        head = file.read(16)
    if head[:2] not in (b"II", b"MM"):
        return False
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    directory = {42: head[4:8], 43: head[8:16]}.get(int.from_bytes(head[2:4], order), b"")
    return int.from_bytes(directory, order) >= path.stat().st_size
