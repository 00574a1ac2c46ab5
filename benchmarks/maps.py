"""How well maps find planted tiles on slides of 56 to 10,000 tiles, by method and number of masks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks import captum_estimators
from benchmarks.abmil import TrainedAbmil, train
from benchmarks.common import MACHINE, PAGES, REAL_SLIDE, WORK, Pages, console, table, write_page
from benchmarks.planted_slides import (
    STEP,
    CohortTiles,
    Pattern,
    PlantedSlide,
    benign_tissue,
    place,
    planted_slide,
    read_cohort,
    tissue,
)
from client.attribution.curves import curves, descending
from client.attribution.grouping import owen_map
from client.attribution.methods.game import CoalitionGame
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.methods.occlusion import keep_one, occlusion
from client.attribution.methods.regions import grid_cells, sliding_windows
from client.attribution.methods.result import Attribution
from client.attribution.methods.scorer import Scorer, Scores
from client.attribution.methods.shapley import MOST_PLAYERS, shapley_regression
from client.attribution.model.cache import CachedScorer, ScoreCache

Bool = NDArray[np.bool_]
Float64 = NDArray[np.float64]

SEED = 20261128
"""Its slides were not looked at while the methods were developed."""
SIZES = {56: (0.1,), 500: (0.02,), 1000: (0.01, 0.05), 3000: (0.005,), 10_000: (0.005,)}
"""Tiles of a slide, and the parts of them that are planted."""
WANTED = {"scattered": 0.85, "contiguous": 0.85, "one place, mixed looks": 0.7}
LEAST_ANSWER = 0.3
PATTERNS: tuple[Pattern, ...] = ("scattered", "contiguous")
MASKS = 512
BUDGETS = (64, 128, 256, 512, 1024, 2048)
OUTPUTS = ModelOutputs(("benign", "lesion"))
LESION = 1

Method = Callable[[CoalitionGame, PlantedSlide], Attribution]


def _owen(game: CoalitionGame, slide: PlantedSlide, **settings: object) -> Attribution:
    return owen_map(game, slide.embeddings, slide.coords, target_index=LESION, **settings)  # type: ignore[arg-type]


def _occlusion(game: CoalitionGame, slide: PlantedSlide) -> Attribution:
    """With the windows that `client attribute` has by default."""
    return occlusion(game, sliding_windows(grid_cells(slide.coords, (STEP, STEP)), 4, 2))


def _regression(game: CoalitionGame, slide: PlantedSlide) -> Attribution:
    return shapley_regression(game, slide.embeddings.astype(np.float64), max_evals=MASKS)


METHODS: dict[str, Method] = {
    "default": partial(_owen, max_evals=MASKS),
    "by look": partial(_owen, max_evals=MASKS, group="look"),
    "by place": partial(_owen, max_evals=MASKS, group="place"),
    "regression": _regression,
    "permutation": lambda game, slide: captum_estimators.permutation(game, LESION, MASKS),
    "kernel": lambda game, slide: captum_estimators.kernel(game, LESION, MASKS),
    "keep-one": lambda game, slide: keep_one(game),
    "occlusion": _occlusion,
    "leave-one-out": lambda game, slide: occlusion(game),
}


@dataclass(frozen=True, eq=False)
class Case:
    """One slide under one model, and what a map of it should find."""

    kind: str
    slide: PlantedSlide
    scorer: Scorer
    wanted: Bool
    """The planted tiles that the model answers to."""
    shapley: Float64 | None
    """Near-exact Shapley values, where they can be had."""
    attention: Float64 | None = None

    @property
    def title(self) -> str:
        """The kind, and how many tiles there are and are planted."""
        return f"{self.kind} | {len(self.wanted):,} | {int(self.slide.planted.sum())}"


@dataclass(frozen=True)
class Found:
    """How good one map is and what it cost."""

    precision: float
    r: float
    srg: float
    forwards: int
    seconds: float
    grouping: str
    covered: tuple[float, float] | None
    """Parts of all and of the planted tiles whose Shapley values lie within two standard errors."""


def main(
    slides: Annotated[int, typer.Option(min=1, help="Slides of each kind and size.")] = 3,
    seed: Annotated[
        int, typer.Option(min=1, help="Of the slides; for development, take another one.")
    ] = SEED,
    pages: Pages = PAGES,
) -> None:
    """Plant lesions, make maps of them by every method and budget, and count what they find."""
    tiles = cohort_tiles(WORK / "maps")
    with console.status("training the attention poolings"):
        lesion, smear = (train(tiles.of_split("train"), kind=kind) for kind in ("lesion", "smear"))
    held_out = tiles.of_split("test")
    found: dict[str, dict[str, list[Found]]] = {}
    budgets: dict[str, dict[int, list[Found]]] = {}
    for size, parts in SIZES.items():
        for repeat in range(slides):
            for case in _cases(held_out, size, parts, (seed, size, repeat), lesion, smear):
                if not case.wanted.any():
                    continue
                results = {name: _map(case, method) for name, method in METHODS.items() if _fits(name, size)}
                results |= _baselines(case)
                for name, result in results.items():
                    found.setdefault(case.title, {}).setdefault(name, []).append(result)
                for budget in BUDGETS:
                    method = partial(_owen, max_evals=budget)
                    budgets.setdefault(case.title, {}).setdefault(budget, []).append(_map(case, method))
                console.print(f"{case.title}: P@k {results['default'].precision:.2f}", markup=False)
    short = _short(found)
    write_page(pages / "maps.md", _page(found, budgets, slides, short), passed=not short)


def cohort_tiles(folder: Path) -> CohortTiles:
    """The cohort's tiles as the packaged tile encoder embeds them; made where `folder` does not hold them."""
    features = folder / "features"
    from training.data.tiles import list_tiles

    if not features.exists():
        from training.cohort.files import make_cohort
        from training.demo_training import embed_slides
        from training.models.build import build_tile_encoder
        from training.models.packaged import packaged_files

        with console.status("making and embedding the cohort"):
            make_cohort(REAL_SLIDE, folder / "cohort")
            part = folder / "features.part"
            embed_slides(
                list_tiles(folder / "cohort" / "tiles.csv"),
                build_tile_encoder("demo", packaged_files("demo").tile),
                part,
            )
            part.rename(features)
    return read_cohort(features, folder / "cohort" / "tiles.csv")


