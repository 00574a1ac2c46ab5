"""The two ways of `slide_occlusion`: where each is taken, and that both are today's masked forward."""

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
from export.graphs import occlusion_graph, write_graph
from export.plain import expanded
from export.samples import seeded_basis, seeded_coords
from gigapath_contract.reference import seeded_embeddings
from tests.export.conftest import TINY
from training.models.build import build_models
from training.models.presets import Preset
from training.models.slide_model import SlideModel
from training.models.variant import EmbeddingVariant

SEGMENT = 24
Arrays = dict[str, NDArray[np.generic]]


def small_model(preset: Preset, dilations: tuple[int, ...] = (1, 2, 4, 8, 16)) -> SlideModel:
    """Two layers of which the shortest segment holds 24 tokens."""
    slide = replace(
        preset.slide, depth=2, dilations=dilations, fixed_segment_lengths=(SEGMENT, 29, 50, 90, 400)
    )
    variant = EmbeddingVariant("mean", 2, "encoder_norm+norm")
    return build_models(replace(preset, slide=slide, variant=variant), seed=0).slide_model.eval()


def inputs(tiles: int, masks: int = 12) -> Arrays:
    """Masks that keep from none to all of the tiles, in no order."""
    generator = np.random.default_rng(tiles)
    keep = generator.random((masks, tiles)) < generator.permutation(np.linspace(0, 1, masks))[:, None]
    embeddings = seeded_embeddings(*seeded_basis(32), tiles)
    return {"EMBEDDINGS": embeddings, "COORDS": seeded_coords(tiles), "KEEP": keep}


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(path.with_suffix(""))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ran_branches(session: onnxruntime.InferenceSession) -> bool:
    """Whether the way by branches was taken: with five attentions per layer it has the merge's Softmax."""
    return '"op_name" : "Softmax"' in Path(session.end_profiling()).read_text()


def published(
    published_encoder: Callable[..., tuple[Tensor, Tensor]], model: SlideModel, slide: Arrays
) -> NDArray[np.float64]:
    """The literal reading's mean-pooled last state under every mask."""
    config = model.encoder.config
    embeddings, coords, keep = (torch.from_numpy(x) for x in slide.values())
    return np.stack(
        [
            published_encoder(
                model.encoder.state_dict(),
                config.heads,
                config.segment_lengths,
                config.dilations,
                embeddings,
                coords,
                mask,
            )[1][1].numpy()
            for mask in keep
        ]
    )


@pytest.fixture(scope="module")
def small_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slide_occlusion` of `small_model`."""
    path = tmp_path_factory.mktemp("small") / "model.onnx"
    write_graph(occlusion_graph(small_model(TINY)), path)
    return path


@pytest.fixture
def published_encoder() -> Callable[..., tuple[Tensor, Tensor]]:
    from tests.training.models.conftest import _encoder

    return _encoder


@pytest.mark.parametrize("dilations", [(1, 2, 4, 8, 16), (1, 8, 4, 8, 16)])
def test_both_sides_of_the_border_are_the_published_masked_forward(
    tiny: Preset,
    tmp_path: Path,
    dilations: tuple[int, ...],
    published_encoder: Callable[..., tuple[Tensor, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several chunks of masks, slides on both sides of the shortest segment, and misaligned segments."""
    monkeypatch.setattr(ways, "CHUNK_TOKENS", 60)
    monkeypatch.setattr(ways, "SLACK", 2.0)
    model = small_model(tiny, dilations)
    write_graph(occlusion_graph(model), tmp_path / "model.onnx")
    for tiles in (1, 5, SEGMENT - 2, SEGMENT - 1, SEGMENT, SEGMENT + 1, 29, 100):
        session, slide = session_of(tmp_path / "model.onnx"), inputs(tiles)
        (got,) = session.run(["SLIDE"], slide)
        assert np.abs(got - published(published_encoder, model, slide)).max() < 1e-5
        assert ran_branches(session) == (tiles + 1 > SEGMENT)


def test_the_published_quirk_takes_the_branches(
    tiny: Preset, tmp_path: Path, published_encoder: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """A key bias against every query's: next to padding keys the others have no mass left."""
    model = small_model(tiny)
    with torch.no_grad():
        for name, weight in model.encoder.state_dict().items():
            if name.endswith(("q_proj.bias", "k_proj.bias")):
                weight[:] = 20 * (1 if "q_proj" in name else -1)
    write_graph(occlusion_graph(model), tmp_path / "model.onnx")
    session, slide = session_of(tmp_path / "model.onnx"), inputs(SEGMENT - 2)
    (got,) = session.run(["SLIDE"], slide)
    assert np.abs(got - published(published_encoder, model, slide)).max() < 1e-4
    assert ran_branches(session)


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
    unique = [p.numel() for p in small_model(TINY).parameters() if p.numel() > 2000]
    assert sum(large) <= sum(unique) + 1000 * 32 + 10_000, "the parameters, and the table of positions"
