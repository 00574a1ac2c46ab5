"""The configuration of a training run: one YAML file, checked strictly before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gigapath_contract.probabilities import HeadKind
from training import files
from training.errors import TrainingError
from training.models.head import HeadConfig
from training.models.presets import Preset, get_preset
from training.models.random_init import HeadInit
from training.models.variant import EmbeddingVariant
from training.task import Task

Model = TypeVar("Model", bound=BaseModel)
RANDOM_INIT = "random_init"  # in the place of a weights file: a random initialisation from the seed
Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a configuration: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskSection(Section):
    """What is predicted.

    Attributes:
        kind: multiclass, multilabel (a column for each class, named like it) or binary (one class).
        classes: names in the order of the logits, or names and what the label column says for them.
        label_column: the label column; null looks for label, isup_grade, target.
        absent: for `binary`, what the label column says where the class isn't there.
    """

    kind: HeadKind = "multiclass"
    classes: dict[str, Text] | list[Text]
    label_column: str | None = None
    absent: Text = "0"

    def task(self) -> Task:
        """The classes and where labels state them, for the readers of labels."""
        named = self.classes if isinstance(self.classes, dict) else {name: name for name in self.classes}
        HeadConfig(tuple(named), self.kind)
        values = tuple(named.values())
        if self.kind == "binary":
            values = (self.absent, values[0] if isinstance(self.classes, dict) else "1")
        return Task(self.kind, tuple(named), values, self.label_column)


class DataSection(Section):
    """Where the data is.

    Attributes:
        features: folder with `<slide>.h5` for each slide.
        labels: table with a row for each slide.
        patient_column: its column of patients; null looks for pat_id, case_id, patient and other usual names.
        splits: folder with `train_K.csv`, `val_K.csv`, `test_K.csv`; null takes the labels file's column
            `split`, or with more than one fold makes seeded folds in which no patient is divided.
        folds: number of folds.
        val_share: fraction of the slides not held out that validates, in seeded folds.
        max_tiles: limit of tiles per slide; more are cut off (after shuffling).
        shuffle_tiles: never, in training, or always. Published runs shuffle in evaluation too, which isn't
            the order that is served.
    """

    features: Path = Path("features")
    labels: Path = Path("labels.csv")
    patient_column: str | None = None
    splits: Path | None = None
    folds: Count = 1
    val_share: Fraction = 0.125
    max_tiles: Count = 1_000_000
    shuffle_tiles: Literal["never", "train", "always"] = "never"


class OptimSection(Section):
    """How weights are learnt.

    Attributes:
        epochs, warmup_epochs: warm-up is linear, then a half cosine down to `min_lr`, both by step.
        accumulate: slides per step (a batch is one slide); an epoch's leftover slides count in the next one.
        base_lr: learning rate for 256 slides per step; scaled by `accumulate` and the number of processes.
        weight_decay: of AdamW, not for vectors (biases, norms).
        layer_decay: factor of the learning rate per block, counted from the head.
        layer_ids: `published` gives the tile projection the head's rate (a quirk of the released code: its
            prefix check misses the name); `corrected` gives it the class token's.
        dropout, drop_path: of the slide encoder, in training.
        train: all weights, or only the head (a linear probe).
        class_weights: none, `balanced` (inverse frequency in the training split), or one per class.
    """

    epochs: Count = 5
    warmup_epochs: float = Field(default=1, ge=0)
    accumulate: Count = 32
    base_lr: float = Field(default=2e-3, gt=0)
    min_lr: float = Field(default=1e-6, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    layer_decay: float = Field(default=0.95, gt=0, le=1)
    layer_ids: Literal["published", "corrected"] = "published"
    dropout: float = Field(default=0.1, ge=0, lt=1)
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    train: Literal["all", "head"] = "all"
    class_weights: Literal["none", "balanced"] | list[float] = "none"


class MaskSection(Section):
    """Masks in training, so that the model has met masked slides when its scores are attributed.

    Attributes:
        count: masked copies of a slide in addition to the whole one, per step.
        keep: smallest and largest fraction of the tiles that a mask keeps.
        regions: sides, in tiles, of the squares that are kept or masked together.
    """

    count: int = Field(default=0, ge=0)
    keep: tuple[float, float] = (0.1, 0.9)
    regions: list[Count] = [1, 2, 4]


class SelectSection(Section):
    """Which epoch's weights a run keeps: the last, or the best by `monitor` on the validation slides.

    `patience` epochs without a better value end the run early (null: never).
    """

    epoch: Literal["last", "best"] = "last"
    monitor: str = "auroc_macro"
    patience: Count | None = None


class ResourceSection(Section):
    """Hardware, by Lightning's names.

    `precision` auto is 16-mixed where there is a CUDA device and 32-true elsewhere.
    """

    accelerator: str = "auto"
    devices: int | Literal["auto"] = 1
    nodes: Count = 1
    strategy: str = "auto"
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed"] = "auto"
    workers: int = Field(default=0, ge=0)
    threads: Count | None = None


class RunConfig(Section):
    """Settings of any run.

    Attributes:
        preset: demo, gigapath-flash or gigapath.
        seed: random seed.
        bootstrap: number of bootstrap draws for the intervals of the metrics.
    """

    preset: str
    resources: ResourceSection = ResourceSection()
    seed: int = 0
    bootstrap: Count = 1000


class TrainingConfig(RunConfig):
    """Everything that decides a run of slide-level fine-tuning.

    Attributes:
        slide_weights: a file, `hf-hub:OWNER/REPOSITORY[/FILE]`, `random_init`, or null: those packaged with
            the preset, or a random initialisation where it has none.
        head_init: distribution of the new head's weights: `uniform`, PyTorch's default for a linear layer, as
            published; or `normal`, with variance 1 / width, from which the packaged demo weights began.
        embedding: a named code path (docs/embedding-variants.md), a variant spelled out, or the preset's.
    """

    slide_weights: str | None = None
    head_init: HeadInit = "uniform"
    embedding: str | EmbeddingVariant | None = None
    task: TaskSection
    data: DataSection = DataSection()
    optim: OptimSection = OptimSection()
    masks: MaskSection = MaskSection()
    select: SelectSection = SelectSection()

    def build_preset(self) -> Preset:
        """The preset with this configuration's embedding, dropout and classes."""
        preset = get_preset(self.preset)
        if isinstance(self.embedding, str):
            preset = preset.with_variant(self.embedding)
        elif self.embedding:
            self.embedding.check_depth(preset.slide.depth)
            preset = replace(preset, variant=self.embedding)
        slide = replace(preset.slide, dropout=self.optim.dropout, drop_path_rate=self.optim.drop_path)
        return replace(preset, slide=slide, classes=self.task.task().classes)


def read_config(path: Path, overrides: dict[str, Any] | None = None) -> TrainingConfig:
    """Read a slide-level configuration; arguments and errors as for `read_yaml`."""
    config = read_yaml(path, TrainingConfig, overrides)
    config.build_preset()
    return config


def read_yaml(path: Path, model: type[Model], overrides: dict[str, Any] | None = None) -> Model:
    """Read a YAML file; `overrides` are dotted names ("data.features") and values that replace its own.

    Raises:
        TrainingError: the file cannot be read, or a setting is unknown, missing or of another type.
    """
    content = files.read_yaml(path)
    if not isinstance(content, dict):
        raise TrainingError(f"{path} is not a configuration: it must be a YAML mapping")
    for name, value in (overrides or {}).items():
        section = content
        *parents, last = name.split(".")
        for parent in parents:
            section[parent] = section.get(parent) or {}
            section = section[parent]
            if not isinstance(section, dict):
                raise TrainingError(f"{path}: {name}: there is no such setting")
        section[last] = value
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        unknown = problem["type"] == "extra_forbidden"
        message = "there is no such setting" if unknown else problem["msg"].lower()
        raise TrainingError(f"{path}: {where}: {message}") from error
