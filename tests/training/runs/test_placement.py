"""Runs that learnt positions other than the served ones are named, when they are resumed or exported."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import h5py
import numpy as np
import pytest

from export.export import export_preset
from export.repository import copy_configs
from gigapath_contract.coordinates import CoordinateRule, LevelZeroScale, grid_coordinates
from training.config import TrainingConfig, read_config
from training.errors import TrainingError
from training.runs.placement import float_coordinates, rule_version, warn_misplaced
from training.runs.slide_level import plan_runs, run

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("one_thread")
RULE: CoordinateRule = "level0/patch_size_level0"


def write_features(bags: Path, out: Path, side: int) -> Path:
    """The slides of `bags` again, in tiles of `side` level-0 px."""
    out.mkdir()
    for path in (bags / "features").glob("*.h5"):
        with h5py.File(path) as old, h5py.File(out / path.name, "w") as new:
            new["features"] = old["features"][:]
            new["coords"] = old["coords"][:] // 256 * side
            new["coords"].attrs["tile_size_level0"] = (side, side)
            new["features"].attrs.update({"mpp_level0_x": 128 / side, "mpp_level0_y": 128 / side})
    return out


def config_for(features: Path, config_text: str, rule: str = RULE) -> TrainingConfig:
    path = features.parent / "config.yaml"
    path.write_text(config_text)
    embedding = {"pooling": "cls", "layer": 4, "norm": "norm", "coordinates": rule}
    return read_config(
        path, {"data.features": str(features), "embedding": embedding, "optim.epochs": 1, "masks.count": 0}
    )


def make_old(folder: Path) -> None:
    """The record as it was before versions of the coordinate rules were recorded."""
    text = (folder / "config.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("head_init: uniform\n", ""))
    (folder / "config.yaml").unlink()
    for name in ("environment.json", "run.json"):
        content = json.loads((folder / name).read_text())
        del content["coordinate_rule_version"]
        (folder / name).write_text(json.dumps(content))


def export_damaged(folder: Path) -> None:
    """Export the run as far as the check of its weights, which fails: there is no need to trace a model."""
    (folder / "model.safetensors").unlink()
    copy_configs(ROOT / "model_repository", folder / "models")
    with pytest.raises(TrainingError, match="no weights file"):
        export_preset(repository=folder / "models", checkpoints=[folder], preset=None)


@pytest.mark.parametrize("rule", [RULE, "target-mpp/256"])
def test_an_old_run_on_misplaced_tiles_is_named_with_their_size(
    rule: str, bags: Path, config_text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, out = (
        config_for(write_features(bags, tmp_path / "features", 506), config_text, rule),
        tmp_path / "run",
    )
    run(plan_runs(config), out)
    assert rule_version(out) == 2
    assert json.loads((out / "run.json").read_text())["coordinate_rule_version"] == 2
    assert not caplog.records
    make_old(out)
    run(plan_runs(config), out)
    export_damaged(out)
    resumed, exported = (record.getMessage() for record in caplog.records)
    assert resumed == exported
    assert resumed.startswith(
        f"{out}: trained under an earlier, inexact coordinate rule {rule}: tiles of 506 px "
    )
    assert resumed.endswith("train it again")
    assert "\n" not in resumed


def test_a_resumed_old_run_stays_an_old_run(bags: Path, config_text: str, tmp_path: Path) -> None:
    config, out = config_for(write_features(bags, tmp_path / "features", 506), config_text), tmp_path / "run"
    run(plan_runs(config), out)
    make_old(out)
    for name in ("metrics.json", "run.json"):
        (out / name).unlink()
    run(plan_runs(config), out)
    assert json.loads((out / "run.json").read_text())["coordinate_rule_version"] == 1


def test_an_old_run_whose_features_are_gone_is_named_all_the_same(
    bags: Path, config_text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features, out = write_features(bags, tmp_path / "features", 512), tmp_path / "run"
    run(plan_runs(config_for(features, config_text)), out)
    make_old(out)
    features.rename(tmp_path / "elsewhere")
    export_damaged(out)
    (record,) = caplog.records
    assert "sizes of this run's tiles are unknown, as its feature files are missing" in record.getMessage()


@pytest.mark.parametrize(("rule", "side"), [(RULE, 512), ("level0/256", 506), ("target-mpp/256", 512)])
def test_an_old_run_that_the_fault_did_not_touch_is_not_named(
    rule: str, side: int, bags: Path, config_text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, out = (
        config_for(write_features(bags, tmp_path / "features", side), config_text, rule),
        tmp_path / "run",
    )
    run(plan_runs(config), out)
    make_old(out)
    with caplog.at_level(logging.WARNING):
        run(plan_runs(config), out)
        export_damaged(out)
    assert not caplog.records


def test_a_folder_that_is_no_run_is_left_to_its_reader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.json").write_text("{")
    warn_misplaced(tmp_path)
    assert not caplog.records


def test_the_fault_is_the_one_that_was() -> None:
    """107 of the sides from 100 to 1,399 px had misplaced tiles, 506 and 509 among them."""
    columns = np.arange(1000)
    wrong = []
    for side in range(100, 1400):
        coords, scale = np.stack([columns * side] * 2, axis=1), LevelZeroScale((side, side))
        before = float_coordinates(coords, RULE, scale) // 256
        if (before != grid_coordinates(coords, RULE, scale) // 256).any():
            wrong.append(side)
    assert len(wrong) == 107
    assert {394, 428, 506, 509, 1012} <= set(wrong)
