"""A run at the tile level: a linear probe or fine-tuning, evaluated, in a run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader

from gigapath_contract.files import file_sha256
from gigapath_contract.probabilities import probabilities
from training.config import RANDOM_INIT
from training.data.tables import SPLITS
from training.data.tiles import Tile, TileImages
from training.errors import TrainingError
from training.loops.tile_level import TileConfig, TileOrder, TileTuner
from training.loops.trainer import build_trainer, fit
from training.models.build import build_tile_encoder
from training.models.tile_encoder import TileEncoder
from training.runs.checkpoint import save_tile_run
from training.runs.layout import METRICS, PREDICTIONS
from training.runs.record import open_record, read_metrics, record_predictions, write_metrics
from training.runs.report import write_report


def run_tiles(config: TileConfig, tiles: Sequence[Tile], out: Path, *, bar: bool = False) -> dict[str, Any]:
    """Train at the tile level, on one device; writes encoder, head and metrics to `out`, returns the metrics.

    A finished run is kept, an interrupted one resumes after its last whole epoch.

    Raises:
        TrainingError: a tile that can't be read, or a folder with another run.
    """
    classes = sorted({tile.label for tile in tiles})
    open_record(out, config, _data(tiles, classes))
    if (out / METRICS).exists():
        return _report(config, classes, out)
    if config.resources.devices != 1 or config.resources.nodes != 1:
        raise TrainingError(
            "training at the tile level takes one device: set resources.devices and nodes to 1"
        )
    given = None if config.tile_weights == RANDOM_INIT else config.tile_weights
    seed = None if config.tile_weights is None else config.seed
    encoder = build_tile_encoder(config.preset, given, seed=seed)
    images = {
        split: TileImages([t for t in tiles if t.split == split], classes, in_memory=config.in_memory)
        for split in SPLITS
    }
    if config.blocks == 0:
        head, how = _probe(config, encoder, images), "a linear probe"
    else:
        head = _fine_tune(config, encoder, images, out, bar)
        how = f"the last {config.blocks} blocks and a head, {config.epochs} epochs"
    encoder.eval()
    save_tile_run(out, config.preset, encoder, head, tuple(classes))
    held_out = {split: images[split] for split in SPLITS[1:]}
    results = {split: _evaluate(config, encoder, head, held_out[split], out, split) for split in held_out}
    counts = ", ".join(f"{len(images[split])} {split} tiles" for split in SPLITS)
    facts = [
        f"Preset `{config.preset}`, started from {config.tile_weights or 'the weights of the preset'}.",
        f"Trained: {how}, seed {config.seed}.",
        f"Data: {counts}. Intervals: bootstrap over slides (image files).",
    ]
    write_metrics(out, f"{config.preset} tile encoder: {', '.join(classes)}", facts, results)
    return _report(config, classes, out)


def _report(config: TileConfig, classes: Sequence[str], out: Path) -> dict[str, Any]:
    """Write the report of a finished run, where it is missing; returns the run's metrics."""
    what = ("tiles", "image files")
    write_report(out, [out], classes, "multiclass", bootstrap=config.bootstrap, seed=config.seed, what=what)
    return read_metrics(out)


def _data(tiles: Sequence[Tile], classes: Sequence[str]) -> dict[str, Any]:
    """The run's data: number of tiles, and one SHA-256 over the list and every image file."""
    digest = hashlib.sha256()
    for tile in tiles:
        digest.update(f"{tile.image.name} {tile.label} {tile.split} {tile.place}\n".encode())
    for path in sorted({tile.image for tile in tiles}):
        digest.update(bytes.fromhex(file_sha256(path)))
    counts = {split: sum(tile.split == split for tile in tiles) for split in SPLITS}
    return {"classes": list(classes), "tiles": counts, "sha256": digest.hexdigest()}


def _probe(config: TileConfig, encoder: TileEncoder, images: dict[str, TileImages]) -> nn.Linear:
    """Logistic regression on embeddings, as a linear layer."""
    train = images["train"]
    features = embed(encoder, train, config.batch, config.resources.workers)
    scale = features.std() or 1.0  # so that the penalty does not depend on the embedding's scale
    solver = LogisticRegression(C=1 / config.penalty, max_iter=2000)
    solver.fit(features / scale, train.targets)
    head = nn.Linear(features.shape[1], len(set(train.targets)))
    weight, bias = solver.coef_ / scale, solver.intercept_
    if len(weight) == 1:  # two classes: scikit-learn has the weights of one logit
        weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    return head


def _fine_tune(
    config: TileConfig, encoder: TileEncoder, images: dict[str, TileImages], out: Path, bar: bool
) -> nn.Linear:
    train, val = images["train"], images["val"]
    tuner = TileTuner(encoder, train.classes, config)
    trainer = build_trainer(
        out,
        config.resources,
        config.select,
        epochs=config.epochs,
        log_every=1,
        bar=bar,
        validate_every=config.validate_every,
    )
    workers = config.resources.workers
    order = TileOrder(train.targets, config)
    loader = DataLoader(train, config.batch, sampler=order, num_workers=workers, drop_last=True)
    fit(trainer, tuner, out, loader, DataLoader(val, config.batch, num_workers=workers), config.select)
    return tuner.head


@torch.inference_mode()
def embed(encoder: TileEncoder, tiles: TileImages, batch: int, workers: int = 0) -> npt.NDArray[np.float32]:
    """Embeddings float32 [n, D] of tiles, in their order, on the encoder's device."""
    device = next(encoder.parameters()).device
    loader = DataLoader(tiles, batch, num_workers=workers)
    return torch.cat([encoder(pixels.to(device)).float().cpu() for pixels, _ in loader]).numpy()


def _evaluate(
    config: TileConfig, encoder: TileEncoder, head: nn.Linear, images: TileImages, out: Path, split: str
) -> dict[str, Any]:
    features = torch.from_numpy(embed(encoder, images, config.batch, config.resources.workers))
    with torch.inference_mode():
        logits = head.cpu()(features).numpy()
    names = [f"{tile.image.name} {tile.place}" if tile.place else tile.image.name for tile in images.tiles]
    return record_predictions(
        out / PREDICTIONS.format(split=split),
        names,
        [str(tile.image) for tile in images.tiles],
        np.array(images.targets),
        probabilities(logits, "multiclass"),
        classes=images.classes,
        kind="multiclass",
        bootstrap=config.bootstrap,
        seed=config.seed,
    )
