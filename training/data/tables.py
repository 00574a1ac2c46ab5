"""Labels from the CSV files people have: PANDA's, Prov-GigaPath's, CLAM's."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gigapath_contract.probabilities import HeadKind
from training.errors import TrainingError

SLIDE_COLUMNS = ("slide_id", "sample_id", "slide", "image_id", "wsi", "filename")
PATIENT_COLUMNS = ("pat_id", "case_id", "patient_id", "patient")
LABEL_COLUMNS = ("label", "isup_grade", "target")
SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".dcm", ".h5")


@dataclass(frozen=True)
class Task:
    """What is predicted.

    Attributes:
        kind: `multiclass` (one of the classes), `multilabel` (each by itself), `binary` (the one or not).
        classes: their names, in the order of the logits.
        values: what the label column says for each class; for `binary` what it says for no and for yes.
        column: the label column's name; None looks for the usual ones.
    """

    kind: HeadKind
    classes: tuple[str, ...]
    values: tuple[str, ...]
    column: str | None = None


@dataclass(frozen=True)
class Slide:
    """A labelled slide; `target` is the class index, 0 or 1 (binary), or a 0 or 1 per class (multilabel)."""

    slide_id: str
    patient_id: str
    target: int | tuple[int, ...]


class Table:
    """A CSV file with a header: column names in lower case, values stripped, none missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                lines = [[value.strip() for value in line] for line in csv.reader(file) if line]
        except OSError as error:
            raise TrainingError(f"cannot read {path}: {error.strerror}") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise TrainingError(f"{path} is not a CSV file in UTF-8: {error}") from error
        if len(lines) < 2:
            raise TrainingError(f"{path} has no rows: it needs a header and a row for each slide")
        self.columns = [name.lower() for name in lines[0]]
        self.rows: list[dict[str, str]] = []
        for number, line in enumerate(lines[1:], start=2):
            if len(line) != len(self.columns):
                raise TrainingError(
                    f"{self.at(number)} has {len(line)} values for {len(self.columns)} columns"
                )
            self.rows.append(dict(zip(self.columns, line, strict=True)))

    def at(self, number: int) -> str:
        """Where row `number` (the header is 1) stands, for a message."""
        return f"{self.path} line {number}"

    def column(self, *names: str) -> str:
        """The first of `names` that is a column; a TrainingError lists what there is."""
        for name in names:
            if name.lower() in self.columns:
                return name.lower()
        raise TrainingError(f"{self.path} has no column {' or '.join(names)}: {', '.join(self.columns)}")

    def slide_ids(self) -> list[str]:
        """Each row's slide, as its h5 file is called: without a slide format's suffix."""
        column = self.column(*SLIDE_COLUMNS)
        ids = []
        for number, row in enumerate(self.rows, start=2):
            suffix = Path(row[column]).suffix
            ids.append(row[column].removesuffix(suffix) if suffix.lower() in SLIDE_SUFFIXES else row[column])
            if not ids[-1]:
                raise TrainingError(f"{self.at(number)} has no {column}")
        return ids


def read_slides(table: Table, task: Task) -> dict[str, Slide]:
    """The labelled slides of a table, by id. Raises TrainingError for a row without a usable label."""
    patient = next((name for name in PATIENT_COLUMNS if name in table.columns), None)
    if task.kind == "multilabel":
        columns = [table.column(name) for name in task.classes]
    else:
        columns = [table.column(task.column) if task.column else table.column(*LABEL_COLUMNS)]
    allowed: Sequence[str] = ("0", "1") if task.kind == "multilabel" else task.values
    slides: dict[str, Slide] = {}
    for number, (slide_id, row) in enumerate(zip(table.slide_ids(), table.rows, strict=True), start=2):
        if slide_id in slides:
            raise TrainingError(f"{table.at(number)} repeats slide {slide_id}: keep one row a slide")
        for column in columns:
            if not row[column]:
                raise TrainingError(
                    f"{table.at(number)}: slide {slide_id} has no label in column {column}: fill it in or "
                    "remove the row"
                )
            if row[column] not in allowed:
                raise TrainingError(
                    f"{table.at(number)}: slide {slide_id} has {column} {row[column]!r}, which is none of "
                    f"{', '.join(allowed)}"
                )
        found = tuple(allowed.index(row[column]) for column in columns)
        target = found if task.kind == "multilabel" else found[0]
        slides[slide_id] = Slide(slide_id, (row[patient] if patient else "") or slide_id, target)
    return slides
