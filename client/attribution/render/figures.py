"""Figures of an explanation: the map, the strongest tiles, maps inside tiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from shapely.geometry.base import BaseGeometry

from ...arrays import Float64, Int64
from ...files import atomic_path
from ...outputs.layout import export_name
from ...slides.contours import rings
from ...slides.slide import Slide
from ..explain import Explanation
from ..look_groups import LookGroups
from ..methods.model_outputs import ModelOutputs
from ..methods.result import Attribution
from ..tile import Encode, Fill, TileScore, embedding_score, slide_score, tile_occlusion
from .contact_sheet import draw_tile_map, strongest, write_contact_sheet
from .evidence import evidence_lines
from .overlay import Canvas, colour_limit, draw_map, save_figure, shrunk
from .tiles import glass_colour, read_crops

LONGEST_PX = 1200

UNITS = {
    "log_odds": "log-odds of {}",
    "probability": "probability of {}",
    "logit": "logit of {}",
    "embedding": "similarity to the full slide's {}",
}


def canvas_for(explanation: Explanation, slide: Slide | None, outlines: BaseGeometry | None = None) -> Canvas:
    """The slide's overview, or white pixels without a slide; `outlines` (level-0 px) are drawn on it."""
    if slide is None:
        canvas = Canvas.blank(explanation.slide.coords, explanation.slide.tile_size, LONGEST_PX)
    else:
        canvas = slide_canvas(slide)
    scale = np.array(canvas.downsample)
    return replace(canvas, outlines=tuple(ring / scale for ring in rings(outlines)) if outlines else ())


def slide_canvas(slide: Slide) -> Canvas:
    """The slide's overview."""
    overview = slide.overview(max(1.0, max(slide.dimensions) / LONGEST_PX))
    return Canvas(overview.pixels, overview.downsample)


def write_map(path: Path, explanation: Explanation, canvas: Canvas, limit: float | None = None) -> None:
    """Write the target's map as PNG; `limit` fixes the colour scale at +-limit."""
    result, trust, slide = explanation.attribution, explanation.reliability, explanation.slide
    values = result.values[:, explanation.target_index]
    limit = limit or colour_limit(values)
    faint = np.abs(values) < trust.noise_floor if trust else None
    picture = draw_map(canvas, slide.coords, slide.tile_size, values, limit, faint)
    seen = not (canvas.pixels == 255).all()
    with atomic_path(path) as part:
        save_figure(
            part,
            picture,
            limit,
            title=_title(explanation),
            unit=_unit(explanation),
            warnings=_warnings(explanation),
            noise_floor=trust.noise_floor if trust else None,
            thumbnail=shrunk(canvas.pixels) if seen else None,
            um_per_px=slide.mpp_level0[0] * canvas.downsample[0] if slide.mpp_level0 else None,
        )


def prediction(explanation: Explanation) -> str:
    """What the slide is called, with the probability: `lesion, p = 0.998`; empty without a head.

    Several classes may hold, or none, where the head is multilabel.
    """
    head, slide = explanation.contract.head, explanation.masked_slide
    if head is None:
        return ""
    logits = slide.in_place()(np.ones((1, len(slide.coords)), np.bool_)).logits
    called = ModelOutputs(tuple(head.classes), "logit", head.kind).calls(logits.astype(np.float64))[0]
    chances = np.atleast_1d(head.probabilities(logits[0]))
    found = [f"{name}, p = {chances[i]:.3f}" for i, name in enumerate(head.classes) if called[i]]
    return "; ".join(found) or "none of the classes"


def _unit(explanation: Explanation) -> str:
    return UNITS[explanation.score].format(explanation.target_class)


def _title(explanation: Explanation) -> list[str]:
    result, target_index, trust = explanation.attribution, explanation.target_index, explanation.reliability
    occluder = explanation.settings.occluder
    shown = filter(None, (prediction(explanation), f"class shown: {explanation.target_class}"))
    lines = [
        f"{explanation.slide.slide_id}: {'; '.join(shown)}",
        f"model {export_name(explanation.contract)}; {result.method}{_grouping(result)}",
        f"full {result.full[target_index]:+.3g}, empty {result.base[target_index]:+.3g}, "
        f"sum of tiles {np.nansum(result.values[:, target_index]):+.3g}; {result.evaluations} masks, "
        f"occluder {occluder if isinstance(occluder, str) else 'bank'}",
    ]
    if trust is not None:
        lines.append(
            f"SRG {trust.curves.srg:+.3g} (random up to {max(map(abs, trust.random_srg)):.3g}), "
            f"noise floor {trust.noise_floor:.2g} (hatched below), redundancy {trust.redundancy:.2f}, "
            f"agreement with {trust.other_occluder} {trust.agreement:+.2f}"
        )
    return lines + evidence_lines(explanation)


