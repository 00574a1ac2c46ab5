"""Reference inputs and outputs of one export, stored beside it as `reference.npz`.

`python -m client verify` sends the inputs to a running server and compares, so the file is plain NumPy:

| key | type, shape | what |
|---|---|---|
| `contract` | str | the export's contract, JSON |
| `max_abs`, `min_cosine` | float64 | the gate: largest difference (inf: any) and smallest cosine allowed |
| `tiles` | uint8 [B,224,224,3] | real tiles: TILES of `tile_encoder` |
| `tile_encoder.EMBEDDINGS` | float32 [B,D] | what PyTorch (float32) returns for them |
| `rows`, `columns` | float32 [61,D], [67,D] | EMBEDDINGS of a slide: `rows[i % 61] + columns[i % 67]`, i < N |
| `sizes` | int64 [S] | the slides' N |
| `n<N>.coords` | int64 [N,2] | COORDS |
| `n<N>.keep` | bool [M,N] | KEEP |
| `n<N>.slide_encoder.<OUTPUT>` | float32 | what PyTorch (float32) returns |
| `n<N>.slide_occlusion.<OUTPUT>` | float32 | the same |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.samples import seeded_embeddings

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Case:
    """One request and its true answer."""

    model: str
    name: str
    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True)
class SlideReference:
    """A seeded slide and PyTorch's answers; its embeddings follow from the basis and N."""

    coords: NDArray[np.int64]
    keep: NDArray[np.bool_]
    encoder: Arrays
    occlusion: Arrays


@dataclass(frozen=True)
class Reference:
    """All that one export is held to."""

    tiles: NDArray[np.uint8]
    embeddings: NDArray[np.float32]
    rows: NDArray[np.float32]
    columns: NDArray[np.float32]
    slides: tuple[SlideReference, ...]

    def cases(self) -> Iterator[Case]:
        """Every request, the tile encoder's first, then the slides by size."""
        yield Case(
            "tile_encoder", f"{len(self.tiles)} tiles", {"TILES": self.tiles}, {"EMBEDDINGS": self.embeddings}
        )
        for slide in self.slides:
            n = len(slide.coords)
            inputs: Arrays = {
                "EMBEDDINGS": seeded_embeddings(self.rows, self.columns, n),
                "COORDS": slide.coords,
            }
            yield Case("slide_encoder", f"N={n}", inputs, slide.encoder)
            yield Case("slide_occlusion", f"N={n}", {**inputs, "KEEP": slide.keep}, slide.occlusion)

    def save(self, path: Path, *, contract: str, max_abs: float, min_cosine: float) -> None:
        """Write the file described above."""
        arrays: Arrays = {
            "contract": np.array(contract),
            "max_abs": np.array(max_abs),
            "min_cosine": np.array(min_cosine),
            "tiles": self.tiles,
            "tile_encoder.EMBEDDINGS": self.embeddings,
            "rows": self.rows,
            "columns": self.columns,
            "sizes": np.array([len(slide.coords) for slide in self.slides]),
        }
        for slide in self.slides:
            n = f"n{len(slide.coords)}"
            arrays |= {f"{n}.coords": slide.coords, f"{n}.keep": slide.keep}
            arrays |= {f"{n}.slide_encoder.{name}": array for name, array in slide.encoder.items()}
            arrays |= {f"{n}.slide_occlusion.{name}": array for name, array in slide.occlusion.items()}
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
