"""A signed map on the slide: diverging, centred at 0, no blur, drawn to the pixel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ...arrays import Bool, Float32, Float64, Int64, Pixels

COLOURS = matplotlib.colormaps["RdBu_r"]
PROBABILITY = matplotlib.colormaps["YlGnBu"]  # from 0 to 1; an attribution's colours mean other things
OPACITY, FAINT, TISSUE = 0.65, 0.12, 0.7
COLOUR_KEPT, DARKNESS_KEPT = 0.5, 0.6  # of the tissue under a map
HATCH_PERIOD, HATCH_GREY, HATCH_OPACITY = 9, 110, 0.3
DPI, MARGIN, LINE = 100, 12, 18  # px
SIDE, BAR, THUMBNAIL, LEAST_HEIGHT = 270, 260, 230, 580  # px: the column right of the map, and what is in it


@dataclass(frozen=True)
class Canvas:
    """What a map is drawn on: RGB pixels uint8 [h, w, 3], each `downsample` (x, y) level-0 px in size.

    `outlines` are rings [n, 2] in its pixels, drawn in black.
    """

    pixels: Pixels
    downsample: tuple[float, float]
    outlines: tuple[Float64, ...] = ()

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
    """Symmetric limit of the colour scale: the 99th percentile of |value|, robust to single tiles.

    It is larger where tiles beyond it hold over a tenth of the sum of |value|: the evidence of a large slide
    may lie in less than a hundredth of it, and weak values would be drawn as strong.
    """
    finite = np.sort(np.abs(values[np.isfinite(values)]))
    if not finite.any():
        return 1.0
    tenth = finite[np.searchsorted(finite.cumsum(), 0.9 * finite.sum())]
    return float(max(np.percentile(finite, 99), tenth))


def tile_colours(values: Float64, limit: float | None = None) -> Float64:
    """The colours [N, 3], 0 to 255, of values [N] on the scale of +-`limit`; of NaN the middle's."""
    scaled = np.nan_to_num(values / (limit or colour_limit(values)))
    return np.asarray(255 * COLOURS(0.5 + 0.5 * np.clip(scaled, -1, 1))[:, :3])


def draw_map(
    canvas: Canvas,
    coords: Int64,
    tile_size: tuple[int, int],
    values: Float64,
    limit: float,
    faint: Bool | None = None,
    colours: Float64 | None = None,
) -> Pixels:
    """The muted slide with every scored tile coloured: red supports the class, blue opposes it.

    Weak values are drawn thinly, since their colours are nearly white and would veil the tissue.

    coords: [N, 2], and tile_size: (x, y), in level-0 px.
    values: [N]; a NaN is not drawn.
    limit: value of the strongest colours.
    faint: bool [N], drawn pale and lightly hatched, for values within the noise.
    colours: [N, 3], 0 to 255, where they are not those of the diverging scale.
    """
    picture = muted(canvas.pixels)
    hatch = hatching(picture.shape[:2])
    strength = np.ones(len(values)) if colours is not None else np.minimum(np.abs(values) / limit, 1)
    opacity = FAINT + (OPACITY - FAINT) * np.sqrt(strength)
    colours = tile_colours(values, limit) if colours is None else colours
    for i, (x0, y0, x1, y1) in enumerate(canvas.edges(coords, tile_size)):
        if not np.isfinite(values[i]):
            continue
        pale = faint is not None and bool(faint[i])
        tile = picture[y0:y1, x0:x1]
        tile += (FAINT if pale else opacity[i]) * (colours[i] - tile)
        if pale:
            lines = hatch[y0:y1, x0:x1]
            tile[lines] += HATCH_OPACITY * (HATCH_GREY - tile[lines])
    pixels: Pixels = np.rint(picture).astype(np.uint8)
    for ring in canvas.outlines:
        cv2.polylines(pixels, [np.rint(ring).astype(np.int32)], True, (0, 0, 0), 2, cv2.LINE_AA)
    return pixels


def muted(pixels: Pixels) -> Float32:
    """RGB pixels in their own colours, but paler and lighter everywhere, so that a map on them stands out."""
    grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB).astype(np.float32)
    coloured = grey + COLOUR_KEPT * (pixels.astype(np.float32) - grey)
    return np.asarray(255 - DARKNESS_KEPT * (255 - coloured), dtype=np.float32)


