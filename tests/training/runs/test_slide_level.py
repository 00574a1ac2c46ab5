"""Runs as a user starts them: folds, kinds of task, resuming, two processes, and what a run folder holds."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import RichProgressBar
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from server.ports import free_port
from training.config import ResourceSection, SelectSection, TrainingConfig, read_config
from training.data.h5_features import read_bag
from training.errors import TrainingError
from training.loops.metrics import LEAST_GROUPS
from training.loops.trainer import build_trainer
from training.models.build import build_models
from training.runs.checkpoint import load_run, published_state
from training.runs.record import NO_INTERVAL
from training.runs.slide_level import plan_runs, run

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(text: str, folder: Path, **changes: Any) -> TrainingConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(text)
    return read_config(folder / "config.yaml", {name.replace("__", "."): v for name, v in changes.items()})


def start(config: Path, out: Path, *changes: str) -> subprocess.Popen[str]:
    """`python -m training finetune`, as a user starts it."""
    command = [
        sys.executable,
        "-m",
        "training",
        "finetune",
        "--config",
        str(config),
        "--out",
        str(out),
        "--quiet",
    ]
    for change in changes:
        command += ["--set", change]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port("127.0.0.1"))}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)


def predictions(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(config_text: str, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of the common configuration."""
    folder = tmp_path_factory.mktemp("runs")
    run(plan_runs(config_of(config_text, folder)), folder / "run")
    return folder / "run"


def test_a_run_folder_says_what_was_done_and_its_model_gives_its_predictions(
    finished: Path, bags: Path
) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    rows = predictions(finished / "predictions_test.csv")
    truth, scores = [int(r["target"]) for r in rows], [float(r["prob_lesion"]) for r in rows]
    assert metrics["test"]["metrics"]["auroc_lesion"] == pytest.approx(roc_auc_score(truth, scores))
    assert len({row["pat_id"] for row in rows}) < LEAST_GROUPS  # so few give no interval
    assert metrics["test"]["intervals_95"]["auroc_lesion"] == [None, None]
    assert NO_INTERVAL in (finished / "MODEL_CARD.md").read_text()
    models = load_run(finished)
    assert models.slide_model.head is not None
    assert models.slide_model.head.config.classes == ("benign", "lesion")
    for row in rows:
        bag = read_bag(bags / "features" / f"{row['slide_id']}.h5")
        with torch.inference_mode():
            logits = models.slide_model.score(*map(torch.from_numpy, bag)).logits
        assert logits is not None
        assert float(logits.softmax(dim=0)[1]) == pytest.approx(float(row["prob_lesion"]), abs=1e-6)
    assert set(load_file(finished / "model.safetensors")) >= {
        "slide_encoder.cls_token",
        "classifier.0.weight",
    }
    data = json.loads((finished / "data.json").read_text())
    assert len(data["sha256"]) == 24
    assert data["assumed"].keys() == data["sha256"].keys()  # the bags don't say what their coordinates are
    assert "level-0 pixels" in data["assumed"][f"{rows[0]['slide_id']}.h5"]
    assert set(json.loads((finished / "environment.json").read_text())) >= {"python", "torch", "lightning"}
    card = (finished / "MODEL_CARD.md").read_text()
    assert "For research only" in card
    assert f"{metrics['test']['metrics']['auroc_macro']:.3f}" in card
    curves = EventAccumulator(str(finished / "tensorboard")).Reload()
    assert len(curves.Scalars("val/auroc_macro")) == 3


def test_a_run_that_was_killed_ends_like_an_undisturbed_one(
    finished: Path, config_text: str, tmp_path: Path
) -> None:
    config, out = config_of(config_text, tmp_path), tmp_path / "run"
    process = start(tmp_path / "config.yaml", out)
    deadline = time.monotonic() + 500
    while not (out / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "metrics.json").exists()
    state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=False)
    assert state["leftover_gradients"]  # 16 slides, 5 a step: one is left over, and counts in the next epoch
    run(plan_runs(config), out)
    for name in ("model.safetensors", "predictions_test.csv", "metrics.json", "run.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_two_processes_learn_what_one_learns(config_text: str, tmp_path: Path) -> None:
    steady = {"optim__dropout": 0.0, "optim__epochs": 2}
    alone = config_of(config_text, tmp_path, optim__accumulate=4, **steady)
    changes = ("optim.accumulate=2", "optim.dropout=0.0", "optim.epochs=2", "resources.devices=2")
    process = start(tmp_path / "config.yaml", tmp_path / "both", *changes, "resources.strategy=ddp")
    run(plan_runs(alone), tmp_path / "alone")
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "both"))
    start_state = published_state(build_models(alone.build_preset()).slide_model)
    moved = torch.cat([(one[name] - start_state[name]).flatten() for name in one]).norm()
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one]).norm()
    assert moved > 0.01
    assert (
        apart < 0.02 * moved
    )  # the sums' order differs, and Adam magnifies that where a gradient is nearly 0
    assert len(predictions(tmp_path / "both" / "predictions_val.csv")) == 4


def test_the_bar_leaves_out_what_is_the_same_in_every_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(RichProgressBar, "get_metrics", lambda self, *_: {"v_num": "oard", "loss": 0.5})
    resources, select = ResourceSection(accelerator="cpu"), SelectSection()
    trainer = build_trainer(tmp_path, resources, select, epochs=1, log_every=1, bar=True)
    (bar,) = [one for one in trainer.callbacks if isinstance(one, RichProgressBar)]  # type: ignore[attr-defined]
    assert bar.get_metrics(trainer, LightningModule()) == {"loss": 0.5}


