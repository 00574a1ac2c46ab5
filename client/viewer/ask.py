"""Questions about a slide while one looks at it: what if these tiles were gone, alone, or benign?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import shapely
from shapely.geometry import Polygon

from ..arrays import Float32, KeepMask
from ..attribution.counterfactual import Change, counterfactual, tiles_inside
from ..attribution.explain import choose_outputs
from ..attribution.methods.model_outputs import Score
from ..attribution.model.embedded import EmbeddedSlide, read_bank, read_slide
from ..attribution.model.masked_slide import MaskedSlide
from ..attribution.model.served import ServedForward
from ..errors import ClientError
from ..triton.connection import Connection
from ..triton.contract import check_same, read_contract
from ..triton.endpoint import Endpoint
from .library import Entry

SCORE: Score = "log_odds"
SAMPLES = 16  # draws from a bank, as `client counterfactual` makes


class Asker:
    """Asks a served model; each question has a connection of its own, so that it can be taken back."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Somebody waits for the answer: a server that is away is an error at once."""
        self._endpoint = replace(endpoint, retry_for=0.0)

    def connect(self) -> Connection:
        """A connection for one question."""
        return Connection(self._endpoint)

    def server(self) -> dict[str, Any]:
        """Which export is served, or why none is."""
        try:
            with self.connect() as connection:
                return {"url": self._endpoint.url, "export_id": read_contract(connection).export_id}
        except ClientError as error:
            return {"url": self._endpoint.url, "error": str(error)}


def answer(connection: Connection, entry: Entry, question: Any, bank: Entry | None) -> dict[str, Any]:
    """The model's outputs of a slide and their changes, by `client counterfactual`'s own functions.

    question: {"area": [[x, y], …]} in level-0 px, or {"tiles": [row, …]} of the slide's file.
    bank: the slide whose tiles replace the chosen ones; None leaves that change out.

    Raises:
        ClientError: no tile is meant, the slide does not fit the served model, or the model fails.
    """
    if entry.stored is None:
        raise ClientError(f"{entry.slide_id}: has no embeddings to ask about: score it first")
    embedded = read_slide(entry.stored)
    inside = _inside(embedded, question)
    contract = read_contract(connection)
    masked_slide = MaskedSlide.from_embedded(embedded, ServedForward(connection, contract), contract)
    outputs, _ = choose_outputs(masked_slide, contract, None, SCORE)
    full = outputs(masked_slide.in_place()(np.ones((1, len(embedded.coords)), dtype=bool)))[0]
    changes: dict[Change, Float32 | None] = {"remove": None, "keep": None}
    if bank is not None and bank.stored is not None:
        changes["replace"], _ = read_bank(bank.stored.features, contract)
    effects = {}
    for change, embeddings in changes.items():
        (effect,) = counterfactual(
            masked_slide, outputs, {"area": inside}, change=change, bank=embeddings, n_samples=SAMPLES
        )
        errors = effect.stderr
        effects[change] = {
            "mean": effect.mean.tolist(),
            "stderr": None if errors is None else errors.tolist(),
        }
    check_same(connection, contract)
    return {
        "tiles": embedded.rows[inside].tolist(),
        "classes": outputs.names,
        "full": full.tolist(),
        "effects": effects,
        "doubt": embedded.doubt(contract),
    }


def _inside(embedded: EmbeddedSlide, question: Any) -> KeepMask:
    """Which of the slide's tiles [N] a question means."""
    try:
        if "tiles" in question:
            inside = np.isin(embedded.rows, np.asarray(question["tiles"], np.int64))
        else:
            area = shapely.make_valid(Polygon(np.asarray(question["area"], np.float64)))
            inside = tiles_inside(area, embedded.coords, embedded.tile_size)
    except (TypeError, KeyError, ValueError, OverflowError, shapely.errors.ShapelyError) as error:
        raise ClientError(f"not a question about an area or about tiles ({error}): draw it again") from None
    if not inside.any():
        raise ClientError("no scored tile has its centre in the area: draw a larger one")
    return inside
