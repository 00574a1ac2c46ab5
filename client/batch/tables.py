"""Tables over all slides of a run: status, scores and slide embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gigapath_contract.schema import Contract
from gigapath_contract.tables import PATIENT_COLUMNS, find_column, is_missing

from ..arrays import Float32
from ..files import atomic_path, write_csv
from ..outputs.layout import Layout
from ..outputs.records import DEGRADED, FAILED, OK, SlideRecord

POOLING = "mean of the slides' probabilities"

STATUS_COLUMNS = [
    *("slide_id", "path", "status", "reason", "tiles", "invalid_tiles", "resumed_tiles", "reused"),
    *("mpp", "mpp_source", "notes", "seconds", "result_key"),
]


def write_status(path: Path, records: Iterable[SlideRecord]) -> None:
    """`status.csv`: the outcome of every slide."""
    rows = [
        [
            "; ".join(record.notes) if column == "notes" else getattr(record, column)
            for column in STATUS_COLUMNS
        ]
        for record in records
    ]
    write_csv(path, STATUS_COLUMNS, rows)


def write_scores(
    layout: Layout, records: Iterable[SlideRecord], columns: Mapping[str, Mapping[str, str]]
) -> list[Path]:
    """`scores.csv`, `scores.parquet`, `slide_embeddings.parquet` and, with patients, `patients.csv`.

    `columns`: the manifest's own by slide. A slide that failed or has no tissue has empty scores and no
    embedding; its `status` says so. Returns what was written.
    """
    head = layout.contract.head
    classes = head.classes if head else ()
    records = list(records)
    scores, embeddings = [], []
    for record in records:
        if record.status == FAILED:
            embeddings.append(np.empty((0, 0), np.float32))
            scores.append(np.empty(0, np.float32))
            continue
        with h5py.File(layout.slide_features(record.slide_id)) as file:
            embeddings.append(file["features"][:])
            scores.append(file["scores"][:] if head else np.empty(0, np.float32))
    ids = [record.slide_id for record in records]
    own = ["slide_id", "status", "prediction", *(f"score_{name}" for name in classes)]
    table: dict[str, pa.Array] = {"slide_id": pa.array(ids, pa.string())}
    for name in dict.fromkeys(name for further in columns.values() for name in further):
        values = [columns.get(slide_id, {}).get(name) for slide_id in ids]
        table[f"manifest_{name}" if name in own else name] = pa.array(values, pa.string())
    table["status"] = pa.array([record.status for record in records], pa.string())
    table |= _score_columns(layout.contract, scores)
    vectors: dict[str, pa.Array] = {"slide_id": pa.array(ids, pa.string())}
    for i in range(layout.contract.slide_encoder.embed_dim):
        vectors[f"d{i}"] = pa.array([e[i] if e.ndim == 1 else None for e in embeddings], pa.float32())
    written = [
        layout.scores,
        layout.scores.with_suffix(".parquet"),
        layout.export / "slide_embeddings.parquet",
    ]
    _write_table(written[0], table)
    for path, content in ((written[1], table), (written[2], vectors)):
        with atomic_path(path) as part:
            pq.write_table(pa.table(content), part)
    patients = {slide_id: _patient(columns.get(slide_id, {})) for slide_id in ids}
    if head and any(patients.values()):
        written.append(layout.patients)
        _write_table(written[-1], _by_patient(layout.contract, records, scores, patients))
    return written


def _score_columns(contract: Contract, scores: Sequence[Float32]) -> dict[str, pa.Array]:
    """`prediction` (of exclusive classes) and `score_<class>` of probabilities [C], or [0] where none are."""
    if contract.head is None:
        return {}
    classes, table = contract.head.classes, {}
    if contract.head.kind == "multiclass":
        called = [classes[s.argmax()] if s.size else None for s in scores]
        table["prediction"] = pa.array(called, pa.string())
    for i, name in enumerate(classes):
        table[f"score_{name}"] = pa.array([s[i] if s.size else None for s in scores], pa.float32())
    return table


def _patient(columns: Mapping[str, str]) -> str:
    """The patient of a slide, by the manifest's columns; empty where they don't say."""
    name = find_column([column.lower() for column in columns], PATIENT_COLUMNS)
    found = next((value for column, value in columns.items() if column.lower() == name), "")
    return "" if is_missing(found) else found


def _by_patient(
    contract: Contract,
    records: Sequence[SlideRecord],
    scores: Sequence[Float32],
    patients: Mapping[str, str],
) -> dict[str, pa.Array]:
    """A row per patient with the mean of the probabilities of the slides that have any.

    `status` is the worst of the slides': failed, degraded or ok.
    """
    rows: dict[str, list[tuple[SlideRecord, Float32]]] = {}
    for record, score in zip(records, scores, strict=True):
        if patient := patients[record.slide_id]:
            rows.setdefault(patient, []).append((record, score))
    pooled, scored = [], []
    for slides in rows.values():
        found = [score for _, score in slides if score.size]
        pooled.append(np.mean(found, axis=0) if found else np.empty(0, np.float32))
        scored.append(len(found))
    worst = [
        next((s for s in (FAILED, DEGRADED) if any(record.status == s for record, _ in slides)), OK)
        for slides in rows.values()
    ]
    return {
        "patient": pa.array(rows, pa.string()),
        "slides": pa.array([len(slides) for slides in rows.values()]),
        "scored_slides": pa.array(scored),
        "status": pa.array(worst, pa.string()),
        "pooling": pa.array([POOLING] * len(rows), pa.string()),
        **_score_columns(contract, pooled),
    }


def _write_table(path: Path, table: Mapping[str, pa.Array]) -> None:
    write_csv(path, table, zip(*(column.to_pylist() for column in table.values()), strict=True))
