"""Where outputs lie: TRIDENT's job folder, and how a slide's features are found again."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from gigapath_contract.schema import Contract

from ..errors import ClientError


@dataclass(frozen=True)
class Layout:
    """The paths of a slide's outputs below `out`, as TRIDENT names them for a contract's encoders."""

    out: Path
    contract: Contract

    @property
    def job(self) -> Path:
        """TRIDENT's job folder, `<magnification>x_<tile px>px_<overlap>px_overlap`."""
        tile = self.contract.tile
        return self.out / f"{10 / tile.mpp:g}x_{tile.size_px}px_0px_overlap"

    def patches(self, slide_id: str) -> Path:
        """Coordinates alone."""
        return self.job / "patches" / f"{slide_id}_patches.h5"

    def features(self, slide_id: str, suffix: str = ".h5") -> Path:
        """Tile embeddings and coordinates."""
        return self.job / f"features_{file_stem(self.contract.tile_encoder.name)}" / f"{slide_id}{suffix}"

    def slide_features(self, slide_id: str) -> Path:
        """Slide embedding, layers and scores."""
        return self.job / f"slide_features_{file_stem(self.contract.slide_encoder.name)}" / f"{slide_id}.h5"

    def picture(self, slide_id: str) -> Path:
        """The thumbnail with the tiles."""
        return self.job / "visualization" / f"{slide_id}.jpg"

    def contours(self, slide_id: str) -> Path:
        """The tissue's outlines for QuPath."""
        return self.out / "contours_geojson" / f"{slide_id}.geojson"

    def base(self, slide_id: str) -> list[Path]:
        """The files that every scored slide has."""
        return [
            self.patches(slide_id),
            self.features(slide_id),
            self.slide_features(slide_id),
            self.picture(slide_id),
            self.contours(slide_id),
        ]

    def tiles_geojson(self, slide_id: str) -> Path:
        """The tiles for QuPath."""
        return self.out / "tiles_geojson" / f"{slide_id}.geojson"

    def clam(self, kind: str, slide_id: str) -> Path:
        """CLAM's `patches`, `h5_files` or `pt_files`."""
        return self.out / "clam" / kind / f"{slide_id}{'.pt' if kind == 'pt_files' else '.h5'}"


def find_features(target: Path, slide_id: str | None = None) -> Path:
    """The HDF5 file with a slide's tile embeddings: `target` itself, or the one of `slide_id` below it.

    A folder is what `client score` (OUT/SLIDE.h5) or `client batch` (OUT/*/features_*/SLIDE.h5) wrote to;
    `slide_id` may be left out where it holds a single slide.

    Raises:
        ClientError: there is no such file or slide, or several.
    """
    if not target.is_dir():
        if not target.exists():
            raise ClientError(f"{target}: no such file or folder: check the path")
        if slide_id is not None:
            raise ClientError(f"--slide-id chooses a slide of a folder, but {target} is a file: leave it out")
        return target
    found = features_files(target, "*" if slide_id is None else glob.escape(slide_id))
    if len(found) == 1:
        return found[0]
    if slide_id is None:
        slides = sorted({path.stem for path in found})
        some = ", ".join(slides[:3]) + (", …" if len(slides) > 3 else "")
        raise ClientError(
            f"{target}: holds features of {len(slides)} slides ({some}): choose one with --slide-id"
            if found
            else f"{target}: holds no slide's features: score slides into it first"
        )
    raise ClientError(
        f"{target}: holds several files with features of {slide_id}: give one of {', '.join(map(str, found))}"
        if found
        else f"{target}: holds no features of slide {slide_id}: score it first, or check the name"
    )


def features_files(folder: Path, pattern: str = "*") -> list[Path]:
    """The files of tile embeddings that `client score` or `client batch` wrote into a folder, by slide id."""
    places = (f"{pattern}.h5", f"features_*/{pattern}.h5", f"*/features_*/{pattern}.h5")
    return [path for place in places for path in sorted(folder.glob(place))]


def file_stem(name: str) -> str:
    """A name as part of a file name: everything but letters, digits, `.`, `_` and `-` becomes `_`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)
