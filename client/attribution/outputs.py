"""The files an explanation becomes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from client.attribution.explain import Explanation
from client.attribution.picture import Canvas, colour_limit, draw_map, save_figure
from client.attribution.scorer import Float64
from client.files import atomic_path
from client.slide import Slide

LONGEST_PX = 1200

UNITS = {
    "log_odds": "log-odds",
    "probability": "probability",
    "logit": "logit",
    "embedding": "cosine to the whole slide's embedding",
}


def canvas_for(explanation: Explanation, slide: Slide | None) -> Canvas:
    """The slide's overview, or white where only its embeddings are at hand."""
    if slide is None:
        return Canvas.blank(explanation.slide.coords, explanation.slide.tile_size, LONGEST_PX)
    overview = slide.overview(max(1.0, max(slide.dimensions) / LONGEST_PX))
    return Canvas(overview.pixels, overview.downsample)


def write_map(path: Path, explanation: Explanation, canvas: Canvas, limit: float | None = None) -> None:
    """The target's map as PNG; `limit` fixes the colours across slides."""
    values = explanation.attribution.values[:, explanation.focus]
    limit = limit or colour_limit(values)
    slide = explanation.slide
    picture = draw_map(canvas, slide.coords, slide.tile_size, values, limit)
    with atomic_path(path) as part:
        save_figure(
            part,
            picture,
            limit,
            title=_title(explanation, values),
            unit=f"{UNITS[explanation.settings.score]} of {explanation.target}",
            warnings=_warnings(explanation),
        )


def _title(explanation: Explanation, values: Float64) -> list[str]:
    result, focus = explanation.attribution, explanation.focus
    return [
        f"{explanation.slide.slide_id}: {explanation.target}, {result.method}",
        f"whole slide {result.full[focus]:+.3g}, nothing {result.base[focus]:+.3g}, "
        f"sum of tiles {np.nansum(values):+.3g}, {result.evaluations} masks",
    ]


def _warnings(explanation: Explanation) -> list[str]:
    return [] if explanation.contract.trained else ["untrained weights: this map shows nothing real"]
