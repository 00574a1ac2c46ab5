"""Find the tissue of a cohort before any GPU time, to be looked at, corrected and taken up by a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import cv2
import numpy as np

from ..arrays import Pixels
from ..errors import ClientError, OutputError
from ..files import write_csv
from ..outputs.records import DEGRADED, FAILED, OK
from ..outputs.thumbnail import write_picture
from ..scoring.score import THUMBNAIL_PX, SlideSource, TilingOptions, find_tissue
from ..slides.contours import rings
from ..slides.geojson import tissue_features, write_feature_collection
from ..slides.slide import Slide, open_slide
from ..slides.tiling import NO_TILES, plan_tiles
from ..slides.tissue import TissueMask, mask_from_file

MANIFEST = "tissue.csv"
_OUTLINE = (20, 110, 60)


@dataclass(frozen=True)
class TissueRow:
    """A slide's row of `tissue.csv`, which is a manifest for `batch`; `mask_path` is its outlines."""

    slide_id: str
    path: str
    mpp: str = ""
    mask_path: str = ""
    tissue_status: str = OK
    tissue: str = ""
    tiles: str = ""
    notes: str = ""


def find_cohort_tissue(
    slides: list[SlideSource], out: Path, tiling: TilingOptions, *, overwrite: bool = False
) -> Iterator[TissueRow]:
    """Write outlines, mask and thumbnail of each slide, and yield its row; outlines that exist stay.

    Raises:
        OutputError: a file cannot be written.
    """
    for source in slides:
        outlines = out / "tissue_geojson" / f"{source.slide_id}.geojson"
        own = source.mask or (outlines if outlines.exists() and not overwrite else None)
        asked = SlideSource(source.path, source.slide_id, source.mpp, own)
        mpp = "" if source.mpp is None else repr(source.mpp)
        about = source.slide_id, str(source.path.absolute()), mpp
        try:
            with open_slide(source.path, source.mpp) as slide:
                tissue = find_tissue(slide, asked, TilingOptions(True, tiling.min_tissue))
                assert tissue is not None  # without --all-tiles
                if own is None:
                    features = tissue_features(
                        tissue.contours(slide.bounds), source.slide_id, origin=slide.bounds[:2]
                    )
                    write_feature_collection(outlines, features)
                    if tissue.mask.any():  # as a batch will have it, from the outlines
                        tissue = mask_from_file(outlines, slide, frame="qupath")
                _write_pictures(out, slide, source.slide_id, tissue)
                tiles = len(plan_tiles(slide, tissue, min_tissue=tiling.min_tissue))
                notes = "; ".join(slide.notes)
        except OutputError:
            raise
        except ClientError as error:
            yield TissueRow(*about, tissue_status=FAILED, notes=str(error))
            continue
        mask = source.mask or (outlines if tissue.mask.any() else None)
        yield TissueRow(
            *about,
            mask_path=str(mask.absolute()) if mask else "",
            tissue_status=OK if tiles and not notes else DEGRADED,
            tissue=f"{tissue.fraction:.4f}",
            tiles=str(tiles),
            notes=notes if tiles else "; ".join(filter(None, [NO_TILES, notes])),
        )


def write_manifest(out: Path, rows: list[TissueRow], columns: Mapping[str, Mapping[str, str]]) -> Path:
    """Write `tissue.csv`, with the further `columns` of the slides' manifest. Raises OutputError."""
    names = [field.name for field in fields(TissueRow)]
    further = [name for name in next(iter(columns.values()), {}) if name.lower() not in names]
    table = [
        [getattr(row, name) for name in names] + [columns.get(row.slide_id, {}).get(name) for name in further]
        for row in rows
    ]
    write_csv(out / MANIFEST, [*names, *further], table)
    return out / MANIFEST


def _write_pictures(out: Path, slide: Slide, slide_id: str, tissue: TissueMask) -> None:
    """Write the mask, and the thumbnail with the outlines."""
    mask = np.where(tissue.mask, np.uint8(255), np.uint8(0))
    write_picture(out / "masks" / f"{slide_id}.png", np.repeat(mask[..., None], 3, axis=2))
    thumbnail: Pixels = slide.thumbnail(THUMBNAIL_PX).copy()
    scale = np.array(thumbnail.shape[1::-1]) / np.array(slide.dimensions)
    for contour in tissue.contours(slide.bounds):
        for ring in rings(contour):
            cv2.polylines(thumbnail, [np.rint(ring * scale).astype(np.int32)], True, _OUTLINE, 2)
    write_picture(out / "thumbnails" / f"{slide_id}.jpg", thumbnail)
