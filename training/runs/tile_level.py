"""A run at the tile level: a linear probe or fine-tuning, evaluated, in a run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader

from gigapath_contract.probabilities import probabilities
from training.data.tiles import SPLITS, Tile, TileImages
from training.errors import TrainingError
from training.loops.tile_level import TileOrder, TileRecipe, TileTuner
from training.loops.trainer import build_trainer, fit
from training.models.build import build_tile_encoder
from training.models.tile_encoder import TileEncoder
from training.recipe import RANDOM_INIT
from training.runs.checkpoint import TILE_MODEL
from training.runs.record import METRICS, open_record, read_metrics, record_predictions, write_metrics

TILE_HEAD = "tile_head.safetensors"


def run_tiles(recipe: TileRecipe, tiles: Sequence[Tile], out: Path, *, bar: bool = False) -> dict[str, Any]:
    """Train at the tile level; `out` gets encoder, head and metrics, which are returned.

    A finished run is kept, one that was cut off goes on after its last whole epoch. It takes one process.

    Raises:
        TrainingError: a tile that can't be read, or a folder with another run.
    """
    classes = sorted({tile.label for tile in tiles})
    open_record(out, recipe, _data(tiles, classes))
    if (out / METRICS).exists():
        return read_metrics(out)
    if recipe.resources.devices != 1 or recipe.resources.nodes != 1:
        raise TrainingError(
            "training at the tile level takes one device: set resources.devices and nodes to 1"
        )
    given = None if recipe.tile_weights == RANDOM_INIT else recipe.tile_weights
    seed = None if recipe.tile_weights is None else recipe.seed
    encoder = build_tile_encoder(recipe.preset, given, seed=seed)
    images = {
        split: TileImages([t for t in tiles if t.split == split], classes, in_memory=recipe.in_memory)
        for split in SPLITS
    }
    if recipe.blocks == 0:
        head, how = _probe(recipe, encoder, images), "a linear probe"
    else:
        head = _fine_tune(recipe, encoder, images, out, bar)
        how = f"the last {recipe.blocks} blocks and a head, {recipe.epochs} epochs"
    encoder.eval()
    save_file(encoder.vit.state_dict(), out / TILE_MODEL)
    save_file(head.state_dict(), out / TILE_HEAD)
    held_out = {split: images[split] for split in SPLITS[1:]}
    results = {split: _evaluate(recipe, encoder, head, held_out[split], out, split) for split in held_out}
    counts = ", ".join(f"{len(images[split])} {split} tiles" for split in SPLITS)
    facts = [
        f"Preset `{recipe.preset}`, started from {recipe.tile_weights or 'the weights of the preset'}.",
        f"Trained: {how}, seed {recipe.seed}.",
        f"Data: {counts}. Intervals draw slides (image files) anew.",
    ]
    write_metrics(out, f"{recipe.preset} tile encoder: {', '.join(classes)}", facts, results)
    return read_metrics(out)


def _data(tiles: Sequence[Tile], classes: Sequence[str]) -> dict[str, Any]:
    """What the run is made from: how many tiles, and a digest of the list and of every image file."""
    digest = hashlib.sha256()
    for tile in tiles:
        digest.update(f"{tile.image.name} {tile.label} {tile.split} {tile.place}\n".encode())
    for path in sorted({tile.image for tile in tiles}):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    counts = {split: sum(tile.split == split for tile in tiles) for split in SPLITS}
    return {"classes": list(classes), "tiles": counts, "sha256": digest.hexdigest()}


def _probe(recipe: TileRecipe, encoder: TileEncoder, images: dict[str, TileImages]) -> nn.Linear:
    """Logistic regression on embeddings, as a linear layer."""
    train = images["train"]
    features = embed(encoder, train, recipe.batch, recipe.resources.workers)
    scale = features.std() or 1.0  # the penalty means the same whatever the embedding's scale
    solver = LogisticRegression(C=1 / recipe.penalty, max_iter=2000)
    solver.fit(features / scale, train.targets)
    head = nn.Linear(features.shape[1], len(set(train.targets)))
    weight, bias = solver.coef_ / scale, solver.intercept_
    if len(weight) == 1:  # two classes: scikit-learn has the one logit's weights
        weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    return head


def _fine_tune(
    recipe: TileRecipe, encoder: TileEncoder, images: dict[str, TileImages], out: Path, bar: bool
) -> nn.Linear:
    train, val = images["train"], images["val"]
    tuner = TileTuner(encoder, train.classes, recipe)
    trainer = build_trainer(
        out,
        recipe.resources,
        recipe.select,
        epochs=recipe.epochs,
        log_every=1,
        bar=bar,
        validate_every=recipe.validate_every,
    )
    workers = recipe.resources.workers
    order = TileOrder(train.targets, recipe)
    loader = DataLoader(train, recipe.batch, sampler=order, num_workers=workers, drop_last=True)
    fit(trainer, tuner, out, loader, DataLoader(val, recipe.batch, num_workers=workers), recipe.select)
    return tuner.head


@torch.inference_mode()
def embed(encoder: TileEncoder, tiles: TileImages, batch: int, workers: int = 0) -> npt.NDArray[np.float32]:
    """Embeddings float32 [n, D] of tiles, in their order, on the encoder's device."""
    device = next(encoder.parameters()).device
    loader = DataLoader(tiles, batch, num_workers=workers)
    return torch.cat([encoder(pixels.to(device)).float().cpu() for pixels, _ in loader]).numpy()


def _evaluate(
    recipe: TileRecipe, encoder: TileEncoder, head: nn.Linear, images: TileImages, out: Path, split: str
) -> dict[str, Any]:
    features = torch.from_numpy(embed(encoder, images, recipe.batch, recipe.resources.workers))
    with torch.inference_mode():
        logits = head.cpu()(features).numpy()
    names = [f"{tile.image.name} {tile.place}" if tile.place else tile.image.name for tile in images.tiles]
    return record_predictions(
        out / f"predictions_{split}.csv",
        names,
        [str(tile.image) for tile in images.tiles],
        np.array(images.targets),
        probabilities(logits, "multiclass"),
        classes=images.classes,
        kind="multiclass",
        bootstrap=recipe.bootstrap,
        seed=recipe.seed,
    )
