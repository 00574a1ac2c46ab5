"""The ways of `slide_occlusion` and `slide_encoder`: where each is taken, and that all give the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from export import ways
from export.graphs import occlusion_graph, slide_graph, write_graph
from export.plain import expanded
from export.samples import seeded_basis, seeded_coords
from gigapath_contract.reference import seeded_embeddings
from tests.export.conftest import TINY
from training.models.build import build_models
from training.models.slide_model import SlideModel
from training.models.variant import EmbeddingVariant

SEGMENT = 24
Arrays = dict[str, NDArray[np.generic]]


def small_model(misaligned: bool = False) -> SlideModel:
    """Two layers of which the shortest segment holds 24 tokens; from 30 tokens on some can be misaligned."""
    lengths, dilations = (SEGMENT, 32, 56, 96, 400), (1, 2, 4, 8, 16)
    if misaligned:
        lengths, dilations = (SEGMENT, 29, 50, 90, 400), (1, 8, 4, 8, 16)
    slide = replace(TINY.slide, depth=2, dilations=dilations, fixed_segment_lengths=lengths)
    variant = EmbeddingVariant("mean" if misaligned else "cls", 2, "encoder_norm+norm")
    return build_models(replace(TINY, slide=slide, variant=variant), seed=0).slide_model.eval()


def inputs(tiles: int, masks: int = 6) -> Arrays:
    """Masks that keep from none to all of the tiles, in no order."""
    generator = np.random.default_rng(tiles)
    keep = generator.random((masks, tiles)) < generator.permutation(np.linspace(0, 1, masks))[:, None]
    embeddings = seeded_embeddings(*seeded_basis(32), tiles)
    return {"EMBEDDINGS": embeddings, "COORDS": seeded_coords(tiles), "KEEP": keep}


def session_of(path: Path, folder: Path) -> onnxruntime.InferenceSession:
    """A session whose profile goes into `folder`."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def way_of(session: onnxruntime.InferenceSession) -> str:
    """The last way that was taken: other than merged attention, branches have a Softmax for their merge."""
    profile = Path(session.end_profiling()).read_text()
    ran = {name for name in ("Softmax", "ScatterElements") if f'"op_name" : "{name}"' in profile}
    return "merged" if not ran else "kept" if "ScatterElements" in ran else "branches"


