"""The methods by name, with the settings of Captum and SHAP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from ..arrays import Float32, Int64
from ..errors import ClientError
from .grouping import owen_map, trees
from .methods.game import CoalitionGame
from .methods.model_outputs import ModelOutputs
from .methods.occlusion import keep_one, occlusion
from .methods.regions import grid_cells, sliding_windows
from .methods.result import Attribution, Grouping
from .methods.scorer import Scorer, average, bank_draws, medoid
from .methods.shapley import MOST_PLAYERS, shapley_regression
from .methods.trees import player_means
from .model.masked_slide import MaskedSlide

Method = Literal["partition_shap", "occlusion", "keep_one", "shapley_regression"]
Group = Literal["auto", "look", "place"]
OccluderName = Literal["in_place", "mean", "medoid"]
Occluder = OccluderName | Float32

BANK_DRAWS = 4
SHAPLEY_GROUPS = 256


@dataclass(frozen=True, eq=False)
class Settings:
    """How a slide is attributed; the names are Captum's and SHAP's where they have one.

    `Settings()` is the default map; `Settings(method="occlusion", sliding_window_shapes=4, strides=2)` asks
    what the score needs, with overlapping windows of 4 x 4 tiles.

    Attributes:
        method: `partition_shap` (how the score is shared among tiles), `occlusion` (what the score needs),
            `keep_one` (the score of each tile alone), `shapley_regression` (as the first, with standard
            errors, for at most 300 tiles or groups of tiles).
        occluder: how occluded tiles are replaced: `in_place` (masked), `mean` or `medoid` (the slide's mean
            or most typical embedding), one embedding [D], or a bank of them [B, D] to draw from.
        feature_mask: region of every tile [N], 0..G-1; the tiles of a region are occluded together.
        sliding_window_shapes, strides: side and step, in tiles, of the windows of `occlusion`.
        group: whether tiles are grouped by `look` (embedding) or by `place`; `auto` is, for `partition_shap`,
            the one whose map has the larger SRG, and by look for `shapley_regression`.
        max_evals: largest number of masks that `partition_shap` and `shapley_regression` score.
        perturbations_per_eval: masks in memory at once; changes no value.
    """

    method: Method = "partition_shap"
    occluder: Occluder = "in_place"
    feature_mask: Int64 | None = None
    sliding_window_shapes: int = 4
    strides: int = 2
    group: Group = "auto"
    max_evals: int = 512
    perturbations_per_eval: int = 64
    seed: int = 0


def attribute(
    masked_slide: MaskedSlide,
    outputs: ModelOutputs,
    settings: Settings | None = None,
    *,
    target_index: int = 0,
    step: tuple[int, int] = (256, 256),
    progress_callback: Callable[[int], None] = lambda masks: None,
) -> Attribution:
    """Values [N, K] of a slide's tiles for the K `outputs`.

    target_index: the output for which `partition_shap` refines.
    step: the tile grid's step (x, y) in level-0 px, on which windows lie.
    progress_callback: called with the number of masks scored since its last call.

    Raises:
        ClientError: settings that do not fit each other or the slide, or the model fails.
    """
    settings = settings or Settings()
    masked_slide.check_finite(np.ones((1, len(masked_slide.embeddings)), dtype=bool))  # all score the whole
    game = CoalitionGame(
        scorer_for(masked_slide, settings.occluder, settings.seed),
        outputs,
        _players(masked_slide, settings),
        settings.perturbations_per_eval,
        progress_callback,
    )
    match settings.method:
        case "partition_shap":
            return owen_map(
                game,
                masked_slide.embeddings,
                masked_slide.coords,
                group=None if settings.group == "auto" else settings.group,
                max_evals=settings.max_evals,
                target_index=target_index,
            )
        case "occlusion":
            return occlusion(game, _windows(masked_slide, settings, step))
        case "keep_one":
            single_tiles = settings.feature_mask is None
            return keep_one(game, replace(game, scorer=masked_slide.dropped()) if single_tiles else None)
        case "shapley_regression":
            features = player_means(masked_slide.embeddings, game.feature_mask)
            found = shapley_regression(game, features, max_evals=settings.max_evals, seed=settings.seed)
            return replace(found, grouping=_coarse_grouping(masked_slide, settings))
        case unknown:
            raise ClientError(f"no method {unknown!r}: choose one of {', '.join(get_args(Method))}")


def planned_masks(masked_slide: MaskedSlide, settings: Settings, step: tuple[int, int] = (256, 256)) -> int:
    """The largest number of masks that `attribute` scores."""
    players = int(_players(masked_slide, settings).max()) + 1
    match settings.method:
        case "occlusion":
            windows = _windows(masked_slide, settings, step)
            return 2 + (players if windows is None else len(windows))
        case "keep_one":
            return 2 + players
        case _:
            return max(2, settings.max_evals)


def _players(masked_slide: MaskedSlide, settings: Settings) -> Int64:
    if settings.feature_mask is not None:
        return settings.feature_mask
    tiles = np.arange(len(masked_slide.coords), dtype=np.int64)
    grouping = _coarse_grouping(masked_slide, settings)
    if grouping is None:
        return tiles
    (tree,) = trees(grouping, masked_slide.embeddings, masked_slide.coords, tiles)
    return tree.parts(SHAPLEY_GROUPS)


def _coarse_grouping(masked_slide: MaskedSlide, settings: Settings) -> Grouping | None:
    """How `shapley_regression` groups the tiles of a slide that has too many of them."""
    few = len(masked_slide.coords) <= MOST_PLAYERS or settings.feature_mask is not None
    if settings.method != "shapley_regression" or few:
        return None
    return "place" if settings.group == "place" else "look"


def _windows(masked_slide: MaskedSlide, settings: Settings, step: tuple[int, int]) -> list[Int64] | None:
    if settings.feature_mask is not None:
        return None
    cells = grid_cells(masked_slide.coords, step)
    return sliding_windows(cells, settings.sliding_window_shapes, settings.strides)


def scorer_for(masked_slide: MaskedSlide, occluder: Occluder, seed: int = 0) -> Scorer:
    """The scorer with an occluder; `seed` draws from a bank.

    Raises:
        ClientError: no such occluder, or a bank of another width or with values that are not finite.
    """
    embeddings = masked_slide.embeddings
    if isinstance(occluder, str):
        if occluder == "in_place":
            return masked_slide.in_place()
        if occluder == "mean":
            return masked_slide.replaced(embeddings.mean(axis=0, dtype=np.float64).astype(np.float32))
        if occluder == "medoid":
            return masked_slide.replaced(medoid(embeddings))
        raise ClientError(
            f"no occluder {occluder!r}: choose one of {', '.join(get_args(OccluderName))} or a bank"
        )
    width = embeddings.shape[1]
    if occluder.ndim not in (1, 2) or occluder.shape[-1] != width or not np.isfinite(occluder).all():
        raise ClientError(f"a bank needs finite embeddings of width {width}, not an array {occluder.shape}")
    if occluder.ndim == 1:
        return masked_slide.replaced(occluder)
    draws = bank_draws(occluder, len(embeddings), BANK_DRAWS, seed)
    return average([masked_slide.replaced(draw) for draw in draws])
