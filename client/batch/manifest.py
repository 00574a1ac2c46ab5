"""Which slides to score: those of a folder, or the rows of a table with the field's column names."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from gigapath_contract.errors import TableError
from gigapath_contract.files import NO_SUCH
from gigapath_contract.slides import LONGEST_ID, SLIDE_SUFFIXES, is_file_name
from gigapath_contract.slides import slide_id as id_of
from gigapath_contract.tables import (
    ID_COLUMNS,
    LABEL_COLUMNS,
    MASK_COLUMNS,
    MPP_COLUMNS,
    PATH_COLUMNS,
    Row,
    Table,
    find_column,
    id_in,
    is_missing,
    read_table,
)

from ..errors import ManifestError, SlideError
from ..scoring.score import SlideSource
from ..slides.address import RemotePath, slide_path, without_secret
from ..slides.detect import has_slide_content, is_slide, read_instance
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
    """The slides of a manifest or folder, the unusable rows, and each slide's further columns.

    `left_out` are the files of a folder that are no slides.
    """

    slides: list[SlideSource]
    bad: list[BadRow]
    columns: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    left_out: list[Path] = dataclasses.field(default_factory=list)

    def omission(self) -> str:
        """How many files are left out, and the names of three, or of more how many of each suffix."""
        names = [_shown(path.name) for path in self.left_out]
        if len(names) > 3:
            suffixes = Counter(_shown(path.suffix.lower()) or "without a suffix" for path in self.left_out)
            names = [f"{count} {suffix}" for suffix, count in suffixes.most_common()]
        some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        return f"{len(self.left_out)} files that are no slides ({some})" if names else ""


def read_work_list(source: Path, slides: Path | None = None) -> WorkList:
    """The slides of a folder (searched with its subfolders), of a CSV or TSV manifest, or a single slide.

    Args:
        source: the folder, manifest or slide.
        slides: where a manifest's relative paths, and slides named by id alone, are looked for; by default
            the manifest's folder.

    Raises:
        ManifestError: it is missing, unreadable or empty, or no column names slides.
    """
    if isinstance(source, RemotePath):
        return _checked([_row(source)], source)
    if source.is_dir():
        found = _find(source)
        ids = Counter(id_of(path.name) for path in found.slides)
        rows = [_row(path, _folder_name(path) if ids[id_of(path.name)] > 1 else "") for path in found.slides]
        rows += [(p.stem, {}, BadRow(_shown(p.stem), _shown(p), _dead_link(p))) for p in found.dead]
        return dataclasses.replace(_checked(rows, source), left_out=found.others)
    if is_slide(source):
        return _checked([_row(source)], source)
    return _checked(_manifest_rows(source, slides or source.parent), source)


_UNIQUE = "rename one, or give each an id of its own in a manifest (columns slide_id and path)"

ManifestRow = tuple[str, Mapping[str, str], SlideSource | BadRow]
"""A slide id, its further columns, and the slide or what is wrong with it."""


def _row(path: Path, slide_id: str = "") -> ManifestRow:
    slide = SlideSource(path, slide_id)
    return slide.slide_id, {}, slide


def _folder_name(path: Path) -> str:
    """The folder's name of a DICOM slide, else "": archives give the files of every series the same names."""
    return path.parent.name if read_instance(path) else ""


def _checked(rows: Iterator[ManifestRow] | list[ManifestRow], source: Path) -> WorkList:
    """Sort the rows into good and bad: an id has to be a valid file name, and unique.

    Of a DICOM series two rows may not name different files.
    """
    slides: dict[str, SlideSource] = {}
    series: dict[object, Path] = {}
    bad: list[BadRow] = []
    columns: dict[str, Mapping[str, str]] = {}
    for slide_id, further, row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
        elif slide_id in slides:
            other = slides[slide_id].path
            bad.append(BadRow(slide_id, str(row.path), f"slide id {slide_id} is already {other}: {_UNIQUE}"))
        elif not _is_utf8(row.path) or not is_file_name(slide_id):
            shown = slide_id if len(slide_id) <= 60 else f"{slide_id[:60]}…"
            size = len(slide_id.encode(errors="replace"))
            why = f" (File name too long: {size} bytes, at most {LONGEST_ID})" if size > LONGEST_ID else ""
            bad.append(
                BadRow(ascii(slide_id)[1:-1], _shown(row.path), f"{shown!a} can't name files{why}: rename it")
            )
        elif (other := series.setdefault(_series(row.path), row.path)) != row.path:
            bad.append(
                BadRow(slide_id, str(row.path), f"of the DICOM series of {other}: name each slide once")
            )
        else:
            slides[slide_id], columns[slide_id] = row, further
    if not slides and not bad:
        raise ManifestError(f"{source}: holds no slides (looked for {' '.join(sorted(SLIDE_SUFFIXES))})")
    return WorkList(list(slides.values()), bad, columns)