def _cases(
    tiles: CohortTiles,
    size: int,
    parts: tuple[float, ...],
    seed: tuple[int, ...],
    lesion: TrainedAbmil,
    smear: TrainedAbmil,
) -> list[Case]:
    cases = []
    rng = np.random.default_rng(seed)
    for part in parts:
        count = max(3, round(size * part))
        cases += [
            _pooled(pattern, planted_slide(tiles, size, count, pattern, rng), lesion, rng)
            for pattern in PATTERNS
        ]
        slide = planted_slide(tiles, size, count, "scattered", rng, "smear")
        cases.append(_pooled("confounder (smears)", slide, smear, rng))
        cells = tissue(size, rng)
        embeddings = benign_tissue(tiles, cells, rng)
        first = place(cells, count, "contiguous", rng)
        cases.append(_ruled("one place, mixed looks", embeddings, cells, [first], part))
        second = np.zeros_like(first)
        second[~first] = place(cells[~first], count, "contiguous", rng)
        cases.append(_ruled("two places, both needed", embeddings, cells, [first, second], part))
    return cases


def _pooled(kind: str, slide: PlantedSlide, trained: TrainedAbmil, rng: np.random.Generator) -> Case:
    model = trained.on(slide)
    shapley = model.shapley(60 if len(slide.coords) <= 3000 else 20, rng)
    wanted = model.answered(slide.planted, LEAST_ANSWER, rng)
    return Case(kind, slide, model, wanted, shapley, model.attention)


def _ruled(
    kind: str, embeddings: NDArray[np.float32], cells: NDArray[np.int64], places: list[Bool], part: float
) -> Case:
    """The score is a soft step of the part of kept tiles that lie in each place, whatever they look like."""
    planted = np.any(places, axis=0)

    def scorer(keep: Bool) -> Scores:
        kept = np.maximum(keep.sum(axis=1), 1)
        least = np.min([(keep @ one.astype(np.float64)) / kept for one in places], axis=0)
        value = (8 * np.tanh(0.2 / part * least) - 3).astype(np.float32)
        return Scores(np.stack([0 * value, value], axis=1), np.ones((len(keep), 1), np.float32))

    return Case(kind, PlantedSlide(embeddings, cells * STEP, planted), scorer, planted, None)


def _fits(method: str, size: int) -> bool:
    return method != "regression" or size <= MOST_PLAYERS


def _game(case: Case) -> CoalitionGame:
    return CoalitionGame(case.scorer, OUTPUTS, np.arange(len(case.wanted)))


def _map(case: Case, method: Method) -> Found:
    with ScoreCache() as cache:
        scorer = CachedScorer(case.scorer, cache, b"")
        game = replace(_game(case), scorer=scorer)
        started = time.perf_counter()
        result = method(game, case.slide)
        seconds = time.perf_counter() - started
    covered = None
    if result.stderr is not None and case.shapley is not None:
        inside = np.abs(result.values[:, LESION] - case.shapley) <= 2 * result.stderr[:, LESION]
        covered = float(inside.mean()), float(inside[case.slide.planted].mean())
    return _found(case, result.values[:, LESION], scorer.forwards, seconds, result.grouping or "", covered)


def _baselines(case: Case) -> dict[str, Found]:
    """What needs no masks: near-exact Shapley values, and the model's own attention."""
    return {
        name: _found(case, values, 0, 0.0)
        for name, values in (("exact Shapley", case.shapley), ("attention", case.attention))
        if values is not None
    }


def _found(
    case: Case, values: Float64, forwards: int, seconds: float, grouping: str = "",
    covered: tuple[float, float] | None = None,
) -> Found:  # fmt: skip
    r = float("nan") if case.shapley is None else float(np.corrcoef(values, case.shapley)[0, 1])
    srg = curves(_game(case), descending(values), LESION).srg
    return Found(case.slide.precision(values, case.wanted), r, srg, forwards, seconds, grouping, covered)


