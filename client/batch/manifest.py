"""Which slides to score: a folder, or a table with the column names that people already have."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ManifestError
from ..scoring.score import SlideSource
from ..slides.mpp import PLAUSIBLE

# TRIDENT, CLAM, prov-gigapath, PANDA, STAMP and eva call them so; compared without case.
ID_NAMES = ("slide_id", "sample_id", "slide", "image_id", "filename", "wsi")
PATH_NAMES = ("image_path", "path", "file_name", "wsi")
MPP_NAMES = ("mpp", "spacing_at_level_0", "slide_mpp", "default_slide_mpp")
MASK_NAMES = ("mask_path",)

# What OpenSlide opens, see https://openslide.org/formats/
SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm"}
)


@dataclass(frozen=True)
class BadRow:
    """A row that names no slide to score, and why; the others are scored all the same."""

    slide_id: str
    path: str
    reason: str


@dataclass(frozen=True)
class WorkList:
    """The slides of a manifest or folder, the rows that can't be used, and each slide's further columns."""

    slides: list[SlideSource]
    bad: list[BadRow]
    columns: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)


def read_work_list(source: Path, slides: Path | None = None) -> WorkList:
    """The slides of a folder (searched with its subfolders) or of a CSV or TSV manifest.

    A manifest's relative paths, and slides it names by id alone, are looked for in `slides`, by default the
    manifest's own folder.

    Raises:
        ManifestError: it is missing, unreadable or empty, or no column names slides.
    """
    if source.is_dir():
        return _checked(((p.stem, {}, SlideSource(p, p.stem)) for p in _find(source)), source)
    if source.suffix.lower() in SUFFIXES:
        return _checked([(source.stem, {}, SlideSource(source, source.stem))], source)
    return _checked(_manifest_rows(source, slides or source.parent), source)


Row = tuple[str, Mapping[str, str], SlideSource | BadRow]


def _checked(rows: Iterator[Row] | list[Row], source: Path) -> WorkList:
    """Sort the rows into good and bad: an id has to be a file name, and one of a kind."""
    slides: dict[str, SlideSource] = {}
    bad: list[BadRow] = []
    columns: dict[str, Mapping[str, str]] = {}
    for slide_id, own, row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
        elif slide_id in slides:
            other = slides[slide_id].path
            bad.append(
                BadRow(slide_id, str(row.path), f"slide id {slide_id} is already {other}: make ids unique")
            )
        elif not (readable := _is_utf8(row.path)) or not slide_id or slide_id[0] == "." or "/" in slide_id:
            name = str(row.path) if readable else ascii(str(row.path))
            bad.append(BadRow(ascii(slide_id)[1:-1], name, f"{slide_id!a} can't name files: rename it"))
        else:
            slides[slide_id], columns[slide_id] = row, own
    if not slides and not bad:
        raise ManifestError(f"{source}: holds no slides (looked for {' '.join(sorted(SUFFIXES))})")
    return WorkList(list(slides.values()), bad, columns)


def _find(folder: Path) -> list[Path]:
    """Slide files in a folder and below, sorted; of a DICOM series the first file."""
    found: dict[object, Path] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            found.setdefault(path.parent if path.suffix.lower() == ".dcm" else path, path)
    return list(found.values())


def _manifest_rows(manifest: Path, folder: Path) -> Iterator[Row]:
    try:
        lines = manifest.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ManifestError(f"{manifest}: no such file or folder: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"{manifest}: not a readable CSV or TSV file ({error}): save it as UTF-8 CSV"
        ) from None
    if not lines:
        raise ManifestError(f"{manifest}: is empty: give it a header line, such as slide_id,path")
    table = csv.DictReader(lines, delimiter=max(",\t;", key=lines[0].count))
    names = {(name or "").strip().lower(): name for name in table.fieldnames or ()}
    id_name, path_name, mpp_name, mask_name = (
        next((names[alias] for alias in aliases if alias in names), None)
        for aliases in (ID_NAMES, PATH_NAMES, MPP_NAMES, MASK_NAMES)
    )
    if id_name is None and path_name is None:
        raise ManifestError(
            f"{manifest}: no column names the slides (has {', '.join(map(str, names.values()))}): "
            f"call one {', '.join(ID_NAMES)} or {', '.join(PATH_NAMES)}"
        )
    by_name = {} if path_name else {key: p for p in _find(folder) for key in (p.stem, p.name)}
    for number, row in enumerate(table, start=2):
        values = {str(name): (value or "").strip() for name, value in row.items() if isinstance(value, str)}
        if not any(values.values()):
            continue
        named = values.get(path_name or "", "") or values.get(id_name or "", "")
        slide_id = _slide_id(values.get(id_name or "", "") or Path(named).name)
        if None in row or any(value is None for value in row.values()):
            yield (
                slide_id,
                {},
                BadRow(slide_id, named, f"line {number} of {manifest} has too many or too few cells"),
            )
            continue
        path = folder / named if path_name else by_name.get(named, folder / named)
        mpp, mask = values.get(mpp_name or "", ""), values.get(mask_name or "", "")
        own = {
            name: value
            for name, value in values.items()
            if name not in (id_name, path_name, mpp_name, mask_name)
        }
        try:
            scale = _mpp(mpp) if mpp else None
        except ValueError:
            low, high = PLAUSIBLE
            reason = (
                f"line {number} of {manifest}: mpp {mpp!r} is no number of microns from {low:g} to {high:g}"
            )
            yield slide_id, own, BadRow(slide_id, named, reason)
            continue
        yield slide_id, own, SlideSource(path, slide_id, scale, folder / mask if mask else None)


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


def _slide_id(name: str) -> str:
    """`name` as a slide id: prov-gigapath and STAMP write it with the file's suffix."""
    return Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name
