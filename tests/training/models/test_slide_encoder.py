"""The slide encoder against the published outputs, and against the literal reading at other sizes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from training.errors import TrainingError
from training.models.head import ClassificationHead, HeadConfig
from training.models.presets import SlideEncoderConfig, get_preset
from training.models.random_init import randomise
from training.models.slide_encoder import LongNetSlideEncoder
from training.models.slide_model import SlideModel
from training.models.variant import EmbeddingVariant

GOLDEN = Path(__file__).with_name("longnet_12l384d.npz")
"""Outputs of the published code on a CPU, in float32, for `golden_model` and `slide`."""

TINY = SlideEncoderConfig(
    "tiny",
    in_chans=12,
    embed_dim=32,
    depth=3,
    heads=8,
    fixed_segment_lengths=(8, 20, 48, 96, 400),
    dilations=(1, 2, 4, 8, 16),
)


def slide(tiles: int, width: int) -> tuple[Tensor, Tensor]:
    """Tile embeddings [N, D] and coordinates [N, 2] as the golden outputs were made from."""
    generator = np.random.default_rng([11, tiles])
    embeddings = generator.standard_normal((1, tiles, width), dtype=np.float32)[0]
    side = math.ceil(math.sqrt(1.7 * tiles))
    cell = np.sort(generator.choice(side * side, tiles, replace=False))
    coords = np.stack([cell % side, cell // side], axis=-1) * 256 + generator.integers(0, 256, 2)
    return torch.from_numpy(embeddings), torch.from_numpy(coords)


@pytest.fixture(scope="module")
def golden_model() -> LongNetSlideEncoder:
    model = LongNetSlideEncoder(get_preset("gigapath-flash").slide)
    state = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        noise = np.random.default_rng([7, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
        if name.endswith("bias"):
            weight = noise * 0.1
        elif noise.ndim == 1:
            weight = 1 + 0.1 * noise
        elif name == "cls_token":
            weight = noise * 0.5
        else:
            weight = noise * (2 if "q_proj" in name or "k_proj" in name else 1) / math.sqrt(shape[-1])
        state[name] = torch.from_numpy(weight.astype(np.float32))
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture(scope="module")
def tiny() -> LongNetSlideEncoder:
    return seeded(TINY)


def seeded(config: SlideEncoderConfig) -> LongNetSlideEncoder:
    model = LongNetSlideEncoder(config)
    randomise(model, 1)
    return model.eval()


@pytest.mark.parametrize("tiles", [1, 15, 37, 1023, 1024, 1068, 3000])
def test_agrees_with_the_published_outputs(golden_model: LongNetSlideEncoder, tiles: int) -> None:
    with torch.inference_mode(), np.load(GOLDEN) as golden:
        output = golden_model(*slide(tiles, 384))
        want = {name: torch.from_numpy(golden[f"n{tiles}.{name}"]) for name in (
            "layers_cls", "layers_mean", "last_cls", "last_mean"
        )}  # fmt: skip
    assert (output.layers[:, 0] - want["layers_cls"]).abs().max() < 2e-5
    assert (output.layers[:, 1] - want["layers_mean"]).abs().max() < 2e-5
    assert (output.encoder_norm[0] - want["last_cls"]).abs().max() < 2e-5
    assert (output.encoder_norm[1] - want["last_mean"]).abs().max() < 2e-5


@pytest.mark.parametrize("tiles", [1, 7, 19, 89, 150])
@pytest.mark.parametrize("heads", [8, 16])
def test_agrees_with_the_literal_reading(
    tiles: int, heads: int, published_encoder: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """Segments of 20 and 90 with dilation 8 are misaligned ones; a mask drops a third of the tiles."""
    config = SlideEncoderConfig(
        "tiny", 12, 64, 2, heads, 2, fixed_segment_lengths=(8, 20, 50, 90, 400), dilations=(1, 8, 4, 8, 16)
    )
    model, (embeddings, coords) = seeded(config), slide(tiles, 12)
    keep = torch.rand(3, tiles, generator=torch.Generator().manual_seed(0)) > 0.33
    keep[0], keep[1] = True, False
    with torch.inference_mode():
        layers, encoder_norm = model(embeddings, coords, keep)
    for i, mask in enumerate(keep):
        want = published_encoder(
            model.state_dict(), heads, config.segment_lengths, config.dilations, embeddings, coords, mask
        )
        assert (layers[i] - want[0]).abs().max() < 1e-5
        assert (encoder_norm[i] - want[1]).abs().max() < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tiles", [5, 150, 1023])
def test_a_mask_that_keeps_all_changes_no_bit(tiny: LongNetSlideEncoder, tiles: int, threads: int) -> None:
    """Whichever other masks it is evaluated with."""
    torch.set_num_threads(threads)
    inputs = slide(tiles, 12)
    model = SlideModel(
        tiny, ClassificationHead(32, HeadConfig(("a", "b", "c"))), EmbeddingVariant("mean", 2, "norm")
    ).eval()
    others = torch.rand(4, tiles, generator=torch.Generator().manual_seed(1)) > 0.5
    with torch.inference_mode():
        bare, score = model(*inputs), model.score(*inputs)
        for many in (0, 1, 4):
            keep = torch.cat([others[:many], torch.ones(1, tiles, dtype=torch.bool)])
            masked, masked_score = model(*inputs, keep), model.score(*inputs, keep)
            for want, got in zip((*bare, *score), (*masked, *masked_score), strict=True):
                assert torch.equal(want, got[-1])


def test_a_masked_tile_can_be_anything(tiny: LongNetSlideEncoder) -> None:
    """Its embedding and its place don't count; those of the others do, and stay."""
    embeddings, coords = slide(150, 12)
    keep = torch.rand(1, 150, generator=torch.Generator().manual_seed(2)) > 0.5
    with torch.inference_mode():
        want = tiny(embeddings, coords, keep)
        gone = torch.where(keep[0, :, None], embeddings, 1e3 * torch.randn_like(embeddings))
        moved = torch.where(keep[0, :, None], coords, coords.flip(0))
        got = tiny(gone, moved, keep)
        other = tiny(torch.where(keep[0, :, None], embeddings + 1, embeddings), coords, keep)
    assert (got.layers - want.layers).abs().max() < 1e-6
    assert (other.layers - want.layers).abs().max() > 1e-2


