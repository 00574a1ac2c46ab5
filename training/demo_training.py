"""Train the demo preset on the cohort from a random initialisation: tile encoder first, then slide encoder.

The tile encoder learns to tell lesion tiles of training slides from others; the slide encoder and its head
then see its embeddings and each slide's label alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors.torch import save_file

from training.cohort.files import MARK
from training.config import read_config, read_yaml
from training.data.h5_features import read_bag
from training.data.tiles import Tile, TileImages, list_tiles
from training.errors import TrainingError
from training.files import atomic_path, make_folder, read_json, write_json
from training.loops.tile_level import TileConfig
from training.models.build import build_slide_model, build_tile_encoder
from training.models.packaged import files_in, packaged_files
from training.models.slide_model import SlideModel
from training.models.tile_encoder import TileEncoder
from training.models.weights import read_state_dict
from training.runs.layout import MODEL, TILE_MODEL
from training.runs.slide_level import plan_runs, run
from training.runs.tile_level import embed, run_tiles

CONFIGS = Path(__file__).parent / "configs"
TOLERANCE = 1e-2  # of a slide's probability, between the packaged weights and retrained ones


def train_demo(
    cohort: Path, work: Path, *, bar: bool, say: Callable[[str], None], configs: Path = CONFIGS
) -> dict[str, Any]:
    """Train in `work`, from the beginning, on the cohort in `cohort`, as the demo's configurations say.

    Writes `packaged/` there, laid out like a preset's packaged weights (half precision), and returns its
    facts: the cohort's digest, the metrics of both runs, every held-out slide's probability of a lesion.
    """
    tile_run, features, slide_run, packaged = (work / n for n in ("tiles", "features", "slides", "packaged"))
    for folder in (tile_run, features, slide_run, packaged):
        shutil.rmtree(folder, ignore_errors=True)
    tiles = list_tiles(cohort / "tiles.csv")
    say("training the tile encoder")
    tile_result = run_tiles(read_yaml(configs / "demo-tiles.yaml", TileConfig), tiles, tile_run, bar=bar)
    files = files_in(packaged)
    packaged.mkdir()
    _halve(tile_run / TILE_MODEL, files.tile)
    say("embedding the slides")
    embed_slides(tiles, build_tile_encoder("demo", files.tile), features)
    say("training the slide encoder")
    places = {"data.features": str(features), "data.labels": str(cohort / "labels.csv")}
    slide_result = run(plan_runs(read_config(configs / "demo-slides.yaml", places)), slide_run, bar=bar)
    _halve(slide_run / MODEL, files.slide)
    say("scoring the held-out slides")
    model = build_slide_model("demo", files.slide)
    facts = {
        "made_by": "python -m training train-demo",
        "cohort": read_json(cohort / MARK)["plan_sha256"],
        "tiles": tile_result["test"]["metrics"],
        "slides": slide_result["test"]["metrics"],
        "held_out": score_slides(model, sorted(features.glob("test-*.h5"))),
    }
    write_json(files.facts, facts)
    return facts


def package(work: Path) -> None:
    """Copy the weights that `train_demo` made into the repository, as the demo preset's."""
    target = packaged_files("demo").facts.parent
    make_folder(target)
    for file in (work / "packaged").iterdir():
        with atomic_path(target / file.name) as part:
            shutil.copyfile(file, part)


def compare(held_out: dict[str, float]) -> float:
    """The largest difference between `held_out` probabilities and those recorded with the packaged weights.

    Raises TrainingError where it exceeds `TOLERANCE`, or there is nothing to compare with.
    """
    path = packaged_files("demo").facts
    if not path.exists():
        raise TrainingError("the demo has no packaged weights to compare with: run `make demo-weights`")
    before: dict[str, float] = read_json(path)["held_out"]
    if not held_out or not set(held_out) <= set(before):
        raise TrainingError("the packaged weights were made on another cohort: run `make demo-weights`")
    apart = {name: abs(score - before[name]) for name, score in held_out.items()}
    worst = max(apart, key=lambda name: apart[name])
    if apart[worst] > TOLERANCE:
        raise TrainingError(f"slide {worst} scores {apart[worst]:.3g} apart from the packaged weights")
    return apart[worst]


def score_slides(model: SlideModel, bags: Sequence[Path]) -> dict[str, float]:
    """Each slide's probability of a lesion, from its h5 file."""
    scores = {}
    for path in bags:
        with torch.inference_mode():
            logits = model.score(*map(torch.from_numpy, read_bag(path))).logits
        assert logits is not None
        scores[path.stem] = float(logits.softmax(dim=0)[1])
    return scores


def _halve(source: Path, target: Path) -> None:
    """The weights of `source` in half precision."""
    save_file({name: tensor.half() for name, tensor in read_state_dict(source).items()}, target)


def embed_slides(tiles: Sequence[Tile], encoder: TileEncoder, out: Path) -> None:
    """An h5 file of `features` and `coords` (level-0 px) in `out` for each slide that `tiles` lie in."""
    out.mkdir(parents=True, exist_ok=True)
    classes = sorted({tile.label for tile in tiles})

    def embed_slide(image: Path, of_slide: list[Tile]) -> None:
        features = embed(encoder, TileImages(of_slide, classes, in_memory=True), batch=64)
        places = [tile.place for tile in of_slide if tile.place is not None]
        with h5py.File(out / f"{image.stem}.h5", "w") as file:
            file["features"] = features
            file["coords"] = np.array(places, np.int64)[:, :2]

    slides = [(image, list(group)) for image, group in groupby(tiles, key=lambda tile: tile.image)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(embed_slide, *zip(*slides, strict=True)):
            pass  # raises the errors of the threads
