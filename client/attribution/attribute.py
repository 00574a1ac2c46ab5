"""The methods by name, with the arguments that Captum's and SHAP's users know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from client.attribution.game import Game
from client.attribution.occlusion import keep_one, occlusion
from client.attribution.partition_shap import partition_shap
from client.attribution.regions import coarse_regions, grid_cells, sliding_windows
from client.attribution.result import Attribution
from client.attribution.scorer import Float32, Int64, Scorer, average, bank_draws, medoid
from client.attribution.shapley import shapley_sampling
from client.attribution.subject import Subject
from client.attribution.target import Target
from client.errors import ClientError

Method = Literal["partition_shap", "occlusion", "keep_one", "shapley_sampling"]
Occluder = Literal["mask", "mean", "medoid"]
Baselines = Occluder | Float32

BANK_DRAWS = 4
SHAPLEY_REGIONS = 256


def attribute(
    subject: Subject,
    target: Target,
    *,
    method: Method = "partition_shap",
    focus: int = 0,
    baselines: Baselines = "mask",
    feature_mask: Int64 | None = None,
    step: tuple[int, int] = (256, 256),
    sliding_window_shapes: int = 4,
    strides: int = 2,
    max_evals: int = 512,
    n_samples: int = 16,
    perturbations_per_eval: int = 64,
    seed: int = 0,
    progress_callback: Callable[[int], None] | None = None,
) -> Attribution:
    """Values [N, K] of a slide's tiles.

    focus: index of the explained number that `partition_shap` refines for.
    baselines: what a left-out tile becomes: `mask` (in place, invisible), `mean` or `medoid` (the slide's
        mean or most typical embedding), one embedding [D], or a bank of them [B, D] whose draws are averaged.
    feature_mask: region of every tile [N], 0..G-1; the tiles of a region come and go together.
    step: the tile grid's step (x, y) in level-0 px, on which the windows lie.
    sliding_window_shapes, strides: side and step, in tiles, of the windows of `occlusion`.
    max_evals: masks that `partition_shap` may score. n_samples: pairs of orders of `shapley_sampling`.
    progress_callback: called with the number of masks done since its last call.
    """
    tiles = np.arange(len(subject.coords), dtype=np.int64)
    game = Game(
        scorer_for(subject, baselines, seed),
        target,
        tiles if feature_mask is None else feature_mask,
        perturbations_per_eval,
        progress_callback or (lambda count: None),
    )
    if method == "partition_shap":
        return partition_shap(game, subject.coords, max_evals=max_evals, focus=focus)
    if method == "occlusion":
        windows = None
        if feature_mask is None:
            windows = sliding_windows(grid_cells(subject.coords, step), sliding_window_shapes, strides)
        return occlusion(game, windows)
    if method == "keep_one":
        bags = replace(game, scorer=subject.bags()) if feature_mask is None else None
        return keep_one(game, bags)
    if method == "shapley_sampling":
        if feature_mask is None:
            game = replace(game, feature_mask=coarse_regions(subject.coords, SHAPLEY_REGIONS))
        return shapley_sampling(game, n_samples=n_samples, seed=seed)
    raise ClientError(f"no method {method!r}: choose one of {', '.join(get_args(Method))}")


def scorer_for(subject: Subject, baselines: Baselines, seed: int = 0) -> Scorer:
    """The scorer that leaves tiles out as `baselines` says."""
    if isinstance(baselines, str):
        if baselines == "mask":
            return subject.masked()
        if baselines == "mean":
            return subject.replaced(subject.embeddings.mean(axis=0, dtype=np.float64).astype(np.float32))
        if baselines == "medoid":
            return subject.replaced(medoid(subject.embeddings))
        raise ClientError(
            f"no occluder {baselines!r}: choose one of {', '.join(get_args(Occluder))} or a bank"
        )
    width = subject.embeddings.shape[1]
    if baselines.ndim not in (1, 2) or baselines.shape[-1] != width or not np.isfinite(baselines).all():
        raise ClientError(f"a bank needs finite embeddings of width {width}, not an array {baselines.shape}")
    if baselines.ndim == 1:
        return subject.replaced(baselines)
    draws = bank_draws(baselines, len(subject.coords), BANK_DRAWS, seed)
    return average([subject.replaced(draw) for draw in draws])