def faded_grey(pixels: Pixels) -> Float32:
    """RGB pixels as light grey, so that only the map has colour."""
    grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.asarray(255 - TISSUE * (255 - grey.astype(np.float32)), dtype=np.float32)


def hatching(shape: tuple[int, ...]) -> Bool:
    """Diagonal lines, bool [height, width], over a picture of `shape`."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    lines: Bool = (rows + columns) % HATCH_PERIOD == 0
    return lines


def scale_bar(um_per_px: float, width: int) -> tuple[float, str]:
    """Length in px, at most a quarter of `width`, and label of a scale bar of 1, 2 or 5 times 10^n µm."""
    longest = um_per_px * width / 4
    power = 10.0 ** np.floor(np.log10(longest))
    length = max(step * power for step in (1, 2, 5) if step * power <= longest)
    return length / um_per_px, f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"


def save_figure(
    path: Path,
    picture: Pixels,
    limit: float,
    *,
    title: list[str],
    unit: str,
    warnings: list[str] | None = None,
    noise_floor: float | None = None,
    thumbnail: Pixels | None = None,
    um_per_px: float | None = None,
    scale: ScalarMappable | None = None,
) -> tuple[int, int]:
    """Write `picture` without resampling as PNG, with title, warnings in red and a colour bar.

    Args:
        unit: the colour bar's label.
        noise_floor: explains the hatching, where something is hatched.
        thumbnail: the slide in its own colours, shown smaller on the right.
        um_per_px: µm per pixel of the picture, for a scale bar below it.
        scale: the colour bar's, by default the diverging one of +-limit.

    Returns the place of the picture's top-left pixel in the file, (x, y).
    """
    lines = [(line, "black") for line in title] + [(line, "crimson") for line in warnings or []]
    height, width = picture.shape[:2]
    head = LINE * len(lines) + 2 * MARGIN
    longest = max((len(line) for line, _ in lines), default=0)
    full_width = max(width + SIDE + 2 * MARGIN, 7 * longest + 2 * MARGIN)
    full_height = head + max(height, LEAST_HEIGHT) + 4 * MARGIN
    figure = Figure(figsize=(full_width / DPI, full_height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)

    def place(x: float, y: float) -> tuple[float, float]:
        """Pixels from the top left, as fractions from the bottom left."""
        return x / full_width, 1 - y / full_height

    def text(x: float, y: float, line: str, **style: Any) -> None:
        figure.text(*place(x, y), line, va="top", fontsize=8.5, family="DejaVu Sans", **style)

    # figimage places pixels as they are; imshow would resample them.
    figure.figimage(picture, MARGIN, full_height - head - height)
    for number, (line, colour) in enumerate(lines):
        weight = "normal" if number else "bold"
        text(MARGIN, MARGIN + LINE * number, line, color=colour, weight=weight)
    side = width + 2 * MARGIN
    bar = figure.add_axes((*place(side, head + BAR), 16 / full_width, BAR / full_height))
    beyond = "both" if scale is None else "neither"
    scale = scale or ScalarMappable(Normalize(-limit, limit), COLOURS)
    figure.colorbar(scale, cax=bar, extend=beyond, label=unit)
    bar.tick_params(labelsize=7)
    bar.yaxis.label.set_fontsize(8)
    below = head + BAR + 2 * MARGIN
    if noise_floor is not None:
        size = (16 / full_width, 16 / full_height)
        style: dict[str, Any] = {"facecolor": "white", "edgecolor": "grey", "hatch": "////", "linewidth": 0.5}
        figure.add_artist(Rectangle(place(side, below + 16), *size, transform=figure.transFigure, **style))
        text(side + 24, below + 2, f"within noise (below {noise_floor:.2g})")
        below += 2 * LINE
    if thumbnail is not None:
        figure.figimage(thumbnail, side, full_height - below - thumbnail.shape[0])
    if um_per_px is not None:
        length, label = scale_bar(um_per_px, width)
        foot = head + height + MARGIN
        ends = zip(place(MARGIN, foot), place(MARGIN + length, foot), strict=True)
        figure.add_artist(Line2D(*ends, color="black", linewidth=3, solid_capstyle="butt"))
        text(MARGIN + length + 8, foot - 6, label)
    figure.savefig(path, dpi=DPI, format="png")
    return MARGIN, head


def shrunk(pixels: Pixels, longest: int = THUMBNAIL) -> Pixels:
    """The picture with no side longer than `longest` px."""
    scale = longest / max(pixels.shape[:2])
    size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    return pixels if scale >= 1 else np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
