"""Configurations: published runs have the published values; a mistake is named before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.config import read_config, read_yaml
from training.errors import TrainingError
from training.loops.tile_level import TileConfig

CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"


def test_panda_is_the_published_configuration() -> None:
    config = read_config(CONFIGS / "panda.yaml")
    preset, optim = config.build_preset(), config.optim
    assert preset.slide.segment_lengths == (1024, 4870, 23170, 110217, 524288)  # of max_wsi_size 250000
    assert (preset.variant.pooling, preset.variant.layer, preset.variant.norm) == ("cls", 11, "norm")
    assert (preset.slide.dropout, preset.slide.drop_path_rate) == (0.1, 0.0)
    assert optim.base_lr * optim.accumulate / 256 == pytest.approx(2.5e-4)
    assert (optim.epochs, optim.warmup_epochs, optim.min_lr) == (5, 1, 1e-6)
    assert (optim.weight_decay, optim.layer_decay, optim.layer_ids) == (0.05, 0.95, "published")
    assert (config.seed, config.select.epoch, config.data.shuffle_tiles) == (0, "last", "always")
    assert config.task.task().values == ("0", "1", "2", "3", "4", "5")


def test_mutation_is_the_paper_s_task_on_the_released_defaults() -> None:
    config = read_config(CONFIGS / "luad-mutation.yaml")
    preset, optim = config.build_preset(), config.optim
    assert preset.slide.segment_lengths == (1024, 5792, 32768, 185363, 1048576)  # of max_wsi_size 262144
    assert (preset.variant.pooling, preset.variant.layer, preset.variant.norm) == ("cls", 11, "norm")
    assert (preset.slide.dropout, preset.slide.drop_path_rate) == (0.1, 0.1)
    assert (optim.epochs, optim.base_lr, optim.weight_decay) == (20, 2e-3, 0.01)
    assert (config.task.kind, config.data.folds, config.head_init) == ("multilabel", 10, "uniform")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_that_comes_along_is_valid(path: Path) -> None:
    if "tile" in path.stem:
        read_yaml(path, TileConfig)
    else:
        read_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: demo\ntask: {classes: [a, b]}\noptim: {epocs: 3}", "optim.epocs: there is no such setting"),
        ("preset: demo\ntask: {classes: [a, b]}\noptim: {epochs: many}", "optim.epochs: input should be"),
        ("preset: demo\ntask: {classes: [a, b]}\noptim: {epochs: 0}", "optim.epochs: .*greater than"),
        ("preset: demo", "task: field required"),
        ("preset: big\ntask: {classes: [a, b]}", "no preset 'big'; choose one of"),
        ("preset: demo\nembedding: mine\ntask: {classes: [a, b]}", "no embedding variant 'mine'"),
        ("preset: demo\nembedding: panda-finetune\ntask: {classes: [a]}", "layer 11 does not exist"),
        ("preset: demo\ntask: {kind: binary, classes: [a, b]}", "a binary head can't have 2 classes"),
        ("- a list", "must be a YAML mapping"),
        ("preset: [", "is not YAML"),
        ("[" * 100_000, "is not YAML: maximum recursion depth"),
        ("preset: &a demo\ntask: {classes: [*a, b]}", "is not YAML: no aliases here"),
        ("preset: !!timestamp soon", "is not YAML"),
        ("#" * 300_000, "is no configuration: it has over 256 KiB"),
    ],
)
def test_a_mistake_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(TrainingError, match=message) as caught:
        read_config(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("preset: demo\ntask: {classes: [a, b]}\noptim: {epochs: 3}")
    config = read_config(tmp_path / "config.yaml", {"optim.epochs": 7, "masks.count": 2})
    assert (config.optim.epochs, config.masks.count) == (7, 2)
    with pytest.raises(TrainingError, match=r"none\.yaml: no such file or folder: check the path"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["preset.size", "task.classes.x", "optim.epochs.first"])
def test_an_override_below_a_value_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "preset: demo\ntask: {classes: [a, b]}\noptim: {epochs: 3}\ndata:\n"
    )
    assert read_config(tmp_path / "config.yaml", {"data.folds": 2}).data.folds == 2
    with pytest.raises(TrainingError, match=f"{name}: there is no such setting"):
        read_config(tmp_path / "config.yaml", {name: 1})