def _grouping(result: Attribution) -> str:
    if result.grouping is None:
        return ""
    gains = [f"SRG by {one.grouping} {one.srg:+.3g}" for one in result.groupings if one.srg is not None]
    return f" of groups by {result.grouping}" + (f" ({', '.join(gains)})" if gains else "")


def _warnings(explanation: Explanation) -> list[str]:
    untrained = [] if explanation.contract.trained else ["untrained weights: this map means nothing"]
    doubt = [explanation.doubt] if explanation.doubt else []
    return untrained + doubt + (explanation.reliability.warnings() if explanation.reliability else [])


def write_strongest(path: Path, explanation: Explanation, slide: Slide) -> None:
    """Write the tiles that support and that oppose the target most as a contact sheet (PNG)."""
    values, coords = explanation.attribution.values[:, explanation.target_index], explanation.slide.coords
    rows = []
    for heading, tiles in zip(("supports", "opposes"), strongest(values), strict=True):
        if len(tiles):
            pixels = read_crops(slide, coords[tiles], explanation.contract)
            labels = [
                f"{rank}. {label}" for rank, label in enumerate(_tile_labels(explanation, tiles), start=1)
            ]
            rows.append((f"{heading} {explanation.target_class}", pixels, labels))
    write_contact_sheet(path, rows, _title(explanation)[0], explanation.doubt)


def _tile_labels(explanation: Explanation, tiles: Int64) -> list[str]:
    """Value, probability of a slide of that tile alone, and place in mm of each of `tiles`."""
    values, slide = explanation.attribution.values[:, explanation.target_index], explanation.slide
    alone = _probability_alone(explanation)
    labels = []
    for tile in tiles.tolist():
        x, y = slide.coords[tile].tolist()
        place = f"({x}, {y}) px"
        if slide.mpp_level0:
            place = f"({x * slide.mpp_level0[0]:,.0f}, {y * slide.mpp_level0[1]:,.0f}) µm"
        chance = "" if alone is None else f", alone p = {alone[tile]:.3f}"
        labels.append(f"{values[tile]:+.3g}{chance}\n{place}")
    return labels


def _probability_alone(explanation: Explanation) -> Float64 | None:
    """The target's probability on a slide of each tile alone [N]; None where keep_one does not give it."""
    alone = explanation.keep_one or explanation.attribution
    if alone.method != "keep_one" or explanation.score not in ("log_odds", "probability"):
        return None
    column = explanation.target_index
    outputs = alone.values[:, column] + alone.base[column]
    return np.asarray(1 / (1 + np.exp(-outputs)) if explanation.score == "log_odds" else outputs)


def write_look_groups(path: Path, explanation: Explanation, groups: LookGroups, slide: Slide) -> None:
    """Write typical tiles of each group by look, with what the group carries of the score, as PNG."""
    coords = explanation.slide.coords
    rows = [
        (line, read_crops(slide, coords[tiles], explanation.contract), _tile_labels(explanation, tiles))
        for line, tiles in zip(groups.lines(), groups.typical, strict=True)
    ]
    title = f"{explanation.slide.slide_id}: {explanation.target_class}, by look"
    write_contact_sheet(path, rows, title, explanation.doubt)


def write_tile_map(
    path: Path,
    explanation: Explanation,
    slide: Slide,
    tile: int,
    encode: Encode,
    *,
    score: TileScore = "slide",
    fill: Fill = "blur",
) -> None:
    """Write the occlusion map of one tile as PNG.

    score, fill: see `TileScore` and `tile_occlusion`.
    """
    at = explanation.slide.coords[tile : tile + 1]
    pixels = read_crops(slide, at, explanation.contract)[0]
    whole = read_crops(slide, at, explanation.contract, explanation.contract.tile.size_px)[0]
    if score == "slide":
        score_tiles = slide_score(
            explanation.masked_slide, tile, explanation.outputs, explanation.target_index
        )
        unit = f"slide's {_unit(explanation)}"
    else:
        score_tiles, unit = embedding_score(encode, pixels), "1 - cosine of the tile's embedding"
    found = tile_occlusion(pixels, encode, score_tiles, fill=fill, glass=glass_colour(slide))
    picture, limit = draw_tile_map(whole, found)
    warnings = [explanation.doubt] if explanation.doubt else []
    if not found.agreement >= 0.5:
        warnings.append(
            f"{found.other_fill} instead of {found.fill} gives another map "
            f"(correlation {found.agreement:+.2f})"
        )
    x, y = at[0].tolist()
    title = [
        f"{explanation.slide.slide_id}: tile at ({x}, {y}), {found.fill}",
        "hatched: outside the model's crop",
    ]
    with atomic_path(path) as part:
        save_figure(part, picture, limit, title=title, unit=unit, warnings=warnings)
