"""The thumbnail of a slide with the tiles that were scored."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from ..arrays import Pixels
from ..files import atomic_path
from ..scoring.score import ScoredSlide

_VALID, _INVALID = (20, 110, 60), (200, 30, 30)


def draw_tiles(scored: ScoredSlide) -> Pixels:
    """The thumbnail RGB uint8 [h, w, 3] with every tile's outline, green where scored, red where not."""
    picture = scored.thumbnail.copy()
    scale = np.array(picture.shape[1::-1]) / np.array(scored.plan.dimensions)
    corners = np.rint(scored.plan.coords * scale).astype(int)
    ends = np.rint((scored.plan.coords + np.array(scored.plan.tile_size_level0)) * scale).astype(int)
    for (x0, y0), (x1, y1), valid in zip(corners, ends, scored.valid, strict=True):
        cv2.rectangle(picture, (int(x0), int(y0)), (int(x1), int(y1)), _VALID if valid else _INVALID, 1)
    return picture


def write_picture(path: Path, pixels: Pixels) -> None:
    """RGB uint8 [h, w, 3] as PNG or JPEG, by the path's suffix."""
    _, encoded = cv2.imencode(path.suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    with atomic_path(path) as part:
        part.write_bytes(encoded.tobytes())
