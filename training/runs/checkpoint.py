"""The checkpoints that export reads from finished runs.

A slide model is `model.safetensors` and `run.json`; a tile encoder with its head is
`tile_encoder.safetensors`, `tile_head.safetensors` and `tile_run.json`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from gigapath_contract.coordinates import RULE_VERSION
from gigapath_contract.files import parse_json
from gigapath_contract.probabilities import HeadKind
from training.errors import TrainingError
from training.files import atomic_path, write_text
from training.models.build import Models, build_models, build_tile_encoder
from training.models.head import ClassificationHead, HeadConfig
from training.models.presets import Preset, get_preset
from training.models.slide_model import SlideModel
from training.models.tile_encoder import TileEncoder
from training.models.variant import EmbeddingVariant
from training.models.weights import SLIDE_PREFIX, load_strict, read_state_dict, weights_digest
from training.runs.layout import METADATA, MODEL, TILE_HEAD, TILE_METADATA, TILE_MODEL


class CheckpointMetadata(BaseModel):
    """`run.json`: how to build the model for the weights in `model.safetensors`.

    Attributes:
        preset: the preset's name.
        variant: the slide embedding that the head was trained on.
        max_wsi_size: slide edge in px from which the segment lengths derive.
        classes, kind: the head's.
        weights_sha256: digest of the weights in `model.safetensors`.
        coordinate_rule_version: version of the coordinate rules that the run was trained with.
        tile_encoder_sha256: digest of the tile encoder whose embeddings it was trained on, where their files
            name it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    preset: str
    variant: EmbeddingVariant
    max_wsi_size: int
    classes: tuple[str, ...]
    kind: HeadKind
    weights_sha256: str
    coordinate_rule_version: int = 1
    tile_encoder_sha256: str | None = None

    def build_preset(self) -> Preset:
        """The preset with the run's variant, segment lengths and classes."""
        preset = get_preset(self.preset)
        slide = replace(preset.slide, max_wsi_size=self.max_wsi_size)
        return replace(preset, slide=slide, variant=self.variant, classes=self.classes)


def published_state(model: SlideModel) -> dict[str, Tensor]:
    """The weights under the published fine-tuned keys: `slide_encoder.*` and `classifier.0.*`."""
    state = {SLIDE_PREFIX + name: tensor for name, tensor in model.encoder.state_dict().items()}
    return state | (model.head.state_dict() if model.head is not None else {})


def save_run(
    folder: Path,
    preset: Preset,
    model: SlideModel,
    coordinate_rule_version: int = RULE_VERSION,
    tile_encoder_sha256: str | None = None,
) -> CheckpointMetadata:
    """Write `model.safetensors` and `run.json` into `folder`."""
    if model.head is None:
        raise TrainingError("a run without a classification head has nothing to serve")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in published_state(model).items()}
    metadata = CheckpointMetadata(
        preset=preset.name,
        variant=model.variant,
        max_wsi_size=preset.slide.max_wsi_size,
        classes=model.head.config.classes,
        kind=model.head.config.kind,
        weights_sha256=weights_digest(state),
        coordinate_rule_version=coordinate_rule_version,
        tile_encoder_sha256=tile_encoder_sha256,
    )
    with atomic_path(folder / MODEL) as part:
        save_file(state, part)
    write_text(folder / METADATA, metadata.model_dump_json(indent=1))
    return metadata


def read_metadata(folder: Path) -> CheckpointMetadata:
    """`run.json` of a finished run; a TrainingError says what is missing or wrong with it."""
    return _read(folder / METADATA, CheckpointMetadata)


Metadata = TypeVar("Metadata", bound=BaseModel)


def _read(path: Path, kind: type[Metadata]) -> Metadata:
    try:
        return kind.model_validate(parse_json(path.read_bytes()))
    except OSError as error:
        raise TrainingError(
            f"{path.parent} is not a finished fine-tuning run (no {path.name}): give the folder that "
            "`python -m training finetune` or `tiles` wrote"
        ) from error
    except (ValueError, ValidationError) as error:
        raise TrainingError(f"{path} is damaged: fine-tune again") from error


