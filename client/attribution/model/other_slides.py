"""How a class scores on the slides of a batch that do not show it, to hold the empty slide against."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from ...errors import ClientError
from ..methods.model_outputs import Score

SAME_SCORE = 1e-3


def level_elsewhere(table: Path, slide_id: str, target: str, score: Score, full: float) -> float | None:
    """Median output `score` of the class `target` over a batch's slides that were not called it.

    table: the `scores.csv` of the batch, where there is one.
    full: this slide's own output, by which another model's table is recognised.

    Returns None where it can't be known: no batch, no other slide, another model, or another output.

    Raises:
        ClientError: the table can't be read.
    """
    if not table.is_file() or score not in ("log_odds", "probability"):
        return None
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get(f"score_{target}")]
        probabilities = {row["slide_id"]: _probabilities(row, target) for row in rows}
    except (OSError, UnicodeError, csv.Error, ValueError, KeyError) as error:
        raise ClientError(f"{table}: cannot be read ({error}): run the batch again") from error
    own = probabilities.pop(slide_id, None)
    expected = full if score == "probability" else 1 / (1 + np.exp(-full))
    if own is None or abs(own[0] - expected) > SAME_SCORE:
        return None
    others = [this for this in probabilities.values() if this[0] < max(this[1:])]
    if not others:
        return None
    if score == "probability":
        return float(np.median([p for p, *_ in others]))
    return float(np.median([np.log(max(p, 1e-30) / sum(rest)) for p, *rest in others]))


def _probabilities(row: dict[str, str], target: str) -> list[float]:
    """The probability of `target`, then of the classes that exclude it, or of its absence."""
    own = float(row[f"score_{target}"])
    others = [float(row[key]) for key in row if key.startswith("score_") and key != f"score_{target}"]
    exclusive = others and abs(own + sum(others) - 1) < SAME_SCORE
    return [own, *others] if exclusive else [own, 1 - own]
