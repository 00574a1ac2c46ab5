"""Checks before a long run: server, contract, versions, disk and every slide's scale."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openslide

from gigapath_contract.schema import GRAPHS, MODELS, Contract

from ..errors import ClientError
from ..reading.stream import read_tiles
from ..scoring.score import SlideSource, TilingOptions, find_tissue, plan_slide
from ..slides.slide import open_slide
from ..slides.tiling import TilePlan, plan_tiles
from ..triton.connection import Connection
from ..triton.contract import read_contract
from ..triton.endpoint import Endpoint
from ..triton.statistics import available_statistics
from ..version import __version__
from .manifest import read_work_list

ALL_TILES = TilingOptions(tissue=False)
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


def check_all(endpoint: Endpoint, out: Path, source: Path | None, slides: Path | None) -> Iterator[Check]:
    """Run every check, also after one has failed, and yield each result at once.

    Args:
        endpoint: the servers.
        out: the output folder, for its free space.
        source: a slide, folder or manifest, or None; `slides` as in `read_work_list`.
    """
    yield check_versions()
    contract: Contract | None = None
    try:
        with Connection(endpoint) as connection:
            for server, version in connection.server_versions().items():
                yield Check(f"server {server}", GOOD, f"Triton {version}")
            contract = read_contract(connection)
            yield from check_contract(connection, contract)
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
            for slide in work_list.slides:
                check, most_tiles = check_slide(slide, contract)
                tiles += most_tiles
                yield check
    yield check_disk(out, tiles, contract)


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


def check_slide(source: SlideSource, contract: Contract | None) -> tuple[Check, int]:
    """Whether a slide can be planned and a tile of it decoded; also the most tiles it can have.

    A slide that fails has 0 tiles.
    """
    name = f"slide {source.slide_id}"
    try:
        with open_slide(source.path, source.mpp) as slide:
            plan = (
                plan_slide(slide, source.slide_id, None, contract, ALL_TILES)
                if contract
                else plan_tiles(slide, None)
            )
            tissue = find_tissue(slide, source, TilingOptions())
            size, mpp, where, notes = slide.dimensions, slide.mpp, slide.mpp_source, slide.notes
        decoded = _decodes(plan)
    except ClientError as error:
        return Check(name, BAD, str(error)), 0
    tiles = len(plan)
    detail = f"{size[0]} x {size[1]} px, mpp {mpp[0]:.4g} x {mpp[1]:.4g} ({where}), at most {tiles} tiles"
    if not decoded:
        return Check(name, BAD, f"{source.path}: none of {_TRIED} tiles could be decoded: copy it again"), 0
    if tissue is not None and not tissue.mask.any():
        notes = [*notes, "no tissue found"]
    if contract and tiles > contract.limits.max_tiles:
        notes = [*notes, f"the model takes {contract.limits.max_tiles}"]
    return Check(name, WARN if notes else GOOD, "; ".join([detail, *notes])), tiles


def _decodes(plan: TilePlan) -> bool:
    """Whether a tile can be decoded, of some across the plan."""
    chosen = np.unique(np.linspace(0, len(plan) - 1, _TRIED).astype(int))
    few = dataclasses.replace(plan, coords=plan.coords[chosen], tissue=plan.tissue[chosen])
    return any(batch.valid.any() for batch in read_tiles(few, workers=1))


def check_disk(out: Path, tiles: int, contract: Contract | None) -> Check:
    """Free space compared with the most that the embeddings need, finished and in progress."""
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    need = 2 * tiles * 4 * contract.tile_encoder.embed_dim if contract else 0
    detail = f"{free / 1e9:.1f} GB free in {place}, at most {need / 1e9:.1f} GB needed"
    return Check("disk", GOOD if need <= free else BAD, detail)
