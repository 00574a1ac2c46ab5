"""Maps of what a tile head says of every tile."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from ...files import atomic_path, make_folder
from ...outputs.hdf5 import StoredFeatures
from ...slides.slide import Slide
from .figures import slide_canvas
from .overlay import PROBABILITY, draw_map, save_figure, shrunk

_DRAWING = threading.Lock()  # a batch scores slides in threads, in which matplotlib is not safe


def write_tile_maps(classes: Mapping[Path, str], slide_id: str, stored: StoredFeatures, slide: Slide) -> None:
    """Write a map of the slide for each of the tile head's `classes`, by the file to write.

    Raises:
        OutputError: one can't be written.
        SlideError: the slide can't be read as a whole.
    """
    assert stored.scale.tile_size is not None
    canvas = slide_canvas(slide)
    for path, name in classes.items():
        scores = stored.tile_scores[name]
        colours = 255 * PROBABILITY(scores)[:, :3]
        picture = draw_map(
            canvas, stored.coords, stored.scale.tile_size, scores.astype(np.float64), 1.0, colours=colours
        )
        make_folder(path.parent)
        with _DRAWING, atomic_path(path) as part:
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
