"""Embedding variants, and those of the public code paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from training.errors import TrainingError
from training.models.head import ClassificationHead, HeadConfig
from training.models.presets import SlideEncoderConfig, get_preset
from training.models.random_init import randomise
from training.models.slide_encoder import LongNetSlideEncoder
from training.models.slide_model import SlideModel
from training.models.variant import KNOWN_VARIANTS, EmbeddingVariant, get_variant


@pytest.fixture(scope="module")
def encoder() -> LongNetSlideEncoder:
    """Twelve layers, as the published variants need them, and tiny."""
    model = LongNetSlideEncoder(SlideEncoderConfig("deep", in_chans=6, embed_dim=32, depth=12))
    randomise(model, 0)
    return model.eval()


INPUTS = torch.randn(30, 6, generator=torch.Generator().manual_seed(1)), torch.arange(60).reshape(30, 2) * 256


@pytest.mark.parametrize("name", KNOWN_VARIANTS)
def test_a_published_variant_is_what_its_code_path_computes(name: str, encoder: LongNetSlideEncoder) -> None:
    """Each public path, spelled out on the token states as that path takes them."""
    states = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, out: states.append(out[0]))
        for block in encoder.encoder.layers
    ]
    with torch.inference_mode():
        got = SlideModel(encoder, None, get_variant(name).variant)(*INPUTS).slide
        for hook in hooks:
            hook.remove()
        norm, encoder_norm = encoder.norm, encoder.encoder.layer_norm
        want = {
            "upstream-readme": lambda: norm(encoder_norm(states[11]))[0],
            "upstream-pipeline": lambda: norm(states[11])[0],
            "upstream-demo": lambda: norm(states[11][1:].mean(dim=0)),
            "panda-finetune": lambda: norm(states[10])[0],  # h_11 is what the eleventh block returns
            "trident": lambda: norm(states[10][1:].mean(dim=0)),
            "slide2vec": lambda: norm(encoder_norm(states[11]))[0],
        }[name]()
    assert (got - want).abs().max() < 1e-6


def test_published_variants_name_their_coordinate_rules() -> None:
    rules = {name: published.variant.coordinates for name, published in KNOWN_VARIANTS.items()}
    assert rules.pop("trident") == "level0/patch_size_level0"
    assert rules.pop("slide2vec") == "target-mpp/256"
    assert set(rules.values()) == {"level0/256"}
    with pytest.raises(TrainingError, match="no embedding variant 'titan'; choose one of upstream-readme, "):
        get_variant("titan")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "max"}, "pooling is 'max'; it can be cls or mean"),
        ({"norm": "none"}, "norm is 'none'"),
        ({"coordinates": "level1/256"}, "coordinates is 'level1/256'"),
        ({"order": "random"}, "order is 'random'"),
    ],
)
def test_refuses_a_variant_that_is_none(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        EmbeddingVariant(**fields)


def test_a_variant_must_exist_in_its_encoder(encoder: LongNetSlideEncoder) -> None:
    with pytest.raises(TrainingError, match="layer 13 does not exist; choose 0 to 12"):
        SlideModel(encoder, None, EmbeddingVariant("cls", 13, "norm"))
    with pytest.raises(
        TrainingError, match="only applied after the last block; choose layer 12 or norm 'norm'"
    ):
        SlideModel(encoder, None, EmbeddingVariant("cls", 11, "encoder_norm+norm"))


def test_scores_are_the_heads_on_the_variants_vector(encoder: LongNetSlideEncoder) -> None:
    head = ClassificationHead(32, HeadConfig(("benign", "lesion", "other")))
    model = SlideModel(encoder, head, EmbeddingVariant("mean", 7, "norm"))
    keep = torch.rand(4, 30, generator=torch.Generator().manual_seed(2)) > 0.5
    with torch.inference_mode():
        whole, score = model(*INPUTS), model.score(*INPUTS)
        masked, masked_score = model(*INPUTS, keep), model.score(*INPUTS, keep)
        logits = head(whole.slide)
    assert whole.layers.shape == (13, 2, 32)
    assert masked.layers.shape == (4, 13, 2, 32)
    assert masked_score.logits is not None
    assert masked_score.logits.shape == (4, 3)
    assert torch.equal(whole.slide, whole.layers[7, 1])
    assert whole.logits is not None
    assert torch.equal(logits, whole.logits)
    for got, want in ((score, whole), (masked_score, masked)):
        assert got.logits is not None
        assert want.logits is not None
        assert torch.allclose(got.slide, want.slide, atol=2e-6)
        assert torch.allclose(got.logits, want.logits, atol=2e-6)


def test_presets_variants_fit_their_encoders() -> None:
    for name in ("gigapath", "gigapath-flash", "demo"):
        preset = get_preset(name)
        preset.variant.check_depth(preset.slide.depth)


@pytest.mark.parametrize(
    ("classes", "kind", "message"),
    [
        ((), "multiclass", "at least one"),
        (("a", "a"), "multiclass", "each once"),
        (("a",), "multiclass", "can't have 1 classes"),
        (("a", "b"), "binary", "can't have 2 classes"),
        (("a", "b"), "softmax", "head kind 'softmax'"),
    ],
)
def test_refuses_a_head_that_is_none(classes: tuple[str, ...], kind: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        HeadConfig(classes, kind)
