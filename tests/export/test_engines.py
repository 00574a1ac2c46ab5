"""Engines: what can be tested without a GPU, and TensorRT-RTX's builder on the demo's graphs."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from export import engines
from export.check_engines import check_engine
from export.configs import engine_config, read_config
from export.errors import ExportError
from export.graphs import write_graph
from export.precision import PRECISIONS
from export.tensorrt_builder import exact_config, slide_profiles, tile_profiles
from export.tile_graph import tile_graph
from training.models.build import build_models

METADATA = engines.EngineMetadata("NVIDIA A100, 8.0", "10.13", "a" * 64, 50_000)


def test_without_a_gpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        ExportError, match="no NVIDIA GPU here: run this on the machine that is to serve"
    ) as caught:
        engines.build_engines(tmp_path, max_tiles=1, progress=print)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [("gpu", "NVIDIA L4, 8.9"), ("tensorrt", "11.0"), ("onnx_sha256", "b" * 64)]
)
def test_a_stale_engine_is_named(tmp_path: Path, field: str, value: str) -> None:
    plan = tmp_path / "model.plan"
    assert engines.stale_reason(plan, METADATA) == "there is none"
    plan.write_bytes(b"plan")
    assert engines.stale_reason(plan, METADATA) == "there is none", "a plan without metadata does not count"
    engines.metadata_file(plan).write_text(json.dumps(dataclasses.asdict(METADATA)))
    assert engines.stale_reason(plan, METADATA) is None
    wanted = dataclasses.replace(METADATA, **{field: value})  # type: ignore[arg-type]
    assert engines.stale_reason(plan, wanted) == f"{field} {getattr(METADATA, field)} instead of {value}"


def test_an_engine_from_before_tf32_was_off_is_stale(tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"plan")
    old = dataclasses.asdict(METADATA)
    del old["tf32"]
    engines.metadata_file(plan).write_text(json.dumps(old))
    assert engines.stale_reason(plan, METADATA) == "tf32 True instead of False"


def test_engine_configs_serve_the_plan_on_a_gpu(demo_repository: Path) -> None:
    served = read_config(demo_repository / "tile_encoder" / "configs" / "onnxruntime.pbtxt")
    text = engine_config(served, 3)
    for line in ('backend: "tensorrt"', 'default_model_filename: "model.plan"', "KIND_GPU", 'profile: "2"'):
        assert line in text
    assert "contract" in text
    assert "accelerator" in str(served)
    assert "accelerator" not in text, "options of ONNX Runtime, which TensorRT does not read"


def test_occlusion_stays_with_onnx_runtime(tiny_repository: Path) -> None:
    engines.write_configs(tiny_repository, 1)
    folder = tiny_repository / "slide_pipeline" / "1"
    backends = {path.stem: read_config(path).backend for path in (folder / "tensorrt").glob("*.pbtxt")}
    assert backends == {
        "tile_encoder": "tensorrt",
        "slide_encoder": "tensorrt",
        "slide_occlusion": "onnxruntime",
        "slide_pipeline": "",
    }


def test_engines_are_built_without_tf32() -> None:
    trt = importlib.import_module("tensorrt_rtx_bindings")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32), "TensorRT's own default"
    assert not exact_config(trt, builder).get_flag(trt.BuilderFlag.TF32)


def test_the_demo_graphs_go_through_a_tensorrt_builder(demo_repository: Path) -> None:
    tile = check_engine(demo_repository / "tile_encoder" / "1" / "model.onnx", tile_profiles(64), "SM80")
    assert (tile.model, tile.capability) == ("tile_encoder", "SM80")
    assert tile.size_bytes > 1_000_000
    graph = demo_repository / "slide_encoder" / "1" / "model.onnx"
    assert check_engine(graph, slide_profiles(96, 20_000), "SM80").layers > 100


@pytest.mark.parametrize("precision", ["fp16", "fp16-mixed"])
def test_the_half_precision_tile_encoder_does_too(precision: str, tmp_path: Path) -> None:
    write_graph(tile_graph(build_models("demo").tile, PRECISIONS[precision]), tmp_path / "model.onnx")
    assert check_engine(tmp_path / "model.onnx", tile_profiles(64), "SM89").size_bytes > 1_000_000


def test_what_does_not_parse_is_one_line(tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"no graph")
    with pytest.raises(ExportError, match="does not parse") as caught:
        check_engine(graph, tile_profiles(64), "SM80")
    assert "\n" not in str(caught.value)


def test_another_tensorrt_than_the_servers_builds_nothing() -> None:
    engines.check_version("11.3.0.14", "11.3.0.14")
    engines.check_version("11.3.0.14", None)
    with pytest.raises(ExportError, match=r"TensorRT 11\.3\.0\.14 only, .* install tensorrt==11\.3\.0\.14"):
        engines.check_version("10.13.0.35", "11.3.0.14")
