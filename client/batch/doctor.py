"""Checks before a long run: server, contract, versions, disk and every slide's scale."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openslide

from gigapath_contract.coordinates import LevelZeroScale
from gigapath_contract.schema import GRAPHS, MODELS, Contract

from ..arrays import Pixels
from ..errors import ClientError, OutputError
from ..files import check_folder
from ..reading.stream import read_tiles
from ..scoring.conformance import check_plan, grid_coordinates
from ..scoring.score import DEFAULT_TILING, SlideSource, TilingOptions, find_tissue, plan_slide
from ..scoring.timings import duration
from ..slides.slide import open_slide
from ..slides.tiling import NO_TILES, TilePlan, plan_tiles
from ..triton.connection import Connection
from ..triton.contract import read_contract
from ..triton.endpoint import Endpoint
from ..triton.statistics import available_statistics
from ..version import __version__
from .manifest import read_work_list

_TRIED = 3  # tiles of a slide that are decoded
GOOD, WARN, BAD = "good", "warn", "bad"
_PACKAGES = (
    "tritonclient",
    "grpcio",
    "numpy",
    "h5py",
    "openslide-python",
    "tifffile",
    "imagecodecs",
    "pyarrow",
)


@dataclass(frozen=True)
class Check:
    """The result of one check: `state` is good, warn or bad."""

    name: str
    state: str
    detail: str


def check_all(
    endpoint: Endpoint,
    out: Path,
    source: Path | None,
    slides: Path | None,
    tiling: TilingOptions = DEFAULT_TILING,
) -> Iterator[Check]:
    """Run every check, also after one has failed, and yield each result at once.

    Args:
        endpoint: the servers.
        out: the output folder, for its free space.
        source: a slide, folder or manifest, or None; `slides` as in `read_work_list`.
        tiling: which tiles a batch will score.
    """
    yield check_versions()
    contract: Contract | None = None
    rate: float | None = None
    try:
        with Connection(endpoint) as connection:
            for server, version in connection.server_versions().items():
                yield Check(f"server {server}", GOOD, f"Triton {version}")
            contract = read_contract(connection)
            yield from check_contract(connection, contract)
            if source:
                rate = measure_rate(connection, contract)
    except ClientError as error:
        yield Check("server", BAD, str(error))
    tiles = 0
    if source:
        try:
            work_list = read_work_list(source, slides)
        except ClientError as error:
            yield Check("slides", BAD, str(error))
        else:
            yield from (Check(f"slide {bad.slide_id}", BAD, bad.reason) for bad in work_list.bad)
            if omission := work_list.omission():
                yield Check("left out", GOOD, omission)
            for slide in work_list.slides:
                check, planned = check_slide(slide, contract, tiling)
                tiles += planned
                yield check
    if rate:
        detail = f"{tiles} tiles at {rate:.3g} tiles per second, as the server computed two requests just now"
        yield Check("time", GOOD, f"at least {duration(tiles / rate)}: {detail}")
    yield check_disk(out, tiles, contract)


def measure_rate(connection: Connection, contract: Contract) -> float:
    """Tiles per second of the tile encoder over the network, by two full requests in flight after a first."""
    tile = contract.tile
    pixels = np.zeros((min(64, tile.max_batch), tile.crop_px, tile.crop_px, 3), np.uint8)

    def embed(batch: Pixels) -> None:
        connection.infer("tile_encoder", {"TILES": batch}, ["EMBEDDINGS"], version=contract.version)

    embed(pixels[:1])
    began = time.perf_counter()
    for _ in connection.map_ordered(embed, iter([pixels, pixels])):
        pass
    return 2 * len(pixels) / (time.perf_counter() - began)


def check_versions() -> Check:
    """Versions of the client and its libraries."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    ours = (
        f"client {__version__}, Python {platform.python_version()}, OpenSlide {openslide.__library_version__}"
    )
    return Check("versions", GOOD, ", ".join([ours, *found]))


