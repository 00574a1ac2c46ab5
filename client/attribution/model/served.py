"""Forwards on the server: Triton's `slide_occlusion` for masks, `tile_encoder` for tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from gigapath_contract.schema import Contract

from ...arrays import Array, Float32, Int64, KeepMask
from ...errors import ContractMismatch
from ...triton.connection import Connection
from ...triton.contract import ExportGuard
from ..methods.scorer import Scores, concatenate

# While the server works on one request, the next one is there already; more would only hold memory.
IN_FLIGHT = 2


class ServedForward:
    """In-place masked forwards of one slide at a time on the server (a `scorer.Forward`).

    A request carries the embeddings and coordinates once and as many masks as the contract's
    `max_mask_tokens` allows. `requests` and `bytes_sent` count what was sent so far.
    """

    def __init__(self, connection: Connection, contract: Contract) -> None:
        self._connection = connection
        self._contract = contract
        self._guard = ExportGuard(connection, contract)
        self.requests = 0
        self.bytes_sent = 0

    def masks_per_request(self, tiles: int) -> int:
        """How many masks of a slide of `tiles` tiles fit into one request.

        Raises:
            ContractMismatch: not one does.
        """
        budget = self._contract.occlusion.max_mask_tokens
        if tiles + 1 > budget:
            raise ContractMismatch(
                f"a slide of {tiles} tiles is over the server's budget of {budget} tokens per request: "
                "export the model for more memory (--gpu-memory), or attribute a part of the slide"
            )
        return budget // (tiles + 1)

    def __call__(self, embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
        outputs = ["LOGITS", "SLIDE"] if self._contract.head else ["SLIDE"]
        answers = self._connection.infer_stream(
            "slide_occlusion",
            self._batches(embeddings, coords, keep),
            outputs,
            version=self._contract.version,
            window=IN_FLIGHT,
        )
        scores = concatenate([_scores(answer) for answer in answers])
        self._guard.check()  # before anything is stored
        return scores

    def _batches(self, embeddings: Float32, coords: Int64, keep: KeepMask) -> Iterator[dict[str, Array]]:
        size = self.masks_per_request(len(embeddings))
        for start in range(0, len(keep), size):
            inputs: dict[str, Array] = {
                "EMBEDDINGS": np.ascontiguousarray(embeddings, dtype=np.float32),
                "COORDS": coords,
                "KEEP": keep[start : start + size],
            }
            self.requests += 1
            self.bytes_sent += sum(array.nbytes for array in inputs.values())
            yield inputs


def _scores(answer: dict[str, Array]) -> Scores:
    slide = answer["SLIDE"]
    return Scores(answer.get("LOGITS", np.zeros((len(slide), 0), dtype=np.float32)), slide)


def served_tile_encoder(connection: Connection, contract: Contract) -> Callable[[Array], Float32]:
    """The server's `tile_encoder`: tiles uint8 [B, 224, 224, 3] -> embeddings [B, D], any B."""

    def encode(tiles: Array) -> Float32:
        size = contract.tile.max_batch
        batches = ({"TILES": tiles[start : start + size]} for start in range(0, len(tiles), size))
        answers = connection.infer_stream("tile_encoder", batches, ["EMBEDDINGS"], version=contract.version)
        return np.concatenate([answer["EMBEDDINGS"] for answer in answers])

    return encode