def published(
    published_encoder: Callable[..., tuple[Tensor, Tensor]], model: SlideModel, slide: Arrays
) -> NDArray[np.float64]:
    """The literal reading's SLIDE under every mask, or else its LAYERS."""
    config = model.encoder.config
    embeddings, coords, *keep = (torch.from_numpy(x) for x in slide.values())

    def run(mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return published_encoder(
            model.encoder.state_dict(),
            config.heads,
            config.segment_lengths,
            config.dilations,
            embeddings,
            coords,
            mask,
        )

    if not keep:
        return np.asarray(run(None)[0].numpy())
    pooling = 0 if model.variant.pooling == "cls" else 1
    return np.stack([run(mask)[1][pooling].numpy() for mask in keep[0]])


@pytest.fixture(scope="module")
def small_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slide_occlusion` of `small_model`, with small chunks of masks."""
    path = tmp_path_factory.mktemp("small") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways, "CHUNK_TOKENS", 60)
        patch.setattr(ways, "SLACK", 2.0)
        write_graph(occlusion_graph(small_model()), path)
    return path


@pytest.fixture(scope="module")
def small_slide_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slide_encoder` of `small_model`."""
    path = tmp_path_factory.mktemp("small") / "slide.onnx"
    write_graph(slide_graph(small_model()), path)
    return path


@pytest.fixture
def published_encoder() -> Callable[..., tuple[Tensor, Tensor]]:
    from tests.training.models.conftest import _encoder

    return _encoder


@pytest.mark.parametrize("tiles", [1, 5, 22, 23, 24, 31, 32, 55, 56, 95, 96, 100, 401])
def test_every_length_is_the_published_masked_forward(
    small_graph: Path, tmp_path: Path, tiles: int, published_encoder: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """Several chunks of masks, on both sides of every segment's border; some keep nothing of a segment."""
    slide = inputs(tiles)
    slide["KEEP"][2:4, : tiles // 2] = False
    session = session_of(small_graph, tmp_path)
    (got,) = session.run(["SLIDE"], slide)
    assert np.abs(got - published(published_encoder, small_model(), slide)).max() < 1e-5
    assert way_of(session) == ("merged" if tiles < SEGMENT else "kept")


def test_misaligned_segments_take_the_branches(
    tmp_path: Path, published_encoder: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    model = small_model(misaligned=True)
    write_graph(occlusion_graph(model), tmp_path / "model.onnx")
    for tiles, way in ((23, "merged"), (24, "kept"), (28, "kept"), (29, "branches"), (100, "branches")):
        session, slide = session_of(tmp_path / "model.onnx", tmp_path), inputs(tiles)
        (got,) = session.run(["SLIDE"], slide)
        assert np.abs(got - published(published_encoder, model, slide)).max() < 1e-5
        assert way_of(session) == way


def test_slide_encoder_merges_the_branches_of_a_short_slide(
    small_slide_graph: Path, tmp_path: Path, published_encoder: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    for tiles in (1, 5, SEGMENT - 1, SEGMENT, 100):
        session, slide = session_of(small_slide_graph, tmp_path), inputs(tiles)
        del slide["KEEP"]
        layers, vector = session.run(["LAYERS", "SLIDE"], slide)
        assert np.abs(layers - published(published_encoder, small_model(), slide)).max() < 1e-5
        assert np.isfinite(vector).all()
        assert way_of(session) == ("merged" if tiles < SEGMENT else "branches")


def test_the_published_quirk_takes_the_branches(
    small_graph: Path,
    small_slide_graph: Path,
    tmp_path: Path,
    published_encoder: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """A key bias against every query's: next to padding keys the others have no mass left."""
    model, biases = small_model(), {"q_proj.bias": 20.0, "k_proj.bias": -20.0}
    with torch.no_grad():
        for name, weight in model.encoder.state_dict().items():
            weight[:] = biases.get(".".join(name.split(".")[-2:]), weight)
    for path, output in ((small_graph, "SLIDE"), (small_slide_graph, "LAYERS")):
        graph = onnx.load(path)
        changed = [one for one in graph.graph.initializer if one.name.endswith(tuple(biases))]
        assert len(changed) == 4
        for one in changed:
            value = np.full(tuple(one.dims), biases[".".join(one.name.split(".")[-2:])], np.float32)
            one.CopyFrom(onnx.numpy_helper.from_array(value, one.name))
        onnx.save(graph, tmp_path / "model.onnx")
        for tiles in (SEGMENT - 2, 100):
            session, slide = session_of(tmp_path / "model.onnx", tmp_path), inputs(tiles)
            if output == "LAYERS":
                del slide["KEEP"]
            (got,) = session.run([output], slide)
            assert np.abs(got - published(published_encoder, model, slide)).max() < 1e-4
            assert way_of(session) == ("kept" if tiles == 100 and output == "SLIDE" else "branches")


def test_a_tile_that_is_not_finite_touches_the_masks_that_keep_it(small_graph: Path, tmp_path: Path) -> None:
    """On every way, and in what TensorRT gets."""
    onnx.save(expanded(onnx.load(small_graph)), tmp_path / "plain.onnx")
    for path, tiles in itertools.product((small_graph, tmp_path / "plain.onnx"), (5, 100)):
        session, slide = onnxruntime.InferenceSession(path), inputs(tiles)
        (want,) = session.run(["SLIDE"], slide)
        slide["EMBEDDINGS"][3, 7] = np.nan
        (got,) = session.run(["SLIDE"], slide)
        kept = slide["KEEP"][:, 3].astype(np.bool_)
        assert kept.any()
        assert np.isnan(got[kept]).all()
        np.testing.assert_allclose(got[~kept], want[~kept], atol=1e-5)


def test_tensorrt_gets_the_branches_alone(small_graph: Path, tmp_path: Path) -> None:
    both = onnx.load(small_graph)
    plain = expanded(both)
    assert {"If", "Loop"}.isdisjoint(node.op_type for node in plain.graph.node)
    assert {"If"} <= {node.op_type for node in both.graph.node}
    onnx.save(plain, tmp_path / "plain.onnx")
    for tiles in (5, 100):
        slide = inputs(tiles)
        want, got = (
            onnxruntime.InferenceSession(path).run(None, slide)
            for path in (small_graph, tmp_path / "plain.onnx")
        )
        for one, other in zip(want, got, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_weights_are_stored_once(small_graph: Path) -> None:
    large = [
        math.prod(weight.dims)
        for weight in onnx.load(small_graph).graph.initializer
        if math.prod(weight.dims) > 2000
    ]
    unique = [p.numel() for p in small_model().parameters() if p.numel() > 2000]
    assert sum(large) <= sum(unique) + 1000 * 32 + 10_000, "the parameters, and the table of positions"
