"""A folder that is costly to fill, kept between test runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from gigapath_contract.files import locked


def copy_of_kept(kept: Path, key: str, fill: Callable[[Path], None], copy: Path) -> Path:
    """Copy the folder `kept` to `copy`, after it was filled with what belongs to `key`.

    `fill(kept)` is called every time and finds what it wrote before or, where that was for another key or was
    cut short by a kill, nothing. The key is noted down last. Processes take turns; a copy stays valid when
    another process fills the folder again.
    """
    kept.parent.mkdir(parents=True, exist_ok=True)
    note = kept.with_name(f"{kept.name}.key")
    with locked(kept.with_name(f"{kept.name}.lock")):
        if not note.exists() or note.read_text() != key:
            note.unlink(missing_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
        fill(kept)
        note.write_text(key)
        return Path(shutil.copytree(kept, copy, symlinks=True))
