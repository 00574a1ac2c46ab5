"""How far a map can be trusted: every figure is measured on the slide itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .attribute import Baselines, Method, Settings, attribute, planned_masks, scorer_for
from .curves import STEPS, Curves, curves, descending, random_orders, spearman
from .methods.game import CoalitionGame
from .methods.regions import coarse_regions
from .methods.result import Attribution
from .methods.scorer import Float64, Int64
from .methods.target import Target
from .model.masked_slide import MaskedSlide

REGIONS = 16
ROLLS = 8
ROLLED_TILES = 4
RANDOM_ORDERS = 5
EVALS_PER_OCCLUDER = 2 * REGIONS


@dataclass(frozen=True)
class Reliability:
    """The reliability block of one map; scores are the target's.

    position_sensitivity: root mean square change of the whole slide's score when the same tiles are shifted
        by 1..8 positions, which should mean nothing to a slide and does to dilated attention.
    noise_floor: the same for one tile's marginal effect in a random context; smaller values are noise.
    agreement: Spearman correlation, over coarse regions, of the map with that of `other_occluder`.
    redundancy: 1 - sum of necessity / sum of Shapley values over regions (positive parts): near 1, every
        region can be spared because others say the same, and a leave-one-out map would be empty; below 0,
        regions need one another.
    """

    base: float
    full: float
    completeness_gap: float
    additive: bool
    unresolved: float
    position_sensitivity: float
    noise_floor: float
    other_occluder: str
    agreement: float
    redundancy: float
    curves: Curves
    random_gains: tuple[float, ...]

    @property
    def beats_random(self) -> bool:
        """Whether the map's gain is above every random order's in size (gains are symmetric about 0)."""
        return self.curves.gain > max(abs(random) for random in self.random_gains)

    def warnings(self) -> list[str]:
        """One line for each reason not to trust the map."""
        found = []
        if not self.beats_random:
            found.append(
                f"does not beat a random map (SRG {self.curves.gain:+.3g}, "
                f"random up to {max(map(abs, self.random_gains)):.3g}): do not read it"
            )
        if abs(self.full - self.base) <= self.position_sensitivity:
            found.append(
                "the whole slide scores like nothing at all, within the noise of slots: "
                "sizes of values mean little; compare with another occluder"
            )
        if self.additive and self.unresolved > 0.2:
            found.append(
                f"{self.unresolved:.0%} of the evidence is not resolved to single tiles: raise max_evals"
            )
        if self.agreement < 0.5:
            found.append(
                f"another occluder ({self.other_occluder}) ranks regions differently ({self.agreement:+.2f})"
            )
        return found


def assess(
    subject: MaskedSlide,
    target: Target,
    result: Attribution,
    settings: Settings,
    *,
    focus: int,
    progress_callback: Callable[[int], None] = lambda masks: None,
) -> Reliability:
    """Measure the reliability of `result`, which `settings` made."""
    baselines, seed = settings.baselines, settings.seed
    tiles = np.arange(len(subject.coords), dtype=np.int64)
    game = CoalitionGame(
        scorer_for(subject, baselines, seed), target, tiles, progress_callback=progress_callback
    )
    regions = coarse_regions(subject.coords, REGIONS)

    def on_regions(method: Method, occluder: Baselines) -> Float64:
        coarse = replace(
            settings,
            method=method,
            baselines=occluder,
            feature_mask=regions,
            max_evals=EVALS_PER_OCCLUDER,
            n_samples=2,
        )
        found = attribute(subject, target, coarse, focus=focus, progress_callback=progress_callback)
        return _of_regions(found.values[:, focus], regions, found.additive)

    method = settings.method
    other: Baselines = "mean" if isinstance(baselines, str) and baselines == "mask" else "mask"
    position_sensitivity, noise_floor = _slot_noise(subject, game, focus, seed)
    values = np.nan_to_num(result.values[:, focus])
    return Reliability(
        base=float(result.base[focus]),
        full=float(result.full[focus]),
        completeness_gap=float(result.completeness_gap[focus]),
        additive=result.additive,
        unresolved=result.unresolved,
        position_sensitivity=position_sensitivity,
        noise_floor=noise_floor,
        other_occluder=str(other),
        agreement=spearman(on_regions(method, baselines), on_regions(method, other)),
        redundancy=redundancy_index(
            on_regions("occlusion", baselines), on_regions("partition_shap", baselines)
        ),
        curves=curves(game, descending(values, seed), focus),
        random_gains=tuple(
            curves(game, order, focus).gain for order in random_orders(regions, RANDOM_ORDERS, seed)
        ),
    )


def planned_checks(subject: MaskedSlide, settings: Settings) -> int:
    """How many masks `assess` will ask for, at most; many of them are already scored."""
    regions = coarse_regions(subject.coords, REGIONS)
    count = int(regions.max()) + 1
    coarse = replace(settings, feature_mask=regions, max_evals=EVALS_PER_OCCLUDER, n_samples=2)
    rolled = (ROLLS + 1) * (1 + 2 * ROLLED_TILES)
    occluders = 2 * planned_masks(subject, coarse)
    redundancy = count + 2 + EVALS_PER_OCCLUDER
    return rolled + occluders + redundancy + 2 * (STEPS + 1) * (1 + RANDOM_ORDERS)


def redundancy_index(necessity: Float64, shapley: Float64) -> float:
    """1 - sum of necessity / sum of Shapley values, positive parts, over regions [G]."""
    shared = float(np.maximum(shapley, 0).sum())
    return 1 - float(np.maximum(necessity, 0).sum()) / shared if shared > 0 else float("nan")


def _of_regions(values: Float64, regions: Int64, additive: bool) -> Float64:
    sums = np.bincount(regions, values).astype(np.float64)
    return sums if additive else np.asarray(sums / np.bincount(regions))


def _slot_noise(subject: MaskedSlide, game: CoalitionGame, focus: int, seed: int) -> tuple[float, float]:
    """RMS change under rolls of v(everything) and of single tiles' marginals in random contexts."""
    rng = np.random.default_rng(seed)
    tiles = len(subject.coords)
    rows = [np.ones(tiles, dtype=bool)]
    for tile in rng.choice(tiles, min(ROLLED_TILES, tiles), replace=False):
        context = rng.random(tiles) < rng.random()
        context[tile] = True
        without = context.copy()
        without[tile] = False
        rows += [context, without]
    kept = np.stack(rows)

    def measure(one: CoalitionGame) -> Float64:
        values = one.values(kept)[:, focus]
        return np.concatenate([values[:1], values[1::2] - values[2::2]])

    straight = measure(replace(game, scorer=subject.masked()))
    rolls = range(1, min(ROLLS, tiles - 1) + 1)
    changes = [measure(replace(game, scorer=subject.rolled(slots))) - straight for slots in rolls]
    if not changes:
        return 0.0, 0.0
    squared = np.square(changes)
    return float(np.sqrt(squared[:, 0].mean())), float(np.sqrt(squared[:, 1:].mean()))