def test_seeded_folds_hold_each_slide_out_once_and_are_summed_up(config_text: str, tmp_path: Path) -> None:
    config = config_of(config_text, tmp_path, data__folds=2, optim__epochs=1, data__val_share=0.4)
    begun: list[tuple[int, int]] = []
    summary = run(plan_runs(config), tmp_path / "run", begin=lambda fold, folds: begun.append((fold, folds)))
    assert begun == [(0, 2), (1, 2)]
    held_out = [predictions(tmp_path / "run" / f"fold_{k}" / "predictions_test.csv") for k in range(2)]
    assert sorted(row["slide_id"] for rows in held_out for row in rows) == [f"s{k:02d}" for k in range(24)]
    each = [json.loads((tmp_path / "run" / f"fold_{k}" / "metrics.json").read_text()) for k in range(2)]
    values = [one["test"]["metrics"]["auroc_macro"] for one in each]
    assert summary["test"]["auroc_macro"]["mean"] == pytest.approx(np.mean(values))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == summary


@pytest.mark.parametrize(
    ("kind", "classes", "label"),
    [("multilabel", ["A", "B"], None), ("binary", {"lesion": 1}, "label")],
    ids=["multilabel", "binary"],
)
def test_other_kinds_of_task_learn(
    kind: str, classes: Any, label: str | None, config_text: str, tmp_path: Path
) -> None:
    task = {"kind": kind, "classes": classes, "label_column": label}
    changes: dict[str, Any] = {"optim__epochs": 6, "optim__class_weights": "balanced", "masks__count": 0}
    run(plan_runs(config_of(config_text, tmp_path, task=task, **changes)), tmp_path / "run")
    rows = predictions(tmp_path / "run" / "predictions_test.csv")
    assert [name for name in rows[0] if name.startswith("prob_")] == [f"prob_{name}" for name in classes]
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("train/loss_epoch")
    assert curves[-1].value < 0.9 * curves[0].value
    head = load_run(tmp_path / "run").slide_model.head
    assert head is not None
    assert (head.config.kind, head.config.classes) == (kind, tuple(classes))


def test_the_best_epoch_is_kept_and_a_run_without_progress_stops(config_text: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"select": {"epoch": "best", "patience": 2}, "optim__epochs": 30}
    run(plan_runs(config_of(config_text, tmp_path, **changes)), tmp_path / "run")
    curve = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("val/auroc_macro")
    assert 3 <= len(curve) < 30
    best = max(point.value for point in curve)
    assert all(point.value <= curve[-3].value for point in curve[-2:])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val"]["metrics"]["auroc_macro"] == pytest.approx(best)


def test_a_linear_probe_leaves_the_encoder_as_it_was(config_text: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"optim__train": "head", "optim__epochs": 1, "optim__warmup_epochs": 0}
    config = config_of(config_text, tmp_path, **changes)
    run(plan_runs(config), tmp_path / "run")
    before = build_models(config.build_preset()).slide_model
    after = load_run(tmp_path / "run").slide_model
    for name, tensor in before.encoder.state_dict().items():
        assert torch.equal(after.encoder.state_dict()[name], tensor), name
    assert before.head is not None
    assert after.head is not None
    state = after.head.state_dict()
    assert not any(torch.equal(state[name], tensor) for name, tensor in before.head.state_dict().items())


def test_a_finished_run_is_kept_and_another_configuration_or_other_data_is_refused(
    finished: Path, config_text: str, bags: Path, tmp_path: Path
) -> None:
    plan = plan_runs(config_of(config_text, tmp_path))
    before = (finished / "model.safetensors").stat().st_mtime_ns
    assert run(plan, finished) == json.loads((finished / "metrics.json").read_text())
    assert (finished / "model.safetensors").stat().st_mtime_ns == before
    record = finished / "config.yaml"
    text = record.read_text()
    record.write_text(text.replace("head_init: uniform\n", ""))  # a run from before that setting
    assert record.read_text() != text
    assert run(plan, finished) == json.loads((finished / "metrics.json").read_text())
    record.write_text(text)
    with pytest.raises(TrainingError, match="holds a run of another configuration: choose another --out"):
        run(plan_runs(config_of(config_text, tmp_path, optim__epochs=9)), finished)
    for changed in (
        dataclasses.replace(plan, digests=dict.fromkeys(plan.digests, "0")),
        dataclasses.replace(plan, assumed={}),
    ):
        with pytest.raises(TrainingError, match="the data has changed"):
            run(changed, finished)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(TrainingError, match="is not empty and not a run"):
        run(plan, tmp_path / "mine")


def test_a_model_that_its_card_does_not_describe_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="is not a finished fine-tuning run"):
        load_run(tmp_path)
    card = json.loads((finished / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(card | {"weights_sha256": "0" * 64}))
    (tmp_path / "model.safetensors").write_bytes((finished / "model.safetensors").read_bytes())
    with pytest.raises(TrainingError, match=r"is not what its run\.json describes"):
        load_run(tmp_path)


def test_too_many_slides_per_step_is_an_error_before_training(config_text: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no step would ever be taken"):
        plan_runs(config_of(config_text, tmp_path, optim__accumulate=17))


@pytest.mark.parametrize(("kind", "classes"), [("multiclass", ["0", "1"]), ("binary", {"lesion": 1})])
def test_a_monitor_that_is_no_metric_is_named_before_training(
    kind: str, classes: Any, config_text: str, tmp_path: Path
) -> None:
    changes = {"task": {"kind": kind, "classes": classes}, "select.monitor": "auc"}
    with pytest.raises(TrainingError, match=r"select\.monitor 'auc' is none of accuracy, .*auroc_macro"):
        plan_runs(config_of(config_text, tmp_path, **changes))
    plan_runs(config_of(config_text, tmp_path, **(changes | {"select.monitor": "auroc_macro"})))