def _series(path: Path) -> object:
    """What is the same for all files of a DICOM slide, and for no other file."""
    instance = read_instance(path)
    return (path.parent, instance.series) if instance else path


@dataclass(frozen=True)
class _Found:
    slides: list[Path]
    dead: list[Path]  # links of a slide's name to nothing
    others: list[Path]


def _find(folder: Path) -> _Found:
    """The slides in a folder and below, by their name or content, sorted; of a DICOM series the first level.

    Links are followed, and a folder that several lead to is searched once. What is hidden is passed over.
    """
    slides: dict[object, Path] = {}
    dead, others = [], []
    for path in sorted(_files(folder)):
        suffix = path.suffix.lower()
        if not path.is_file():
            if path.is_symlink() and not path.exists() and suffix in SLIDE_SUFFIXES:
                dead.append(path)
        elif instance := read_instance(path):
            if instance.is_level:
                slides.setdefault(_series(path), path)
            else:
                others.append(path)
        elif suffix in SLIDE_SUFFIXES or has_slide_content(path):
            # A .dcm that can't be read may belong to any series: one of the folder is tried, and says why.
            slides.setdefault(path.parent if suffix == ".dcm" else path, path)
        else:
            others.append(path)
    return _Found(list(slides.values()), dead, others)


def _files(folder: Path) -> Iterator[Path]:
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        about = Path(place).stat()
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _dead_link(path: Path) -> str:
    return f"{_shown(path)}: a link to {_shown(path.readlink())}, which is not there: mount or restore it"


def _shown(path: Path | str) -> str:
    """A path as tables and records can hold it."""
    return str(path) if _is_utf8(path) else ascii(str(path))


_ROLES = (ID_COLUMNS, PATH_COLUMNS, MPP_COLUMNS, MASK_COLUMNS)


class _Columns(NamedTuple):
    """The columns of a manifest that are read, by `_ROLES`; None where it has no such one."""

    slide_id: str | None
    path: str | None
    mpp: str | None
    mask: str | None

    def id_in(self, values: Mapping[str, str]) -> str:
        return id_in(values, self.slide_id, self.path)


def _manifest_rows(manifest: Path, folder: Path) -> Iterator[ManifestRow]:
    table = _table(manifest)
    columns = _Columns(*(find_column(table.columns, names) for names in _ROLES))
    if columns.slide_id is None and columns.path is None:
        raise ManifestError(
            f"{manifest}: no column names the slides (has {', '.join(table.names)}): "
            f"call one {', '.join(ID_COLUMNS)} or {', '.join(PATH_COLUMNS)}"
        )
    for name, why in _unread(table.columns, columns):
        logger.warning("%s: column %s is not read: %s", manifest, name, why)
    rows = _wanted_rows(table, manifest)
    by_id_alone = any(not _given(table.values(row), columns.path) for row in rows)
    known = _by_name(folder) if by_id_alone else {}
    for row in rows:
        values, where = table.values(row), f"line {row.line} of {manifest}"
        if len(row.cells) != len(table.header):
            yield "", {}, _refused(values, columns, f"{where} has too many or too few cells")
            continue
        further = {
            name: values[key]
            for name, key in zip(table.header, table.columns, strict=True)
            if key and key not in columns
        }
        yield columns.id_in(values), further, _slide_in(values, columns, where, folder, known)


def _table(manifest: Path) -> Table:
    try:
        table = read_table(manifest)
    except FileNotFoundError:
        raise ManifestError(f"{manifest}: {NO_SUCH}") from None
    except (OSError, TableError) as error:
        raise ManifestError(
            f"{manifest}: not a readable CSV or TSV file ({error}): save it as UTF-8 CSV"
        ) from None
    if not table.header:
        raise ManifestError(f"{manifest}: is empty: give it a header line, such as slide_id,path")
    return table


