"""The parity report: how far the exported graphs are from PyTorch in float32, and whether that passes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from export.errors import ExportError
from gigapath_contract.reference import Arrays, Case, Gate, Gates, ParityRow, compare

_HALF = Gate(float("inf"), 0.999, 0.05)
GATES = {"fp32": Gate(1e-4, 0.99999, 1e-3), "fp16": _HALF, "fp16-mixed": _HALF}


@dataclass(frozen=True)
class Report:
    """Every row, and the gate of every model's precision."""

    precision: str
    gates: Gates
    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed (an empty report did not)."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def worst(self) -> ParityRow:
        """The first row that failed, else the one with the smallest cosine."""
        return min(self.rows, key=lambda row: (row.passed, row.min_cosine))

    def to_json(self) -> str:
        """The report as JSON, as it is stored with the export."""
        return json.dumps(
            {"reference": "PyTorch float32", "passed": self.passed, **dataclasses.asdict(self)}, indent=1
        )


class ParityError(ExportError):
    """The exported graphs do not return what PyTorch returns, as `report` lists; nothing was installed."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def make_report(
    cases: Iterable[Case], run: Callable[[str, Arrays], Arrays], precision: str, gates: Gates
) -> Report:
    """Run every case through `run(model, inputs)` and compare its outputs with the model's gate."""
    rows = [row for case in cases for row in compare(case, run(case.model, case.inputs), gates[case.model])]
    return Report(precision, gates, tuple(rows))
