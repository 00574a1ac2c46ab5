"""A signed map on the slide: diverging, centred at 0, no blur, drawn to the pixel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ...arrays import Bool, Float32, Float64, Int64, Pixels

COLOURS = matplotlib.colormaps["RdBu_r"]
OPACITY, FAINT, TISSUE = 0.65, 0.25, 0.7
HATCH_PERIOD, HATCH_GREY = 7, 110
DPI, MARGIN, SIDE, LINE = 100, 12, 130, 18  # px


@dataclass(frozen=True)
class Canvas:
    """What a map is drawn on: RGB pixels uint8 [h, w, 3], each `downsample` (x, y) level-0 px in size."""

    pixels: Pixels
    downsample: tuple[float, float]

    @staticmethod
    def blank(coords: Int64, tile_size: tuple[int, int], longest: int = 1200) -> Canvas:
        """White, just large enough for the tiles and at most `longest` px: to draw on without a slide."""
        width, height = (int(end) for end in coords.max(axis=0) + np.array(tile_size))
        scale = max(1.0, max(width, height) / longest)
        shape = (int(np.ceil(height / scale)), int(np.ceil(width / scale)), 3)
        return Canvas(np.full(shape, 255, dtype=np.uint8), (scale, scale))

    def edges(self, coords: Int64, tile_size: tuple[int, int]) -> Int64:
        """Pixel rectangles [N, 4] (x0, y0, x1, y1) of tiles, floored so that neighbours meet exactly."""
        scale = np.array(self.downsample)
        first = np.floor(coords / scale)
        last = np.maximum(np.floor((coords + np.array(tile_size)) / scale), first + 1)
        return np.concatenate([first, last], axis=1).astype(np.int64)


def colour_limit(values: Float64) -> float:
    """Symmetric limit of the colour scale: the 99th percentile of |value|, robust to single tiles."""
    finite = np.abs(values[np.isfinite(values)])
    limit = float(np.percentile(finite, 99)) if len(finite) else 0.0
    return limit if limit > 0 else float(finite.max(initial=0.0)) or 1.0


def draw_map(
    canvas: Canvas,
    coords: Int64,
    tile_size: tuple[int, int],
    values: Float64,
    limit: float,
    faint: Bool | None = None,
) -> Pixels:
    """The slide in grey with every scored tile coloured: red supports the class, blue opposes it.

    coords: [N, 2], and tile_size: (x, y), in level-0 px.
    values: [N]; a NaN is not drawn.
    limit: value of the strongest colours.
    faint: bool [N], drawn pale and hatched, for values within the noise.
    """
    picture = faded_grey(canvas.pixels)
    hatch = hatching(picture.shape[:2])
    colours = 255 * COLOURS(0.5 + 0.5 * np.clip(values / limit, -1, 1))[:, :3]
    for i, (x0, y0, x1, y1) in enumerate(canvas.edges(coords, tile_size)):
        if not np.isfinite(values[i]):
            continue
        pale = faint is not None and bool(faint[i])
        opacity = FAINT if pale else OPACITY
        tile = picture[y0:y1, x0:x1]
        tile += opacity * (colours[i] - tile)
        if pale:
            tile[hatch[y0:y1, x0:x1]] = HATCH_GREY
    pixels: Pixels = np.rint(picture).astype(np.uint8)
    return pixels


def faded_grey(pixels: Pixels) -> Float32:
    """RGB pixels as light grey, so that only the map has colour."""
    grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.asarray(255 - TISSUE * (255 - grey.astype(np.float32)), dtype=np.float32)


def hatching(shape: tuple[int, ...]) -> Bool:
    """Diagonal lines, bool [height, width], over a picture of `shape`."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    lines: Bool = (rows + columns) % HATCH_PERIOD == 0
    return lines


def save_figure(
    path: Path,
    picture: Pixels,
    limit: float,
    *,
    title: list[str],
    unit: str,
    warnings: list[str] | None = None,
) -> tuple[int, int]:
    """Write `picture` without resampling as PNG, with title, warnings in red and a colour bar.

    unit: the colour bar's label.

    Returns the place of the picture's top-left pixel in the file, (x, y).
    """
    warnings = warnings or []
    height, width = picture.shape[:2]
    head = LINE * (len(title) + len(warnings)) + 2 * MARGIN
    longest = max((len(line) for line in title + warnings), default=0)
    full_width = max(width + SIDE + 2 * MARGIN, 7 * longest + 2 * MARGIN)
    full_height = max(height, 220) + head + MARGIN
    figure = Figure(figsize=(full_width / DPI, full_height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    # figimage places pixels as they are; imshow would resample them.
    figure.figimage(picture, MARGIN, full_height - head - height)
    for number, line in enumerate(title + warnings):
        figure.text(
            MARGIN / full_width,
            1 - (MARGIN + LINE * number) / full_height,
            line,
            va="top",
            fontsize=8.5,
            family="DejaVu Sans",
            color="black" if number < len(title) else "crimson",
            weight="bold" if number == 0 else "normal",
        )
    bar = figure.add_axes(
        (
            (width + 2 * MARGIN) / full_width,
            1 - (head + min(max(height, 200), 500)) / full_height,
            16 / full_width,
            min(max(height, 200), 500) / full_height,
        )
    )
    figure.colorbar(ScalarMappable(Normalize(-limit, limit), COLOURS), cax=bar, extend="both", label=unit)
    bar.tick_params(labelsize=7)
    bar.yaxis.label.set_fontsize(8)
    figure.savefig(path, dpi=DPI, format="png")
    return MARGIN, head
