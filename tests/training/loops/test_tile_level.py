"""Tile level: folders and CSVs, the linear probe, the last blocks, and resuming."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from training.cohort.files import make_cohort
from training.data.tiles import Tile, list_tiles, read_list, read_tile
from training.errors import TrainingError
from training.loops.tile_level import TileConfig, TileOrder, TileTuner, augment, freeze_blocks
from training.models.build import build_models
from training.runs.checkpoint import load_tile_run
from training.runs.layout import TILE_MODEL
from training.runs.tile_level import run_tiles

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles `SPLIT/CLASS/*.png`: coarse and fine stripes, dark on bright, in colours that vary."""
    root = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    for split, count in {"train": 12, "val": 4, "test": 6}.items():
        for label, width in {"coarse": 32, "fine": 8}.items():
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                stripes = np.kron(np.arange(256 // width) % 2, np.ones(width))[:, None]
                dark, bright = rng.integers(60, 100, 3), rng.integers(180, 220, 3)
                pixels = np.where(stripes, dark, bright)[None].repeat(256, axis=0)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{number}.png")
    return root


def config(**changes: Any) -> TileConfig:
    common = {"preset": "demo", "tile_weights": "random_init", "bootstrap": 5, "batch": 8}
    return TileConfig.model_validate(common | {"resources": {"accelerator": "cpu", "threads": 1}} | changes)


def test_a_linear_probe_tells_textures_apart_and_leaves_the_encoder_alone(
    folder: Path, tmp_path: Path
) -> None:
    result = run_tiles(config(), list_tiles(folder), tmp_path / "run")
    assert result["test"]["metrics"]["accuracy"] == 1
    before = build_models("demo", seed=0).tile.vit.state_dict()
    after = load_file(tmp_path / "run" / TILE_MODEL)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    head = load_file(tmp_path / "run" / "tile_head.safetensors")
    assert head["weight"].shape == (2, 96)
    models = load_tile_run(tmp_path / "run")
    assert models.tile_head is not None
    assert models.tile_head.config.classes == ("coarse", "fine")
    assert torch.equal(models.tile_head.state_dict()["classifier.0.weight"], head["weight"])
    assert torch.equal(models.tile.vit.state_dict()["pos_embed"], before["pos_embed"])
    assert "For research only" in (tmp_path / "run" / "MODEL_CARD.md").read_text()
    assert run_tiles(config(), list_tiles(folder), tmp_path / "run") == result  # kept


def test_the_last_block_learns_and_the_others_stay(folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"blocks": 1, "epochs": 3, "rate": 3e-3, "patch_drop": 0.5, "warmup_epochs": 0}
    result = run_tiles(config(**settings), list_tiles(folder), tmp_path / "run")
    assert result["test"]["metrics"]["auroc_macro"] > 0.9
    before = build_models("demo", seed=0).tile.vit.state_dict()
    after = load_file(tmp_path / "run" / TILE_MODEL)
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed
    assert all(name.startswith(("blocks.2.", "norm.")) for name in changed)


def test_a_cut_off_run_ends_like_an_undisturbed_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(blocks=3, epochs=3, balanced=True, tiles_per_epoch=16, patch_drop=0.25)
    tiles = list_tiles(folder)
    run_tiles(wanted, tiles, tmp_path / "whole")

    def stop(self: TileTuner) -> None:
        if self.current_epoch == 2:
            raise ConnectionAbortedError

    monkeypatch.setattr(TileTuner, "on_train_epoch_start", stop, raising=False)
    with pytest.raises(ConnectionAbortedError):
        run_tiles(wanted, tiles, tmp_path / "cut")
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "metrics.json").exists()
    run_tiles(wanted, tiles, tmp_path / "cut")
    for name in (TILE_MODEL, "tile_head.safetensors", "predictions_test.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


class Code:
    """Unpickled, it makes a folder, as it could do anything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_strangers_checkpoint_runs_no_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, wanted, tiles = tmp_path / "run", config(blocks=3, epochs=3), list_tiles(folder)

    def stop(self: TileTuner) -> None:
        if self.current_epoch == 1:
            raise ConnectionAbortedError

    monkeypatch.setattr(TileTuner, "on_train_epoch_start", stop, raising=False)
    with pytest.raises(ConnectionAbortedError):
        run_tiles(wanted, tiles, out)
    monkeypatch.undo()
    last, made = out / "checkpoints" / "last.ckpt", tmp_path / "made"
    strangers: tuple[Any, ...] = (
        {**torch.load(last, weights_only=True), "more": Code(made)},
        {"more": 1},
        [],
        b"",
    )
    for strange in strangers:
        torch.save(strange, last)
        with pytest.raises(TrainingError, match=r"last\.ckpt is no checkpoint of this program") as caught:
            run_tiles(wanted, tiles, out)
        assert "\n" not in str(caught.value)
        assert not made.exists()
        if isinstance(strange, dict) and "epoch" in strange:
            torch.load(last, weights_only=False)
            assert made.exists()
            made.rmdir()


def test_a_place_in_a_slide_is_the_same_tissue_whatever_the_scanner(real_slide: Path, tmp_path: Path) -> None:
    make_cohort(real_slide, tmp_path / "cohort", only=("test-24A", "test-25B", "test-26A"))
    with (tmp_path / "cohort" / "labels.csv").open() as file:
        scanner = {row["slide_id"]: float(row["scanner"]) for row in csv.DictReader(file)}
    rows = read_list(tmp_path / "cohort" / "tiles.csv")
    assert set(scanner.values()) == {0.5, 0.25, 0.4}
    for name, mpp in scanner.items():
        tile = next(tile for tile in rows if tile.image.stem == name)
        assert tile.place is not None
        assert tile.place[2] == round(128 / mpp)
        pixels = read_tile(tile)
        assert pixels.shape == (224, 224, 3)
        x, y, side = tile.place
        with openslide.OpenSlide(tile.image) as slide:
            whole = slide.read_region((x, y), 0, (side, side)).convert("RGB").resize((256, 256))
        expected = np.asarray(whole).astype(int)[16:-16, 16:-16]
        assert np.abs(pixels.astype(int) - expected).mean() < 8


def test_images_of_other_sizes_are_resized_and_cropped(tmp_path: Path) -> None:
    Image.new("L", (300, 500), 120).save(tmp_path / "grey.png")
    pixels = read_tile(Tile(tmp_path / "grey.png", "a", "train"))
    assert pixels.shape == (224, 224, 3)
    assert (pixels == 120).all()
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(TrainingError, match=r"bad\.png can't be read as a tile"):
        read_tile(Tile(tmp_path / "bad.png", "a", "train"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label,split\na.png,x,train\nb.png,x,val\n", "has no test tiles"),
        ("image,label,split\na.png,x,train\nb.png,x,val\nc.png,y,test\n", "class y has no training tile"),
        ("image,label,split\na.png,nan,train\n", "line 2 needs a label, and a split"),
        ("image,label,split\na.png,x,dev\n", "line 2 needs a label, and a split"),
        ("image,label\na.png,x\n", "has no column split"),
        ("image,label,split,x,y,size\na.svs,x,train,1.5,2,256\n", "x, y and size must be whole pixels"),
    ],
)
def test_a_bad_list_is_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tiles.csv").write_text(text)
    with pytest.raises(TrainingError, match=message):
        list_tiles(tmp_path / "tiles.csv")


def test_epochs_that_are_not_validated_cannot_be_selected_from() -> None:
    assert config(validate_every=2).validate_every == 2
    with pytest.raises(ValueError, match="set validate_every to 1"):
        config(validate_every=2, select={"epoch": "best"})


def test_balanced_epochs_have_as_many_of_each_class() -> None:
    targets = [0] * 90 + [1] * 10
    order = TileOrder(targets, config(balanced=True, tiles_per_epoch=40))
    drawn = [targets[index] for index in order]
    assert (len(drawn), sum(drawn)) == (40, 20)
    first = list(order)
    assert first == list(order)
    order.set_epoch(1)
    assert first != list(order)
    assert sorted(TileOrder(targets, config())) == list(range(100))


def test_stain_jitter_scales_density_and_keeps_white_white() -> None:
    torch.manual_seed(0)
    pixels = torch.full((4, 8, 8, 3), 255, dtype=torch.uint8)
    assert (augment(pixels, 0.3) == 255).all()
    pixels[:] = 100
    changed = augment(pixels, 0.3)
    assert changed.dtype == torch.uint8
    assert len({tuple(colour) for colour in changed[:, 0, 0].tolist()}) == 4  # other factors for each tile
    assert (changed == changed[:, :1, :1]).all()
    assert (augment(pixels, 0.0) == 100).all()


def test_all_blocks_means_everything() -> None:
    encoder = build_models("demo", seed=0).tile
    freeze_blocks(encoder, 3)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
