"""A preset's models with their weights: seeded, from files, or from the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from training.models.head import ClassificationHead, HeadConfig
from training.models.hub import fetch
from training.models.packaged import packaged_weights
from training.models.presets import Preset, get_preset
from training.models.seeded import seed_weights, seeded_state
from training.models.slide_encoder import LongNetSlideEncoder
from training.models.slide_model import SlideModel
from training.models.tile_encoder import TileEncoder
from training.models.weights import StateDict, load_strict, read_state_dict, split_finetuned


@dataclass(frozen=True)
class Models:
    """A preset's two models, in eval mode on the CPU.

    Attributes:
        preset: what they were built from.
        tile: the tile encoder.
        slide_model: slide encoder, variant and head.
        trained: whether every weight came from a file or the hub, and none from the seed.
    """

    preset: Preset
    tile: TileEncoder
    slide_model: SlideModel
    trained: bool


def build_models(
    preset: str | Preset,
    tile_weights: str | Path | None = None,
    slide_weights: str | Path | None = None,
    head: HeadConfig | None = None,
    *,
    seed: int | None = None,
) -> Models:
    """Build a preset's models.

    Args:
        preset: a name, or a `Preset` of your own (`get_preset(name).with_recipe(recipe)`).
        tile_weights, slide_weights: a file, or `hf-hub:OWNER/REPOSITORY[/FILE]`; None is the preset's
            packaged weights where it has some (`training.models.packaged`), or else weights from `seed`.
            `slide_weights` may be a fine-tuned checkpoint, which brings the head's weights with it.
        head: class names and kind of the head; None is the preset's classes, or for a fine-tuned checkpoint
            of another size `class 0`, `class 1` ...; without either there is no head.
        seed: draw what isn't given from this seed, and don't take packaged weights; None: they come first,
            and what is still missing is drawn from 0.

    Raises:
        TrainingError: weights that can't be had or don't fit.
    """
    if isinstance(preset, str):
        preset = get_preset(preset)
    with torch.device("meta"):  # a billion weights that are replaced anyway aren't worth their initialisation
        tile, encoder = TileEncoder(preset.tile), LongNetSlideEncoder(preset.slide)
    packaged = packaged_weights(preset.name) if seed is None else None
    if packaged:
        tile_weights = tile_weights or packaged.tile
    own_slide_weights = packaged is not None and slide_weights is None
    if packaged and own_slide_weights:
        slide_weights = packaged.slide
    seed = seed or 0

    if tile_weights is None:
        load_strict(tile.vit, seeded_state(tile.vit, seed), "the seed")
    else:
        load_strict(tile.vit, read_state_dict(fetch(tile_weights, "pytorch_model.bin")), str(tile_weights))

    head_state: StateDict = {}
    if slide_weights is None:
        load_strict(encoder, seeded_state(encoder, seed), "the seed")
    else:
        slide_state, head_state = split_finetuned(read_state_dict(fetch(slide_weights, "slide_encoder.pth")))
        load_strict(encoder, slide_state, str(slide_weights))

    if head is None and preset.classes:
        head = HeadConfig(preset.classes)
    if own_slide_weights and head != HeadConfig(get_preset(preset.name).classes):
        head_state = {}  # the packaged head tells other classes apart
    if head is None and head_state:
        count = next(iter(head_state.values())).shape[0]
        head = HeadConfig(tuple(f"class {i}" for i in range(count)), "multiclass" if count > 1 else "binary")
    classifier = None
    if head is not None:
        classifier = ClassificationHead(preset.slide.embed_dim, head)
        if head_state:
            load_strict(classifier, head_state, str(slide_weights))
        else:
            seed_weights(classifier, seed)
    trained = tile_weights is not None and slide_weights is not None and (head is None or bool(head_state))
    model = SlideModel(encoder, classifier, preset.variant)
    return Models(preset, tile.eval(), model.eval(), trained)
