"""From PyTorch to a served version: parity, determinism, the gate, kills, and what the graphs may not do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export import build_graphs as build
from export import repository
from export.errors import ExportError
from export.export import export_preset
from export.graphs import occlusion_graph, write_graph
from export.parity import ParityError
from export.plain import one_way
from export.samples import SIZES, seeded_basis, seeded_coords
from gigapath_contract.reference import seeded_embeddings
from gigapath_contract.schema import MODELS
from tests.support.cuda_kernels import uses_of, without_kernel
from training.models.build import build_models
from training.models.presets import Preset, get_preset
from training.models.variant import EmbeddingVariant

ROOT = Path(__file__).resolve().parents[2]
Files = Callable[[Path], dict[str, bytes]]


def every_graph(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and the graphs in its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from every_graph(attribute.g)


def session_of(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are expected here
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def test_the_demo_export_agrees_with_pytorch_at_every_size(demo_repository: Path) -> None:
    report = json.loads((demo_repository / "slide_pipeline" / "1" / "parity.json").read_text())
    assert report["passed"]
    assert report["precision"] == "fp32"
    by_case = {(row["model"], row["case"], row["output"]): row for row in report["rows"]}
    for n in (1, 37, 1023, 1024, 1068, 5000):
        for model, outputs in (
            ("slide_encoder", ("LAYERS", "SLIDE", "LOGITS")),
            ("slide_occlusion", ("SLIDE", "LOGITS")),
        ):
            for output in outputs:
                row = by_case[model, f"N={n}", output]
                assert row["max_abs"] < 1e-4
                assert row["min_cosine"] > 0.99999
    assert by_case["tile_encoder", "4 tiles", "EMBEDDINGS"]["max_abs"] < 1e-4


def test_graph_names_are_the_contract(demo_repository: Path) -> None:
    """Names, types and ranks; a name stands for a dimension that a request may choose."""
    names = {"tile_encoder": "B", "slide_encoder": "N", "slide_occlusion": "N"}
    shapes = {}
    for model in names:
        session = session_of(demo_repository / model / "1")
        shapes[model] = {t.name: (t.type, t.shape) for t in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {
        "tile_encoder": {
            "TILES": ("tensor(uint8)", ["B", 224, 224, 3]),
            "EMBEDDINGS": ("tensor(float)", ["B", 96]),
        },
        "slide_encoder": {
            "EMBEDDINGS": ("tensor(float)", ["N", 96]),
            "COORDS": ("tensor(int64)", ["N", 2]),
            "LAYERS": ("tensor(float)", [5, 2, 96]),
            "SLIDE": ("tensor(float)", [96]),
            "LOGITS": ("tensor(float)", [2]),
        },
        "slide_occlusion": {
            "EMBEDDINGS": ("tensor(float)", ["N", 96]),
            "COORDS": ("tensor(int64)", ["N", 2]),
            "KEEP": ("tensor(bool)", ["M", "N"]),
            "SLIDE": ("tensor(float)", ["M", 96]),
            "LOGITS": ("tensor(float)", ["M", 2]),
        },
    }


@pytest.mark.parametrize("x", [-1, -256, 256_000, 1 << 60])
def test_a_position_outside_the_grid_is_an_error(demo_repository: Path, x: int) -> None:
    session = session_of(demo_repository / "slide_encoder" / "1")
    coords = np.zeros((3, 2), np.int64)
    coords[1, 0] = x
    with pytest.raises(
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of data bounds"
    ):
        session.run(None, {"EMBEDDINGS": np.zeros((3, 96), np.float32), "COORDS": coords})


@pytest.mark.parametrize("x", [-1, 256_000, 1 << 60])
@pytest.mark.parametrize("model", ["slide_encoder", "slide_occlusion"])
def test_where_a_lookup_outside_the_grid_is_no_error_every_output_is_nan(
    demo_repository: Path, tmp_path: Path, model: str, x: int
) -> None:
    """The lookup made to take the nearest row, as TensorRT's does (CUDA's returns zeros)."""
    graph = onnx.load(demo_repository / model / "1" / "model.onnx")
    found = 0
    for part in every_graph(graph.graph):
        lookups = [node for node in part.node if node.input[:1] == ["model.encoder.position_table"]]
        found += len(lookups)
        for node in lookups:
            clipped = onnx.helper.make_node(
                "Clip", [node.input[1], "first", "last"], [f"{node.output[0]}.clipped"]
            )
            node.input[1] = clipped.output[0]
            part.node.insert(list(part.node).index(node), clipped)
    assert found == (4 if model == "slide_encoder" else 6), "two per way"
    for name, row in (("first", 0), ("last", 999)):
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(row), name))
    onnx.save(graph, tmp_path / "model.onnx")
    coords = np.zeros((3, 2), np.int64)
    inputs = {"EMBEDDINGS": np.ones((3, 96), np.float32), "COORDS": coords}
    if model == "slide_occlusion":
        inputs["KEEP"] = np.array([[True, False, True]])  # the tile outside may be masked
    names = ["SLIDE", "LOGITS"]
    session = session_of(tmp_path)
    assert all(np.isfinite(output).all() for output in session.run(names, inputs))
    coords[1, 0] = x
    assert all(np.isnan(output).all() for output in session.run(names, inputs))


def test_attention_is_fused_and_layers_are_small(demo_repository: Path, tiny_repository: Path) -> None:
    def operators(repository: Path, model: str) -> Counter[str]:
        graph = onnx.load(repository / model / "1" / "model.onnx", load_external_data=False).graph
        return Counter(node.op_type for node in one_way(graph))

    tile, slide = (operators(demo_repository, model) for model in ("tile_encoder", "slide_encoder"))
    assert tile["MultiHeadAttention"] == 3
    assert slide["MultiHeadAttention"] == 4 * 5
    assert not tile["Softmax"], "no score matrix"
    assert slide["Softmax"] == 4, "the merge of the branches alone"
    three_layers = slide - operators(tiny_repository, "slide_encoder")  # the demo has four, the other one
    assert three_layers.total() / 3 < 155


@pytest.mark.parametrize(
    "variant",
    [
        EmbeddingVariant("mean", 2, "encoder_norm+norm"),
        EmbeddingVariant("mean", 1, "norm"),
        EmbeddingVariant("cls", 1, "norm"),
        EmbeddingVariant("cls", 0, "norm"),
    ],
)
def test_occlusion_computes_every_variant(tiny: Preset, tmp_path: Path, variant: EmbeddingVariant) -> None:
    deeper = replace(tiny, slide=replace(tiny.slide, depth=2), variant=variant)
    model = build_models(deeper, seed=0).slide_model
    write_graph(occlusion_graph(model), tmp_path / "model.onnx")
    session = session_of(tmp_path)
    for n in (1, 16, 1100):
        embeddings, coords = seeded_embeddings(*seeded_basis(32), n), seeded_coords(n)
        keep = np.random.default_rng(n).random((3, n)) < 0.5
        keep[:, 0] = True
        inputs = {"EMBEDDINGS": embeddings, "COORDS": coords, "KEEP": keep}
        slide, logits = session.run(["SLIDE", "LOGITS"], inputs)
        with torch.no_grad():
            expected = model.score(*(torch.from_numpy(x) for x in inputs.values()))
        assert expected.logits is not None
        np.testing.assert_allclose(slide, expected.slide.numpy(), atol=2e-5)
        np.testing.assert_allclose(logits, expected.logits.numpy(), atol=2e-5)


@pytest.mark.usefixtures("slide_graphs_traced")
def test_a_broken_weight_fails_the_gate_and_installs_nothing(
    tiny: Preset,
    tiny_repository: Path,
    real_slide: Path,
    files_of: Files,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = files_of(tiny_repository)

    def write_broken(graph: object, path: Path) -> int:
        model = onnx.load(tiny_repository / path.parent.name / "1" / "model.onnx")
        weight = next(w for w in model.graph.initializer if w.name.endswith(("fc1.bias", "up.bias")))
        values = onnx.numpy_helper.to_array(weight).copy()
        values.flat[0] += 0.5
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        path.parent.mkdir(exist_ok=True)
        onnx.save(model, path)
        return len(model.graph.node)

    monkeypatch.setattr(build, "write_graph", write_broken)
    with pytest.raises(ParityError, match="nothing was installed") as caught:
        export_preset("tiny", repository=tiny_repository, slide=real_slide, occlusion_precision="fp16")
    assert not caught.value.report.passed
    assert files_of(tiny_repository) == before
    assert repository.served_version(tiny_repository) == 1


def test_equal_input_gives_equal_bytes_and_nothing_to_do(
    tiny: Preset, tiny_repository: Path, empty_repository: Path, real_slide: Path, files_of: Files
) -> None:
    before = files_of(tiny_repository)
    again = export_preset("tiny", repository=tiny_repository, slide=real_slide)
    assert (again.report, again.version) == (None, 1)
    assert files_of(tiny_repository) == before

    elsewhere = export_preset("tiny", repository=empty_repository, slide=real_slide)
    assert elsewhere.report is not None
    assert json.loads(elsewhere.contract) == json.loads(again.contract)
    for model in MODELS[:3]:
        paths = [root / model / "1" / "model.onnx" for root in (tiny_repository, empty_repository)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("precision", ["fp16", "fp16-mixed"])
def test_half_precision_is_near_enough(
    tiny: Preset, two_versions: Path, real_slide: Path, precision: str
) -> None:
    """`two_versions` has fp16, the same as asked for here; fp16-mixed becomes a third."""
    result = export_preset(
        "tiny", repository=two_versions, slide=real_slide, precision=precision, gpu_memory=80
    )
    assert result.version == (2 if precision == "fp16" else 3)
    contract = json.loads(result.contract)
    assert (contract["precision"], contract["occlusion"]["precision"]) == (precision, "fp32")
    every = json.loads((result.folder / "parity.json").read_text())["rows"]
    rows = [row for row in every if row["model"] != "slide_occlusion"]
    assert min(row["min_cosine"] for row in rows) >= 0.999
    assert max(row["max_abs"] for row in rows) > 1e-4, "half precision is really in use"
    assert all(row["max_abs"] < 1e-4 for row in every if row["model"] == "slide_occlusion")

    for model in ("tile_encoder", "slide_encoder"):
        path = two_versions / model / str(result.version) / "model.onnx"
        assert not without_kernel(uses_of(path))
        whole = onnx.load(path)
        nodes = one_way(whole.graph)
        del whole.graph.node[:]
        whole.graph.node.extend(nodes)
        graph = onnx.shape_inference.infer_shapes(whole).graph
        half = onnx.TensorProto.FLOAT16
        kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
        kinds |= {w.name: w.data_type for w in graph.initializer}
        for node in graph.node:
            if node.op_type.endswith("LayerNormalization"):
                inner = any(name in node.input[1] for name in ("inner_attn_ln", "ffn_layernorm"))
                in_half = half in {kinds.get(name) for name in (*node.input, *node.output)}
                assert in_half == (inner or (model, precision) == ("tile_encoder", "fp16")), node.name
            if node.op_type == "MultiHeadAttention":
                assert {kinds[name] for name in node.input} == {half}, node.name
            if node.op_type in ("Softmax", "Log", "Exp", "ReduceSum"):
                assert half not in {kinds.get(name) for name in (*node.input, *node.output)}, node.name
        assert all(t.type.tensor_type.elem_type != half for t in (*graph.input, *graph.output))


def test_killed_while_it_traces_the_old_version_is_served(
    tiny: Preset, tiny_repository: Path, real_slide: Path, files_of: Files
) -> None:
    before = files_of(tiny_repository)
    script = f"""