def _wanted_rows(table: Table, manifest: Path) -> list[Row]:
    """The rows that CLAM's column `process` does not leave out; warns of those, and of missing labels."""
    rows = [row for row in table.rows if table.values(row).get("process", "").lower() not in _LEFT_OUT]
    if not rows:
        why = "every row has CLAM's process 0: set it to 1" if table.rows else "has no row: add one per slide"
        raise ManifestError(f"{manifest}: {why}")
    if len(rows) < len(table.rows):
        left_out = len(table.rows) - len(rows)
        logger.warning("%s: CLAM's process 0 leaves out %d of %d rows", manifest, left_out, len(table.rows))
    label = find_column(table.columns, LABEL_COLUMNS)
    missing = [row.line for row in rows if label and is_missing(table.values(row).get(label, ""))]
    if 0 < len(missing) < len(rows):
        logger.warning(
            "%s: %d of %d rows have no %s (line %d): training will refuse the table",
            *(manifest, len(missing), len(rows), label, missing[0]),
        )
    return rows


def _by_name(folder: Path) -> dict[str, set[Path]]:
    """The slides of a folder by all that a manifest may call them: id, file, DICOM folder and series."""
    found: dict[str, set[Path]] = {}
    for path in _find(folder).slides:
        instance = read_instance(path)
        of_series = (path.parent.name, instance.series) if instance else ()
        for name in (id_of(path.name), path.name, *of_series):
            found.setdefault(normalize("NFC", name), set()).add(path)
    return found


def _slide_in(
    values: Mapping[str, str], columns: _Columns, where: str, folder: Path, known: Mapping[str, set[Path]]
) -> SlideSource | BadRow:
    """The slide of a row; one without a path is looked up in `known`, see `_by_name`."""
    given, slide_id = _given(values, columns.path), columns.id_in(values)
    named = given or values.get(columns.slide_id or "", "")
    if not named:
        return BadRow("", "", f"{where} names no slide")
    try:
        keys = [] if given else [normalize("NFC", name) for name in (named, slide_id)]
        found = next(filter(None, map(known.get, keys)), None)
        candidates = sorted(found or {_as_on_disk(slide_path(named, folder))})
    except SlideError as error:
        return _refused(values, columns, f"{where}: {error}")
    if len(candidates) > 1:
        some = ", ".join(map(str, candidates[:3]))
        reason = f"{where}: {named} is the name of {len(candidates)} slides ({some}): add a column `path`"
        return BadRow(slide_id, named, reason)
    mpp, mask = _given(values, columns.mpp), _given(values, columns.mask)
    try:
        scale = _mpp(mpp) if mpp else None
    except ValueError:
        low, high = PLAUSIBLE
        reason = f"{where}: mpp {mpp!r} is no number of microns from {low:g} to {high:g}"
        return BadRow(slide_id, named, reason)
    return SlideSource(candidates[0], slide_id, scale, _as_on_disk(folder / mask) if mask else None)


def _refused(values: Mapping[str, str], columns: _Columns, reason: str) -> BadRow:
    """A row that may name an address with a login or query, which nothing must show."""
    shown = {name: without_secret(cell) for name, cell in values.items()}
    named = _given(shown, columns.path) or shown.get(columns.slide_id or "", "")
    return BadRow(columns.id_in(shown), named, reason)


_LEFT_OUT = ("0", "0.0", "false")  # CLAM's process_list works on the rows whose `process` is 1


def _given(values: Mapping[str, str], column: str | None) -> str:
    """A cell, empty where it has what R, pandas or people write for nothing."""
    cell = values.get(column or "", "")
    return "" if is_missing(cell) or cell.lower() in ("na", "n/a", "none", "null") else cell


def _as_on_disk(path: Path) -> Path:
    """A path as the disk spells it: a Mac's files have é as e and an accent, tables seldom."""
    if isinstance(path, RemotePath) or str(path).isascii():
        return path
    with contextlib.suppress(OSError):
        if not path.exists() and path != path.parent:
            folder, name = _as_on_disk(path.parent), normalize("NFC", path.name)
            return next((other for other in folder.iterdir() if normalize("NFC", other.name) == name), path)
    return path


def _unread(columns: Sequence[str], used: _Columns) -> Iterator[tuple[str, str]]:
    """The columns that nothing reads though their names say the same as a known column's, and why."""
    hints = (r"slide_?name", r"slide_?file", r"mpp|micron|spacing", "mask")
    for names, found, hint in zip(_ROLES, used, hints, strict=True):
        for column in filter(None, columns):
            if column not in used and (column in names or re.search(hint, column)):
                yield column, f"{found} is" if found else f"to have it read call it {names[0]}"


def _is_utf8(path: Path | str) -> bool:
    """Whether tables and records can hold a path: Python reads foreign bytes in names as lone surrogates."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _mpp(text: str) -> float:
    value = float(text.replace(",", "."))  # a decimal comma, as in tables with semicolons
    if not PLAUSIBLE[0] <= value <= PLAUSIBLE[1]:
        raise ValueError(text)
    return value
