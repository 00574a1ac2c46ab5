"""The slide encoder in half precision, attention included, next to PyTorch's own half precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from export.graphs import slide_graph, write_graph
from export.half_gate import TrueHalf
from export.parity import LARGEST_HALF
from export.precision import halve
from export.samples import seeded_basis, seeded_coords
from gigapath_contract.reference import seeded_embeddings
from training.models.build import build_models
from training.models.presets import Preset
from training.models.slide_model import SlideModel

WIDTH = 32


def slide(tiles: int) -> tuple[Tensor, Tensor]:
    embeddings = seeded_embeddings(*seeded_basis(WIDTH), tiles)
    return torch.from_numpy(embeddings), torch.from_numpy(seeded_coords(tiles))


@torch.no_grad()
def peaked(preset: Preset, sharpness: float) -> SlideModel:
    """Two layers, their queries times `sharpness`."""
    deeper = replace(preset.slide, depth=2)
    variant = replace(preset.variant, layer=2)
    model = build_models(replace(preset, slide=deeper, variant=variant), seed=0).slide_model
    for name, parameter in model.encoder.named_parameters():
        if "q_proj" in name:
            parameter.mul_(sharpness)
    return model


@pytest.mark.parametrize("sharpness", [0.1, 1, 4])
def test_it_is_as_near_as_pytorchs_own_half_precision(tiny: Preset, tmp_path: Path, sharpness: float) -> None:
    model = peaked(tiny, sharpness)
    slides = {tiles: slide(tiles) for tiles in (1, 16, 1100)}
    with torch.no_grad():
        exact = {tiles: model(*inputs).layers for tiles, inputs in slides.items()}
        halve(model.encoder)
        half = {tiles: model(*inputs).layers for tiles, inputs in slides.items()}
    graph = tmp_path / "slide_encoder" / "model.onnx"
    graph.parent.mkdir()
    write_graph(slide_graph(model), graph)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    true_half = TrueHalf(tmp_path)
    for tiles, (embeddings, coords) in slides.items():
        inputs = {"EMBEDDINGS": embeddings.numpy(), "COORDS": coords.numpy()}
        theirs = np.abs(half[tiles].numpy() - exact[tiles].numpy()).max()
        for layers in (session.run(["LAYERS"], inputs)[0], true_half("slide_encoder", inputs)["LAYERS"]):
            own = np.abs(layers - exact[tiles].numpy()).max()
            assert 0 < own < 1.5 * theirs + 1e-3
            assert own < 0.02
    largest = {tensor.name: tensor.largest for tensor in true_half.tensors()}
    assert len(largest) > 100
    assert max(largest.values()) < LARGEST_HALF, "not even where no output looks"
