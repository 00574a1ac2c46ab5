"""The checkpoint that export reads from a fine-tuning run: `model.safetensors` and `run.json`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from gigapath_contract.coordinates import RULE_VERSION
from gigapath_contract.files import parse_json
from gigapath_contract.probabilities import HeadKind
from training.errors import TrainingError
from training.files import atomic_path, write_text
from training.models.build import Models, build_models
from training.models.head import HeadConfig
from training.models.presets import Preset, get_preset
from training.models.slide_model import SlideModel
from training.models.variant import EmbeddingVariant
from training.models.weights import SLIDE_PREFIX, read_state_dict, weights_digest
from training.runs.layout import METADATA, MODEL, TILE_MODEL


class CheckpointMetadata(BaseModel):
    """`run.json`: how to build the model for the weights in `model.safetensors`.

    Attributes:
        preset: the preset's name.
        variant: the slide embedding that the head was trained on.
        max_wsi_size: slide edge in px from which the segment lengths derive.
        classes, kind: the head's.
        weights_sha256: digest of the weights in `model.safetensors`.
        coordinate_rule_version: version of the coordinate rules that the run was trained with.
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
    folder: Path, preset: Preset, model: SlideModel, coordinate_rule_version: int = RULE_VERSION
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
    )
    with atomic_path(folder / MODEL) as part:
        save_file(state, part)
    write_text(folder / METADATA, metadata.model_dump_json(indent=1))
    return metadata


def read_metadata(folder: Path) -> CheckpointMetadata:
    """`run.json` of a finished run; a TrainingError says what is missing or wrong with it."""
    path = folder / METADATA
    try:
        return CheckpointMetadata.model_validate(parse_json(path.read_bytes()))
    except OSError as error:
        raise TrainingError(
            f"{folder} is not a finished fine-tuning run (no {METADATA}): give the folder that "
            "`python -m training finetune` wrote"
        ) from error
    except (ValueError, ValidationError) as error:
        raise TrainingError(f"{path} is damaged: fine-tune again") from error


def load_run(folder: Path, tile_weights: str | Path | None = None) -> Models:
    """The models of a finished run, in eval mode: its slide encoder and head, and a tile encoder.

    The tile encoder's weights are `tile_weights`, or the run's own where it has some, or else the preset's.
    """
    metadata = read_metadata(folder)
    if tile_weights is None and (folder / TILE_MODEL).exists():
        tile_weights = folder / TILE_MODEL
    if weights_digest(read_state_dict(folder / MODEL)) != metadata.weights_sha256:
        raise TrainingError(f"{folder / MODEL} is not what its {METADATA} describes: fine-tune again")
    head = HeadConfig(metadata.classes, metadata.kind)
    return build_models(metadata.build_preset(), tile_weights, folder / MODEL, head)
