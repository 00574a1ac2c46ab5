"""Tables of slides as people have them: CSV, TSV or semicolons, and the column names of the field's tools."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from gigapath_contract.errors import TableError
from gigapath_contract.slides import slide_id

# TRIDENT, CLAM, prov-gigapath, PANDA, STAMP, eva and the GDC use these names; `find_column` compares them.
ID_COLUMNS = ("slide_id", "sample_id", "slide", "image_id", "filename", "wsi")
PATH_COLUMNS = ("image_path", "path", "slide_path", "wsi_path", "filepath", "file_path", "file_name", "wsi")
PATIENT_COLUMNS = (
    *("pat_id", "case_id", "patient_id", "patient", "patientid", "case", "caseid", "subject_id", "subject"),
    *("case_submitter_id", "bcr_patient_barcode"),
)
LABEL_COLUMNS = ("label", "isup_grade", "target")
MPP_COLUMNS = ("mpp", "spacing_at_level_0", "slide_mpp", "default_slide_mpp")
MASK_COLUMNS = ("mask_path",)

_SEPARATOR = re.compile(r"[\s-]+")
_NAMELESS = re.compile(
    r"|Unnamed: \d+([._]\w+)*"
)  # pandas reads "" as "Unnamed: 0", and that as "Unnamed: 0.1"


@dataclass(frozen=True)
class Row:
    """A row's cells, stripped, and the line of the file on which it ends (the first is 1)."""

    line: int
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A header, stripped and otherwise as written, and the rows that are not empty, of whatever length."""

    header: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The header in lower case; a nameless column, such as an index that pandas wrote, is ""."""
        return tuple("" if _NAMELESS.fullmatch(name) else name.lower() for name in self.header)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of `columns` as they are written, without the nameless."""
        return tuple(name for name, column in zip(self.header, self.columns, strict=True) if column)

    def values(self, row: Row) -> dict[str, str]:
        """The cells of `row` by column in lower case; nameless columns and surplus cells are left out."""
        return {name: cell for name, cell in zip(self.columns, row.cells, strict=False) if name}


def read_table(path: Path) -> Table:
    """Read a table in UTF-8; the character that the header holds most of, `,`, tab or `;`, divides the cells.

    Raises:
        OSError: it cannot be opened; FileNotFoundError where there is none.
        TableError: it is no text in UTF-8, or no table, or two columns have one name.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",\t;", key=first.count), strict=True)
            rows = [Row(reader.line_num, tuple(cell.strip() for cell in line)) for line in _records(reader)]
    except UnicodeDecodeError as error:
        raise TableError(str(error)) from error
    rows = [row for row in rows if any(row.cells)]
    if not rows:
        return Table((), ())
    table = Table(rows[0].cells, tuple(_trimmed(row, len(rows[0].cells)) for row in rows[1:]))
    names = [name for name in table.columns if name]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TableError(f"column {min(twice)} is there twice: rename one")
    return table


def _trimmed(row: Row, width: int) -> Row:
    """A row without the empty cells beyond the header's, such as a comma at its end makes."""
    return row if any(row.cells[width:]) else Row(row.line, row.cells[:width])


def _records(reader: Any) -> Iterator[list[str]]:
    """The records of a csv.reader; a TableError names the line on which one that can't be read begins."""
    while True:
        began = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = "a quote is not closed" if "unexpected end" in str(error) else str(error)
            raise TableError(f"line {began}: {reason}") from error
        if any("\0" in cell for cell in record):
            raise TableError(f"line {began}: a zero byte, which no text holds")
        yield record


def is_missing(cell: str) -> bool:
    """Whether a cell has no value: it is empty, or has what pandas makes of a missing one in a text."""
    return cell.lower() in ("", "nan", "<na>")


def find_column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of `columns` (lower case) with the first of `names` that is among them.

    Case does not matter, and people write `Case ID` for case_id.
    """
    written = {_SEPARATOR.sub("_", column): column for column in reversed(columns)}
    return next((found for name in names if (found := written.get(_SEPARATOR.sub("_", name.lower())))), None)


def id_in(values: Mapping[str, str], id_column: str | None, path_column: str | None) -> str:
    """The slide id of a row, from its id column or else from the file that its path column names."""
    given = values.get(id_column or "", "")
    return slide_id(given or PurePath(values.get(path_column or "", "")).name)
