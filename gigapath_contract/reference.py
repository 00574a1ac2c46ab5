"""Reference inputs and outputs of one export, stored with it as `reference.npz`, and their comparison.

The export checks its graphs against them, `client verify` a running server. The file is plain NumPy:

| key | type, shape | what |
|---|---|---|
| `contract` | str | the export's contract, JSON |
| `gate.<model>.max_abs` | float64 | the largest difference that passes (inf: any) |
| `gate.<model>.min_cosine` | float64 | the smallest cosine that passes |
| `gate.<model>.max_relative` | float64 | the same, over the output's largest magnitude |
| `tiles` | uint8 [B,224,224,3] | real tiles: TILES of `tile_encoder` |
| `tile_encoder.<OUTPUT>` | float32 | what PyTorch (float32) returns for them |
| `rows`, `columns` | float32 [61,D], [67,D] | EMBEDDINGS of a slide: `rows[i%61] + columns[i%67]`, i < N |
| `sizes` | int64 [S] | the slides' N |
| `n<N>.coords` | int64 [N,2] | COORDS |
| `n<N>.keep` | bool [M,N] | KEEP |
| `n<N>.slide_encoder.<OUTPUT>` | float32 | what PyTorch (float32) returns |
| `n<N>.slide_occlusion.<OUTPUT>` | float32 | the same |
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigapath_contract.schema import Contract

Array = NDArray[Any]
Arrays = dict[str, Array]
Gates = dict[str, "Gate"]


@dataclass(frozen=True)
class Gate:
    """What passes: the largest absolute difference, the smallest cosine, the largest relative difference.

    A cosine does not see scale: the relative difference does.
    """

    max_abs: float
    min_cosine: float
    max_relative: float


@dataclass(frozen=True)
class Case:
    """One request and its true answer."""

    model: str
    name: str
    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True)
class SlideReference:
    """A seeded slide and PyTorch's answers; N and the rows and columns of `Reference` give its embeddings."""

    coords: NDArray[np.int64]
    keep: NDArray[np.bool_]
    encoder: Arrays
    occlusion: Arrays


@dataclass(frozen=True)
class Reference:
    """The inputs and PyTorch's answers of one export."""

    tiles: NDArray[np.uint8]
    tile: Arrays  # outputs of `tile_encoder`
    rows: NDArray[np.float32]
    columns: NDArray[np.float32]
    slides: tuple[SlideReference, ...]

    def cases(self) -> Iterator[Case]:
        """Every request, one model after the other."""
        yield Case("tile_encoder", f"{len(self.tiles)} tiles", {"TILES": self.tiles}, self.tile)
        for slide in self.slides:
            yield Case("slide_encoder", f"N={len(slide.coords)}", self._inputs(slide), slide.encoder)
        for slide in self.slides:
            inputs = self._inputs(slide) | {"KEEP": slide.keep}
            yield Case("slide_occlusion", f"N={len(slide.coords)}", inputs, slide.occlusion)

    def _inputs(self, slide: SlideReference) -> Arrays:
        embeddings = seeded_embeddings(self.rows, self.columns, len(slide.coords))
        return {"EMBEDDINGS": embeddings, "COORDS": slide.coords}


def seeded_embeddings(
    rows: NDArray[np.float32], columns: NDArray[np.float32], tiles: int
) -> NDArray[np.float32]:
    """Tile embeddings of a slide of `tiles` tiles, float32 [tiles, dim], of about unit variance."""
    index = np.arange(tiles)
    return rows[index % len(rows)] + columns[index % len(columns)]


def write_reference(path: Path, reference: Reference, contract: Contract, gates: Gates) -> None:
    """Write the file described above."""
    arrays: Arrays = {
        "contract": np.array(contract.to_json()),
        "tiles": reference.tiles,
        **{f"tile_encoder.{name}": array for name, array in reference.tile.items()},
        "rows": reference.rows,
        "columns": reference.columns,
        "sizes": np.array([len(slide.coords) for slide in reference.slides], np.int64),
    }
    for model, gate in gates.items():
        arrays |= {f"gate.{model}.{name}": np.array(value) for name, value in asdict(gate).items()}
    for slide in reference.slides:
        n = f"n{len(slide.coords)}"
        arrays |= {f"{n}.coords": slide.coords, f"{n}.keep": slide.keep}
        arrays |= {f"{n}.slide_encoder.{name}": array for name, array in slide.encoder.items()}
        arrays |= {f"{n}.slide_occlusion.{name}": array for name, array in slide.occlusion.items()}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def read_reference(path: Path) -> tuple[Reference, Contract, Gates]:
    """Read the file described above.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is not a reference file, or is damaged.
    """
    try:
        with path.open("rb") as opened:
            if not zipfile.is_zipfile(opened):
                raise ValueError("not a NumPy .npz archive")
        with np.load(path, allow_pickle=False) as file:
            arrays: Arrays = {name: file[name] for name in file.files}
        contract = Contract.parse(str(arrays["contract"]))
        slides = tuple(
            SlideReference(
                coords=arrays[f"n{n}.coords"],
                keep=arrays[f"n{n}.keep"],
                encoder=_under(arrays, f"n{n}.slide_encoder."),
                occlusion=_under(arrays, f"n{n}.slide_occlusion."),
            )
            for n in arrays["sizes"].tolist()
        )
        tile = _under(arrays, "tile_encoder.")
        if "EMBEDDINGS" not in tile:
            raise ValueError("it has no array tile_encoder.EMBEDDINGS")
        reference = Reference(arrays["tiles"], tile, arrays["rows"], arrays["columns"], slides)
        gates = {
            model: Gate(*(float(arrays[f"gate.{model}.{field.name}"]) for field in fields(Gate)))
            for model in {case.model for case in reference.cases()}
        }
    except KeyError as error:
        raise ValueError(f"it has no array {error}") from error
    except (EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from error
    return reference, contract, gates


def _under(arrays: Arrays, prefix: str) -> Arrays:
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


@dataclass(frozen=True)
class ParityRow:
    """One output of one request; see `distance` for its three measures."""

    model: str
    case: str
    output: str
    max_abs: float
    min_cosine: float
    max_relative: float
    passed: bool


def compare(case: Case, answers: Mapping[str, Array], gate: Gate) -> Iterator[ParityRow]:
    """Compare `answers` with the case's outputs, one row per output."""
    for output, expected in case.outputs.items():
        max_abs, min_cosine, relative = distance(answers[output], expected)
        # Written so that NaN fails.
        passed = max_abs <= gate.max_abs and min_cosine >= gate.min_cosine and relative <= gate.max_relative
        yield ParityRow(case.model, case.name, output, max_abs, min_cosine, relative, passed)


def distance(actual: Array, expected: Array) -> tuple[float, float, float]:
    """Largest absolute difference, smallest cosine over the vectors of the last axis, and the largest
    difference over the largest magnitude of `expected`.

    A vector of zeros, or of one element, has no direction: its cosine counts as 1. Infinite, -1 and infinite
    where the shapes differ; NaN where a value is.
    """
    if actual.shape != expected.shape:
        return float("inf"), -1.0, float("inf")
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.where((norms == 0) | (b.shape[-1] == 1), 1.0, (a * b).sum(axis=-1) / norms)
        largest, scale = float(np.abs(a - b).max()), float(np.abs(b).max())
    return (
        largest,
        float(cosines.min()),
        largest / scale if scale else (0.0 if largest == 0 else float("inf")),
    )
