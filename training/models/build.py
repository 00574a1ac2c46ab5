"""A preset's models with their weights: from files, from the hub, or initialised at random from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from training.models.head import ClassificationHead, HeadConfig
from training.models.hub import fetch
from training.models.packaged import Packaged, packaged_weights
from training.models.presets import Preset, SlideEncoderConfig, TileEncoderConfig, get_preset
from training.models.random_init import HeadInit, random_state, uniform_state
from training.models.slide_encoder import LongNetSlideEncoder
from training.models.slide_model import SlideModel
from training.models.tile_encoder import TileEncoder
from training.models.weights import StateDict, load_strict, read_state_dict, split_finetuned

Weights = str | Path
"""A file, or `hf-hub:OWNER/REPOSITORY[/FILE]`."""


@dataclass(frozen=True)
class Models:
    """A preset's two models, in eval mode on the CPU.

    Attributes:
        preset: what they were built from.
        tile: the tile encoder.
        slide_model: slide encoder, variant and head.
        trained: whether every weight came from a file or the hub, and none from the seed.
        tile_head: classifies single tiles, where a run of `tiles` trained one.
    """

    preset: Preset
    tile: TileEncoder
    slide_model: SlideModel
    trained: bool
    tile_head: ClassificationHead | None = None


@dataclass(frozen=True)
class WeightSources:
    """Where weights come from; None: a random initialisation from `seed`.

    Attributes:
        tile, slide: of the tile encoder and of the slide encoder.
        head: whether a head among the slide encoder's weights is taken too.
    """

    tile: Weights | None
    slide: Weights | None
    head: bool
    seed: int


def choose_weights(
    preset: Preset,
    packaged: Packaged | None,
    tile_weights: Weights | None = None,
    slide_weights: Weights | None = None,
    head: HeadConfig | None = None,
    seed: int | None = None,
) -> WeightSources:
    """The sources that `build_models` loads: the weights given, else the `packaged` ones, else the seed.

    A seed rules the packaged weights out. A packaged head is taken only for the classes it was trained on.
    """
    if seed is not None or packaged is None:
        return WeightSources(tile_weights, slide_weights, head=True, seed=seed or 0)
    fits = slide_weights is not None or _head_config(preset, head) == _head_config(get_preset(preset.name))
    return WeightSources(tile_weights or packaged.tile, slide_weights or packaged.slide, head=fits, seed=0)


def build_models(
    preset: str | Preset,
    tile_weights: Weights | None = None,
    slide_weights: Weights | None = None,
    head: HeadConfig | None = None,
    *,
    seed: int | None = None,
) -> Models:
    """Build a preset's models.

    Args:
        preset: a name, or a `Preset` of your own (`get_preset(name).with_variant(name)`).
        tile_weights, slide_weights: None is the preset's packaged weights where it has some
            (`training.models.packaged`), or else a random initialisation from `seed`. `slide_weights` may be
            a fine-tuned checkpoint, which brings the head's weights with it.
        head: class names and kind of the head; None is the preset's classes, or for a fine-tuned checkpoint
            of another size `class 0`, `class 1` ...; without either there is no head.
        seed: initialise what isn't given from this seed, and don't take packaged weights; None: they come
            first, and what is still missing is initialised from 0.

    Raises:
        TrainingError: weights that can't be had or don't fit.
    """
    preset = get_preset(preset) if isinstance(preset, str) else preset
    packaged = packaged_weights(preset.name)
    sources = choose_weights(preset, packaged, tile_weights, slide_weights, head, seed)
    tile = _tile_encoder(preset.tile, sources)
    model, trained = _slide_model(preset, sources, head, "uniform")
    return Models(preset, tile, model, trained and sources.tile is not None)


def build_tile_encoder(
    preset: str | Preset, tile_weights: Weights | None = None, *, seed: int | None = None
) -> TileEncoder:
    """The tile encoder alone, in eval mode; arguments and errors as for `build_models`."""
    preset = get_preset(preset) if isinstance(preset, str) else preset
    packaged = packaged_weights(preset.name)
    return _tile_encoder(preset.tile, choose_weights(preset, packaged, tile_weights, seed=seed))


def build_slide_model(
    preset: str | Preset,
    slide_weights: Weights | None = None,
    head: HeadConfig | None = None,
    *,
    seed: int | None = None,
    head_init: HeadInit = "uniform",
) -> SlideModel:
    """The slide encoder with its head, in eval mode; arguments and errors as for `build_models`.

    `head_init` is the distribution of a head without trained weights: `uniform` as `nn.Linear` has it, or
    `normal` like the other random weights.
    """
    preset = get_preset(preset) if isinstance(preset, str) else preset
    packaged = packaged_weights(preset.name)
    sources = choose_weights(preset, packaged, None, slide_weights, head, seed)
    return _slide_model(preset, sources, head, head_init)[0]


def _tile_encoder(config: TileEncoderConfig, sources: WeightSources) -> TileEncoder:
    with torch.device("meta"):  # a billion weights that are replaced anyway aren't worth their initialisation
        tile = TileEncoder(config)
    if sources.tile is None:
        load_strict(tile.vit, random_state(tile.vit, sources.seed), "the seed")
    else:
        state = read_state_dict(fetch(sources.tile, "pytorch_model.bin"))
        load_strict(tile.vit, state, str(sources.tile))
    return tile.eval()


def _slide_model(
    preset: Preset, sources: WeightSources, head: HeadConfig | None, head_init: HeadInit
) -> tuple[SlideModel, bool]:
    """The slide model, and whether all its weights are trained."""
    encoder, head_state = _slide_encoder(preset.slide, sources)
    if not sources.head:
        head_state = {}
    head = _head_config(preset, head)
    if head is None and head_state:
        count = next(iter(head_state.values())).shape[0]
        head = HeadConfig(tuple(f"class {i}" for i in range(count)), "multiclass" if count > 1 else "binary")
    classifier = None
    if head is not None:
        classifier = ClassificationHead(preset.slide.embed_dim, head)
        _load_head(classifier, head_state, sources, head_init)
    trained = sources.slide is not None and (head is None or bool(head_state))
    return SlideModel(encoder, classifier, preset.variant).eval(), trained


def _slide_encoder(
    config: SlideEncoderConfig, sources: WeightSources
) -> tuple[LongNetSlideEncoder, StateDict]:
    """The slide encoder, and the head's weights that come with its own (or none)."""
    with torch.device("meta"):
        encoder = LongNetSlideEncoder(config)
    if sources.slide is None:
        load_strict(encoder, random_state(encoder, sources.seed), "the seed")
        return encoder, {}
    slide_state, head_state = split_finetuned(read_state_dict(fetch(sources.slide, "slide_encoder.pth")))
    load_strict(encoder, slide_state, str(sources.slide))
    return encoder, head_state


def _head_config(preset: Preset, head: HeadConfig | None = None) -> HeadConfig | None:
    """`head`, or one for the preset's classes where it has some."""
    return head or (HeadConfig(preset.classes) if preset.classes else None)


def _load_head(head: nn.Module, state: StateDict, sources: WeightSources, init: HeadInit) -> None:
    if state:
        load_strict(head, state, str(sources.slide))
    else:
        initial = uniform_state if init == "uniform" else random_state
        load_strict(head, initial(head, sources.seed), "the seed")
