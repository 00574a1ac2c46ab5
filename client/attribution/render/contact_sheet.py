"""Single tiles: the strongest of a slide as a contact sheet, and the map of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...arrays import Float64, Int64, Pixels
from ...files import atomic_path
from ..tile import PATCH_PX, TileMap
from .overlay import COLOURS, HATCH_GREY, OPACITY, colour_limit, faded_grey, hatching

COLUMNS = 8
ENLARGED = 3


def strongest(values: Float64, count: int = COLUMNS) -> tuple[Int64, Int64]:
    """Indices of the `count` tiles that support most and that oppose most, strongest first."""
    order = np.argsort(-values, kind="stable")
    order = order[np.isfinite(values[order])]
    supports = order[values[order] > 0][:count]
    opposes = order[::-1][values[order[::-1]] < 0][:count]
    return supports.astype(np.int64), opposes.astype(np.int64)


def write_contact_sheet(
    path: Path, rows: list[tuple[str, Pixels, list[str]]], title: str, doubt: str = ""
) -> None:
    """Write rows of tiles, each (heading, pixels [n, h, w, 3], n labels), as PNG; `doubt` stands in red.

    A tile is shown at its own resolution or larger, so that nuclei can be judged.
    """
    shown = [row for row in rows if len(row[1])]
    figure = Figure(figsize=(2.6 * COLUMNS, 3.3 * len(shown) + 0.6), dpi=100)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", weight="bold")
    figure.text(0.99, 0.995, doubt, fontsize=9, ha="right", va="top", color="crimson")
    axes = figure.subplots(len(shown), COLUMNS, squeeze=False)
    figure.subplots_adjust(0.01, 0.02, 0.99, 1 - 1 / (3.3 * len(shown) + 0.6), 0.04, 0.35)
    for line, (heading, pixels, labels) in zip(axes, shown, strict=True):
        for axis in line:
            axis.axis("off")
        line[0].text(0, 1.2, heading, transform=line[0].transAxes, fontsize=11, weight="bold")
        for axis, tile, label in zip(line, pixels, labels, strict=False):
            axis.imshow(tile, interpolation="nearest")
            axis.set_title(label, fontsize=9)
    with atomic_path(path) as part:
        figure.savefig(part, format="png")


def draw_tile_map(whole: Pixels, found: TileMap) -> tuple[Pixels, float]:
    """A whole tile (uint8 [256, 256, 3]) with the map of its centre, enlarged, and the colour limit.

    The border outside the encoder's crop is grey and hatched.
    """
    limit = colour_limit(found.values)
    rows, columns = (side * PATCH_PX for side in found.values.shape)
    top, left = (whole.shape[0] - rows) // 2, (whole.shape[1] - columns) // 2
    picture = faded_grey(whole)
    seen = np.zeros(whole.shape[:2], dtype=bool)
    seen[top : top + rows, left : left + columns] = True
    colours = 255 * COLOURS(0.5 + 0.5 * np.clip(found.values / limit, -1, 1))[..., :3]
    inside = picture[top : top + rows, left : left + columns]
    inside += OPACITY * (colours.repeat(PATCH_PX, axis=0).repeat(PATCH_PX, axis=1) - inside)
    large = np.rint(picture).astype(np.uint8).repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)
    rim = ~seen.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)
    large[hatching(rim.shape) & rim] = HATCH_GREY
    return large, limit
