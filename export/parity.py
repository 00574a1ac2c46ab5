"""The parity report: how far the exported graphs are from PyTorch in float32, and whether it is near
enough.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from export.reference import Arrays, Case, Gate

GATES = {"fp32": Gate(1e-4, 0.99999), "fp16": Gate(float("inf"), 0.999)}


@dataclass(frozen=True)
class Row:
    """One output of one request; the cosine is the smallest over its vectors (the last axis)."""

    model: str
    case: str
    output: str
    max_abs: float
    min_cosine: float
    passed: bool


@dataclass(frozen=True)
class Report:
    """Every row, and the gate of every model's precision."""

    precision: str
    gates: dict[str, Gate]
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed (an empty report did not)."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def worst(self) -> Row:
        """The first row that failed, else the one with the smallest cosine."""
        return min(self.rows, key=lambda row: (row.passed, row.min_cosine))

    def to_json(self) -> str:
        """The report as JSON, as it is written beside the export."""
        return json.dumps(
            {"reference": "PyTorch float32", "passed": self.passed, **dataclasses.asdict(self)}, indent=1
        )

    def table(self) -> Table:
        """The report for a terminal."""
        table = Table(title=f"Parity with PyTorch float32 ({self.precision})")
        for title in ("model", "input", "output", "max-abs", "min cosine", ""):
            table.add_column(title, justify="right" if title in ("max-abs", "min cosine") else "left")
        for row in self.rows:
            verdict = "[green]ok[/]" if row.passed else "[red]FAILED[/]"
            table.add_row(
                row.model, row.case, row.output, f"{row.max_abs:.1e}", f"{row.min_cosine:.7f}", verdict
            )
        return table


def compare(
    cases: Iterable[Case], run: Callable[[str, Arrays], Arrays], precision: str, gates: dict[str, Gate]
) -> Report:
    """Run every case through `run(model, inputs)` and hold its outputs to the model's gate."""
    rows = []
    for case in cases:
        actual = run(case.model, case.inputs)
        for output, expected in case.outputs.items():
            rows.append(_row(case, output, actual[output], expected, gates[case.model]))
    return Report(precision, gates, tuple(rows))


def _row(
    case: Case, output: str, actual: NDArray[np.generic], expected: NDArray[np.generic], gate: Gate
) -> Row:
    if actual.shape != expected.shape:
        return Row(case.model, case.name, output, float("inf"), -1.0, passed=False)
    a, b = (array.astype(np.float64) for array in (actual, expected))
    max_abs = float(np.abs(a - b).max())
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    min_cosine = float(((a * b).sum(axis=-1) / norms).min())
    # Written so that NaN fails.
    passed = max_abs <= gate.max_abs and min_cosine >= gate.min_cosine
    return Row(case.model, case.name, output, max_abs, min_cosine, passed)
