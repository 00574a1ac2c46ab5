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


LARGEST_HALF = 65_504.0


@dataclass(frozen=True)
class HalfTensor:
    """A float16 tensor of a graph and its largest magnitude on the reference inputs, before rounding.

    `layer` is that of the last weights before it. `largest` is NaN where it only passes on an overflow.
    """

    model: str
    name: str
    layer: str
    largest: float

    @property
    def margin(self) -> float:
        """How many times larger it may become before it overflows."""
        return LARGEST_HALF / max(self.largest, 2.0**-24)


@dataclass(frozen=True)
class Report:
    """Every row, the gate of every model's precision, and the float16 tensors."""

    precision: str
    gates: Gates
    rows: tuple[ParityRow, ...]
    half: tuple[HalfTensor, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every row passed (an empty report did not)."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def overflow(self) -> HalfTensor | None:
        """The first float16 tensor that overflows, be it in channels that no output uses."""
        return next((tensor for tensor in self.half if tensor.largest > LARGEST_HALF), None)

    def tightest(self) -> HalfTensor | None:
        """Of the float16 tensors that do not overflow the one with the smallest margin; None without any."""
        sound = (tensor for tensor in self.half if tensor.largest <= LARGEST_HALF)
        return min(sound, key=lambda tensor: tensor.margin, default=None)

    def worst(self) -> ParityRow:
        """The first row that failed, else the one with the smallest cosine."""
        return min(self.rows, key=lambda row: (row.passed, row.min_cosine))

    def to_json(self) -> str:
        """The report as JSON, as it is stored with the export."""
        half = [{**dataclasses.asdict(tensor), "margin": tensor.margin} for tensor in self.half]
        fields = {**dataclasses.asdict(self), "half": half}
        return json.dumps({"reference": "PyTorch float32", "passed": self.passed, **fields}, indent=1)


class ParityError(ExportError):
    """The exported graphs do not return what PyTorch returns, as `report` lists; nothing was installed."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


Run = Callable[[str, Arrays], Arrays]


def compare_all(cases: Iterable[Case], run: Run, gates: Gates) -> tuple[ParityRow, ...]:
    """Run every case through `run(model, inputs)` and compare its outputs with the model's gate."""
    return tuple(
        row for case in cases for row in compare(case, run(case.model, case.inputs), gates[case.model])
    )
