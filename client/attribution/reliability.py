"""Reliability of a map, measured on the slide itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from ..arrays import Float64, Int64
from .attribute import Method, Occluder, Settings, attribute, planned_masks, scorer_for
from .curves import Curves, curves, descending, random_orders, spearman
from .grouping import CURVE_MASKS, trees
from .methods.game import CoalitionGame
from .methods.model_outputs import ModelOutputs
from .methods.regions import coarse_regions
from .methods.result import Attribution, Grouping
from .model.masked_slide import MaskedSlide

REGIONS = 16
SHIFTS = 8
SHIFTED_TILES = 4
RANDOM_ORDERS = 5
NEUTRAL = 0.1
"""The empty slide is neutral up to this part of the distance from the full slide to one without evidence."""
EVALS_PER_OCCLUDER = 2 * REGIONS


@dataclass(frozen=True)
class Reliability:
    """How far a map can be trusted; values are of the target's output.

    Attributes:
        base, full, completeness_gap, additive, unresolved: as in the map's `Attribution`.
        position_sensitivity: RMS change of the full slide's output when the tiles are shifted by 1..8
            positions. A slide does not change by it; dilated attention does.
        noise_floor: the same for the effect of one tile in a random context; smaller values are noise.
        other_occluder: the second occluder.
        agreement: Spearman correlation with its map, over coarse regions.
        redundancy: 1 - sum of necessity / sum of Shapley values over regions (positive parts). Near 1, each
            region can be spared because others suffice, and a leave-one-out map would be empty; below 0,
            regions need one another.
        curves: deletion and insertion curves of the map.
        random_srg: SRG of random orders of 16 groups of tiles, from the tree that the map was made on.
        groupings: SRG of the trial maps by look and by place, where both were made.
        elsewhere: median output of slides that do not show the class, None where unknown.
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
    random_srg: tuple[float, ...]
    groupings: dict[Grouping, float] = field(default_factory=dict)
    elsewhere: float | None = None

    @property
    def beats_random(self) -> bool:
        """Whether the map's SRG exceeds every random order's in size (these are symmetric about 0)."""
        return self.curves.srg > max(abs(random) for random in self.random_srg)

    @property
    def groupings_alike(self) -> bool:
        """Whether the maps by look and by place differ in SRG by less than two random maps do on average."""
        differences = [abs(a - b) for a, b in combinations(self.random_srg, 2)]
        gains = self.groupings.values()
        return len(gains) == 2 and max(gains) - min(gains) < float(np.mean(differences))

    @property
    def absent(self) -> float:
        """The output without evidence for the class: of other slides, or without the strongest tiles."""
        return float(self.curves.mif.min()) if self.elsewhere is None else self.elsewhere

    def warnings(self) -> list[str]:
        """One line per reason to doubt the map or its sign."""
        found = []
        if not self.beats_random:
            found.append(
                f"the map does not beat a random map (SRG {self.curves.srg:+.3g}, "
                f"random up to {max(map(abs, self.random_srg)):.3g}): do not read it"
            )
        if abs(self.full - self.base) <= self.position_sensitivity:
            found.append(
                "full and empty slide score alike within positional noise: magnitudes are not meaningful; "
                "compare with another occluder"
            )
        if self.groupings_alike:
            gains = " and ".join(f"{name} (SRG {gain:+.3g})" for name, gain in self.groupings.items())
            found.append(f"groups by {gains} explain the score similarly well: compare both maps")
        if self.additive and abs(self.base - self.absent) > NEUTRAL * abs(self.full - self.absent):
            without = "without its strongest tiles" if self.elsewhere is None else "of another class"
            sign = "negative" if self.base > self.absent else "positive"
            found.append(
                f"the empty slide is not neutral: it scores {self.base:+.3g}, a slide {without} "
                f"{self.absent:+.3g}, so tiles without evidence get {sign} values"
            )
        if self.agreement < 0.5:
            found.append(
                f"another occluder ({self.other_occluder}) ranks regions differently "
                f"(correlation {self.agreement:+.2f})"
            )
        return found