def load_run(folder: Path, tile_weights: str | Path | None = None) -> Models:
    """The models of a finished run, in eval mode: its slide encoder and head, and a tile encoder.

    The tile encoder's weights are `tile_weights`, or the run's own where it has some, or else the preset's.

    Raises:
        TrainingError: no such run, or the tile encoder is not the one that it was trained on.
    """
    metadata = read_metadata(folder)
    if tile_weights is None and (folder / TILE_MODEL).exists():
        tile_weights = folder / TILE_MODEL
    if weights_digest(read_state_dict(folder / MODEL)) != metadata.weights_sha256:
        raise TrainingError(f"{folder / MODEL} is not what its {METADATA} describes: fine-tune again")
    head = HeadConfig(metadata.classes, metadata.kind)
    models = build_models(metadata.build_preset(), tile_weights, folder / MODEL, head)
    wanted, given = metadata.tile_encoder_sha256, weights_digest(models.tile.vit.state_dict())
    if wanted not in (None, given):
        raise TrainingError(
            f"{folder} was trained on embeddings of tile encoder {wanted:.8}, not of {given:.8}: give the "
            "former's weights, or the run of `tiles` that made it, too"
        )
    return models


class TileRunMetadata(BaseModel):
    """`tile_run.json`: what the weights of a run at the tile level belong to, and their digests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    preset: str
    classes: tuple[str, ...]
    encoder_sha256: str
    head_sha256: str


def save_tile_run(
    folder: Path, preset: str, encoder: TileEncoder, head: nn.Linear, classes: tuple[str, ...]
) -> None:
    """Write tile encoder, head and `tile_run.json` into `folder`."""
    states = {TILE_MODEL: encoder.vit.state_dict(), TILE_HEAD: head.state_dict()}
    for name, state in states.items():
        with atomic_path(folder / name) as part:
            save_file(state, part)
    digests = (weights_digest(state) for state in states.values())
    metadata = TileRunMetadata(
        preset=preset, classes=classes, encoder_sha256=next(digests), head_sha256=next(digests)
    )
    write_text(folder / TILE_METADATA, metadata.model_dump_json(indent=1))


def is_tile_run(folder: Path) -> bool:
    """Whether a folder holds a finished run at the tile level."""
    return (folder / TILE_METADATA).exists()


def load_tile_run(
    folder: Path, slide_weights: str | Path | None = None, slide_run: Path | None = None
) -> Models:
    """The models of a finished run at the tile level, in eval mode: its tile encoder and head, a slide model.

    The slide model is that of `slide_run`, or has `slide_weights`, or else the preset's own; of these the
    head is left out where it was trained on another tile encoder's embeddings.

    Raises:
        TrainingError: no such run, or the slide model does not belong to its tile encoder.
    """
    metadata = _read(folder / TILE_METADATA, TileRunMetadata)
    state = read_state_dict(folder / TILE_HEAD)
    if weights_digest(state) != metadata.head_sha256:
        raise TrainingError(f"{folder / TILE_HEAD} is not what its {TILE_METADATA} describes: train again")
    preset = get_preset(metadata.preset)
    if slide_run is not None:
        if (other := read_metadata(slide_run).preset) != preset.name:
            raise TrainingError(
                f"{slide_run} was fine-tuned from {other}, {folder} from {preset.name}: give runs of one"
                " preset"
            )
        models = load_run(slide_run, folder / TILE_MODEL)
    else:
        if preset.classes and slide_weights is None:
            own = build_tile_encoder(preset)
            if weights_digest(own.vit.state_dict()) != metadata.encoder_sha256:
                preset = replace(preset, classes=())
        models = build_models(preset, folder / TILE_MODEL, slide_weights)
    if weights_digest(models.tile.vit.state_dict()) != metadata.encoder_sha256:
        raise TrainingError(f"{folder / TILE_MODEL} is not what its {TILE_METADATA} describes: train again")
    head = ClassificationHead(preset.tile.embed_dim, HeadConfig(metadata.classes))
    load_strict(head.classifier[0], state, str(folder / TILE_HEAD))
    return replace(models, tile_head=head.eval())
