"""Labels from the tables that people have: PANDA's, Prov-GigaPath's, CLAM's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gigapath_contract.errors import TableError
from gigapath_contract.files import why_unreadable
from gigapath_contract.tables import (
    ID_COLUMNS,
    LABEL_COLUMNS,
    MASK_COLUMNS,
    MPP_COLUMNS,
    PATH_COLUMNS,
    PATIENT_COLUMNS,
    find_column,
    id_in,
    is_missing,
    read_table,
)
from training.errors import TrainingError
from training.task import Task

SPLITS = ("train", "val", "test")
# Values that repeat in these are no patients'; the last four are what `gigapath-client tissue` adds.
NO_PATIENTS = {*ID_COLUMNS, *PATH_COLUMNS, *LABEL_COLUMNS, *MPP_COLUMNS, *MASK_COLUMNS} | {
    *("split", "tissue_status", "tissue", "tiles", "notes")
}
MOST_SLIDES = 10  # per patient on average, in a column that is taken for one of patients

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledSlide:
    """A labelled slide; `target` is the class index, 0 or 1 (binary), or a 0 or 1 per class (multilabel)."""

    slide_id: str
    patient_id: str
    target: int | tuple[int, ...]


class Table:
    """A table with a header and full rows: column names in lower case, values stripped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            table = read_table(path)
        except OSError as error:
            raise TrainingError(why_unreadable(path, error)) from error
        except TableError as error:
            raise TrainingError(f"{path} is not a CSV file in UTF-8 ({error}): save it as one") from error
        if not table.rows:
            raise TrainingError(f"{path} has no rows: it needs a header and a row for each slide")
        self.columns, self.names = table.columns, table.names
        for row in table.rows:
            if len(row.cells) != len(self.columns):
                raise TrainingError(
                    f"{path} line {row.line} has {len(row.cells)} values for {len(self.columns)} columns"
                )
        self.rows = [table.values(row) for row in table.rows]
        self._lines = [row.line for row in table.rows]

    def at(self, index: int) -> str:
        """File and line of row `index`, for a message."""
        return f"{self.path} line {self._lines[index]}"

    def column(self, *names: str, remedy: str = "rename one") -> str:
        """The first of `names` that is a column; a TrainingError has the `remedy` and lists the columns."""
        found = find_column(self.columns, names)
        if found is None:
            present = ", ".join(self.names)
            raise TrainingError(
                f"{self.path} has no column {' or '.join(names)}: {remedy} (its columns: {present})"
            )
        return found

    def slide_ids(self) -> list[str]:
        """The id of each row's slide, by which its h5 file is named."""
        id_column, path_column = (find_column(self.columns, names) for names in (ID_COLUMNS, PATH_COLUMNS))
        if path_column is None:
            id_column = self.column(*ID_COLUMNS)
        ids = [id_in(row, id_column, path_column) for row in self.rows]
        if "" in ids:
            raise TrainingError(f"{self.at(ids.index(''))} has no {id_column or path_column}")
        return ids


def read_slides(
    table: Table,
    task: Task,
    patient_column: str | None = None,
    option: str = "--set data.patient_column=NAME",
) -> dict[str, LabelledSlide]:
    """The labelled slides of a table, by id; a warning names `option` where no column says the patients.

    Raises TrainingError for a row without a usable label, and where there is no `patient_column`.
    """
    patient = patient_in(table, patient_column, option)
    if task.kind == "multilabel":
        columns = [table.column(name) for name in task.classes]
    else:
        names = (task.column,) if task.column else LABEL_COLUMNS
        columns = [table.column(*names, remedy="name yours, --set task.label_column=NAME")]
    if patient is None:
        _warn_without_patients(table, {*columns, *map(str.lower, task.classes)}, option)
    allowed: Sequence[str] = ("0", "1") if task.kind == "multilabel" else task.values
    slides: dict[str, LabelledSlide] = {}
    ids = table.slide_ids()
    _check_labels(table, ids, columns)
    for index, (slide_id, row) in enumerate(zip(ids, table.rows, strict=True)):
        if slide_id in slides:
            raise TrainingError(f"{table.at(index)} repeats slide {slide_id}: keep one row per slide")
        for column in columns:
            if row[column] not in allowed:
                raise TrainingError(
                    f"{table.at(index)}: slide {slide_id} has {column} {row[column]!r}, which is none of "
                    f"{', '.join(allowed)}: correct it"
                    + ("" if task.kind == "multilabel" else ", or set your classes: --set 'task.classes=[…]'")
                )
        found = tuple(allowed.index(row[column]) for column in columns)
        target = found if task.kind == "multilabel" else found[0]
        named = row[patient] if patient else ""
        slides[slide_id] = LabelledSlide(slide_id, slide_id if is_missing(named) else named, target)
    return slides


def _check_labels(table: Table, ids: Sequence[str], columns: Sequence[str]) -> None:
    """Refuse rows without a label, all at once."""
    missing = [(i, c) for i, row in enumerate(table.rows) for c in columns if is_missing(row[c])]
    if missing:
        index, column = missing[0]
        rows = len({i for i, _ in missing})
        others = f" (so have {rows} of {len(ids)} rows)" if rows > 1 else ""
        raise TrainingError(
            f"{table.at(index)}: slide {ids[index]} has no label in column {column}{others}: fill it in or "
            "remove the row"
        )


def patient_in(table: Table, named: str | None, option: str) -> str | None:
    """The column of patients: the one `named`, which must exist, or one with a usual name if any."""
    if named:
        return table.column(named, remedy=f"name the one with the patients, {option}")
    return find_column(table.columns, PATIENT_COLUMNS)


def _warn_without_patients(table: Table, labels: set[str], option: str) -> None:
    """Log that slides count as patients, and the column with the most values of which some repeat."""
    values = {
        name: [row[name] for row in table.rows if row[name]]
        for name in table.columns
        if name and name not in NO_PATIENTS | labels
    }
    different = {name: len(set(found)) for name, found in values.items()}
    likely = [name for name, n in different.items() if n < len(values[name]) <= n * MOST_SLIDES]
    asked = f"; is it {max(likely, key=lambda name: different[name])}?" if likely else ":"
    logger.warning(
        "%s has no patient column, so each slide counts as a patient%s %s", table.path, asked, option
    )
