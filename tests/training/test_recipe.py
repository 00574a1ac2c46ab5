"""A recipe is written that fits a table and its embeddings; what can't be trained on is refused in a line."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from training.cli import app
from training.config import read_config
from training.errors import TrainingError
from training.recipe import TEMPLATE, plan_recipe
from training.runs.slide_level import plan_runs


def write_table(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows, ""]))
    return path


def embed(folder: Path, slides: int, width: int = 96) -> Path:
    """Embeddings of slides s0, s1 ... in `folder`."""
    folder.mkdir(parents=True)
    for number in range(slides):
        with h5py.File(folder / f"s{number}.h5", "w") as file:
            file["features"] = np.ones((2, width), np.float32)
            file["coords"] = np.array([[0, 0], [256, 0]])
    return folder


def test_a_written_recipe_names_the_next_command_and_can_be_trained_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    features = embed(tmp_path / "results" / "20x" / "features_demo", 12)
    rows = [f"slides/s{k}.svs,case {k // 2},{'high' if k < 4 else 'low'}" for k in range(12)]
    write_table(Path("labels.csv"), "Path,Case_ID,Grade", rows)
    command = ["init-recipe", "labels.csv", "--features", "results", "--label-column", "grade"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    facts, named = done.output.splitlines()
    assert "12 slides of 6 patients (column case_id); grade: high (4), low (8); 2 folds" in facts
    assert named == "next: python -m training finetune --config own-slides.yaml --out runs/own-slides"
    config = read_config(Path("own-slides.yaml"))
    assert (config.preset, config.slide_weights) == ("demo", None)
    assert (config.task.classes, config.task.label_column) == (["high", "low"], "grade")
    assert config.data.features == features.relative_to(tmp_path)
    assert len(plan_runs(config).folds) == 2
    elsewhere = read_config(Path("own-slides.yaml"), {"data.features": "nowhere"})
    with pytest.raises(TrainingError, match=r"data\.features: nowhere: no such folder"):
        plan_runs(elsewhere)
    comments = [line.partition("# ")[2] for line in TEMPLATE.read_text().splitlines()]
    assert all(comment in Path("own-slides.yaml").read_text() for comment in comments)
    with pytest.raises(TrainingError, match=r"own-slides\.yaml exists .*remove it or choose another --out"):
        plan_recipe(Path("labels.csv"), Path("results"), "grade").write(Path("own-slides.yaml"))


@pytest.mark.parametrize(("column", "option"), [("case", []), ("who", ["--patient-column", "Who"])])
def test_slides_of_a_patient_stay_together_by_a_usual_or_a_given_column(
    column: str, option: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"s{k}.svs;{'ab'[k % 2]};{k // 2};x{k % 3}" for k in range(12)]
    labels = write_table(tmp_path / "own.csv", f"filename;diagnosis;{column};scanner", rows)
    features = embed(tmp_path / "features", 12)
    recipe = tmp_path / "own.yaml"
    command = ["init-recipe", str(labels), "--features", str(features), "--out", str(recipe)]
    done = CliRunner().invoke(app, [*command, "--label-column", "diagnosis", *option])
    assert f"12 slides of 6 patients (column {column})" in done.output
    config = read_config(recipe)
    assert config.data.patient_column == column
    assert all(len({slide.patient_id for slide in fold.slides}) == 6 for fold in plan_runs(config).folds)
    assert "no patient column" not in caplog.text


def test_a_table_without_a_patient_column_is_warned_of_with_the_likely_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"s{k},{'ab'[k % 2]},{k // 2},x{k % 3}" for k in range(12)]
    labels = write_table(tmp_path / "own.csv", "slide_id,label,who,scanner", rows)
    recipe = plan_recipe(labels, embed(tmp_path / "features", 12))
    assert "12 slides of as many patients (no column names them)" in recipe.data
    said = "own.csv has no patient column, so each slide counts as a patient; is it who?"
    assert f"{said} --patient-column NAME" in caplog.text
    recipe.write(tmp_path / "own.yaml")
    plan_runs(read_config(tmp_path / "own.yaml"))
    assert f"{said} --set data.patient_column=NAME" in caplog.text
    with pytest.raises(TrainingError, match=r"no column nobody: .*--patient-column NAME .*: slide_id, label"):
        plan_recipe(labels, tmp_path / "features", patient_column="nobody")


@pytest.mark.parametrize(("patients", "folds"), [(3, 3), (4, 4), (5, 5), (30, 5)])
def test_there_are_as_many_folds_as_every_class_has_patients(
    patients: int, folds: int, tmp_path: Path
) -> None:
    rows = [f"s{k},p{k},{k % 2}" for k in range(2 * patients)]
    labels = write_table(tmp_path / "labels.csv", "slide_id,patient,label", rows)
    recipe = plan_recipe(labels, embed(tmp_path / "features", 2 * patients))
    assert recipe.settings["folds"] == folds
    assert 1 <= recipe.settings["accumulate"] <= 32
    recipe.write(tmp_path / "own.yaml")
    assert len(plan_runs(read_config(tmp_path / "own.yaml")).folds) == folds


def test_numbers_are_classes_in_their_order_and_a_split_column_is_one_fold(tmp_path: Path) -> None:
    splits = ["train", "train", "val", "test"]
    rows = [f"s{k},{(10, 2, 0)[k % 3]},{splits[k // 3]}" for k in range(12)]
    labels = write_table(tmp_path / "labels.csv", "slide_id,isup_grade,split", rows)
    recipe = plan_recipe(labels, embed(tmp_path / "features", 12, width=1536))
    assert recipe.settings["classes"] == ["0", "2", "10"]
    assert (recipe.settings["folds"], recipe.settings["preset"]) == (1, "gigapath")
    assert recipe.settings["slide_weights"] == "hf-hub:prov-gigapath/prov-gigapath"
    recipe.write(tmp_path / "own.yaml")
    assert len(plan_runs(read_config(tmp_path / "own.yaml")).folds) == 1


def test_names_that_mean_something_in_yaml_stay_what_they_are(tmp_path: Path) -> None:
    classes = [r"a\1 # b", "no", "tumör: [x]"]
    rows = [f's{k},"{classes[k % 3]}"' for k in range(12)]
    labels = write_table(tmp_path / "labels.csv", "slide_id,label", rows)
    plan_recipe(labels, embed(tmp_path / "features # 1", 12)).write(tmp_path / "own.yaml")
    config = read_config(tmp_path / "own.yaml")
    assert config.task.classes == classes
    assert config.data.features == tmp_path / "features # 1"
    assert "tumör" in (tmp_path / "own.yaml").read_text()


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (
            "slide_id,grade",
            ["s0,1"],
            r"no column label or isup_grade or target: .*--label-column NAME .*: slide_id, grade\)",
        ),
        ("slide_id,label", ["s0,a", "s1,a"], "column label has 1 different values.*--label-column"),
        ("slide_id,label", [f"s{k},{k / 7}" for k in range(30)], "column label has 30 different values"),
        ("slide_id,label", ["s0,a", "s1,nan", "s2,b"], "line 3: slide s1 has no label in column label"),
        (
            "slide_id,pat_id,label",
            [f"s{k},p{k},{'rare' if k < 2 else 'usual'}" for k in range(4)],
            "class rare has 2 patients, too few to train, validate and test on",
        ),
        ("name,label", ["s0,a", "s1,b"], "has no column slide_id"),
        (
            "slide_id,label",
            [f"t{k},{k % 2}" for k in range(8)],
            "8 of 8 slides have no embeddings in .* as t0",
        ),
    ],
    ids=["column", "one class", "numbers", "empty cell", "few patients", "no slides", "not embedded"],
)
def test_what_no_recipe_fits_is_one_line(header: str, rows: list[str], message: str, tmp_path: Path) -> None:
    labels = write_table(tmp_path / "labels.csv", header, rows)
    with pytest.raises(TrainingError, match=message):
        plan_recipe(labels, embed(tmp_path / "features", 8))


def test_embeddings_that_can_t_be_chosen_or_used_are_named(tmp_path: Path) -> None:
    labels = write_table(tmp_path / "labels.csv", "slide_id,label", [f"s{k},{k % 2}" for k in range(8)])
    with pytest.raises(TrainingError, match=r"nowhere: no such folder: give the --out of `gigapath-client"):
        plan_recipe(labels, tmp_path / "nowhere")
    with pytest.raises(TrainingError, match=r"has no embeddings: give the --out of `gigapath-client batch`"):
        plan_recipe(labels, tmp_path)
    embed(tmp_path / "out" / "20x" / "features_odd", 8, width=7)
    with pytest.raises(TrainingError, match="no preset takes embeddings 7 wide"):
        plan_recipe(labels, tmp_path / "out")
    embed(tmp_path / "out" / "20x" / "features_demo", 8)
    with pytest.raises(
        TrainingError, match=r"has several folders of embeddings: .*features_demo.*features_odd"
    ):
        plan_recipe(labels, tmp_path / "out")
