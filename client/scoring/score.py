"""One slide, from the file to its embeddings and scores."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from shapely.geometry import Polygon

from gigapath_contract.coordinates import LevelZeroScale
from gigapath_contract.features import TileFeatures
from gigapath_contract.schema import Contract
from gigapath_contract.slides import slide_id as id_of

from ..arrays import Array, Bool, Float32, Int64, Pixels
from ..errors import NonFiniteAnswer, SlideError
from ..slides.geojson import Frame
from ..slides.slide import Slide, open_slide
from ..slides.tiling import NO_TILES, TilePlan, plan_tiles
from ..slides.tissue import TissueMask, mask_from_file, tissue_mask
from ..triton.connection import Connection
from .conformance import check_plan, grid_coordinates
from .embedding import Embedded, Progress, Throughput, embed_tiles
from .resume import EmbeddingCheckpoint
from .timings import StageTimer

THUMBNAIL_PX = 1024


@dataclass(frozen=True)
class SlideSource:
    """A slide to score: its file, the name of its outputs, and overrides for mpp and tissue.

    Attributes:
        path: the slide file.
        slide_id: the name; by default the file's, without its suffix.
        mpp: microns per level-0 pixel, in place of the file's own.
        mask: a mask image or QuPath's GeoJSON, in place of tissue found by colour.
    """

    path: Path
    slide_id: str = ""
    mpp: float | None = None
    mask: Path | None = None

    def __post_init__(self) -> None:
        if not self.slide_id:
            object.__setattr__(self, "slide_id", id_of(self.path.name))


@dataclass(frozen=True)
class TilingOptions:
    """Tiling options; changing them invalidates stored results.

    `tissue` False keeps every tile; else at least `min_tissue` (0 to 1) of a tile must be tissue.
    `mask_frame` says where masks that are annotations have their origin, see `slides.tissue`.
    """

    tissue: bool = True
    min_tissue: float = 0.1
    mask_frame: Frame = "qupath"


DEFAULT_TILING, DEFAULT_THROUGHPUT = TilingOptions(), Throughput()


@dataclass(frozen=True, eq=False)
class ScoredSlide:
    """A slide's plan, embeddings and scores; the last three arrays are None where no tile was valid."""

    plan: TilePlan
    contours: list[Polygon]  # of the tissue, level-0 pixels
    origin: tuple[int, int]  # where the slide's bounds begin, which QuPath calls (0, 0)
    thumbnail: Pixels
    embeddings: Float32  # [N, D], NaN where not valid
    valid: Bool  # [N]
    layers: Float32 | None  # [L+1, 2, E]: CLS and mean of every layer
    slide_embedding: Float32 | None  # [E], the contract's variant
    logits: Float32 | None  # [C], None too where the export has no head
    resumed_tiles: int = 0  # taken over from an earlier run
    reused: bool = False  # all of them, from the feature file
    notes: tuple[str, ...] = ()  # what was odd about the slide, see `Slide.notes`
    tile_logits: Float32 | None = None  # [N, C] by the tile head, NaN where not valid; None: none, or reused

    @property
    def degraded_reason(self) -> str:
        """Why the result is incomplete; empty where it is complete."""
        invalid = len(self.valid) - int(self.valid.sum())
        if len(self.valid) == 0:
            return f"{NO_TILES}: no slide embedding and no score"
        return f"{invalid} of {len(self.valid)} tiles could not be decoded" if invalid else ""


