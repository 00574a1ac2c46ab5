"""The default map finds evidence by look wherever it lies, and by place whatever it looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.arrays import Bool, Float32, Float64, Int64, KeepMask
from client.attribution.attribute import Settings, attribute
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.methods.result import Attribution
from client.attribution.methods.scorer import Scores
from client.attribution.model.masked_slide import MaskedSlide
from client.attribution.model.other_slides import level_elsewhere
from client.attribution.reliability import Reliability, assess
from client.errors import ClientError

Square = Callable[[int], Int64]
TARGET = ModelOutputs(("tumour", "normal"))
SIDE = 30


def slide_of(
    square: Square, planted: Bool, rule: Callable[[Float64], Float64], looks: Float32
) -> MaskedSlide:
    """A slide whose output is `rule` of the part of the planted tiles that are kept."""

    def forward(embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
        value = rule((keep @ planted) / planted.sum()).astype(np.float32)
        return Scores(np.stack([value, 0 * value], axis=1), np.ones((len(keep), 2), np.float32))

    return MaskedSlide(forward, looks, square(SIDE))


def tissue(seed: int = 0) -> Float32:
    return np.random.default_rng(seed).normal(size=(SIDE * SIDE, 24)).astype(np.float32)


@pytest.fixture
def scattered(square: Square) -> tuple[MaskedSlide, Bool]:
    """Twenty tiles of one look, far apart; half of them suffice."""
    planted = np.zeros(SIDE * SIDE, dtype=bool)
    planted[np.random.default_rng(1).choice(SIDE * SIDE, 20, replace=False)] = True
    looks = tissue()
    looks[planted, :8] += 3
    return slide_of(square, planted, lambda part: np.tanh(4 * part), looks), planted


@pytest.fixture
def mixed(square: Square) -> tuple[MaskedSlide, Bool]:
    """49 tiles of one place that look like anything; half of them suffice."""
    columns, rows = square(SIDE).T // 256
    planted = (np.abs(columns - 11) <= 3) & (np.abs(rows - 17) <= 3)
    return slide_of(square, planted, lambda part: np.tanh(4 * part), tissue()), planted


def precision(result: Attribution, planted: Bool) -> float:
    """The part of the k strongest tiles that is planted, k being the number of planted ones."""
    strongest = np.argsort(-result.values[:, 0], kind="stable")[: planted.sum()]
    return float(planted[strongest].mean())


def check(slide: MaskedSlide) -> Reliability:
    return assess(slide, TARGET, attribute(slide, TARGET), Settings(), target_index=0)


def test_scattered_tiles_of_one_look_are_found_by_look(scattered: tuple[MaskedSlide, Bool]) -> None:
    slide, planted = scattered
    result = attribute(slide, TARGET)
    assert result.grouping == "look"
    assert result.alternative is not None
    assert result.alternative.grouping == "place"
    assert result.srg is not None
    assert result.alternative.srg is not None
    assert result.srg > 1.5 * result.alternative.srg
    assert precision(result, planted) >= 0.9
    assert precision(result.alternative, planted) <= 0.4


def test_one_place_of_many_looks_is_found_by_place(mixed: tuple[MaskedSlide, Bool]) -> None:
    slide, planted = mixed
    result = attribute(slide, TARGET)
    assert result.grouping == "place"
    assert result.alternative is not None
    assert precision(result, planted) >= 0.7
    assert precision(result.alternative, planted) <= 0.4


def test_evidence_that_needs_two_places_is_found_by_place(square: Square) -> None:
    columns, rows = square(SIDE).T // 256
    first = (np.abs(columns - 5) <= 1) & (np.abs(rows - 6) <= 1)
    second = (np.abs(columns - 22) <= 1) & (np.abs(rows - 20) <= 1)

    def forward(embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
        value = np.minimum(keep @ first, keep @ second).astype(np.float32) / 9
        return Scores(np.stack([value, 0 * value], axis=1), np.ones((len(keep), 2), np.float32))

    result = attribute(MaskedSlide(forward, tissue(), square(SIDE)), TARGET)
    assert result.grouping == "place"
    assert precision(result, first | second) >= 0.6
    # Each place needs the other: they share the score equally.
    shares = [float(result.values[place, 0].sum()) for place in (first, second)]
    assert shares[0] == pytest.approx(shares[1], abs=0.1)


@pytest.mark.parametrize("budget", [2, 3, 76, 127, 128, 133, 200, 511, 512, 640, 1024, 2049])
@pytest.mark.parametrize("group", ["auto", "look", "place"])
def test_the_map_sums_exactly_within_every_budget(
    scattered: tuple[MaskedSlide, Bool], budget: int, group: str
) -> None:
    slide, _ = scattered
    before = slide.cost.forwards
    result = attribute(slide, TARGET, Settings(max_evals=budget, group=group))  # type: ignore[arg-type]
    assert result.evaluations <= budget
    assert slide.cost.forwards - before <= result.evaluations
    for one in result.groupings:
        assert one.completeness_gap.max() < 1e-9
    assert (result.alternative is not None) == (group == "auto" and budget >= 128)


def test_the_map_needs_no_seed_and_depends_on_the_tiles_alone(mixed: tuple[MaskedSlide, Bool]) -> None:
    slide, _ = mixed
    maps = [attribute(slide, TARGET, Settings(seed=seed, max_evals=1200)) for seed in (0, 1)]
    np.testing.assert_array_equal(maps[0].values, maps[1].values)
    assert maps[0].srg == maps[1].srg


def test_regions_are_grouped_by_look_too(scattered: tuple[MaskedSlide, Bool]) -> None:
    slide, planted = scattered
    pairs = np.arange(SIDE * SIDE) // 2
    result = attribute(slide, TARGET, Settings(feature_mask=pairs))
    np.testing.assert_array_equal(result.values[::2], result.values[1::2])
    holds = np.isin(pairs, pairs[planted])
    assert result.values[holds, 0].mean() > 10 * np.abs(result.values[~holds, 0]).mean()


def test_random_maps_of_the_same_groups_are_beaten_by_both_groupings(
    scattered: tuple[MaskedSlide, Bool], mixed: tuple[MaskedSlide, Bool]
) -> None:
    for slide, _ in (scattered, mixed):
        trust = check(slide)
        assert trust.beats_random
        assert not trust.groupings_alike
        assert set(trust.groupings) == {"look", "place"}


def test_a_lesion_of_one_look_in_one_place_is_explained_equally_by_both(
    square: Square, mixed: tuple[MaskedSlide, Bool]
) -> None:
    planted, looks = mixed[1], tissue()
    looks[planted, :8] += 3
    trust = check(slide_of(square, planted, lambda part: np.tanh(4 * part), looks))
    assert trust.groupings_alike
    assert any("explain the score similarly well" in warning for warning in trust.warnings())
    chosen_apart = replace(trust, groupings={"look": 5.0, "place": 0.1})
    assert not any("similarly well" in warning for warning in chosen_apart.warnings())


def test_an_empty_slide_that_is_not_neutral_is_named_with_what_it_does_to_the_values(
    square: Square, scattered: tuple[MaskedSlide, Bool]
) -> None:
    slide, planted = scattered
    assert not any("not neutral" in warning for warning in check(slide).warnings())
    # Every tile that is not planted speaks against the class, so the empty slide lies far above a benign one.
    benign = ~planted

    def forward(embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
        value = 8 * np.tanh((keep & planted).sum(axis=1)) - 6 * np.tanh((keep & benign).sum(axis=1) / 9) + 1.7
        return Scores(
            np.stack([value, 0 * value], axis=1).astype(np.float32), np.ones((len(keep), 2), np.float32)
        )

    found = check(MaskedSlide(forward, slide.embeddings, square(SIDE)))
    (line,) = (warning for warning in found.warnings() if "not neutral" in warning)
    assert "scores +1.7" in line
    assert "without its strongest tiles -4.3" in line
    assert "negative values" in line
    (line,) = (warning for warning in replace(found, elsewhere=-5.0).warnings() if "not neutral" in warning)
    assert "a slide of another class -5" in line
    assert not any("not neutral" in warning for warning in replace(found, elsewhere=1.6).warnings())


def write_batch(folder: Path, *rows: str) -> Path:
    folder.mkdir(exist_ok=True)
    table = folder / "scores.csv"
    table.write_text("\n".join(["slide_id,score_benign,score_lesion", *rows]) + "\n")
    return table


def test_a_batch_tells_how_slides_of_another_class_score(tmp_path: Path) -> None:
    table = write_batch(
        tmp_path, "a,0.1,0.9", "b,0.99,0.01", "c,0.98,0.02", "d,0.97,0.03", "e,0.2,0.8", "f,,"
    )
    own = float(np.log(9))
    assert level_elsewhere(table, "a", "lesion", "log_odds", own) == pytest.approx(np.log(0.02 / 0.98))
    assert level_elsewhere(table, "a", "lesion", "probability", 0.9) == pytest.approx(0.02)
    assert level_elsewhere(table, "a", "benign", "log_odds", -own) == pytest.approx(np.log(0.2 / 0.8))
    # Not this slide, another model's table, an output that the table lacks, or no table at all.
    assert level_elsewhere(table, "z", "lesion", "log_odds", own) is None
    assert level_elsewhere(table, "a", "lesion", "log_odds", own + 1) is None
    assert level_elsewhere(table, "a", "lesion", "logit", own) is None
    assert level_elsewhere(tmp_path / "none.csv", "a", "lesion", "log_odds", own) is None
    broken = write_batch(tmp_path / "broken", "a,0.1,much")
    with pytest.raises(ClientError, match="run the batch again"):
        level_elsewhere(broken, "a", "lesion", "log_odds", own)
