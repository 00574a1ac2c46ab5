"""Tables over all slides of a run: status, scores and slide embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import atomic_path, write_csv
from ..outputs.layout import Layout
from ..outputs.records import FAILED, SlideRecord

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
    """`scores.csv`, `scores.parquet` and `slide_embeddings.parquet`; `columns`: the manifest's own by slide.

    A slide without tissue has empty scores and no embedding. Returns what was written.
    """
    head = layout.contract.head
    classes = head.classes if head else ()
    extra = list(dict.fromkeys(name for further in columns.values() for name in further))
    ids, scores, embeddings = [], [], []
    for record in records:
        if record.status == FAILED:
            continue
        with h5py.File(layout.slide_features(record.slide_id)) as file:
            ids.append(record.slide_id)
            embeddings.append(file["features"][:])
            scores.append(file["scores"][:] if head else np.empty(0, np.float32))
    table: dict[str, pa.Array] = {"slide_id": pa.array(ids, pa.string())}
    for name in extra:
        table[name] = pa.array([columns.get(slide_id, {}).get(name) for slide_id in ids], pa.string())
    if head and head.kind == "multiclass":
        table["prediction"] = pa.array([classes[s.argmax()] if s.size else None for s in scores], pa.string())
    for i, name in enumerate(classes):
        table[f"score_{name}"] = pa.array([s[i] if s.size else None for s in scores], pa.float32())
    vectors: dict[str, pa.Array] = {"slide_id": pa.array(ids, pa.string())}
    for i in range(layout.contract.slide_encoder.embed_dim):
        vectors[f"d{i}"] = pa.array([e[i] if e.ndim == 1 else None for e in embeddings], pa.float32())
    written = [layout.out / name for name in ("scores.csv", "scores.parquet", "slide_embeddings.parquet")]
    rows = zip(*(column.to_pylist() for column in table.values()), strict=True)
    write_csv(written[0], table, rows)
    for path, content in ((written[1], table), (written[2], vectors)):
        with atomic_path(path) as part:
            pq.write_table(pa.table(content), part)
    return written