def assess(
    masked_slide: MaskedSlide,
    outputs: ModelOutputs,
    result: Attribution,
    settings: Settings,
    *,
    target_index: int,
    elsewhere: float | None = None,
    progress_callback: Callable[[int], None] = lambda masks: None,
) -> Reliability:
    """Measure the reliability of `result`, the attribution of `outputs` with `settings`.

    elsewhere: the output of slides that do not show the class, where it is known.

    Raises:
        ClientError: the model fails.
    """
    occluder, seed = settings.occluder, settings.seed
    tiles = np.arange(len(masked_slide.coords), dtype=np.int64)
    game = CoalitionGame(
        scorer_for(masked_slide, occluder, seed), outputs, tiles, progress_callback=progress_callback
    )
    regions = coarse_regions(masked_slide.coords, REGIONS)
    controls = regions if result.grouping is None else _groups(masked_slide, settings, result.grouping)

    def on_regions(method: Method, occluder: Occluder) -> Float64:
        coarse = replace(
            settings,
            method=method,
            occluder=occluder,
            feature_mask=regions,
            group="place",
            max_evals=EVALS_PER_OCCLUDER,
        )
        found = attribute(
            masked_slide, outputs, coarse, target_index=target_index, progress_callback=progress_callback
        )
        return _of_regions(found.values[:, target_index], regions, found.additive)

    method = settings.method
    other: Occluder = "mean" if isinstance(occluder, str) and occluder == "in_place" else "in_place"
    position_sensitivity, noise_floor = position_noise(masked_slide, game, target_index, seed)
    values = np.nan_to_num(result.values[:, target_index])
    return Reliability(
        base=float(result.base[target_index]),
        full=float(result.full[target_index]),
        completeness_gap=float(result.completeness_gap[target_index]),
        additive=result.additive,
        unresolved=result.unresolved,
        position_sensitivity=position_sensitivity,
        noise_floor=noise_floor,
        other_occluder=str(other),
        agreement=spearman(on_regions(method, occluder), on_regions(method, other)),
        redundancy=redundancy_index(
            on_regions("occlusion", occluder), on_regions("partition_shap", occluder)
        ),
        curves=curves(game, descending(values, seed), target_index),
        random_srg=tuple(
            curves(game, order, target_index).srg for order in random_orders(controls, RANDOM_ORDERS, seed)
        ),
        groupings={
            one.grouping: one.srg
            for one in result.groupings
            if one.grouping is not None and one.srg is not None
        },
        elsewhere=elsewhere,
    )


def _groups(masked_slide: MaskedSlide, settings: Settings, grouping: Grouping) -> Int64:
    """Group of every tile [N]: the coarsest parts of the tree on which a map was made."""
    players = settings.feature_mask
    if players is None:
        players = np.arange(len(masked_slide.coords), dtype=np.int64)
    (tree,) = trees(grouping, masked_slide.embeddings, masked_slide.coords, players)
    return np.asarray(tree.parts(REGIONS)[players])


def planned_checks(masked_slide: MaskedSlide, settings: Settings) -> int:
    """The largest number of masks that `assess` asks for; many of them are in the cache."""
    regions = coarse_regions(masked_slide.coords, REGIONS)
    count = int(regions.max()) + 1
    coarse = replace(settings, feature_mask=regions, group="place", max_evals=EVALS_PER_OCCLUDER)
    shifted = (SHIFTS + 1) * (1 + 2 * SHIFTED_TILES)
    occluders = 2 * planned_masks(masked_slide, coarse)
    redundancy = count + 2 + EVALS_PER_OCCLUDER
    return shifted + occluders + redundancy + CURVE_MASKS * (1 + RANDOM_ORDERS)


def redundancy_index(necessity: Float64, shapley: Float64) -> float:
    """1 - sum of necessity / sum of Shapley values, positive parts, over regions [G]."""
    shared = float(np.maximum(shapley, 0).sum())
    return 1 - float(np.maximum(necessity, 0).sum()) / shared if shared > 0 else float("nan")


def _of_regions(values: Float64, regions: Int64, additive: bool) -> Float64:
    sums = np.bincount(regions, values).astype(np.float64)
    return sums if additive else np.asarray(sums / np.bincount(regions))


def position_noise(
    masked_slide: MaskedSlide, game: CoalitionGame, target_index: int, seed: int
) -> tuple[float, float]:
    """RMS change under shifts, of v(all) and of single tiles' marginals in random contexts."""
    rng = np.random.default_rng(seed)
    tiles = len(masked_slide.coords)
    rows = [np.ones(tiles, dtype=bool)]
    for tile in rng.choice(tiles, min(SHIFTED_TILES, tiles), replace=False):
        context = rng.random(tiles) < rng.random()
        context[tile] = True
        without = context.copy()
        without[tile] = False
        rows += [context, without]
    kept = np.stack(rows)

    def measure(one: CoalitionGame) -> Float64:
        values = one.values(kept)[:, target_index]
        return np.concatenate([values[:1], values[1::2] - values[2::2]])

    unshifted = measure(replace(game, scorer=masked_slide.in_place()))
    shifts = range(1, min(SHIFTS, tiles - 1) + 1)
    changes = [measure(replace(game, scorer=masked_slide.shifted(n))) - unshifted for n in shifts]
    if not changes:
        return 0.0, 0.0
    squared = np.square(changes)
    return float(np.sqrt(squared[:, 0].mean())), float(np.sqrt(squared[:, 1:].mean()))
