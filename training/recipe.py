"""A recipe that fits a table of labels and the embeddings of its slides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gigapath_contract.tables import LABEL_COLUMNS, is_missing
from training.config import DataSection, RunConfig, read_config
from training.data.folds import Fold, check_fold, make_folds, read_split_column
from training.data.h5_features import read_bag
from training.data.tables import LabelledSlide, Table, patient_in, read_slides
from training.errors import TrainingError
from training.files import write_text
from training.models.presets import PRESETS
from training.task import Task

TEMPLATE = Path(__file__).parent / "configs" / "own-slides.yaml"
PUBLISHED = "hf-hub:prov-gigapath/prov-gigapath"
PATIENT_OPTION = "--patient-column NAME"
MOST_FOLDS, MOST_CLASSES = 5, 20
MOST_PER_STEP = 32  # as published
STEPS_PER_EPOCH = 4


@dataclass(frozen=True)
class Recipe:
    """What a table and its embeddings allow: the settings, and a sentence about the data."""

    settings: dict[str, Any]
    data: str

    def write(self, path: Path) -> None:
        """Write the commented template with these settings. Raises TrainingError where `path` exists."""
        if path.exists():
            raise TrainingError(f"{path} exists and may have your changes: remove it or choose another --out")
        text = TEMPLATE.read_text(encoding="utf-8")
        for name, value in self.settings.items():
            shown = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
            plain = shown.removesuffix("...\n").strip().replace("\\", r"\\")  # `subn` takes one \ of two
            pattern = re.compile(rf"^( *{name}:) [^#\n]*?( +#.*)?$", re.MULTILINE)
            text, found = pattern.subn(rf"\1 {plain}\2", text)
            assert found == 1, name
        write_text(path, text)
        read_config(path)


def plan_recipe(
    labels: Path, features: Path, label_column: str | None = None, patient_column: str | None = None
) -> Recipe:
    """The recipe for the slides of the table `labels`, embedded in `features`.

    `features` holds `<slide>.h5`, or is the folder of a batch. Classes are the values of the label column,
    folds as many as the patients allow (up to 5), or the one that a column `split` names.

    Raises:
        TrainingError: no label or patient column of that name, no classes, too few patients, or slides
            without embeddings.
    """
    table = Table(labels)
    names = [label_column] if label_column else LABEL_COLUMNS
    column = table.column(*names, remedy="name the one with the labels, --label-column NAME")
    classes = _classes(table, column)
    task = Task("multiclass", classes, classes, column)
    slides = read_slides(table, task, patient_column, PATIENT_OPTION)
    patient = patient_in(table, patient_column, PATIENT_OPTION)
    members = {name: [s for s in slides.values() if s.target == k] for k, name in enumerate(classes)}
    folds = _folds(table, slides, task, members)
    folder, width = _embeddings(features, list(slides))
    preset = next((name for name, one in PRESETS.items() if one.slide.in_chans == width), None)
    if preset is None:
        raise TrainingError(f"{folder}: no preset takes embeddings {width} wide: embed with our tile encoder")
    steps = min(len(fold.train) for fold in folds) // STEPS_PER_EPOCH
    settings = {
        "preset": preset,
        "slide_weights": PUBLISHED if preset == "gigapath" else None,
        "classes": list(classes),
        "label_column": column,
        "features": str(folder),
        "labels": str(labels),
        "patient_column": patient,
        "folds": len(folds),
        "accumulate": max(1, min(MOST_PER_STEP, steps)),
    }
    counts = ", ".join(f"{name} ({len(each)})" for name, each in members.items())
    patients = "as many patients (no column names them)"
    if patient:
        patients = f"{_patients(slides.values())} patients (column {patient})"
    how = f"{len(folds)} folds" if len(folds) > 1 else "the splits of column split"
    return Recipe(settings, f"{len(slides)} slides of {patients}; {column}: {counts}; {how}; preset {preset}")


def _classes(table: Table, column: str) -> tuple[str, ...]:
    """The values of the label column, numbers by size, others by name."""
    found = {row[column] for row in table.rows if not is_missing(row[column])}
    if not 2 <= len(found) <= MOST_CLASSES:
        raise TrainingError(
            f"{table.path}: column {column} has {len(found)} different values, and a class column has 2 to "
            f"{MOST_CLASSES}: name another, --label-column NAME"
        )
    numbers = all(value.isdecimal() for value in found)
    return tuple(sorted(found, key=(lambda value: (int(value), value)) if numbers else None))


def _patients(slides: Iterable[LabelledSlide]) -> int:
    return len({slide.patient_id for slide in slides})


def _folds(
    table: Table, slides: dict[str, LabelledSlide], task: Task, members: dict[str, list[LabelledSlide]]
) -> list[Fold]:
    """The fold of the column `split`, or as many seeded ones as every class has patients for."""
    if "split" in table.columns:
        folds = [read_split_column(table, slides)]
        check_fold(folds[0], task)
        return folds
    name = min(members, key=lambda name: _patients(members[name]))
    count = _patients(members[name])
    data = DataSection()
    for number in range(min(MOST_FOLDS, count), 1, -1):
        try:
            folds = make_folds(slides, number, data.val_share, RunConfig.model_fields["seed"].default)
            for fold in folds:
                check_fold(fold, task)
        except TrainingError:
            continue
        return folds
    raise TrainingError(
        f"{table.path}: class {name} has {count} patients, too few to train, validate and test on: add "
        "patients, join it with another class, or remove its rows"
    )


def _embeddings(features: Path, slides: Sequence[str]) -> tuple[Path, int]:
    """The folder with the slides' embeddings, and their width."""
    if not features.is_dir():
        raise TrainingError(f"{features}: no such folder: give the --out of `gigapath-client batch`")
    below = (folder for folder in sorted(features.glob("*/features_*")) if not folder.is_symlink())
    found = [folder for folder in (features, *below) if any(folder.glob("*.h5"))]
    if not found:
        raise TrainingError(f"{features} has no embeddings: give the --out of `gigapath-client batch`")
    if len(found) > 1:
        several = ", ".join(map(str, found))
        raise TrainingError(f"{features} has several folders of embeddings: name one of {several}")
    missing = [name for name in slides if not (found[0] / f"{name}.h5").is_file()]
    if missing:
        raise TrainingError(
            f"{len(missing)} of {len(slides)} slides have no embeddings in {found[0]}, such as {missing[0]}: "
            "run gigapath-client batch on them, or remove their rows"
        )
    return found[0], read_bag(found[0] / f"{slides[0]}.h5").features.shape[1]