def score_slide(
    source: SlideSource,
    connection: Connection,
    contract: Contract,
    tiling: TilingOptions = DEFAULT_TILING,
    throughput: Throughput = DEFAULT_THROUGHPUT,
    *,
    timer: StageTimer | None = None,
    stored: TileFeatures | None = None,
    open_checkpoint: Callable[[TilePlan], EmbeddingCheckpoint | None] = lambda plan: None,
    progress: Progress = lambda done, total: None,
) -> ScoredSlide:
    """Open a slide, find its tissue, plan, embed the tiles and encode the slide.

    Args:
        source: the slide.
        connection: to servers of the contract's export.
        contract: what `read_contract(connection)` returned.
        tiling: which tiles are scored.
        throughput: threads and tiles per request.
        timer: gets the stages' times.
        stored: embeddings by the same tile encoder; they are taken if they are of the tiles that are planned.
        open_checkpoint: opens what an earlier run left of this plan, None where nothing is kept.
        progress: called with the tiles done and their total.

    Raises:
        SlideError: the slide cannot be opened, its scale is unknown, or none of its tiles can be decoded.
        MaskError: its mask cannot be used.
        PlanError, ContractMismatch: it cannot be tiled as the model needs.
        ServerUnavailable, RequestRefused, Cancelled: see `Connection.infer`.
    """
    timer = timer or StageTimer()
    with timer.time("open"):
        slide = open_slide(source.path, source.mpp)
    with slide, timer.time("tissue"):
        tissue = find_tissue(slide, source, tiling)
        plan = plan_slide(slide, source.slide_id, tissue, contract, tiling)
        check_plan(plan, contract)
        contours = tissue.contours(slide.bounds) if tissue else []
        thumbnail = _thumbnail(slide)
    scale = LevelZeroScale(plan.tile_size_level0, plan.mpp_level0)
    grid_coords = grid_coordinates(contract, plan.coords, scale)
    reused = None if stored is None else _as_planned(stored, plan)
    if reused is not None:
        (embeddings, valid, tile_logits), resumed = reused, len(plan)
        progress(resumed, resumed)
    else:
        with open_checkpoint(plan) or nullcontext() as checkpoint:
            resumed = len(checkpoint.valid) if checkpoint else 0
            embeddings, valid, tile_logits = embed_tiles(
                plan, connection, contract, throughput, timer=timer, checkpoint=checkpoint, progress=progress
            )
    if len(valid) and not valid.any():
        raise SlideError(
            f"{source.path}: none of its {len(valid)} tiles could be decoded: copy the slide again"
        )
    layers = embedding = logits = None
    if valid.any():
        with timer.time("slide", embeddings.nbytes):
            try:
                layers, embedding, logits = encode_slide(
                    connection, contract, embeddings[valid], grid_coords[valid]
                )
            except NonFiniteAnswer as error:
                raise error.at(str(source.path)) from error
    return ScoredSlide(
        plan=plan,
        contours=contours,
        origin=slide.bounds[:2],
        thumbnail=thumbnail,
        embeddings=embeddings,
        valid=valid,
        layers=layers,
        slide_embedding=embedding,
        logits=logits,
        resumed_tiles=resumed,
        reused=reused is not None,
        notes=tuple(slide.notes),
        tile_logits=tile_logits,
    )


def _as_planned(stored: TileFeatures, plan: TilePlan) -> Embedded | None:
    """Stored embeddings in the plan's order; None if they are of other tiles."""
    undecoded = set(map(tuple, stored.invalid_coords.tolist()))
    valid = np.array([tuple(corner) not in undecoded for corner in plan.coords.tolist()], np.bool_)
    if not np.array_equal(stored.coords, plan.coords[valid]) or len(undecoded) != (~valid).sum():
        return None
    embeddings = np.full((len(plan), stored.embeddings.shape[1]), np.nan, np.float32)
    embeddings[valid] = stored.embeddings
    return Embedded(embeddings, valid, None)


def _thumbnail(slide: Slide) -> Pixels:
    """The slide made small; blank where it is too damaged to be read as a whole, as its tiles may not be."""
    try:
        return slide.thumbnail(THUMBNAIL_PX)
    except SlideError:
        width, height = (max(1, side * THUMBNAIL_PX // max(slide.dimensions)) for side in slide.dimensions)
        return np.full((height, width, 3), 255, np.uint8)


def find_tissue(slide: Slide, source: SlideSource, tiling: TilingOptions) -> TissueMask | None:
    """The tissue as the source's mask says, else by colour; None where every tile is wanted."""
    if source.mask:
        return mask_from_file(source.mask, slide, frame=tiling.mask_frame)
    return tissue_mask(slide) if tiling.tissue else None


def plan_slide(
    slide: Slide, slide_id: str, tissue: TissueMask | None, contract: Contract, tiling: TilingOptions
) -> TilePlan:
    """Plan tiles of the contract's size, crop and scale."""
    plan = plan_tiles(
        slide,
        tissue,
        tile_px=contract.tile.size_px,
        crop_px=contract.tile.crop_px,
        mpp=contract.tile.mpp,
        min_tissue=tiling.min_tissue,
    )
    return replace(plan, slide_id=slide_id)  # a manifest's id may differ from the file's name


def encode_slide(
    connection: Connection,
    contract: Contract,
    embeddings: Float32,
    grid_coords: Int64,
) -> tuple[Float32, Float32, Float32 | None]:
    """LAYERS [L+1, 2, E], SLIDE [E] and LOGITS [C] (None without a head) of tiles [N, D] at COORDS [N, 2]."""
    outputs = ["LAYERS", "SLIDE", *(["LOGITS"] if contract.head else [])]
    inputs: dict[str, Array] = {"EMBEDDINGS": embeddings, "COORDS": grid_coords}
    answer = connection.infer("slide_encoder", inputs, outputs, version=contract.version)
    return answer["LAYERS"], answer["SLIDE"], answer.get("LOGITS")
