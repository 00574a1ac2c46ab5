"""Which slides to score: those of a folder, or the rows of a table with the field's column names."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gigapath_contract.errors import TableError
from gigapath_contract.slides import LONGEST_ID, SLIDE_SUFFIXES, is_file_name
from gigapath_contract.tables import (
    ID_COLUMNS,
    MASK_COLUMNS,
    MPP_COLUMNS,
    PATH_COLUMNS,
    find_column,
    id_in,
    read_table,
)

from ..errors import ManifestError
from ..scoring.score import SlideSource
from ..slides.mpp import PLAUSIBLE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadRow:
    """A row without a usable slide, and why; the other rows are scored."""

    slide_id: str
    path: str
    reason: str


@dataclass(frozen=True)
class WorkList:
    """The slides of a manifest or folder, the unusable rows, and each slide's further columns."""

    slides: list[SlideSource]
    bad: list[BadRow]
    columns: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)


def read_work_list(source: Path, slides: Path | None = None) -> WorkList:
    """The slides of a folder (searched with its subfolders), of a CSV or TSV manifest, or a single slide.

    Args:
        source: the folder, manifest or slide.
        slides: where a manifest's relative paths, and slides named by id alone, are looked for; by default
            the manifest's folder.

    Raises:
        ManifestError: it is missing, unreadable or empty, or no column names slides.
    """
    if source.is_dir():
        return _checked(((p.stem, {}, SlideSource(p, p.stem)) for p in _find(source)), source)
    if source.suffix.lower() in SLIDE_SUFFIXES:
        return _checked([(source.stem, {}, SlideSource(source, source.stem))], source)
    return _checked(_manifest_rows(source, slides or source.parent), source)


ManifestRow = tuple[str, Mapping[str, str], SlideSource | BadRow]
"""A slide id, its further columns, and the slide or what is wrong with it."""


def _checked(rows: Iterator[ManifestRow] | list[ManifestRow], source: Path) -> WorkList:
    """Sort the rows into good and bad: an id has to be a valid file name, and unique."""
    slides: dict[str, SlideSource] = {}
    bad: list[BadRow] = []
    columns: dict[str, Mapping[str, str]] = {}
    for slide_id, further, row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
        elif slide_id in slides:
            other = slides[slide_id].path
            bad.append(
                BadRow(slide_id, str(row.path), f"slide id {slide_id} is already {other}: make ids unique")
            )
        elif not (readable := _is_utf8(row.path)) or not is_file_name(slide_id):
            name = str(row.path) if readable else ascii(str(row.path))
            shown = slide_id if len(slide_id) <= 60 else f"{slide_id[:60]}…"
            size = len(slide_id.encode(errors="replace"))
            why = f" (File name too long: {size} bytes, at most {LONGEST_ID})" if size > LONGEST_ID else ""
            bad.append(BadRow(ascii(slide_id)[1:-1], name, f"{shown!a} can't name files{why}: rename it"))
        else:
            slides[slide_id], columns[slide_id] = row, further
    if not slides and not bad:
        raise ManifestError(f"{source}: holds no slides (looked for {' '.join(sorted(SLIDE_SUFFIXES))})")
    return WorkList(list(slides.values()), bad, columns)


def _find(folder: Path) -> list[Path]:
    """Slide files in a folder and below, sorted; of a DICOM series the first file."""
    found: dict[object, Path] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SLIDE_SUFFIXES and not hidden and path.is_file():
            found.setdefault(path.parent if path.suffix.lower() == ".dcm" else path, path)
    return list(found.values())


def _manifest_rows(manifest: Path, folder: Path) -> Iterator[ManifestRow]:
    try:
        table = read_table(manifest)
    except FileNotFoundError:
        raise ManifestError(f"{manifest}: no such file or folder: check the path") from None
    except (OSError, TableError) as error:
        raise ManifestError(
            f"{manifest}: not a readable CSV or TSV file ({error}): save it as UTF-8 CSV"
        ) from None
    if not table.header:
        raise ManifestError(f"{manifest}: is empty: give it a header line, such as slide_id,path")
    id_name, path_name, mpp_name, mask_name = used = [
        find_column(table.columns, names) for names in (ID_COLUMNS, PATH_COLUMNS, MPP_COLUMNS, MASK_COLUMNS)
    ]
    if id_name is None and path_name is None:
        raise ManifestError(
            f"{manifest}: no column names the slides (has {', '.join(filter(None, table.columns))}): "
            f"call one {', '.join(ID_COLUMNS)} or {', '.join(PATH_COLUMNS)}"
        )
    for name, why in _unread(table.columns, used):
        logger.warning("%s: column %s is not read: %s", manifest, name, why)
    by_name = {} if path_name else {key: p for p in _find(folder) for key in (p.stem, p.name)}
    for row in table.rows:
        values, where = table.values(row), f"line {row.line} of {manifest}"
        if values.get("process") in ("0", "0.0"):  # CLAM's process_list: leave this slide out
            continue
        named = values.get(path_name or "", "") or values.get(id_name or "", "")
        slide_id = id_in(values, id_name, path_name)
        if len(row.cells) != len(table.header):
            yield slide_id, {}, BadRow(slide_id, named, f"{where} has too many or too few cells")
            continue
        path = folder / named if path_name else by_name.get(named) or by_name.get(slide_id, folder / named)
        mpp, mask = values.get(mpp_name or "", ""), values.get(mask_name or "", "")
        further = {
            name: values[key]
            for name, key in zip(table.header, table.columns, strict=True)
            if key and key not in used
        }
        try:
            scale = _mpp(mpp) if mpp else None
        except ValueError:
            low, high = PLAUSIBLE
            reason = f"{where}: mpp {mpp!r} is no number of microns from {low:g} to {high:g}"
            yield slide_id, further, BadRow(slide_id, named, reason)
            continue
        yield slide_id, further, SlideSource(path, slide_id, scale, folder / mask if mask else None)


def _unread(columns: Sequence[str], used: Sequence[str | None]) -> Iterator[tuple[str, str]]:
    """The columns that nothing reads though their names say the same as a known column's, and why."""
    roles = (ID_COLUMNS, PATH_COLUMNS, MPP_COLUMNS, MASK_COLUMNS)
    for names, found, hint in zip(
        roles, used, (r"slide_?name", r"slide_?file", r"mpp|micron|spacing", "mask"), strict=True
    ):
        for column in filter(None, columns):
            if column not in used and (column in names or re.search(hint, column)):
                yield column, f"{found} is" if found else f"to have it read call it {names[0]}"


def _is_utf8(path: Path) -> bool:
    """Whether tables and records can hold a path: Python reads foreign bytes in names as lone surrogates."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _mpp(text: str) -> float:
    value = float(text)
    if not PLAUSIBLE[0] <= value <= PLAUSIBLE[1]:
        raise ValueError(text)
    return value