def check_contract(connection: Connection, contract: Contract) -> Iterator[Check]:
    """The export, its models' readiness, and whether its statistics can be read."""
    head = f"classes {', '.join(contract.head.classes)}" if contract.head else "no head"
    detail = (
        f"export {contract.export_id}, preset {contract.preset}, {contract.precision}, "
        f"{contract.tile.size_px} px at {contract.tile.mpp:g} mpp, "
        f"{contract.variant.pooling} pooling of layer {contract.variant.layer}, {head}"
    )
    yield Check("contract", GOOD, detail)
    if not contract.trained:
        yield Check("weights", WARN, "untrained: scores and maps mean nothing")
    for model in MODELS:
        ready = connection.models_ready(model, contract.version)
        unready = [server for server, is_ready in ready.items() if not is_ready]
        if unready:
            yield Check(model, BAD, f"not ready at {', '.join(unready)}: see the server's log")
    yield from check_devices(connection)
    if available_statistics(connection, "tile_encoder", contract.version) is None:
        yield Check("statistics", WARN, "not readable: `timings` cannot separate queue and compute")


def check_devices(connection: Connection) -> Iterator[Check]:
    """Where each server runs its models, as Triton decided when it loaded them."""
    models: dict[str, list[str]] = {}
    for model in GRAPHS:
        for server, config in connection.model_configs(model).items():
            models.setdefault(f"{describe_device(config)} of {server}", []).append(model)
    state = GOOD if len(models) == len(connection.endpoint.servers) else WARN
    found = (f"{', '.join(names)} on {where}" for where, names in models.items())
    yield Check("devices", state, "; ".join(found))


def describe_device(config: Any) -> str:
    """Device and backend of a loaded model by its `ModelConfig`, such as `GPU 0 (onnxruntime, TF32)`."""
    group, details = config.instance_group[0], [config.backend]
    if group.kind == group.KIND_CPU:
        return f"CPU ({config.backend})"
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    options = {key: value for one in accelerators for key, value in one.parameters.items()}
    if config.backend == "onnxruntime" and options.get("use_tf32") != "0":
        details.append("TF32")
    return f"GPU {', '.join(map(str, group.gpus))} ({', '.join(details)})"


def check_slide(
    source: SlideSource, contract: Contract | None, tiling: TilingOptions = DEFAULT_TILING
) -> tuple[Check, int]:
    """Whether a batch will accept a slide: its plan, and a tile of it decoded; also how many tiles it plans.

    A slide that fails has 0 tiles.
    """
    name = f"slide {source.slide_id}"
    try:
        with open_slide(source.path, source.mpp) as slide:
            tissue = find_tissue(slide, source, tiling)
            if contract:
                plan = plan_slide(slide, source.slide_id, tissue, contract, tiling)
                check_plan(plan, contract)
                grid_coordinates(
                    contract, plan.coords, LevelZeroScale(plan.tile_size_level0, plan.mpp_level0)
                )
            else:
                plan = plan_tiles(slide, tissue, min_tissue=tiling.min_tissue)
            size, mpp, where, notes = slide.dimensions, slide.mpp, slide.mpp_source, slide.notes
            tried = plan if len(plan) else plan_tiles(slide, None)
        decoded = not len(tried) or _decodes(tried)  # a slide smaller than a tile has none
    except ClientError as error:
        return Check(name, BAD, str(error)), 0
    if not decoded:
        return Check(name, BAD, f"{source.path}: none of {_TRIED} tiles could be decoded: copy it again"), 0
    share = "" if tissue is None else f", {tissue.fraction:.0%} tissue"
    detail = (
        f"{size[0]} x {size[1]} px, mpp {mpp[0]:.4g} x {mpp[1]:.4g} ({where}), level {plan.level} at "
        f"{plan.mpp_effective[0]:.4g} mpp{share}, {len(plan)} tiles"
    )
    if not len(plan):
        notes = [*notes, NO_TILES]
    return Check(name, WARN if notes else GOOD, "; ".join([detail, *notes])), len(plan)


def _decodes(plan: TilePlan) -> bool:
    """Whether a tile can be decoded, of some across the plan."""
    chosen = np.unique(np.linspace(0, len(plan) - 1, _TRIED).astype(int))
    few = dataclasses.replace(plan, coords=plan.coords[chosen], tissue=plan.tissue[chosen])
    return any(batch.valid.any() for batch in read_tiles(few, workers=1))


def check_disk(out: Path, tiles: int, contract: Contract | None) -> Check:
    """Free space compared with what the embeddings need, finished and in progress."""
    try:
        check_folder(out)
    except OutputError as error:
        return Check("disk", BAD, str(error))
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    need = 2 * tiles * 4 * contract.tile_encoder.embed_dim if contract else 0
    detail = f"{free / 1e9:.1f} GB free in {place}, {need / 1e9:.1f} GB needed while slides are in progress"
    return Check("disk", GOOD if need <= free else BAD, detail)