@pytest.mark.parametrize("tiles", [7, 150])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tile_that_is_not_finite_touches_the_masks_that_keep_it(tiles: int, value: float) -> None:
    """With misaligned segments too, where masked tiles are computed; and under gradients."""
    config = replace(TINY, fixed_segment_lengths=(8, 20, 50, 90, 400), dilations=(1, 8, 4, 8, 16))
    for model in (seeded(TINY), seeded(config)):
        embeddings, coords = slide(tiles, 12)
        keep = torch.rand(4, tiles, generator=torch.Generator().manual_seed(2)) > 0.5
        keep[:, 3] = torch.tensor([True, False, True, False])
        broken = embeddings.clone()
        broken[3] = value
        layers = model(broken, coords, keep).layers
        assert layers.isnan().flatten(1).any(dim=1).tolist() == keep[:, 3].tolist()
        if model.config == TINY:
            want = model(embeddings, coords, keep).layers[1::2]
            torch.testing.assert_close(layers[1::2], want, atol=1e-6, rtol=0.0)


def test_many_masks_embed_the_tiles_once(tiny: LongNetSlideEncoder) -> None:
    rows = []
    hook = tiny.patch_embed.register_forward_hook(lambda module, inputs, out: rows.append(out.shape))
    tiny(*slide(40, 12), torch.ones(5, 40, dtype=torch.bool))
    hook.remove()
    assert rows == [(40, 32)]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(("layer", "norm"), [(0, "norm"), (1, "norm"), (3, "norm"), (3, "encoder_norm+norm")])
