"""The methods by name, with the arguments that Captum's and SHAP's users know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ..errors import ClientError
from .methods.game import CoalitionGame
from .methods.occlusion import keep_one, occlusion
from .methods.partition_shap import partition_shap
from .methods.regions import coarse_regions, grid_cells, sliding_windows
from .methods.result import Attribution
from .methods.scorer import Float32, Int64, Scorer, average, bank_draws, medoid
from .methods.shapley import shapley_sampling
from .methods.target import Target
from .model.masked_slide import MaskedSlide

Method = Literal["partition_shap", "occlusion", "keep_one", "shapley_sampling"]
Occluder = Literal["mask", "mean", "medoid"]
Baselines = Occluder | Float32

BANK_DRAWS = 4
SHAPLEY_REGIONS = 256


@dataclass(frozen=True, eq=False)
class Settings:
    """How tiles are attributed.

    Attributes:
        method: `partition_shap` (which tiles share the score), `occlusion` (what the score needs), `keep_one`
            (what each tile says alone), `shapley_sampling` (as the first, for regions, with standard errors).
        baselines: what a left-out tile becomes: `mask` (in place, invisible), `mean` or `medoid` (the slide's
            mean or most typical embedding), one embedding [D], or a bank of them [B, D] to draw from.
        feature_mask: region of every tile [N], 0..G-1; the tiles of a region come and go together.
        sliding_window_shapes, strides: side and step, in tiles, of the windows of `occlusion`.
        max_evals: masks that `partition_shap` may score.
        n_samples: pairs of orders of `shapley_sampling`.
        perturbations_per_eval: masks in memory at once; changes no value.
    """

    method: Method = "partition_shap"
    baselines: Baselines = "mask"
    feature_mask: Int64 | None = None
    sliding_window_shapes: int = 4
    strides: int = 2
    max_evals: int = 512
    n_samples: int = 16
    perturbations_per_eval: int = 64
    seed: int = 0


def attribute(
    subject: MaskedSlide,
    target: Target,
    settings: Settings | None = None,
    *,
    focus: int = 0,
    step: tuple[int, int] = (256, 256),
    show_progress: bool = False,
    progress_callback: Callable[[int], None] = lambda masks: None,
) -> Attribution:
    """Values [N, K] of a slide's tiles for the K explained numbers of `target`.

    focus: index of the number that `partition_shap` refines for.
    step: the tile grid's step (x, y) in level-0 px, on which windows lie.
    show_progress: a bar with the time left on stderr.
    progress_callback: called with the number of masks done since its last call.
    """
    settings = settings or Settings()
    if show_progress:
        with Progress(*Progress.get_default_columns(), console=Console(stderr=True)) as bar:
            task = bar.add_task(settings.method, total=planned_masks(subject, settings, step))

            def count(masks: int) -> None:
                bar.advance(task, masks)
                progress_callback(masks)

            return attribute(subject, target, settings, focus=focus, step=step, progress_callback=count)
    game = CoalitionGame(
        scorer_for(subject, settings.baselines, settings.seed),
        target,
        _players(subject, settings),
        settings.perturbations_per_eval,
        progress_callback,
    )
    match settings.method:
        case "partition_shap":
            return partition_shap(game, subject.coords, max_evals=settings.max_evals, focus=focus)
        case "occlusion":
            return occlusion(game, _windows(subject, settings, step))
        case "keep_one":
            alone = settings.feature_mask is None
            return keep_one(game, replace(game, scorer=subject.bags()) if alone else None)
        case "shapley_sampling":
            return shapley_sampling(game, n_samples=settings.n_samples, seed=settings.seed)
        case unknown:
            raise ClientError(f"no method {unknown!r}: choose one of {', '.join(get_args(Method))}")


def planned_masks(subject: MaskedSlide, settings: Settings, step: tuple[int, int] = (256, 256)) -> int:
    """How many masks `attribute` will score, at most."""
    players = int(_players(subject, settings).max()) + 1
    match settings.method:
        case "occlusion":
            windows = _windows(subject, settings, step)
            return 2 + (players if windows is None else len(windows))
        case "shapley_sampling":
            return 2 + 2 * settings.n_samples * (players - 1)
        case "keep_one":
            return 2 + players
        case _:
            return max(2, settings.max_evals)


def _players(subject: MaskedSlide, settings: Settings) -> Int64:
    if settings.feature_mask is not None:
        return settings.feature_mask
    if settings.method == "shapley_sampling":
        return coarse_regions(subject.coords, SHAPLEY_REGIONS)
    return np.arange(len(subject.coords), dtype=np.int64)


def _windows(subject: MaskedSlide, settings: Settings, step: tuple[int, int]) -> list[Int64] | None:
    if settings.feature_mask is not None:
        return None
    cells = grid_cells(subject.coords, step)
    return sliding_windows(cells, settings.sliding_window_shapes, settings.strides)


def scorer_for(subject: MaskedSlide, baselines: Baselines, seed: int = 0) -> Scorer:
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
