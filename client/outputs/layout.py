"""Where outputs lie: TRIDENT's job folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gigapath_contract.schema import Contract


@dataclass(frozen=True)
class Layout:
    """The paths of a slide's outputs below `out`, as TRIDENT names them for a contract's encoders."""

    out: Path
    contract: Contract

    @property
    def job(self) -> Path:
        """`<magnification>x_<tile px>px_<overlap>px_overlap`."""
        tile = self.contract.tile
        return self.out / f"{10 / tile.mpp:g}x_{tile.size_px}px_0px_overlap"

    def patches(self, slide_id: str) -> Path:
        """Coordinates alone."""
        return self.job / "patches" / f"{slide_id}_patches.h5"

    def features(self, slide_id: str, suffix: str = ".h5") -> Path:
        """Tile embeddings and coordinates."""
        return self.job / f"features_{_safe(self.contract.tile_encoder.name)}" / f"{slide_id}{suffix}"

    def slide_features(self, slide_id: str) -> Path:
        """Slide embedding, layers and scores."""
        return self.job / f"slide_features_{_safe(self.contract.slide_encoder.name)}" / f"{slide_id}.h5"

    def picture(self, slide_id: str) -> Path:
        """The thumbnail with the tiles."""
        return self.job / "visualization" / f"{slide_id}.jpg"

    def contours(self, slide_id: str) -> Path:
        """The tissue's outlines for QuPath."""
        return self.out / "contours_geojson" / f"{slide_id}.geojson"

    def base(self, slide_id: str) -> list[Path]:
        """What every scored slide has."""
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


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)