def test_embed_is_the_variants_vector_of_the_full_forward(
    tiny: LongNetSlideEncoder, pooling: str, layer: int, norm: str
) -> None:
    variant = EmbeddingVariant(pooling, layer, norm)  # type: ignore[arg-type]
    inputs = slide(150, 12)
    keep = torch.rand(4, 150, generator=torch.Generator().manual_seed(3)) > 0.5
    with torch.inference_mode():
        output, vectors = tiny(*inputs, keep), tiny.embed(*inputs, variant, keep)
    states = output.layers[:, layer] if norm == "norm" else output.encoder_norm
    assert (vectors - states[:, 0 if pooling == "cls" else 1]).abs().max() < 2e-6


def test_embed_leaves_out_the_blocks_beyond_its_layer(tiny: LongNetSlideEncoder) -> None:
    calls: list[int] = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, out: calls.append(out.shape[1]))
        for block in tiny.encoder.layers
    ]
    tiny.embed(*slide(40, 12), EmbeddingVariant("cls", 2, "norm"))
    for hook in hooks:
        hook.remove()
    assert calls == [41, 1]  # the second block has the class token's query only


def test_an_empty_mask_gives_numbers(tiny: LongNetSlideEncoder) -> None:
    output = tiny(*slide(40, 12), torch.zeros(2, 40, dtype=torch.bool))
    assert output.layers.isfinite().all()
    assert torch.equal(output.layers[0, :, 1], tiny.norm.bias.expand(4, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, c, k: (e[:, :5], c, k), r"tile embeddings are \[40, 5\]; this encoder takes \[N, 12\]"),
        (lambda e, c, k: (e[:0], c[:0], k[:, :0]), "without tiles"),
        (lambda e, c, k: (e, c.float(), k), "must be int64"),
        (lambda e, c, k: (e, c[:39], k), r"must be int64 \[40, 2\]"),
        (lambda e, c, k: (e, c, k.float()), r"must be bool \[M, 40\]"),
        (lambda e, c, k: (e, c, k[:, :39]), r"must be bool \[M, 40\]"),
    ],
)
def test_refuses_what_is_no_slide(
    tiny: LongNetSlideEncoder, change: Callable[..., tuple[Tensor, Tensor, Tensor]], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        tiny(*change(*slide(40, 12), torch.ones(1, 40, dtype=torch.bool)))


def test_dropout_and_drop_path_are_the_published_defaults() -> None:
    model = LongNetSlideEncoder(SlideEncoderConfig("deep", in_chans=4, embed_dim=32, depth=12))
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.25}
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    inputs = slide(20, 4)
    model.train()
    assert not torch.equal(model(*inputs).layers, model(*inputs).layers)
    model.eval()
    assert torch.equal(model(*inputs).layers, model(*inputs).layers)


def test_gradients_reach_every_weight_that_the_vector_depends_on(tiny: LongNetSlideEncoder) -> None:
    """As published, layer 2's vector leaves block 3 and the encoder's final norm without a gradient."""
    tiny.zero_grad()
    torch.autograd.backward(tiny.embed(*slide(150, 12), EmbeddingVariant("mean", 2, "norm")).square().sum())
    without = {name for name, p in tiny.named_parameters() if p.grad is None}
    assert without == {
        n for n, _ in tiny.named_parameters() if n.startswith(("encoder.layers.2.", "encoder.layer_norm."))
    }
    for name, parameter in tiny.named_parameters():
        if parameter.grad is not None:
            # A key bias moves all logits of a query alike, but for the zero padding's.
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def test_a_step_lowers_the_loss_of_a_slide_longer_than_a_segment() -> None:
    """The demo encoder as fine-tuning has it: dropout off here, so that two losses can be compared."""
    model, (embeddings, coords) = seeded(get_preset("demo").slide), slide(1100, 96)
    head = nn.Linear(96, 2)
    optimiser = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        vector = model.embed(embeddings, coords, EmbeddingVariant("cls", 4, "norm"))
        loss = nn.functional.cross_entropy(head(vector)[None], torch.tensor([1]))
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
