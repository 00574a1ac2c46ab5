"""Labels from the tables that people have: PANDA's, Prov-GigaPath's, CLAM's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gigapath_contract.errors import TableError
from gigapath_contract.tables import (
    ID_COLUMNS,
    LABEL_COLUMNS,
    PATH_COLUMNS,
    PATIENT_COLUMNS,
    find_column,
    id_in,
    read_table,
)
from training.errors import TrainingError
from training.task import Task

SPLITS = ("train", "val", "test")


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
            raise TrainingError(f"cannot read {path}: {error.strerror}") from error
        except TableError as error:
            raise TrainingError(f"{path} is not a CSV file in UTF-8: {error}") from error
        if not table.rows:
            raise TrainingError(f"{path} has no rows: it needs a header and a row for each slide")
        self.columns = table.columns
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
            present = ", ".join(filter(None, self.columns))
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


def read_slides(table: Table, task: Task) -> dict[str, LabelledSlide]:
    """The labelled slides of a table, by id. Raises TrainingError for a row without a usable label."""
    patient = find_column(table.columns, PATIENT_COLUMNS)
    if task.kind == "multilabel":
        columns = [table.column(name) for name in task.classes]
    else:
        names = (task.column,) if task.column else LABEL_COLUMNS
        columns = [table.column(*names, remedy="name yours, --set task.label_column=NAME")]
    allowed: Sequence[str] = ("0", "1") if task.kind == "multilabel" else task.values
    slides: dict[str, LabelledSlide] = {}
    for index, (slide_id, row) in enumerate(zip(table.slide_ids(), table.rows, strict=True)):
        if slide_id in slides:
            raise TrainingError(f"{table.at(index)} repeats slide {slide_id}: keep one row per slide")
        for column in columns:
            if not row[column]:
                raise TrainingError(
                    f"{table.at(index)}: slide {slide_id} has no label in column {column}: fill it in or "
                    "remove the row"
                )
            if row[column] not in allowed:
                raise TrainingError(
                    f"{table.at(index)}: slide {slide_id} has {column} {row[column]!r}, which is none of "
                    f"{', '.join(allowed)}: correct it"
                    + ("" if task.kind == "multilabel" else ", or set your classes: --set 'task.classes=[…]'")
                )
        found = tuple(allowed.index(row[column]) for column in columns)
        target = found if task.kind == "multilabel" else found[0]
        slides[slide_id] = LabelledSlide(slide_id, (row[patient] if patient else "") or slide_id, target)
    return slides
