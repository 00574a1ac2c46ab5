"""Write a planned cohort: slides, labels, splits, the truth for every tile, and annotations for QuPath."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import shapely

from gigapath_contract.files import file_sha256, why_unreadable
from training.cohort.plan import Cell, SlidePlan, TissueSource, draw_slide, plan_cohort, read_source
from training.cohort.pyramid import write_pyramid
from training.errors import TrainingError
from training.files import make_folder, read_json, write_csv, write_json, write_text

CLASSES = ("benign", "lesion")
MARK = "cohort.json"  # written last: a folder with it is complete


def make_cohort(
    source: Path,
    out: Path,
    *,
    seed: int = 0,
    patients: tuple[int, int, int] = (20, 4, 12),
    only: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SlidePlan]:
    """Make the cohort of `seed` in `out` from the real slide `source`; a complete one is kept.

    With `only`, make the slides of these names alone; they equal those of the whole cohort.

    Raises:
        TrainingError: `source` can't be read, `out` holds something else, or the cohort has no such slide.
    """
    plans = plan_cohort(seed, patients)
    if unknown := sorted(set(only) - {plan.slide_id for plan in plans}):
        raise TrainingError(
            f"the cohort has no slide {', '.join(unknown)}: its slides are called {plans[0].slide_id} "
            f"to {plans[-1].slide_id}"
        )
    plans = [plan for plan in plans if not only or plan.slide_id in only]
    inputs = {"source_sha256": _sha256(source), "plan_sha256": plan_digest(plans)}
    mark = out / MARK
    if mark.exists():
        if {k: v for k, v in read_json(mark).items() if k in inputs} == inputs:
            _write_tables(plans, out)  # an earlier version may have named columns otherwise
            return plans
        raise TrainingError(f"{out} holds another cohort: remove it or choose another --out")
    if out.exists() and (not out.is_dir() or any(p.name != "slides" for p in out.iterdir())):
        raise TrainingError(f"{out} exists and is not a cohort: choose another --out")
    tissue = _read_tissue(source)
    slides = out / "slides"
    make_folder(slides)
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for plan, digest in zip(
            plans, pool.map(lambda p: write_slide(p, tissue, slides), plans), strict=True
        ):
            digests[plan.slide_id] = digest
            progress(len(digests), len(plans))
    _write_tables(plans, out)
    make_folder(out / "annotations")
    for plan in plans:
        text = json.dumps(lesion_annotations(plan))
        write_text(out / "annotations" / f"{plan.slide_id}.geojson", text)
    write_json(mark, {**inputs, "seed": seed, "slides_sha256": digests})
    return plans


def write_slide(plan: SlidePlan, tissue: TissueSource, folder: Path) -> str:
    """Draw one slide into `folder`; returns the file's SHA-256."""
    path = folder / f"{plan.slide_id}.tiff"
    write_pyramid(path, draw_slide(plan, tissue), plan.mpp)
    return _sha256(path)


def plan_digest(plans: Iterable[SlidePlan]) -> str:
    """SHA-256 of everything that determines a cohort's slides, apart from the source."""
    text = json.dumps([CLASSES, *(asdict(plan) for plan in plans)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def slide_label(plan: SlidePlan) -> str:
    """The slide's class: `lesion` where any tile has one."""
    return CLASSES[plan.pattern != "none"]


def tile_kind(plan: SlidePlan, cell: Cell) -> str:
    """What lies in a tissue tile: `lesion`, `smear` or `benign`."""
    return "lesion" if cell in plan.lesion else "smear" if cell in plan.smear else "benign"


def lesion_annotations(plan: SlidePlan) -> dict[str, Any]:
    """The lesions' outlines as a GeoJSON FeatureCollection that QuPath opens (level-0 px)."""
    side = plan.tile_level0_px
    boxes = [shapely.box(c * side, r * side, (c + 1) * side, (r + 1) * side) for c, r in plan.lesion]
    features = [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{plan.slide_id}/lesion/{number}")),
            "geometry": json.loads(shapely.to_geojson(polygon)),
            "properties": {
                "objectType": "annotation",
                "classification": {"name": "Tumor", "color": [200, 0, 0]},
                "isLocked": True,
            },
        }
        for number, polygon in enumerate(shapely.get_parts(shapely.union_all(boxes)))
    ]
    return {"type": "FeatureCollection", "features": features}


def _write_tables(plans: list[SlidePlan], out: Path) -> None:
    write_csv(
        out / "labels.csv",
        ("slide_id", "image_path", "pat_id", "label", "split", "pattern", "scanner"),
        [
            (p.slide_id, f"slides/{p.slide_id}.tiff", p.patient_id, slide_label(p), p.split, p.pattern, p.mpp)
            for p in plans
        ],
    )
    make_folder(out / "splits")
    for split in ("train", "val", "test"):
        rows = [(p.slide_id, p.patient_id, slide_label(p)) for p in plans if p.split == split]
        write_csv(out / "splits" / f"{split}_0.csv", ("slide_id", "pat_id", "label"), rows)
    tiles = []
    for p in plans:
        side = p.tile_level0_px
        for cell in sorted(p.tissue, key=lambda c: (c[1], c[0])):
            kind = tile_kind(p, cell)
            label = CLASSES[kind == "lesion"]
            image = f"slides/{p.slide_id}.tiff"
            tiles.append((image, cell[0] * side, cell[1] * side, side, label, kind, p.slide_id, p.split))
    write_csv(out / "tiles.csv", ("image", "x", "y", "size", "label", "kind", "slide_id", "split"), tiles)


def _read_tissue(source: Path) -> TissueSource:
    try:
        with openslide.OpenSlide(source) as slide:
            rgb = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    except (openslide.OpenSlideError, OSError) as error:
        raise TrainingError(f"{source} is not a slide that OpenSlide can read: {error}") from error
    tissue = read_source(rgb)
    for split, bands in tissue.corners.items():
        if min(len(corners) for corners in bands) == 0:
            raise TrainingError(
                f"{source} has too little tissue for the {split} slides: use CMU-1-Small-Region.svs"
            )
    return tissue


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise TrainingError(why_unreadable(path, error)) from error
