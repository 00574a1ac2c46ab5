"""Every patch's token of a slide's tiles, in a file of its own: a hundred times what embeddings take."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gigapath_contract.schema import Contract

from ..arrays import Array
from ..errors import DiskFull, NonFiniteAnswer
from ..files import atomic_path, make_folder
from ..reading.stream import TileBatch, read_tiles
from ..scoring.embedding import Progress, Throughput, chunk_size
from ..slides.tiling import TilePlan
from ..triton.connection import Connection
from ..triton.contract import check_same


def patch_token_bytes(tiles: int, contract: Contract) -> int:
    """Bytes of a file with the patch tokens of as many tiles, in float16."""
    return tiles * (contract.patch_tokens or 0) * contract.tile_encoder.embed_dim * 2


def write_patch_tokens(
    path: Path,
    plan: TilePlan,
    connection: Connection,
    contract: Contract,
    throughput: Throughput,
    attributes: Mapping[str, Any],
    *,
    progress: Progress = lambda done, total: None,
) -> None:
    """Send a plan's tiles to the tile encoder for their tokens alone, and write `patch_tokens` and `coords`.

    `patch_tokens` is float16 [N, T, D] in chunks of one tile: T is the class token, then the patches by rows;
    `coords` [N, 2] are those of the tiles that could be decoded, in level-0 pixels.

    Raises:
        DiskFull: there is no room for the file.
        SlideError, ServerUnavailable, RequestRefused, NonFiniteAnswer: as `embed_tiles` raises.
        ExportChanged: a server serves another export than `contract` meanwhile.
    """
    shape = contract.tile_outputs["PATCH_TOKENS"]
    needed = patch_token_bytes(len(plan), contract)
    make_folder(path.parent)
    if (free := shutil.disk_usage(path.parent).free) < needed:  # HDF5 ends the process on a full disk
        raise DiskFull(
            f"cannot write {path}: patch tokens take {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
        )
    valid = np.zeros(len(plan), np.bool_)

    def ask(batch: TileBatch) -> tuple[TileBatch, Array | None]:
        if not batch.valid.any():
            return batch, None
        tiles = {"TILES": batch.pixels[batch.valid]}
        try:
            answer = connection.infer("tile_encoder", tiles, ["PATCH_TOKENS"], version=contract.version)
        except NonFiniteAnswer as error:
            raise error.at(str(plan.path)) from error
        return batch, answer["PATCH_TOKENS"].astype(np.float16)

    with (
        contextlib.closing(
            read_tiles(plan, workers=throughput.workers, batch=chunk_size(throughput, contract))
        ) as batches,
        atomic_path(path) as part,
        h5py.File(part, "w", libver=("earliest", "v110")) as file,
    ):
        tokens = file.create_dataset(
            "patch_tokens", (len(plan), *shape), np.float16, chunks=(1, *shape), maxshape=(None, *shape)
        )
        done = 0
        for batch, answer in connection.map_ordered(ask, batches):
            end = batch.start + len(batch.valid)
            valid[batch.start : end] = batch.valid
            if answer is not None:
                tokens[done : done + len(answer)] = answer
                done += len(answer)
            progress(end, len(plan))
        check_same(connection, contract)
        tokens.resize(done, axis=0)
        file["coords"] = plan.coords[valid]
        tokens.attrs.update({"name": plan.slide_id, **attributes})
