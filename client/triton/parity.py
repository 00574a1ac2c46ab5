"""The parity report through a running server: reference inputs sent, answers held to PyTorch's.

Every export leaves its reference beside it as `slide_pipeline/<version>/reference.npz`;
`export/reference.py` describes the file. It needs neither PyTorch nor the ONNX files.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigapath_contract.schema import Contract

from ..errors import ClientError
from .connection import Connection

Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One output of one request; the cosine is the smallest over its vectors (the last axis)."""

    model: str
    case: str
    output: str
    max_abs: float
    min_cosine: float
    passed: bool


def load_reference(path: Path, contract: Contract) -> dict[str, Array]:
    """The arrays of a reference file, which must be that of the export served.

    Raises:
        ClientError: the file is missing, damaged or of another export.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            reference = {name: file[name] for name in file.files}
        export_id = json.loads(str(reference["contract"]))["export_id"]
    except FileNotFoundError:
        raise ClientError(
            f"no reference at {path}: give the one of the export served, "
            f"slide_pipeline/{contract.version}/reference.npz, with --reference"
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ClientError(f"{path} is no reference file ({error}): take it from the export again") from error
    if export_id != contract.export_id:
        raise ClientError(
            f"{path} belongs to export {export_id}, the server serves {contract.export_id} "
            f"(version {contract.version}): give its reference with --reference"
        )
    return reference


def verify(connection: Connection, reference: Mapping[str, Array], contract: Contract) -> Iterator[Row]:
    """Send every reference request to the version served and compare, one row an output.

    Raises:
        ServerUnavailable, RequestRefused
    """
    for model, case, prefix, inputs in _requests(reference):
        expected = {
            key.removeprefix(prefix): array for key, array in reference.items() if key.startswith(prefix)
        }
        answers = connection.infer(model, inputs, list(expected), version=contract.version)
        largest, smallest = (float(reference[f"gate.{model}.{name}"]) for name in ("max_abs", "min_cosine"))
        for output, array in expected.items():
            max_abs, min_cosine = distance(answers[output], array)
            # Written so that NaN fails.
            passed = max_abs <= largest and min_cosine >= smallest
            yield Row(model, case, output, max_abs, min_cosine, passed)


def distance(actual: Array, expected: Array) -> tuple[float, float]:
    """Largest absolute difference, and the smallest cosine over the vectors of the last axis."""
    if actual.shape != expected.shape:
        return float("inf"), -1.0
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.abs(a - b).max()), float(((a * b).sum(axis=-1) / norms).min())


def _requests(reference: Mapping[str, Array]) -> Iterator[tuple[str, str, str, dict[str, Array]]]:
    """Model, name of the case, prefix of the expected outputs' keys, and inputs of every request."""
    tiles = reference["tiles"]
    yield "tile_encoder", f"{len(tiles)} tiles", "tile_encoder.", {"TILES": tiles}
    rows, columns = reference["rows"], reference["columns"]
    for model in ("slide_encoder", "slide_occlusion"):
        for n in reference["sizes"].tolist():
            index = np.arange(n)
            inputs = {
                "EMBEDDINGS": rows[index % len(rows)] + columns[index % len(columns)],
                "COORDS": reference[f"n{n}.coords"],
            }
            if model == "slide_occlusion":
                inputs["KEEP"] = reference[f"n{n}.keep"]
            yield model, f"N={n}", f"n{n}.{model}.", inputs
