"""What is stored of tiles on request and reads the slide again: patch tokens, maps of a tile head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gigapath_contract.schema import Contract

from ..errors import ContractMismatch
from ..outputs.file_keys import FileKeys
from ..outputs.hdf5 import read_features, stored_attributes
from ..outputs.layout import file_stem
from ..outputs.patch_tokens import write_patch_tokens
from ..outputs.store import Outputs
from ..scoring.embedding import Progress, Throughput
from ..scoring.score import SlideSource, TilingOptions, plan_slide
from ..slides.slide import open_slide
from ..triton.connection import Connection

PATCH_TOKENS, TILE_HEAD_MAPS = "patch_tokens", "tile_head_maps"


def check_tile_extras(kinds: frozenset[str], contract: Contract) -> None:
    """Refuse kinds that the served export does not have. Raises ContractMismatch."""
    if PATCH_TOKENS in kinds and contract.patch_tokens is None:
        raise ContractMismatch(
            "the served export has no patch tokens: export with PATCH_TOKENS=1, or leave out --patch-tokens"
        )
    if TILE_HEAD_MAPS in kinds and contract.tile_head is None:
        raise ContractMismatch(
            "the served export has no tile head: export a run of `python -m training tiles`, or leave out "
            "--tile-head-maps"
        )


def write_tile_extras(
    kinds: frozenset[str],
    outputs: Outputs,
    source: SlideSource,
    connection: Connection,
    contract: Contract,
    tiling: TilingOptions,
    throughput: Throughput,
    *,
    progress: Progress = lambda done, total: None,
) -> list[Path]:
    """Write those of `PATCH_TOKENS` and `TILE_HEAD_MAPS` in `kinds` that are missing or of other embeddings.

    The slide must be scored into `outputs`, and the contract pass `check_tile_extras`. Returns the files.

    Raises:
        ClientError: the slide can't be read, or as `write_patch_tokens` and `write_tile_maps` raise.
    """
    slide_id = source.slide_id
    tokens = [outputs.patch_tokens(slide_id)] if PATCH_TOKENS in kinds else []
    classes = contract.tile_head.classes if contract.tile_head and TILE_HEAD_MAPS in kinds else ()
    maps = {outputs.tile_maps / f"{slide_id}-tile-head-{file_stem(name)}.png": name for name in classes}
    if not tokens and not maps:
        return []
    noted, h5 = FileKeys(outputs.out, slide_id), outputs.tile_file(slide_id)
    keys = dict.fromkeys([*tokens, *maps], noted.of(h5) or "")
    stale = {path: keys[path] for path in noted.stale(keys)}
    if not stale:
        return list(keys)
    stored = read_features(h5)
    with open_slide(source.path, source.mpp) as slide, noted.writing(stale):
        if drawn := {path: name for path, name in maps.items() if path in stale}:
            # matplotlib takes long to import: only where something is drawn.
            from ..attribution.render.tile_head import write_tile_maps

            write_tile_maps(drawn, slide_id, stored, slide)
        for path in [path for path in tokens if path in stale]:
            everywhere = plan_slide(slide, slide_id, None, contract, tiling)
            plan = replace(everywhere, coords=stored.coords, tissue=stored.tissue)
            about = stored_attributes(h5)
            write_patch_tokens(path, plan, connection, contract, throughput, about, progress=progress)
    return list(keys)
