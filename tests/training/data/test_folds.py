"""Labels and splits: the field's files are read, and what can't be trained on is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.data.folds import Fold, check_fold, make_folds, read_presplit, read_split_column
from training.data.tables import LabelledSlide, Table, read_slides
from training.errors import TrainingError
from training.task import Task

GRADES = Task("multiclass", ("low", "high"), ("0", "1"))


def table(path: Path, text: str) -> Table:
    path.write_text(text)
    return Table(path)


@pytest.mark.parametrize(
    "text",
    [
        "slide_id,pat_id,label\na.svs,p,1\n",  # Prov-GigaPath
        "image_id,data_provider,isup_grade,gleason_score,patient\na,karolinska,1,3+3,p\n",  # PANDA
        "case_id,slide_id,label\np,a,1\n",  # CLAM
        "PATIENT,FILENAME,target\np, a.tiff ,1\n",  # STAMP-like; padded
    ],
    ids=["gigapath", "panda", "clam", "stamp"],
)
def test_the_field_s_label_files_are_read(text: str, tmp_path: Path) -> None:
    assert read_slides(table(tmp_path / "labels.csv", text), GRADES) == {"a": LabelledSlide("a", "p", 1)}


def test_a_slide_without_a_patient_is_a_patient(tmp_path: Path) -> None:
    slides = read_slides(table(tmp_path / "l.csv", "slide_id,pat_id,label\na,,0\nb,nan,1\nc,nan,1\n"), GRADES)
    assert [slide.patient_id for slide in slides.values()] == ["a", "b", "c"]


def test_multilabel_has_a_column_for_each_class(tmp_path: Path) -> None:
    genes = Task("multilabel", ("EGFR", "TP53"), ("EGFR", "TP53"))
    slides = read_slides(table(tmp_path / "l.csv", "slide_id,EGFR,TP53\na,0,1\n"), genes)
    assert slides["a"].target == (0, 1)
    with pytest.raises(TrainingError, match="slide a has tp53 '2', which is none of 0, 1"):
        read_slides(table(tmp_path / "l.csv", "slide_id,EGFR,TP53\na,0,2\n"), genes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,label\na,1\nb,\n", "line 3: slide b has no label in column label"),
        ("slide_id,label\na,1\nb,nan\nc,\n", r"line 3: slide b has no label .* \(so have 2 of 3 rows\)"),
        ("slide_id,label\na,1\nb,7\n", "line 3: slide b has label '7', which is none of 0, 1"),
        ("slide_id,label\na,1\na.svs,0\n", "line 3 repeats slide a"),
        ("slide_id,label\n,1\n", "line 2 has no slide_id"),
        (
            "slide_id,grade\na,1\n",
            r"has no column label or isup_grade or target: .*task\.label_column=NAME .*: slide_id, grade\)",
        ),
        ("name,label\na,1\n", "has no column slide_id"),
        ("slide_id,label\na,1,2\n", "line 2 has 3 values for 2 columns"),
        ("slide_id,label\n", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_a_bad_label_file_is_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        read_slides(table(tmp_path / "labels.csv", text), GRADES)
    assert str(tmp_path / "labels.csv") in str(caught.value)


def test_a_missing_file_and_binary_rubbish_are_told(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"none\.csv: no such file or folder: check the path"):
        Table(tmp_path / "none.csv")
    (tmp_path / "rubbish.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(TrainingError, match="not a CSV file in UTF-8"):
        Table(tmp_path / "rubbish.csv")


def slides_of(*specs: str) -> tuple[LabelledSlide, ...]:
    """`a:p:1` is slide a of patient p with target 1."""
    parts = [spec.split(":") for spec in specs]
    return tuple(LabelledSlide(slide, patient, int(target)) for slide, patient, target in parts)


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (
            Fold(slides_of("a:p:0", "b:q:1"), slides_of("c:p:0"), slides_of("d:r:1")),
            r"patient p \(slide c\) is in both train and val",
        ),
        (Fold(slides_of("a:p:0", "b:q:1"), (), slides_of("d:r:1")), "the val split is empty"),
        (
            Fold(slides_of("a:p:0", "b:q:0"), slides_of("c:s:0"), slides_of("d:r:1")),
            "class high has no training slide",
        ),
        (
            Fold(slides_of("a:p:0", "a:p:0"), slides_of("c:s:0"), slides_of("d:r:1")),
            "slide a stands 2 times in the train split",
        ),
    ],
    ids=["patient in two splits", "empty split", "unseen class", "slide twice"],
)
def test_a_bad_fold_is_refused_before_training(fold: Fold, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        check_fold(fold, GRADES)


def test_a_label_that_every_training_slide_has_can_t_be_learnt() -> None:
    fold = Fold(slides_of("a:p:1", "b:q:1"), slides_of("c:s:0"), slides_of("d:r:1"))
    with pytest.raises(TrainingError, match="every training slide has class high"):
        check_fold(fold, Task("binary", ("high",), ("0", "1")))


def test_given_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    text = "slide_id,label,split\na,0,train\nb,1,train\nc,0,val\nd,1,test\n"
    labels = table(tmp_path / "labels.csv", text)
    slides = read_slides(labels, GRADES)
    expected = Fold((slides["a"], slides["b"]), (slides["c"],), (slides["d"],))
    assert read_split_column(labels, slides) == expected
    for split, names in {"train": "a.svs\nb.svs", "val": "c", "test": "d"}.items():
        (tmp_path / f"{split}_0.csv").write_text(f"slide_id\n{names}\n")
    assert read_presplit(tmp_path, 0, slides) == expected
    (tmp_path / "test_0.csv").write_text("slide_id\ne\n")
    with pytest.raises(TrainingError, match=r"test_0\.csv: slide e has no label"):
        read_presplit(tmp_path, 0, slides)
    with pytest.raises(TrainingError, match="line 2: split 'dev' is none of train, val, test"):
        read_split_column(table(tmp_path / "l.csv", "slide_id,label,split\na,0,dev\n"), slides)


def test_seeded_folds_divide_no_patient_and_hold_each_slide_out_once() -> None:
    slides = {f"s{k}": LabelledSlide(f"s{k}", f"p{k // 3}", k // 3 % 2) for k in range(60)}
    folds = make_folds(slides, 5, 0.2, seed=1)
    assert sorted(slide.slide_id for fold in folds for slide in fold.test) == sorted(slides)
    for fold in folds:
        check_fold(fold, GRADES)
        assert len(fold.slides) == len(slides)
    assert make_folds(slides, 5, 0.2, seed=1) == folds
    assert make_folds(slides, 5, 0.2, seed=2) != folds
    with pytest.raises(TrainingError, match="20 patients can't be divided into 21"):
        make_folds(slides, 21, 0.2, seed=1)


def test_eight_patients_are_enough_for_folds_at_the_default_share() -> None:
    slides = {f"s{k}": LabelledSlide(f"s{k}", f"p{k}", k % 2) for k in range(8)}
    for fold in make_folds(slides, 4, 0.125, seed=0):
        assert sorted(slide.target for slide in fold.val) == [0, 1]
        assert len(fold.slides) == 8


def test_errors_name_the_setting_that_helps(tmp_path: Path) -> None:
    labels = table(tmp_path / "l.csv", "slide_id,label\na,tumour\n")
    with pytest.raises(TrainingError, match=r"--set 'task\.classes=\["):
        read_slides(labels, GRADES)
    with pytest.raises(TrainingError, match=r"\(--splits\), or have folds made \(--set data\.folds=5\)"):
        read_split_column(labels, {})
