"""Variants of "the slide embedding", and those that the known public code paths compute.

The same weights give different vectors in different public code paths (see `docs/embedding-variants.md`), so
the choice is a value that is served in the contract and written into every output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from gigapath_contract.coordinates import CoordinateRule
from training.errors import TrainingError

Pooling = Literal["cls", "mean"]
FinalNorm = Literal["norm", "encoder_norm+norm"]
Order = Literal["row-major"]


@dataclass(frozen=True)
class EmbeddingVariant:
    """One way to take the slide embedding out of the slide encoder.

    Attributes:
        pooling: the CLS token, or the mean over the tiles.
        layer: index into the states h_0 (embedded tiles) .. h_L (after the last block).
        norm: `norm` only, or the encoder's own final norm and then `norm` (which exists for h_L alone).
        coordinates: how a tile's level-0 pixels become the grid index that the position table is read with.
        order: the order of the tiles; it matters, because segments and dilation go by the index in the
        sequence.
    """

    pooling: Pooling = "cls"
    layer: int = 12
    norm: FinalNorm = "encoder_norm+norm"
    coordinates: CoordinateRule = "level0/256"
    order: Order = "row-major"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("pooling", self.pooling, get_args(Pooling)),
            ("norm", self.norm, get_args(FinalNorm)),
            ("coordinates", self.coordinates, get_args(CoordinateRule)),
            ("order", self.order, get_args(Order)),
        ):
            if value not in allowed:
                raise TrainingError(
                    f"embedding variant: {name} is {value!r}; it can be {' or '.join(allowed)}"
                )

    def check_depth(self, depth: int) -> None:
        """Raise a `TrainingError` unless an encoder of `depth` blocks has this variant."""
        if not 0 <= self.layer <= depth:
            raise TrainingError(f"embedding variant: layer {self.layer} does not exist; choose 0 to {depth}")
        if self.norm == "encoder_norm+norm" and self.layer != depth:
            raise TrainingError(
                f"embedding variant: the encoder's final norm is only applied after the last block; "
                f"choose layer {depth} or norm 'norm'"
            )


@dataclass(frozen=True)
class PublishedVariant:
    """What a public code path computes.

    Attributes:
        variant: the embedding that it returns.
        source: the program, file and options.
        max_wsi_size: slide edge in px from which it derives its segment lengths.
    """

    variant: EmbeddingVariant
    source: str
    max_wsi_size: int = 262_144


KNOWN_VARIANTS: dict[str, PublishedVariant] = {
    "upstream-readme": PublishedVariant(
        EmbeddingVariant("cls", 12, "encoder_norm+norm", "level0/256"),
        "prov-gigapath README: slide_encoder(tile_embed, coordinates)",
    ),
    "upstream-pipeline": PublishedVariant(
        EmbeddingVariant("cls", 12, "norm", "level0/256"),
        "prov-gigapath gigapath/pipeline.py: last_layer_embed, global_pool left at False",
    ),
    "upstream-demo": PublishedVariant(
        EmbeddingVariant("mean", 12, "norm", "level0/256"),
        "prov-gigapath demo: the pipeline with global_pool=True",
    ),
    "panda-finetune": PublishedVariant(
        EmbeddingVariant("cls", 11, "norm", "level0/256"),
        "prov-gigapath scripts/run_panda.sh: feat_layer 11, max_wsi_size 250000, global_pool left at False",
        max_wsi_size=250_000,
    ),
    "trident": PublishedVariant(
        EmbeddingVariant("mean", 11, "norm", "level0/patch_size_level0"),
        "TRIDENT slide_encoder_models/load.py: global_pool=True, all_layer_embed[11]",
    ),
    "slide2vec": PublishedVariant(
        EmbeddingVariant("cls", 12, "encoder_norm+norm", "target-mpp/256"),
        "slide2vec encoders/models/gigapath.py: coordinates rescaled to the requested mpp",
    ),
}


def get_variant(name: str) -> PublishedVariant:
    """The published variant of that name; a `TrainingError` lists the names."""
    try:
        return KNOWN_VARIANTS[name]
    except KeyError:
        raise TrainingError(
            f"no embedding variant {name!r}; choose one of {', '.join(KNOWN_VARIANTS)}"
        ) from None
