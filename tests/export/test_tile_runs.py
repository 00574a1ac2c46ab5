"""A run at the tile level as a checkpoint: what it brings, and what does not belong to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import text_format
from torch import nn
from tritonclient.grpc import model_config_pb2

from export.configs import read_config, served_config
from export.errors import ExportError
from export.export import choose_models
from export.repository import list_versions
from gigapath_contract.schema import Contract
from training.errors import TrainingError
from training.models.build import Models, build_models
from training.models.presets import get_preset
from training.models.weights import weights_digest
from training.runs.checkpoint import save_run, save_tile_run
from training.runs.layout import TILE_HEAD

ROOT = Path(__file__).resolve().parents[2]


def digest(module: nn.Module) -> str:
    return weights_digest(module.state_dict())


@pytest.fixture(scope="module")
def other() -> Models:
    """The demo preset with weights of its own."""
    return build_models("demo", seed=5)


@pytest.fixture
def tuned(other: Models, tmp_path: Path) -> Path:
    """A run of `tiles` that changed the tile encoder."""
    (tmp_path / "tiles").mkdir()
    save_tile_run(tmp_path / "tiles", "demo", other.tile, nn.Linear(96, 3), ("a", "b", "c"))
    return tmp_path / "tiles"


def slide_run(folder: Path, other: Models, encoder: str | None, preset: str = "demo") -> Path:
    folder.mkdir()
    save_run(folder, get_preset(preset), other.slide_model, tile_encoder_sha256=encoder)
    return folder


def test_a_tuned_tile_encoder_comes_with_its_head_and_without_the_heads_on_the_old_one(
    tuned: Path, other: Models
) -> None:
    models = choose_models(None, None, [tuned])
    assert digest(models.tile.vit) == digest(other.tile.vit)
    assert models.tile_head is not None
    assert models.tile_head.config.classes == ("a", "b", "c")
    assert models.slide_model.head is None, "the packaged head was trained on the packaged tile encoder"
    assert digest(models.slide_model.encoder) == digest(build_models("demo").slide_model.encoder)


def test_a_probe_leaves_the_preset_as_it_is(tmp_path: Path) -> None:
    own = build_models("demo")
    save_tile_run(tmp_path, "demo", own.tile, nn.Linear(96, 2), ("a", "b"))
    models = choose_models("demo", None, [tmp_path])
    assert digest(models.tile) == digest(own.tile)
    assert digest(models.slide_model) == digest(own.slide_model)
    assert models.trained


def test_a_tile_run_and_the_slide_run_on_its_embeddings_go_together(
    tuned: Path, other: Models, tmp_path: Path
) -> None:
    for name, encoder in (("fits", digest(other.tile.vit)), ("silent", None)):
        run = slide_run(tmp_path / name, other, encoder)
        for order in ([tuned, run], [run, tuned]):
            models = choose_models(None, None, order)
            assert digest(models.tile.vit) == digest(other.tile.vit)
            assert digest(models.slide_model) == digest(other.slide_model)
            assert models.tile_head is not None


def test_what_does_not_belong_together_is_one_line(tuned: Path, other: Models, tmp_path: Path) -> None:
    own = digest(build_models("demo").tile.vit)
    on_own = slide_run(tmp_path / "on-own", other, own)
    on_tuned = slide_run(tmp_path / "on-tuned", other, digest(other.tile.vit))
    assert choose_models(None, None, [on_own]).trained
    for runs in ([tuned, on_own], [on_tuned]):
        with pytest.raises(TrainingError, match="was trained on embeddings of tile encoder") as caught:
            choose_models(None, None, runs)
        assert "\n" not in str(caught.value)
    with pytest.raises(ExportError, match="several checkpoints of one kind"):
        choose_models(None, None, [on_own, on_tuned])
    with pytest.raises(ExportError, match="was fine-tuned from demo, not gigapath"):
        choose_models("gigapath", None, [tuned])
    (tuned / TILE_HEAD).write_bytes((on_own / "model.safetensors").read_bytes())
    with pytest.raises(TrainingError, match=r"tile_head\.safetensors is not what its tile_run\.json"):
        choose_models(None, None, [tuned])


def test_the_export_has_both_heads_and_reports_every_output(tile_head_repository: Path) -> None:
    (version,) = list_versions(tile_head_repository)
    contract = version.contract
    assert contract.tile_head is not None
    assert contract.tile_head.classes == ("stroma", "tumour", "other")
    assert contract.tile_outputs == {"EMBEDDINGS": (32,), "TILE_LOGITS": (3,), "PATCH_TOKENS": (197, 32)}
    assert contract.head is not None
    report = json.loads((tile_head_repository / "slide_pipeline/1/parity.json").read_text())
    outputs = [row["output"] for row in report["rows"] if row["model"] == "tile_encoder"]
    assert outputs == ["EMBEDDINGS", "TILE_LOGITS", "PATCH_TOKENS"]
    assert report["passed"]
    tile, ensemble = (
        text_format.Parse(
            (tile_head_repository / model / "configs/onnxruntime.pbtxt").read_text(),
            model_config_pb2.ModelConfig(),
        )
        for model in ("tile_encoder", "slide_pipeline")
    )
    assert {each.name: tuple(each.dims) for each in tile.output} == contract.tile_outputs
    assert {each.name: list(each.dims) for each in ensemble.output}["TILE_LOGITS"] == [-1, 3]
    assert "PATCH_TOKENS" not in {each.name for each in ensemble.output}


def test_an_export_without_them_says_nothing_of_them(tiny_repository: Path) -> None:
    """Contract and configurations keep the bytes that they had before there was a tile head."""
    text = (tiny_repository / "slide_pipeline/1/contract.json").read_text()
    assert not {"tile_head", "patch_tokens"} & json.loads(text).keys()
    contract = Contract.parse(text)
    assert contract.to_json() == text.strip()
    for model in ("tile_encoder", "slide_pipeline"):
        template = read_config(ROOT / "model_repository" / model / "config.pbtxt")
        served = text_format.Parse(served_config(template, contract), model_config_pb2.ModelConfig())
        assert [each.name for each in served.output] == [each.name for each in template.output]
