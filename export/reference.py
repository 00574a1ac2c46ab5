"""Reference inputs and outputs of one export, stored beside it as `reference.npz`.

`python -m client verify` sends the inputs to a running server and compares, so the file is plain NumPy:

| key | type, shape | what |
|---|---|---|
| `contract` | str | the export's contract, JSON |
| `gate.<model>.max_abs` | float64 | the largest difference that passes (inf: any) |
| `gate.<model>.min_cosine` | float64 | the smallest cosine that passes |
| `tiles` | uint8 [B,224,224,3] | real tiles: TILES of `tile_encoder` |
| `tile_encoder.EMBEDDINGS` | float32 [B,D] | what PyTorch (float32) returns for them |
| `rows`, `columns` | float32 [61,D], [67,D] | EMBEDDINGS of a slide: `rows[i%61] + columns[i%67]`, i < N |
| `sizes` | int64 [S] | the slides' N |
| `n<N>.coords` | int64 [N,2] | COORDS |
| `n<N>.keep` | bool [M,N] | KEEP |
| `n<N>.slide_encoder.<OUTPUT>` | float32 | what PyTorch (float32) returns |
| `n<N>.slide_occlusion.<OUTPUT>` | float32 | the same |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.samples import seeded_embeddings

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Gate:
    """The largest absolute difference and the smallest cosine that pass."""

    max_abs: float
    min_cosine: float


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
        """Every request, one model after the other."""
        yield Case(
            "tile_encoder", f"{len(self.tiles)} tiles", {"TILES": self.tiles}, {"EMBEDDINGS": self.embeddings}
        )
        for slide in self.slides:
            yield Case("slide_encoder", f"N={len(slide.coords)}", self._inputs(slide), slide.encoder)
        for slide in self.slides:
            inputs = self._inputs(slide) | {"KEEP": slide.keep}
            yield Case("slide_occlusion", f"N={len(slide.coords)}", inputs, slide.occlusion)

    def _inputs(self, slide: SlideReference) -> Arrays:
        embeddings = seeded_embeddings(self.rows, self.columns, len(slide.coords))
        return {"EMBEDDINGS": embeddings, "COORDS": slide.coords}

    def save(self, path: Path, *, contract: str, gates: dict[str, Gate]) -> None:
        """Write the file described above."""
        arrays: Arrays = {
            "contract": np.array(contract),
            "tiles": self.tiles,
            "tile_encoder.EMBEDDINGS": self.embeddings,
            "rows": self.rows,
            "columns": self.columns,
            "sizes": np.array([len(slide.coords) for slide in self.slides]),
        }
        for model, gate in gates.items():
            arrays |= {f"gate.{model}.{name}": np.array(value) for name, value in asdict(gate).items()}
        for slide in self.slides:
            n = f"n{len(slide.coords)}"
            arrays |= {f"{n}.coords": slide.coords, f"{n}.keep": slide.keep}
            arrays |= {f"{n}.slide_encoder.{name}": array for name, array in slide.encoder.items()}
            arrays |= {f"{n}.slide_occlusion.{name}": array for name, array in slide.occlusion.items()}
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
