"""What a head is trained to predict."""

from __future__ import annotations

from dataclasses import dataclass

from gigapath_contract.probabilities import HeadKind


@dataclass(frozen=True)
class Task:
    """The classes to predict, and where a table of slides states them.

    Attributes:
        kind: `multiclass` (one of the classes), `multilabel` (each by itself), `binary` (the one or not).
        classes: their names, in the order of the logits.
        values: what the label column says for each class; for `binary` what it says for no and for yes.
        column: the label column's name; None looks for the usual ones.
    """

    kind: HeadKind
    classes: tuple[str, ...]
    values: tuple[str, ...]
    column: str | None = None
