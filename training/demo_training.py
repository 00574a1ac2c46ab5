"""Train the demo preset on the cohort, from nothing: first the tile encoder, then the slide encoder on top.

The tile encoder learns to tell lesion tiles of training slides from others; the slide encoder and its head
then see its embeddings and each slide's label alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import save_file

from training.bags import read_bag
from training.build import Models, build_models
from training.recipe import read_recipe, read_yaml
from training.run_folder import MODEL, TILE_MODEL
from training.runs import plan_runs, run
from training.tile_encoder import TileEncoder
from training.tile_runs import embed, run_tiles
from training.tile_training import TileRecipe
from training.tiles import TileImages, list_tiles
from training.weights import read_state_dict

CONFIGS = Path(__file__).parent / "configs"
TOLERANCE = 1e-2  # of a probability, between packaged weights and remade ones


def train_demo(cohort: Path, work: Path, *, bar: bool, say: Callable[[str], None]) -> Models:
    """Train in `work` on the cohort in `cohort`; returns the models as they are packaged (in half)."""
    tiles = list_tiles(cohort / "tiles.csv")
    say("training the tile encoder")
    run_tiles(read_yaml(CONFIGS / "demo-tiles.yaml", TileRecipe), tiles, work / "tiles", bar=bar)
    say("embedding the slides")
    tile_weights = work / "tiles" / TILE_MODEL
    embed_slides(cohort, build_models("demo", tile_weights).tile, work / "features")
    say("training the slide encoder")
    places = {"data.features": str(work / "features"), "data.labels": str(cohort / "labels.csv")}
    run(plan_runs(read_recipe(CONFIGS / "demo-slides.yaml", places)), work / "slides", bar=bar)
    for source in (tile_weights, work / "slides" / MODEL):
        state = {name: tensor.half() for name, tensor in read_state_dict(source).items()}
        save_file(state, work / f"half-{source.name}")
    return build_models("demo", work / f"half-{TILE_MODEL}", work / f"half-{MODEL}")


def embed_slides(cohort: Path, encoder: TileEncoder, out: Path) -> None:
    """An h5 file of `features` and `coords` for every slide in the cohort's `tiles.csv`, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tiles = list_tiles(cohort / "tiles.csv")
    classes = sorted({tile.label for tile in tiles})
    for image, group in groupby(tiles, key=lambda tile: tile.image):
        of_slide = list(group)
        features = embed(encoder, TileImages(of_slide, classes, in_memory=True), batch=64)
        places = [tile.place for tile in of_slide if tile.place is not None]
        with h5py.File(out / f"{image.stem}.h5", "w") as file:
            file["features"] = features
            file["coords"] = np.array(places, np.int64)[:, :2]
            file["coords"].attrs["patch_size_level0"] = places[0][2]


def held_out_scores(cohort: Path, models: Models, features: Path) -> dict[str, float]:
    """Each held-out slide's probability of a lesion, from embeddings of `models`' own tile encoder."""
    scores = {}
    for path in sorted(features.glob("test-*.h5")):
        with torch.inference_mode():
            logits = models.slide_model.score(*map(torch.from_numpy, read_bag(path))).logits
        assert logits is not None
        scores[path.stem] = float(logits.softmax(dim=0)[1])
    return scores
