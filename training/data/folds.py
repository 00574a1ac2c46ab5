"""Train, validation and test splits: given, or seeded and grouped by patient."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from training.data.tables import SPLITS, LabelledSlide, Table
from training.errors import TrainingError
from training.task import Task


@dataclass(frozen=True)
class Fold:
    """The slides of one run."""

    train: tuple[LabelledSlide, ...]
    val: tuple[LabelledSlide, ...]
    test: tuple[LabelledSlide, ...]

    @property
    def slides(self) -> tuple[LabelledSlide, ...]:
        """The slides of all three splits."""
        return self.train + self.val + self.test


def read_presplit(folder: Path, fold: int, slides: dict[str, LabelledSlide]) -> Fold:
    """Fold number `fold` from `train_K.csv`, `val_K.csv`, `test_K.csv`, as Prov-GigaPath writes them."""
    parts = []
    for split in SPLITS:
        path = folder / f"{split}_{fold}.csv"
        names = Table(path).slide_ids()
        for name in names:
            if name not in slides:
                raise TrainingError(f"{path}: slide {name} has no label: add it to the labels file")
        parts.append(tuple(slides[name] for name in names))
    return Fold(*parts)


def read_split_column(table: Table, slides: dict[str, LabelledSlide]) -> Fold:
    """The one fold that the labels file's own column `split` names (train, val, test)."""
    if "split" not in table.columns:
        raise TrainingError(
            f"{table.path} has no column split: add one, name a folder of splits (--splits), or have folds "
            "made (--set data.folds=5)"
        )
    column = "split"
    parts: dict[str, list[LabelledSlide]] = {split: [] for split in SPLITS}
    for index, (slide_id, row) in enumerate(zip(table.slide_ids(), table.rows, strict=True)):
        if row[column] not in parts:
            raise TrainingError(f"{table.at(index)}: split {row[column]!r} is none of {', '.join(SPLITS)}")
        parts[row[column]].append(slides[slide_id])
    return Fold(*(tuple(parts[split]) for split in SPLITS))


def make_folds(slides: dict[str, LabelledSlide], count: int, val_share: float, seed: int) -> list[Fold]:
    """`count` seeded folds, stratified by label, grouped by patient; each slide is held out in one of them.

    About `val_share` of the slides that aren't held out validate, at least those of one patient.
    """
    folds = []
    for rest, test in _divide(list(slides.values()), count, seed):
        most = min(len({slide.patient_id for slide in rest}), _largest_class(rest))
        train, val = _divide(rest, max(2, min(round(1 / val_share), most)), seed)[0]
        folds.append(Fold(tuple(train), tuple(val), tuple(test)))
    return folds


def _divide(
    slides: Sequence[LabelledSlide], pieces: int, seed: int
) -> list[tuple[list[LabelledSlide], list[LabelledSlide]]]:
    patients = [slide.patient_id for slide in slides]
    for count, what in ((len(set(patients)), "patients"), (_largest_class(slides), "slides of a class")):
        if count < pieces:
            raise TrainingError(
                f"{count} {what} can't be divided into {pieces}: lower data.folds, or add patients"
            )
    splitter = StratifiedGroupKFold(pieces, shuffle=True, random_state=seed)
    labels = [str(slide.target) for slide in slides]
    with warnings.catch_warnings():  # a class with fewer slides than pieces: `check_fold` judges the result
        warnings.simplefilter("ignore", UserWarning)
        divided = list(splitter.split(np.zeros(len(slides)), labels, patients))
    return [([slides[i] for i in rest], [slides[i] for i in piece]) for rest, piece in divided]


def _largest_class(slides: Sequence[LabelledSlide]) -> int:
    return max(Counter(str(slide.target) for slide in slides).values(), default=0)


def check_fold(fold: Fold, task: Task) -> None:
    """Raise TrainingError for an empty split, a patient in two splits, or a class that training lacks."""
    split_of: dict[str, str] = {}
    for split in SPLITS:
        slides: tuple[LabelledSlide, ...] = getattr(fold, split)
        if not slides:
            raise TrainingError(f"the {split} split is empty: train, val and test each need slides")
        name, count = Counter(slide.slide_id for slide in slides).most_common(1)[0]
        if count > 1:
            raise TrainingError(f"slide {name} stands {count} times in the {split} split: keep one row")
        for slide in slides:
            other = split_of.setdefault(slide.patient_id, split)
            if other != split:
                raise TrainingError(
                    f"patient {slide.patient_id} (slide {slide.slide_id}) is in both {other} and {split}: "
                    "put all slides of a patient into one split"
                )
    for index, name in enumerate(task.classes):
        flags = {_has(slide, index, task) for slide in fold.train}
        if True not in flags:
            raise TrainingError(
                f"class {name} has no training slide, so it can't be learnt: change the splits"
            )
        if task.kind != "multiclass" and False not in flags:
            raise TrainingError(
                f"every training slide has class {name}, so it can't be learnt: change the splits"
            )


def _has(slide: LabelledSlide, index: int, task: Task) -> bool:
    if isinstance(slide.target, tuple):
        return slide.target[index] == 1
    return slide.target == (1 if task.kind == "binary" else index)
