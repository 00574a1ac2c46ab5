"""Maps of what a tile head says of every tile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from ...files import atomic_path
from ...outputs.hdf5 import StoredFeatures
from ...outputs.layout import file_stem
from ...slides.slide import Slide
from .figures import slide_canvas
from .overlay import PROBABILITY, draw_map, save_figure, shrunk


def tile_map_path(folder: Path, slide_id: str, name: str) -> Path:
    """Where the map of the class `name` lies."""
    return folder / f"{slide_id}-tile-head-{file_stem(name)}.png"


def write_tile_maps(folder: Path, slide_id: str, stored: StoredFeatures, slide: Slide) -> list[Path]:
    """Write a map of the slide for each class of the tile head, and return the files.

    Raises:
        OutputError: one can't be written.
    """
    assert stored.scale.tile_size is not None
    canvas, paths = slide_canvas(slide), []
    for name, scores in stored.tile_scores.items():
        colours = 255 * PROBABILITY(scores)[:, :3]
        picture = draw_map(
            canvas, stored.coords, stored.scale.tile_size, scores.astype(np.float64), 1.0, colours=colours
        )
        paths.append(tile_map_path(folder, slide_id, name))
        with atomic_path(paths[-1]) as part:
            save_figure(
                part,
                picture,
                1.0,
                title=[
                    f"{slide_id}: {name}, probability of every tile by the tile head",
                    f"mean {scores.mean():.3f}, {(scores > 0.5).mean():.0%} of {len(scores)} tiles above 0.5"
                    if len(scores)
                    else "no tiles",
                    "The head saw each tile alone. This is no attribution: it does not say what the slide's "
                    "score rests on.",
                ],
                unit=f"tile head: probability of {name}",
                warnings=[] if stored.attributes["trained"] else ["The weights are untrained."],
                thumbnail=shrunk(canvas.pixels),
                um_per_px=slide.mpp[0] * canvas.downsample[0] if slide.mpp else None,
                scale=ScalarMappable(Normalize(0, 1), PROBABILITY),
            )
    return paths
