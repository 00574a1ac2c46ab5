"""The published optimisation: groups, layer decay with and without its quirk, the learning rate by step."""

from __future__ import annotations

import math

import pytest
import torch

from training.loops.optim import (
    LayerIds,
    freeze_unreached,
    layer_id,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from training.models.build import build_models
from training.models.presets import get_preset
from training.models.slide_model import SlideModel


@pytest.fixture
def model() -> SlideModel:
    return build_models("demo", seed=0).slide_model


@pytest.mark.parametrize(("layer_ids", "projection"), [("published", 13), ("corrected", 0)])
def test_layer_ids_of_the_published_encoder(layer_ids: LayerIds, projection: int) -> None:
    ids = {
        "encoder.cls_token": 0,
        "encoder.patch_embed.proj.weight": projection,
        "encoder.encoder.layers.0.ffn.fc1.weight": 1,
        "encoder.encoder.layers.11.self_attn.q_proj.bias": 12,
        "encoder.encoder.layer_norm.weight": 13,
        "encoder.norm.bias": 13,
        "head.classifier.0.weight": 13,
    }
    assert {name: layer_id(name, 12, layer_ids) for name in ids} == ids


def test_each_parameter_is_in_one_group_with_its_share_and_decay(model: SlideModel) -> None:
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.95, layer_ids="published")
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len(list(model.parameters()))
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.05}
    share = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    depth = get_preset("demo").slide.depth
    assert share[id(model.encoder.cls_token)] == pytest.approx(0.95 ** (depth + 1))
    assert model.head is not None
    assert share[id(model.head.classifier[0].weight)] == 1
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rate(optimizer, 2.5e-4)
    assert {group["lr"] for group in optimizer.param_groups} == {2.5e-4 * g["lr_scale"] for g in groups}


def test_the_rate_warms_up_and_falls_as_published() -> None:
    def rate(epoch: float) -> float:
        return learning_rate(epoch, peak=2.5e-4, floor=1e-6, warmup=1, epochs=5)

    assert rate(0) == 0
    assert rate(0.5) == pytest.approx(1.25e-4)
    assert rate(1) == pytest.approx(2.5e-4)
    assert rate(3) == pytest.approx(1e-6 + 2.49e-4 / 2)
    assert rate(4) == pytest.approx(1e-6 + 2.49e-4 * (1 + math.cos(math.pi * 0.75)) / 2)
    assert rate(5) == pytest.approx(1e-6)
    assert learning_rate(0, peak=1, floor=0, warmup=0, epochs=5) == 1


def test_what_the_logits_do_not_depend_on_is_not_trained() -> None:
    model = build_models(get_preset("gigapath-flash").with_variant("panda-finetune"), seed=0).slide_model
    assert model.head is None  # the preset has none
    model = build_models("demo", seed=0).slide_model
    # The demo's variant is norm(h_4): every block counts, the encoder's own final norm doesn't.
    assert freeze_unreached(model) == ["encoder.encoder.layer_norm.weight", "encoder.encoder.layer_norm.bias"]
    assert not model.encoder.encoder.layer_norm.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
