"""The written graph of the tile encoder: PyTorch's numbers, in the operators that GPUs have kernels for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch

from export.graphs import write_graph
from export.half_gate import TrueHalf
from export.plain import expanded
from export.precision import PRECISIONS
from export.samples import real_tiles
from export.tile_graph import tile_graph
from gigapath_contract.reference import distance
from tests.support.cuda_kernels import uses_of, without_kernel
from training.models.head import ClassificationHead, HeadConfig
from training.models.presets import TileEncoderConfig, get_preset
from training.models.random_init import randomise
from training.models.tile_encoder import TileEncoder

# As the published ViT-g is made, with 6 blocks instead of 40 and an eighth of its width.
NARROW = replace(get_preset("gigapath").tile, embed_dim=192, depth=6, heads=3)
CONFIGS = {
    "narrow gigapath": NARROW,
    "gigapath-flash": get_preset("gigapath-flash").tile,
    "demo": get_preset("demo").tile,
    "one block": replace(get_preset("demo").tile, depth=1),
}
Tiles = npt.NDArray[np.uint8]
Embeddings = npt.NDArray[np.float32]


def seeded_encoder(config: TileEncoderConfig) -> TileEncoder:
    encoder = TileEncoder(config).eval()
    randomise(encoder.vit, 0)
    return encoder


def run(model: Path | bytes, tiles: Tiles) -> Embeddings:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    embeddings: Embeddings = session.run(["EMBEDDINGS"], {"TILES": tiles})[0]
    return embeddings


def all_outputs(model: Path | bytes, tiles: Tiles) -> dict[str, Embeddings]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"TILES": tiles}), strict=True))


@torch.no_grad()
def in_pytorch(encoder: TileEncoder, tiles: Tiles) -> Embeddings:
    embeddings: Embeddings = encoder(torch.from_numpy(tiles)).numpy()
    return embeddings


def least_cosine(a: Embeddings, b: Embeddings) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / norms).min())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_returns_what_pytorch_returns(name: str, tmp_path: Path, real_slide: Path) -> None:
    encoder, tiles = seeded_encoder(CONFIGS[name]), real_tiles(real_slide, count=3)
    expected = in_pytorch(encoder, tiles)
    for precision, types in PRECISIONS.items():
        write_graph(tile_graph(encoder, types), tmp_path / "model.onnx")
        found = run(tmp_path / "model.onnx", tiles)
        if precision == "fp32":
            np.testing.assert_allclose(found, expected, atol=2e-5)
        assert least_cosine(found, expected) > 0.99999
        assert np.isfinite(found).all()


def test_nothing_stands_between_the_products_that_a_larger_operator_takes_along(tmp_path: Path) -> None:
    operators = {}
    for precision, types in PRECISIONS.items():
        write_graph(tile_graph(seeded_encoder(NARROW), types), tmp_path / "model.onnx")
        nodes = onnx.load(tmp_path / "model.onnx").graph.node
        operators[precision] = Counter(node.op_type for node in nodes)
    blocks = NARROW.depth
    assert operators["fp32"] == operators["fp16"]
    assert operators["fp16"] - Counter(["Reshape"] * 100) == Counter(
        {
            "MatMul": 1 + 5 * blocks,
            "Gemm": 2 * blocks,
            "MultiHeadAttention": blocks,
            "SkipLayerNormalization": 2 * blocks,
            "QuickGelu": blocks,
            "Mul": blocks,
            "LayerNormalization": 1,
            "Cast": 2,
            "Gather": 2,
            "Transpose": 1,
            "Pad": 1,
            "Add": 1,
        }
    )
    casts = operators["fp16-mixed"] - operators["fp16"]
    assert casts == Counter({"Cast": 1 + 4 * blocks}), (
        "into the float32 residual and out of it, twice a block"
    )


def test_layer_scale_of_a_fresh_model_survives_half_precision(tmp_path: Path, real_slide: Path) -> None:
    """1e-5 folded into a projection falls below the normal numbers of float16."""
    encoder, tiles = seeded_encoder(NARROW), real_tiles(real_slide, count=2)
    with torch.no_grad():
        for name, parameter in encoder.vit.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1e-5)
    write_graph(tile_graph(encoder, PRECISIONS["fp16"]), tmp_path / "model.onnx")
    assert least_cosine(run(tmp_path / "model.onnx", tiles), in_pytorch(encoder, tiles)) > 0.99999


@pytest.mark.parametrize("name", ["narrow gigapath", "one block"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_head_and_patch_tokens_are_pytorchs_too_in_every_graph(
    precision: str, name: str, tmp_path: Path, real_slide: Path
) -> None:
    encoder, tiles = seeded_encoder(CONFIGS[name]), real_tiles(real_slide, count=3)
    torch.manual_seed(0)
    head = ClassificationHead(encoder.config.embed_dim, HeadConfig(("a", "b", "c")))
    path = tmp_path / "tile_encoder" / "model.onnx"
    path.parent.mkdir()
    write_graph(tile_graph(encoder, PRECISIONS[precision], head, patch_tokens=True), path)
    with torch.no_grad():
        tokens = encoder.patch_tokens(torch.from_numpy(tiles))
        expected = {
            "EMBEDDINGS": tokens[:, 0].numpy(),
            "TILE_LOGITS": head(tokens[:, 0]).numpy(),
            "PATCH_TOKENS": tokens.numpy(),
        }
    np.testing.assert_array_equal(expected["EMBEDDINGS"], in_pytorch(encoder, tiles))
    assert not without_kernel(uses_of(path)), "on a GPU"
    plain = expanded(onnx.load(path)).SerializeToString()
    for found in (
        all_outputs(path, tiles),
        all_outputs(plain, tiles),
        TrueHalf(tmp_path)("tile_encoder", {"TILES": tiles}),
    ):
        assert found.keys() == expected.keys()
        for output, wanted in expected.items():
            assert found[output].dtype == np.float32
            _, cosine, relative = distance(found[output], wanted)
            assert relative < (1e-5 if precision == "fp32" else 2e-2), output
            assert cosine > (0.999999 if precision == "fp32" else 0.999), output


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_plain_graph_for_tensorrt_is_the_same_function(precision: str, tmp_path: Path) -> None:
    encoder = seeded_encoder(NARROW)
    write_graph(tile_graph(encoder, PRECISIONS[precision]), tmp_path / "model.onnx")
    tiles = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    plain = expanded(onnx.load(tmp_path / "model.onnx"))
    own = {(node.domain, node.op_type) for node in plain.graph.node if node.domain}
    assert own == {("com.microsoft", "MultiHeadAttention")}
    assert all(len(node.input) == 3 for node in plain.graph.node if node.op_type == "MultiHeadAttention")
    found, expected = run(plain.SerializeToString(), tiles), run(tmp_path / "model.onnx", tiles)
    np.testing.assert_allclose(found, expected, atol=1e-5 if precision == "fp32" else 0.02)