import os, signal
from pathlib import Path
from training.models.presets import PRESETS, Preset, SlideEncoderConfig, TileEncoderConfig
from training.models.variant import EmbeddingVariant
from export.export import export_preset

def progress(step):
    if step == "tracing slide_encoder":
        os.kill(os.getpid(), signal.SIGKILL)

PRESETS["tiny"] = {tiny!r}
repository, slide = Path({str(tiny_repository)!r}), Path({str(real_slide)!r})
export_preset("tiny", repository=repository, slide=slide, precision="fp16", progress=progress)
"""
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert child.returncode == -signal.SIGKILL
    assert (tiny_repository / "slide_pipeline" / ".staging" / "slide_occlusion" / "model.onnx").exists()
    assert files_of(tiny_repository) == before
    assert export_preset("tiny", repository=tiny_repository, slide=real_slide).report is None


def test_contract_says_what_is_served(demo_repository: Path) -> None:
    contract = json.loads((demo_repository / "slide_pipeline" / "1" / "contract.json").read_text())
    assert contract["schema"] == 1
    assert contract["version"] == 1
    assert contract["preset"] == "demo"
    assert len(contract["export_id"]) == 16
    assert contract["slide_encoder"]["segment_lengths"] == [1024, 5792, 32768, 185363, 1048576]
    assert contract["variant"]["order"] == "row-major"
    assert contract["head"]["classes"] == list(get_preset("demo").classes)
    assert contract["tile"] == {"size_px": 256, "crop_px": 224, "mpp": 0.5, "max_batch": 64}
    assert contract["occlusion"]["max_mask_tokens"] > 200_001
    assert {"torch", "onnx", "onnxruntime"} <= contract["versions"].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "no precision 'fp8'"),
        ({"weights": "/nowhere"}, "no folder /nowhere"),
        ({"slide": Path("/nowhere.svs")}, r"/nowhere.svs cannot be read"),
    ],
)
def test_a_mistake_is_one_line(
    tiny: Preset, empty_repository: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_preset("tiny", repository=empty_repository, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_sizes_are_those_of_the_issue() -> None:
    assert SIZES == (1, 37, 1023, 1024, 1068, 5000)


def test_the_tile_graph_takes_any_batch(demo_repository: Path) -> None:
    session = session_of(demo_repository / "tile_encoder" / "1")
    tiles = np.random.default_rng(0).integers(0, 256, (7, 224, 224, 3), np.uint8)
    together = session.run(None, {"TILES": tiles})[0]
    alone = np.concatenate([session.run(None, {"TILES": tile[None]})[0] for tile in tiles])
    np.testing.assert_allclose(together, alone, atol=1e-5)