def _short(found: dict[str, dict[str, list[Found]]]) -> list[str]:
    """Cells of slides of 1,000 to 10,000 tiles in which the default map finds less than it must."""
    missed = []
    for title, by_method in found.items():
        kind, size, _ = title.split(" | ")
        precision = mean(one.precision for one in by_method["default"])
        if int(size.replace(",", "")) >= 1000 and precision < WANTED.get(kind, 0.0):
            missed.append(f"{kind}, {size} tiles: {precision:.2f} (wanted {WANTED[kind]})")
    return missed


def _page(
    found: dict[str, dict[str, list[Found]]],
    budgets: dict[str, dict[int, list[Found]]],
    slides: int,
    short: list[str],
) -> str:
    names = ["exact Shapley", *METHODS, "attention"]

    def cell(results: list[Found] | None, what: Callable[[Found], float], form: str) -> str:
        return "" if not results else format(mean(what(one) for one in results), form)

    def by_case(
        results: Mapping[str, Mapping[Any, list[Found]]],
        columns: Sequence[str | int],
        what: Callable[[Found], float],
        form: str,
        kinds: Callable[[str], bool] = lambda title: True,
    ) -> str:
        rows = [
            " | ".join([title, *(cell(each.get(column), what, form) for column in columns)])
            for title, each in results.items()
            if kinds(title)
        ]
        return table(f"lesion | tiles | planted | {' | '.join(map(str, columns))}", rows)

    by_method, by_budget = partial(by_case, found, names), partial(by_case, budgets, BUDGETS)

    def by_size(what: Callable[[Found], float], form: str) -> str:
        """Means over all slides of a size, of what has masks."""
        rows = []
        for size in SIZES:
            of_size = [each for title, each in found.items() if title.split(" | ")[1] == f"{size:,}"]
            results = {name: [one for each in of_size for one in each.get(name, [])] for name in METHODS}
            rows.append(" | ".join([f"{size:,}", *(cell(results[name], what, form) for name in METHODS)]))
        return table("tiles | " + " | ".join(METHODS), rows)

    def learnt(title: str) -> bool:
        return "place" not in title

    looks = [
        f"{title} | {sum(one.grouping == 'look' for one in each['default'])} of {len(each['default'])}"
        for title, each in found.items()
    ]
    covered = [one.covered for each in found.values() for one in each.get("regression", []) if one.covered]
    everything, planted = (mean(one[i] for one in covered) for i in (0, 1))
    outcome = "All are reached." if not short else "Not reached:\n\n- " + "\n- ".join(short)
    wanted = ", ".join(f"{kind} {least}" for kind, least in WANTED.items())
    return f"""# Maps of slides with planted lesions

Written by `make bench NAME=maps` on {MACHINE}; no server and no slide file is involved. {slides} slides of
each kind and size, put together from the embeddings of the cohort's held-out tiles (docs/training.md) on a
lumpy grid; each tile is interpolated between neighbours. No slide of this seed was seen during development.

- scattered, contiguous: lesion tiles under an attention pooling (ABMIL) trained on the training tiles;
- confounder: smears under one that was trained to tell slides with smears;
- one place: every tile of one place counts, whatever it looks like; two places: both are needed.

Masked tiles are taken out of the pooling. Methods:

- default, by look, by place: `partition_shap`, with `--group` auto, look and place;
- regression: `shapley_regression`, for up to {MOST_PLAYERS} tiles;
- permutation, kernel: Captum's `ShapleyValueSampling` and `KernelShap`, each tile a feature;
- keep-one, occlusion: `keep_one` and `occlusion` with the default windows, leave-one-out with one tile;
- exact Shapley: near-exact values, from 60 random orders and their reverses, 20 for 10,000 tiles;
- attention: the pooling's own weights.

Those with a budget have {MASKS} masks, but permutation has at least one order of the tiles.

## Precision

P@k: how many of the k strongest tiles are planted, for the k planted tiles to which the model answers, those
that raise the log-odds of 50 benign tiles by {LEAST_ANSWER}. The other planted tiles are left out.

{by_method(lambda one: one.precision, ".2f")}

Wanted of the default from 1,000 tiles on: {wanted}. {outcome}

## Correlation with near-exact Shapley values

{by_method(lambda one: one.r, ".2f", learnt)}

Two standard errors of the regression cover {everything:.0%} of all tiles and {planted:.0%} of the planted.

## SRG

{by_method(lambda one: one.srg, ".2f")}

## What the default grouped by look

{table("lesion | tiles | planted | slides", looks)}

## Number of masks

P@k of the default:

{by_budget(lambda one: one.precision, ".2f")}

Its correlation with near-exact Shapley values:

{by_budget(lambda one: one.r, ".2f", learnt)}

## Cost

Masks scored:

{by_size(lambda one: one.forwards, ",.0f")}

Seconds, the method's own and those of this model, which takes almost none; a served model takes its time per
mask in addition:

{by_size(lambda one: one.seconds, ".2f")}
"""
