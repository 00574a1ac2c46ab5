"""The cohort: planned fairly, drawn deterministically, readable by OpenSlide, with lesions where it says."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import shapely

from training.cohort.files import lesion_annotations, make_cohort, slide_label
from training.cohort.plan import (
    GRID,
    TILE_PX,
    TISSUE_ROWS,
    SlidePlan,
    TissueSource,
    draw_slide,
    plan_cohort,
    read_source,
)
from training.cohort.stain import Staining, unmix
from training.errors import TrainingError

PLANS = plan_cohort()


@pytest.fixture(scope="module")
def tissue(real_slide: Path) -> TissueSource:
    with openslide.OpenSlide(real_slide) as slide:
        return read_source(np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")))


def test_no_patient_stands_in_two_splits_and_labels_are_balanced() -> None:
    splits: dict[str, set[str]] = {}
    for plan in PLANS:
        splits.setdefault(plan.patient_id, set()).add(plan.split)
    assert all(len(names) == 1 for names in splits.values())
    for split in TISSUE_ROWS:
        labels = [slide_label(p) for p in PLANS if p.split == split]
        assert labels.count("benign") == labels.count("lesion") > 0


def test_scanner_staining_and_pattern_say_nothing_about_the_label() -> None:
    for staining in {p.staining for p in PLANS}:
        assert sorted(slide_label(p) for p in PLANS if p.staining == staining) == ["benign", "lesion"]
    for mpp in {p.mpp for p in PLANS}:
        labels = [slide_label(p) for p in PLANS if p.mpp == mpp]
        assert labels.count("lesion") == labels.count("benign")
    patterns = [p.pattern for p in PLANS]
    assert patterns.count("contiguous") == patterns.count("scattered") == len(PLANS) // 4


def test_held_out_slides_are_made_of_tissue_that_training_never_saw() -> None:
    taken = {split: {row for band in bands for row in range(*band)} for split, bands in TISSUE_ROWS.items()}
    assert not taken["test"] & (taken["train"] | taken["val"])


@pytest.mark.parametrize("plan", [p for p in PLANS if p.lesion], ids=lambda p: p.slide_id)
def test_lesions_lie_in_tissue_in_their_pattern(plan: SlidePlan) -> None:
    assert set(plan.lesion) <= set(plan.tissue)
    assert not set(plan.lesion) & set(plan.smear)
    cells = [shapely.box(c, r, c + 1, r + 1) for c, r in plan.lesion]
    parts = len(shapely.get_parts(shapely.union_all(cells)))
    assert parts == (1 if plan.pattern == "contiguous" else len(plan.lesion))


def test_a_stain_that_is_taken_apart_and_mixed_again_is_the_same() -> None:
    rgb = np.random.default_rng(0).integers(20, 250, (64, 64, 3), dtype=np.uint8)
    again = Staining(glass=(255, 255, 255)).mix(unmix(rgb))
    assert np.abs(again.astype(int) - rgb).max() <= 1


def test_a_smear_has_the_lesion_s_mean_colour_but_not_its_texture(tissue: TissueSource) -> None:
    plan = replace(PLANS[1], mpp=0.5, smear=(), staining=Staining())
    drawn = {
        "benign": draw_slide(replace(plan, lesion=()), tissue),
        "lesion": draw_slide(plan, tissue),
        "smear": draw_slide(replace(plan, lesion=(), smear=plan.lesion), tissue),
    }
    tiles = {
        kind: np.stack([pixels[r * TILE_PX :, c * TILE_PX :][:TILE_PX, :TILE_PX] for c, r in plan.lesion])
        for kind, pixels in drawn.items()
    }
    mean = {kind: np.log(each + 1.0).mean(axis=(0, 1, 2)) for kind, each in tiles.items()}
    planted = np.abs(mean["lesion"] - mean["benign"]).mean()
    assert planted > 0.2
    assert np.abs(mean["lesion"] - mean["smear"]).mean() < 0.1 * planted
    contrast = {kind: each.astype(float).std(axis=(1, 2)).mean() for kind, each in tiles.items()}
    assert contrast["lesion"] > 1.3 * contrast["smear"]


def test_outlines_cover_exactly_the_planted_tiles() -> None:
    plan = PLANS[1]
    outline = shapely.union_all(
        [shapely.geometry.shape(f["geometry"]) for f in lesion_annotations(plan)["features"]]
    )
    side = plan.tile_level0_px
    assert outline.area == len(plan.lesion) * side**2
    assert all(outline.contains(shapely.Point((c + 0.5) * side, (r + 0.5) * side)) for c, r in plan.lesion)
    assert lesion_annotations(PLANS[0]) == {"type": "FeatureCollection", "features": []}


def test_files_are_the_same_bytes_again_and_openslide_reads_them(real_slide: Path, tmp_path: Path) -> None:
    plans = make_cohort(real_slide, tmp_path / "a", patients=(1, 0, 1))
    some = make_cohort(real_slide, tmp_path / "b", patients=(1, 0, 1), only=("train-00B", "test-01A"))
    assert [plan.slide_id for plan in some] == ["train-00B", "test-01A"]
    files = {
        name: sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*") if p.is_file())
        for name in "ab"
    }
    # slides and annotations; labels, tiles, three splits, the mark
    assert [len(files[name]) for name in "ab"] == [2 * 4 + 6, 2 * 2 + 6]
    for file in files["b"]:
        again, whole = tmp_path / "b" / file, tmp_path / "a" / file
        if file.suffix == ".csv":
            assert set(again.read_text().splitlines()) <= set(whole.read_text().splitlines()), file
        elif file.suffix != ".json":
            assert again.read_bytes() == whole.read_bytes(), file
    for plan in plans:
        with openslide.OpenSlide(tmp_path / "a" / "slides" / f"{plan.slide_id}.tiff") as slide:
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(plan.mpp, abs=1e-6)
            assert slide.dimensions == (GRID * plan.tile_level0_px,) * 2
            assert slide.level_count >= 4
    with (tmp_path / "a" / "tiles.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert sum(r["label"] == "lesion" for r in rows) == sum(len(p.lesion) for p in plans)
    json.loads((tmp_path / "a" / "annotations" / f"{plans[1].slide_id}.geojson").read_text())


def test_a_complete_cohort_is_kept_and_another_is_not_overwritten(real_slide: Path, tmp_path: Path) -> None:
    make_cohort(real_slide, tmp_path / "c", only=("test-24A",))
    mark = (tmp_path / "c" / "cohort.json").stat().st_mtime_ns
    labels = (tmp_path / "c" / "labels.csv").read_text()
    (tmp_path / "c" / "labels.csv").write_text("columns of an earlier version\n")
    make_cohort(real_slide, tmp_path / "c", only=("test-24A",))
    assert (tmp_path / "c" / "cohort.json").stat().st_mtime_ns == mark
    assert (tmp_path / "c" / "labels.csv").read_text() == labels
    with pytest.raises(TrainingError, match="holds another cohort: remove it or choose another --out"):
        make_cohort(real_slide, tmp_path / "c", only=("test-24A",), seed=1)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("mine")
    with pytest.raises(TrainingError, match="is not a cohort"):
        make_cohort(real_slide, tmp_path / "d")
    with pytest.raises(TrainingError, match="no slide test-99A: its slides are called train-00A to test-35B"):
        make_cohort(real_slide, tmp_path / "e", only=("test-99A", "test-24A"))


def test_a_source_that_is_no_slide_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "x.svs").write_text("no slide")
    with pytest.raises(TrainingError, match="not a slide that OpenSlide can read"):
        make_cohort(tmp_path / "x.svs", tmp_path / "out")
